"""The door: compose a typed run from the command line, execute its stage, return an exit code."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import Ending, Usage
from trainer.signals import Signals

# Inside the package in an installed wheel, beside it in a checkout.
CONF = next(folder / "conf" for folder in (Path(__file__).parent, Path(__file__).parents[1]) if (folder / "conf").is_dir())
# Hydra instantiates these before any rule of ours runs; `+hydra.callbacks.x._target_=os.mkdir` would make a folder.
HOSTILE = re.compile(r"_target_|^[+~]*hydra[./@](callbacks|job_logging|hydra_logging)|^[+~]*hydra=")
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's); the exit code of FAULTS: 0 done, 64 usage, 65 data, ..."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with Signals() as signals:
            guard(arguments)
            return compose(arguments, signals)
    except Ending as ending:
        print(f"{ending}", file=sys.stderr, flush=True)
        return ending.code
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - a fault of the program itself
        return unexpected(error)


def guard(arguments: Sequence[str]) -> None:
    """Refuse what must not reach Hydra."""
    for argument in arguments:
        if SECRET.search(argument):
            # The argument is not repeated: it would end up in the terminal's log.
            raise Usage(
                "An argument looks like an access token. Command lines end up in logs: set it in the environment instead, such as HF_TOKEN."
            )
        if HOSTILE.search(argument):
            raise Usage(f"{argument.split('=')[0]}: what Hydra itself loads cannot be set from the command line; leave it out.")


def compose(arguments: list[str], signals: Signals) -> int:
    """Let Hydra read the command line and run the job, once or as a sweep."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from trainer import config

    config.register()
    # Otherwise Hydra prints and exits by itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    def job(composed) -> float | None:
        from trainer import run

        overrides = list(HydraConfig.get().overrides.task)
        return run.execute(config.typed(composed), signals, overrides)

    before, sys.argv = sys.argv, ["trainer", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise Usage(explain(error, arguments)) from error
    finally:
        sys.argv = before
    return 0


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """One line for what Hydra or OmegaConf refused: the options there are, or the key that was meant."""
    text = str(error)
    chain = f"{text}\n{error.__cause__ or ''}"
    if found := re.search(r"Could not find '([\w/]+)/([^']*)'\s+Available options in '[^']*':\s+(.*)", text, re.DOTALL):
        options = [line.strip() for line in found[3].splitlines() if line.strip()]
        return f"{found[1]}={found[2]}: there is no such option; type one of {', '.join(options)}."
    if found := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        return (
            f"{found[1]}: there is no such group; type one of {', '.join(sorted(path.name for path in CONF.iterdir() if path.is_dir()))}."
        )
    if found := re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)", chain):
        key = re.search(r"full_key: ([\w.]+)", chain)
        wrong = key[1] if key else found[1]
        near = difflib.get_close_matches(wrong, known_keys(arguments), 1, 0.5)
        return f"{wrong}: there is no such setting" + (
            f"; did you mean {near[0]}?" if near else "; `python -m trainer --cfg job` lists all."
        )
    if found := re.search(r"(?s)(.*?)\s*full_key: ([\w.]+)", chain):
        return f"{found[2]}: {' '.join(found[1].split())}."
    return " ".join(text.split())


def known_keys(arguments: Sequence[str]) -> list[str]:
    """Every dotted key of the configuration that the group choices among the arguments compose."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from trainer import config

    groups = [a for a in arguments if re.fullmatch(r"(\w+)=\w+", a) and (CONF / a.split("=")[0] / f"{a.split('=')[1]}.yaml").exists()]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return list(config.keys(compose("config", overrides=groups)))


def unexpected(error: Exception) -> int:
    """A fault of the program: one paragraph; the traceback is in the run's log, or here where there is no run yet."""
    import traceback

    log = next((note.removeprefix("log: ") for note in getattr(error, "__notes__", ()) if note.startswith("log: ")), None)
    if log is None:
        traceback.print_exception(error)
    where = f"the traceback is in {log}" if log else "the traceback is above"
    print(f"The program failed with {type(error).__name__}: {error}. This is a fault of the program; {where}.", file=sys.stderr)
    return 1


def script() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    script()
