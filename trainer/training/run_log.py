"""The log of a run, and the messages about how it ended."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trainer.core import files, redaction
from trainer.core.console import LineHandler
from trainer.core.errors import Interrupted, TrainerError
from trainer.tracking.journal import Journal


@contextmanager
def log_to_folder(folder: Path, journal: Journal) -> Iterator[None]:
    """Inside the block, log messages go to `log.txt` in the folder, and warnings of this program to stderr too.

    So do Python's warnings, which therefore do not run into the progress bar.

    Warnings of this program go to the journal as well, where a sweep finds those of its members.

    If the block raises, the traceback goes to `log.txt` and the reason to the journal.
    """
    with files.storage_errors("open", folder / "log.txt"):
        descriptor = files.open_plain(folder / "log.txt", os.O_WRONLY | os.O_APPEND)
    log_file = open(descriptor, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (closed below)
    file_handler = logging.StreamHandler(log_file)
    file_handler.setFormatter(redaction.RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    stderr_handler = LineHandler()
    stderr_handler.setLevel(logging.WARNING)
    stderr_handler.setFormatter(redaction.RedactingFormatter("%(message)s"))
    root_logger, program_logger = logging.getLogger(), logging.getLogger("trainer")
    warnings_logger = logging.getLogger("py.warnings")
    show_warning = warnings.showwarning
    journal_handler = _JournalHandler(journal)
    root_logger.addHandler(file_handler)
    program_logger.addHandler(journal_handler)
    program_logger.addHandler(stderr_handler)
    program_logger.setLevel(logging.INFO)
    warnings_logger.addHandler(stderr_handler)
    warnings.showwarning = _log_warning
    try:
        yield
    except BaseException as error:
        kind = "stopped" if isinstance(error, Interrupted) else "failed"
        journal.log_event(kind, reason=redaction.redact(str(error)) or type(error).__name__)
        log_file.write(redaction.redact(traceback.format_exc()))
        if not isinstance(error, TrainerError | Interrupted | KeyboardInterrupt | SystemExit):
            error.add_note(f"log: {folder / 'log.txt'}")
        raise
    finally:
        warnings.showwarning = show_warning
        warnings_logger.removeHandler(stderr_handler)
        program_logger.removeHandler(stderr_handler)
        program_logger.removeHandler(journal_handler)
        root_logger.removeHandler(file_handler)
        file_handler.close()
        log_file.close()


class _JournalHandler(logging.Handler):
    """Writes warnings to the journal, from the process that has opened it."""

    def __init__(self, journal: Journal):
        super().__init__(logging.WARNING)
        self._journal, self._process = journal, os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() != self._process:
            return  # a loader worker
        try:
            self._journal.log_event("warning", text=redaction.redact(record.getMessage()))
        except Exception:
            self.handleError(record)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Replaces `warnings.showwarning`."""
    text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    logging.getLogger("py.warnings").warning("%s", text)
