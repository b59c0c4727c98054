"""What to type if this interpreter is too old, or if it lacks a package that the program needs.

This must run on interpreters and in environments that cannot run the rest of the program, so it uses old syntax and the
standard library only.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from trainer.core.errors import InstallationError

OLDEST_PYTHON = (3, 11)
"""The same version is in pyproject.toml."""
PROJECT = Path(__file__).resolve().parents[2]
"""The checkout, or the folder of installed packages."""


def check_python() -> None:
    """Checks the version of the interpreter.

    If it is too old, `python -m trainer` prints a message and exits, and `import trainer` raises ImportError.
    """
    if sys.version_info >= OLDEST_PYTHON:
        return
    message = "trainer needs Python {}.{} or newer, and {} is Python {}. {}".format(
        *OLDEST_PYTHON, sys.executable, ".".join(map(str, sys.version_info[:3])), _remedy()
    )
    # Python sets this while it looks for the module of `python -m`. An exception would be printed as a traceback.
    if sys.argv[:1] == ["-m"]:
        print(message, file=sys.stderr)
        sys.exit(InstallationError.code)
    raise ImportError(message)


def missing_package(error: ModuleNotFoundError) -> InstallationError | None:
    """Returns the error to report if a package is not installed; None if a module of this program is missing."""
    package = (error.name or "").partition(".")[0]
    # A package that is None in sys.modules is hidden from the libraries, see trainer.core.libraries.
    if package in ("", "trainer") or package in sys.modules:
        return None
    return InstallationError(
        f"The Python package {package}, which trainer needs, is not installed for the interpreter {sys.executable}. "
        f"{_remedy()}"
    )


def _remedy() -> str:
    """Returns what to type to get an environment with everything that the program needs."""
    if not (PROJECT / "pyproject.toml").is_file():
        return "Install trainer again with its dependencies, or run it with the interpreter that has them."
    install = f"pip install -c {_quote(PROJECT / 'constraints.txt')} -e {_quote(PROJECT)}"
    activate = PROJECT / ".venv" / "bin" / "activate"
    if not activate.is_file():
        return (
            f"Type make -C {_quote(PROJECT)} setup, which creates an environment, then . {_quote(activate)} (once per "
            f"terminal), and the command again. Or activate an environment of your own and type {install}"
        )
    if Path(sys.prefix).resolve() != activate.parents[1].resolve():
        return f"Type . {_quote(activate)} (once per terminal), and the command again with python."
    # The environment is active and incomplete.
    return f"Type {install}"


def _quote(path: Path) -> str:
    """Returns a path for a shell in the working directory."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if here == path or here in path.parents else path))
