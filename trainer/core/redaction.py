"""Detects access tokens and passwords in text, to keep them out of settings, logs and messages."""

from __future__ import annotations

import logging
import os
import re

TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{12,})"
)
"""Access tokens of Hugging Face, OpenAI (and similar services), GitHub and Amazon."""
SECRET_VARIABLE = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
"""Names of environment variables whose values are secret."""
_URL_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")
MIN_LENGTH = 8
"""Shorter values of such variables are ignored, because they occur in other text by chance."""


def secrets_in_environment() -> list[str]:
    """Returns the values of environment variables whose names mark them as secret, longest first."""
    return sorted(
        (value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= MIN_LENGTH),
        key=len,
        reverse=True,
    )


def contains_secret(text: str) -> bool:
    """Returns whether the text contains an access token or a secret of the environment."""
    return bool(TOKEN.search(text)) or any(secret in text for secret in secrets_in_environment())


def redact(text: str) -> str:
    """Returns the text with every secret, and every password in an address, replaced by `***`."""
    for secret in secrets_in_environment():
        text = text.replace(secret, "***")
    return _URL_PASSWORD.sub(r"\1***@", TOKEN.sub("***", text))


class RedactingFormatter(logging.Formatter):
    """A log formatter that removes secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
