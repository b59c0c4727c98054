"""Access tokens and passwords: told from other text, so that they are kept out of settings, logs and messages."""

from __future__ import annotations

import logging
import os
import re

FORM = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{12,})"
)
"""As Hugging Face, OpenAI and its likes, GitHub and Amazon make them."""
NAME = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
LEAST = 8
"""Characters below which a value of the environment stands in other text by chance."""


def known() -> list[str]:
    """The values of the environment that are secrets by the names of their variables, the longest first."""
    return sorted(
        (value for name, value in os.environ.items() if NAME.search(name) and len(value) >= LEAST),
        key=len,
        reverse=True,
    )


def inside(text: str) -> bool:
    """Whether the text holds one."""
    return bool(FORM.search(text)) or any(value in text for value in known())


def redacted(text: str) -> str:
    """The text with *** in place of each."""
    for value in known():
        text = text.replace(value, "***")
    return FORM.sub("***", text)


class RedactingFormatter(logging.Formatter):
    """A formatter of log lines without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))
