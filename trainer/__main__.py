"""The door: compose a typed run from the command line, execute its stage, return an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stderr
from typing import TYPE_CHECKING

from trainer import __version__
from trainer.core import redaction
from trainer.core.errors import FollowerExit, Interrupted, StorageError, TrainerError, UsageError
from trainer.core.ranks import rank_and_world_size
from trainer.core.signals import Signals
from trainer.distributed.processes import owns_stderr

if TYPE_CHECKING:
    from omegaconf import DictConfig

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""A disk that takes no more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's); 0 when done, else the code of errors."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with Signals() as signals, ExitStack() as composing:
            # Hydra and OmegaConf lose an exception that comes from outside in the midst of their clean-up, or turn it into another.
            composing.enter_context(signals.deferred())
            code = compose(arguments, signals, composing.close)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except FollowerExit as ending:
        return ending.code
    except (TrainerError, Interrupted) as ending:
        complain(str(ending))
        return ending.code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            return 128 + signal.SIGPIPE
        if error.errno in FULL:
            complain(f"{error}: make room or choose another place with out=FOLDER, and type the same command again")
            return StorageError.code
        return unexpected(error)
    except Exception as error:
        return unexpected(error)


def compose(arguments: list[str], signals: Signals, begin: Callable[[], None]) -> int:
    """Let Hydra read the command line and run the job, once or as a sweep; `begin` is called when the job begins."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from trainer.config import command_line
    from trainer.config.compose import register, to_run
    from trainer.config.groups import CONF
    from trainer.config.help import help_text
    from trainer.config.hydra_errors import usage_errors

    register()
    # Otherwise Hydra prints and exits by itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # A log that cannot be written is no reason for tracebacks on the terminal.
    logging.raiseExceptions = False
    failures: list[Exception] = []
    code: int | str | None = None

    def job(composed: DictConfig) -> float | None:
        from trainer import run
        from trainer.training import run_folder

        # As they were typed: what ${...} stands for is a matter of the setting it is in.
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        try:
            with usage_errors(asked):
                typed = to_run(composed, overrides, run_folder.find)
            begin()
            return run.execute(typed, signals, overrides)
        except Exception as error:
            # Told below: Hydra would announce it in words of its own.
            failures.append(error)
            raise SystemExit from None

    # A launcher of sweeps has nothing else of ours; it lets signals come when its members begin.
    job.begin = begin
    if "--version" in arguments:
        print(f"trainer {__version__} (Hydra {hydra.__version__})")
        return 0
    asked = command_line.parse(arguments)
    if asked.multirun and rank_and_world_size()[1] > 1:
        raise UsageError(
            "A sweep starts its members itself: type python -m trainer --multirun without accelerate launch."
        )
    with usage_errors(asked):
        if asked.help:
            print(help_text(asked))
            return 0
        if asked.shell_completion and not command_line.is_safe_to_complete(os.environ.get("COMP_LINE", "")):
            return 0
        before, sys.argv = sys.argv, ["trainer", *asked.flags, *asked.overrides]
        # While the tab key is pressed, complaints would only garble the terminal.
        quiet = redirect_stderr(io.StringIO()) if asked.shell_completion else nullcontext()
        try:
            with quiet:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv = before
    if failures:
        raise failures[0]
    # Hydra exits where it has said itself what is wrong.
    return UsageError.code if code else 0


def unexpected(error: Exception) -> int:
    """A fault of the program: one paragraph; the traceback is in the run's log, or in a file of its own where there is no run yet."""
    import tempfile
    import traceback

    log = next(
        (note.removeprefix("log: ") for note in getattr(error, "__notes__", ()) if note.startswith("log: ")), None
    )
    where = f"the traceback is in {log}"
    if log is None:
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="trainer-", suffix=".log", delete=False, errors="backslashreplace"
            ) as file:
                file.write(redaction.redact("".join(traceback.format_exception(error))))
            where = f"the traceback is in {file.name}"
        except OSError as reason:
            where = f"its traceback could not be written ({reason})"
    complain(
        f"The program failed with {type(error).__name__}: {' '.join(str(error).split())}. This is a fault of the program; {where}"
    )
    return 1


def complain(text: str) -> None:
    """Say why the run ends; of several processes one does."""
    if owns_stderr():
        rank, count = rank_and_world_size()
        speaker = f"process {rank} of 0 to {count - 1}: " if rank else ""
        print(redaction.redact(f"{speaker}{text}"), file=sys.stderr, flush=True)


def reader_left() -> bool:
    """Whether nobody reads our output any more (`| head`); Python is then kept from complaining of it at exit."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    left = any(event & select.POLLERR for _, event in output.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def script() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    script()
