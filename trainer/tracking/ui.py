"""`python -m trainer ui` serves the MLflow UI for the runs in a folder and prints a link to them."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from trainer.core import errors
from trainer.tracking.mlflow import MLflow
from trainer.tracking.mlflow_internals import SERVER_ENVIRONMENT, runs_url
from trainer.tracking.mlflow_store import HOST, PORT, connect, missing_store, resolve_uri


def main(arguments: list[str] | None = None) -> int:
    """Serves the UI until Ctrl-C and returns 0, or until the server exits by itself and returns its exit code.

    `arguments` are those after `python -m trainer ui`. Raises errors.TrainerError.
    """
    options = _parser().parse_args(arguments)
    try:
        settings = MLflow(experiment=options.experiment, uri=options.uri)
        uri = resolve_uri(settings.uri, options.out)
        _check_store(uri, options)
        _, experiment_id = connect(uri, settings.experiment)
    except (errors.TrainerError, ModuleNotFoundError):
        raise
    except Exception as error:  # errors of MLflow and SQLAlchemy have no common base class
        raise errors.StorageError(f"The MLflow store at {uri} could not be opened: {error}") from error
    if uri.startswith("http"):
        print(f"MLflow UI: {runs_url(uri, experiment_id)}")
        return 0
    # SIGTERM must end the server too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.suppress(KeyboardInterrupt):
        return _serve_until_exit(uri, options.out, free_port(options.port), experiment_id)
    return 0


def _check_store(uri: str, options: argparse.Namespace) -> None:
    """Refuses a mistyped folder, database or experiment, which `connect` would create. Raises errors.UsageError."""
    reason = missing_store(uri, options.experiment)
    if reason is None:
        return
    typed = f"--uri {options.uri}" if options.uri else f"--out {options.out}"
    if options.uri is None and not options.out.is_dir():
        reason = "there is no such folder"
    raise errors.UsageError(
        f"ui: {typed}: {reason}; type the folder, tracking.uri and tracking.experiment of your runs, for example "
        "python -m trainer ui --out runs."
    )


def _parser() -> argparse.ArgumentParser:
    def refuse(message: str) -> NoReturn:
        raise errors.UsageError(
            f"ui: {message}; type for example python -m trainer ui --out FOLDER (ui --help lists the options)."
        )

    parser = argparse.ArgumentParser(
        prog="python -m trainer ui", description="Serve the MLflow UI for the runs in a folder."
    )
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--uri", help="tracking.uri of the runs (default: sqlite:///<out>/mlflow.db)")
    parser.add_argument("--experiment", default="trainer", help="tracking.experiment to open (default: trainer)")
    parser.add_argument("--port", type=int, default=PORT, help=f"first port to try (default: {PORT})")
    return parser


def _serve_until_exit(uri: str, out: Path, port: int, experiment_id: str) -> int:
    address = f"http://{HOST}:{port}"
    with tempfile.TemporaryFile() as output, serving(uri, address, out, output) as server:
        while server.poll() is None and not answers(address):
            time.sleep(0.1)
        if server.poll() is None:
            print(f"MLflow UI: {runs_url(address, experiment_id)} (Ctrl-C ends it)", flush=True)
        code = server.wait()
        output.seek(0)
        text = output.read()[-4000:].decode(errors="replace")
        print(f"The MLflow server exited unexpectedly:\n{text}", file=sys.stderr)
        return code or errors.StorageError.code


@contextlib.contextmanager
def serving(uri: str, address: str, out: Path, output: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """Runs an MLflow server for the store at `uri`, and ends it with all its child processes when the context exits.

    The server listens at `address` and writes its log to `output`.
    """
    artifacts = str((out / "mlartifacts").resolve())
    host, port = address.removeprefix("http://").split(":")
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", port, "--workers", "1"]
    command += ["--backend-store-uri", uri, "--default-artifact-root", artifacts, "--artifacts-destination", artifacts]
    # In a new session only this process gets Ctrl-C, and it ends the server and its workers as one process group.
    server = subprocess.Popen(
        command,
        env={**os.environ, **SERVER_ENVIRONMENT},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    try:
        yield server
    finally:
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=5)


def free_port(first: int) -> int:
    """Returns the first port from `first` on that no process on this machine listens on."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError, OverflowError):
                probe.bind((HOST, port))
                return port
    raise errors.UsageError(f"No port from {first} to {first + 99} is free; type --port NUMBER, up to 65535.")


def answers(address: str) -> bool:
    """Returns whether an MLflow server at `address` is ready."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
        return answer.status == 200
    return False


if __name__ == "__main__":
    # `python -m trainer.tracking.ui` was the command before `python -m trainer ui`.
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(0)
    except errors.TrainerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
