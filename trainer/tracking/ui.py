"""`python -m trainer.tracking.ui`: the MLflow UI on this machine for the runs under a folder, with a link that lands on them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlencode

from trainer.tracking import view

HOST = "127.0.0.1"
PORT = 5000


def runs_link(base_url: str, experiment_id: str) -> str:
    """The runs of an experiment with their losses. Without the workflow type MLflow opens an empty page for chat applications."""
    return f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={view.RUNS}"


def run_link(base_url: str, experiment_id: str, run_id: str) -> str:
    """The page of one run."""
    return f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def children_link(base_url: str, experiment_id: str, run_id: str) -> str:
    """The runs under one, as `view.children` has it: their curves and pictures beside each other; MLflow's own button turns to the table."""
    query = f"workflowType=machine_learning&viewStateShareKey={run_id}&compareRunsMode=CHART"
    return f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"


def compare_link(base_url: str, experiment_id: str, run_ids: list[str]) -> str:
    """The page that compares these runs."""
    query = {
        "runs": json.dumps(run_ids),
        "experiments": json.dumps([experiment_id]),
        "workflowType": "machine_learning",
    }
    return f"{base_url.rstrip('/')}/#/compare-runs?{urlencode(query, quote_via=quote)}"


def main(arguments: list[str] | None = None) -> int:
    """Serve the UI until Ctrl-C (returns 0) or until the server ends by itself (returns its code)."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.tracking.ui", description="Open the MLflow UI on the runs under a folder."
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the folder of the runs (default: runs)")
    parser.add_argument(
        "--uri", help="the tracking.uri of the runs, where it is not the default (sqlite:///<out>/mlflow.db)"
    )
    parser.add_argument("--experiment", default="trainer", help="the tracking.experiment to open (default: trainer)")
    parser.add_argument("--port", type=int, default=PORT, help=f"the first port to try (default: {PORT})")
    options = parser.parse_args(arguments)

    from trainer.core import errors
    from trainer.tracking import MLflow, sink

    try:
        settings = MLflow(experiment=options.experiment, uri=options.uri)
        uri = sink.address(settings.uri, options.out)
        _, experiment_id = sink.connect(uri, settings.experiment)
    except errors.TrainerError as ending:
        print(ending, file=sys.stderr)
        return ending.code
    except Exception as error:  # MLflow's and SQLAlchemy's errors have no common class; the user needs the line
        print(f"The MLflow store at {uri} could not be opened: {error}", file=sys.stderr)
        return errors.StorageError.code
    if uri.startswith("http"):
        print(f"MLflow UI: {runs_link(uri, experiment_id)}")
        return 0

    base = f"http://{HOST}:{free_port(options.port)}"
    # A terminated process must take its server along as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (
        tempfile.TemporaryFile() as output,
        contextlib.suppress(KeyboardInterrupt),
        serving(uri, base, options.out, output) as server,
    ):
        while server.poll() is None and not _answers(base):
            time.sleep(0.1)
        if server.poll() is None:
            print(f"MLflow UI: {runs_link(base, experiment_id)} (Ctrl-C ends it)", flush=True)
        code = server.wait()
        output.seek(0)
        print(f"The MLflow server ended by itself:\n{output.read()[-4000:].decode(errors='replace')}", file=sys.stderr)
        return code or errors.StorageError.code
    return 0


@contextlib.contextmanager
def serving(uri: str, base_url: str, out: Path, output: object):
    """An MLflow server process for the store at `uri`, ended with all its children at the end of the context."""
    artifacts = (out / "mlartifacts").resolve()
    host, port = base_url.removeprefix("http://").split(":")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        host,
        "--port",
        port,
        "--workers",
        "1",
    ]
    command += ["--default-artifact-root", str(artifacts), "--artifacts-destination", str(artifacts)]
    # Jobs are for evaluating chat applications: without them the server starts in a quarter of the time and memory.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # A session of its own, so that Ctrl-C reaches this process alone and the server with its workers is ended as one group.
    server = subprocess.Popen(
        command,
        env=environment,
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
    """The first port from `first` on that nobody on this machine listens on."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise OSError(f"no free port from {first} to {first + 99}")


def _answers(base_url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{base_url}/health", timeout=2) as answer:
        return answer.status == 200
    return False


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # while MLflow is imported, which takes seconds
        sys.exit(main())
