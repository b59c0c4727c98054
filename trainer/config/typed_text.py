"""Keeps the characters of text in overrides: `name=1.10` is the text 1.10, which Hydra would turn into 1.1."""

from __future__ import annotations

from typing import Any

from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_parser import OverrideLexer, OverrideParser, create_functions
from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor
from hydra.core.override_parser.types import QuotedString

from trainer.config.fields import is_text
from trainer.core.errors import UsageError


def keep_text(text: str) -> str:
    """Returns an override that Hydra can parse with quotes around numbers and booleans in the place of text.

    Values that Hydra converts back to the same characters are left as they are. Works for several values of a sweep,
    for lists and for dictionaries. Raises errors.UsageError for a key of a dictionary that would be changed, because
    Hydra's grammar has no quotes there.
    """
    parser = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(text))))
    visitor = _Visitor()
    visitor.visit(parser.override())
    for start, end in reversed(visitor.changed):
        text = f"{text[:start]}'{text[start:end].strip()}'{text[end:]}"
    return text


class _Visitor(HydraOverrideVisitor):
    """Finds the places in an override whose characters Hydra would change although the setting is text."""

    def __init__(self) -> None:
        super().__init__(create_functions())
        self.changed: list[tuple[int, int]] = []
        self._key: list[str] = []

    def visitKey(self, ctx: Any) -> Any:
        key = super().visitKey(ctx)
        self._key = [key.key_or_group]
        return key

    def visitDictKeyValuePair(self, ctx: Any) -> Any:
        typed = ctx.getChild(0).getText().strip()
        key = self.visitDictKey(ctx.getChild(0))
        if not isinstance(key, str) and str(key) != typed:
            raise UsageError(
                f"{'.'.join(self._key)}: the key {typed} would become {key}; type "
                f"{'.'.join([*self._key, typed])}=VALUE, or use a yaml file with --config-dir"
            )
        self._key.append(str(key))
        pair = super().visitDictKeyValuePair(ctx)
        self._key.pop()
        return pair

    def visitFunction(self, ctx: Any) -> Any:
        count = len(self.changed)
        value = super().visitFunction(ctx)
        if ctx.getChild(0).getText() not in ("choice", "shuffle"):
            # The arguments of the others, such as range(1,10), are numbers.
            del self.changed[count:]
        return value

    def visitPrimitive(self, ctx: Any) -> Any:
        value = super().visitPrimitive(ctx)
        typed = ctx.getText().strip()
        is_number = value is not None and not isinstance(value, str | QuotedString)
        if is_number and str(value) != typed and is_text(".".join(self._key)):
            # The spaces around it must not be left outside the quotes.
            self.changed.append((ctx.start.start, ctx.stop.stop + 1))
        return value
