"""The text that a history and a style make: a template with fields in braces."""

from __future__ import annotations

import string
from collections.abc import Mapping

from trainer.core.errors import UsageError

FIELDS = ("history", "style", "target", "user")


def check(template: str) -> None:
    """Raises errors.UsageError where a template asks for what a sample does not have."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(
            f"dataset.template={template!r}: {error}; type text with {{history}} and {{style}} in it"
        ) from None
    known = ", ".join(f"{{{name}}}" for name in FIELDS)
    for _, name, form, conversion in parts:
        if name is not None and (name not in FIELDS or form or conversion):
            raise UsageError(f"dataset.template has {{{name}}}, and a sample has only {known}")


def load_weights(template: str, values: Mapping[str, str]) -> str:
    """The template with the values of its fields."""
    return template.format_map(values)
