"""Entry point: composes a run from the command line, executes its stage and returns an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stderr, suppress
from typing import TYPE_CHECKING

from trainer.core import garbage, redaction
from trainer.core.errors import FollowerExit, Interrupted, TrainerError, UsageError
from trainer.core.files import full_disk_errors
from trainer.core.installation import missing_package
from trainer.core.libraries import hidden_scipy
from trainer.core.ranks import rank_and_world_size
from trainer.core.signals import Signals
from trainer.core.version import __version__
from trainer.distributed.processes import owns_stderr
from trainer.sweep.members import end_with_sweep

if TYPE_CHECKING:
    from argparse import Namespace

    from omegaconf import DictConfig

    Job = Callable[[DictConfig], float | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of this process.

    Returns 0, or the exit code of the error (see trainer.core.errors).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    end_with_sweep()
    try:
        if arguments[:1] == ["ui"]:
            return serve_ui(arguments[1:])
        with full_disk_errors(), Signals() as signals, ExitStack() as deferral:
            # Hydra and OmegaConf may lose or change an exception that a signal raises inside them.
            deferral.enter_context(signals.deferred())
            code = run_command(arguments, signals, deliver_signals=deferral.close)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except FollowerExit as error:
        return error.code
    except (TrainerError, Interrupted) as error:
        print_error(str(error))
        return error.code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            return 128 + signal.SIGPIPE
        if error.errno == errno.ENAMETOOLONG:
            print_error(f"{error.filename}: the name is too long for the file system; type a shorter one.")
            return UsageError.code
        return report_bug(error)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (reason := missing_package(error)):
            print_error(str(reason))
            return reason.code
        return report_bug(error)


def serve_ui(arguments: list[str]) -> int:
    """Runs `python -m trainer ui` with these arguments. Returns the exit code."""
    try:
        # Importing MLflow takes seconds, in which Ctrl-C ends the program, too.
        from trainer.tracking import ui

        return ui.main(arguments)
    except KeyboardInterrupt:
        return 0


def run_command(arguments: list[str], signals: Signals, deliver_signals: Callable[[], None]) -> int:
    """Parses the command line, and executes a run or lets Hydra do anything else: a sweep, --cfg, completion.

    `deliver_signals` ends the deferral of signals. It is called once Hydra has composed the configuration.
    """
    import hydra

    from trainer.config import command_line
    from trainer.config.compose import register
    from trainer.config.help import help_text
    from trainer.config.hydra_errors import usage_errors
    from trainer.config.request import check_sweep, requested_run
    from trainer.training.run_folder import find_run_folder

    if "--version" in arguments:
        print(f"trainer {__version__} (Hydra {hydra.__version__})")
        return 0
    register()
    # If a log cannot be written, `logging` would print a traceback for each message.
    logging.raiseExceptions = False
    args = command_line.parse(arguments)
    failures: list[Exception] = []
    with usage_errors(args):
        if args.help:
            print(help_text(args))
            return 0
        if args.shell_completion and not command_line.is_safe_to_complete(os.environ.get("COMP_LINE", "")):
            return 0
    if not (args.cfg or args.info or args.hydra_help or args.shell_completion):
        if request := requested_run(args, find_run_folder):
            deliver_signals()
            with hidden_scipy():
                from trainer.run import execute

                execute(request.run, signals, request.overrides)
            return 0
        if rank_and_world_size()[1] > 1:
            raise UsageError(
                "A sweep starts its members itself: type python -m trainer --multirun without accelerate launch."
            )
        check_sweep(args)
    with usage_errors(args):
        code = run_hydra(make_job(args, signals, deliver_signals, failures), args)
    if failures:
        raise failures[0]
    return code


def make_job(args: Namespace, signals: Signals, deliver_signals: Callable[[], None], failures: list[Exception]) -> Job:
    """Returns the function for a sweep whose launcher runs the members in this process, such as Hydra's basic one.

    It appends its errors to `failures`.
    """
    from trainer.config.request import to_request
    from trainer.training.run_folder import find_run_folder

    def job(config: DictConfig) -> float | None:
        from trainer.run import execute
        from trainer.stages.results import held_out_loss

        try:
            request = to_request(config, args, find_run_folder)
            deliver_signals()
            return held_out_loss(execute(request.run, signals, request.overrides))
        except Exception as error:
            # Hydra would print a message of its own for any exception but SystemExit.
            failures.append(error)
            raise SystemExit from None

    # The launcher of sweeps calls this when the members start. It has access to nothing but this function.
    job.deliver_signals = deliver_signals  # type: ignore[attr-defined]
    return job


def run_hydra(job: Job, args: Namespace) -> int:
    """Calls Hydra with a parsed command line. Returns the exit code."""
    import hydra

    from trainer.config.compose import search_path
    from trainer.config.groups import CONF

    # Makes Hydra raise errors. By default it prints them and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    added = [] if args.shell_completion else search_path(args.config_dir)
    # Hydra parses sys.argv.
    argv, sys.argv = sys.argv, ["trainer", *args.flags, *args.overrides, *added]
    # Error messages would clutter the terminal during tab completion.
    stderr = redirect_stderr(io.StringIO()) if args.shell_completion else nullcontext()
    try:
        with stderr:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except SystemExit as stop:
        # Hydra exits with a code if it has printed an error itself.
        return UsageError.code if stop.code else 0
    finally:
        sys.argv = argv
    return 0


def report_bug(error: Exception) -> int:
    """Prints one paragraph about an unexpected error. The traceback goes to the run's log, or to a temporary file."""
    import tempfile
    import traceback

    notes = getattr(error, "__notes__", ())
    log = next((note.removeprefix("log: ") for note in notes if note.startswith("log: ")), None)
    traceback_place = f"the traceback is in {log}"
    if log is None:
        text = redaction.redact("".join(traceback.format_exception(error)))
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="trainer-", suffix=".log", delete=False, errors="backslashreplace"
            ) as file:
                file.write(text)
            traceback_place = f"the traceback is in {file.name}"
        except OSError as reason:
            traceback_place = f"its traceback could not be written ({reason})"
    message = " ".join(str(error).split())
    print_error(
        f"The program failed with {type(error).__name__}: {message}. This is a bug in the program; {traceback_place}"
    )
    return 1


def print_error(text: str) -> None:
    """Prints a message on stderr, without secrets. If there are several processes, only one of them prints."""
    if owns_stderr():
        rank, world_size = rank_and_world_size()
        prefix = f"process {rank} of 0 to {world_size - 1}: " if rank else ""
        print(redaction.redact(f"{prefix}{text}"), file=sys.stderr, flush=True)


def stdout_is_closed() -> bool:
    """Returns whether the reader of stdout has exited (`| head`).

    If so, discards further output, which would make Python fail at exit.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def script() -> None:
    """The console script `trainer`."""
    garbage.collect_seldom()
    code = main()
    garbage.skip_last_collection()
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        # Everything is saved and closed. A signal that interrupted an import may have left a lock behind, for which
        # functions that run at exit could wait.
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    script()
