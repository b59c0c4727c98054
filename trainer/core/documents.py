"""Reads JSON that somebody else wrote: limits on size and nesting, and values of the expected type.

A damaged or hostile file raises an error that names the file, the place in it and what was expected there; it does not
make the program hang, fill the memory, or fail where the value is used. `parse_json` and `decode` raise ValueError
with a reason that a caller puts behind the name of a line, a cell or a tag; `read_json`, `expect` and `entry` raise
errors.DataError with a complete message.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, overload

from trainer.core import errors, files

T = TypeVar("T")

MIB = 2**20
MAX_JSON = 512 * MIB
MAX_DEPTH = 100
"""Levels of lists and mappings inside each other."""
BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_json(path: Path, max_bytes: int = MAX_JSON) -> Any:
    """Returns the value in a JSON file, see `parse_json`.

    Raises errors.StorageError if it cannot be read, errors.DataError if it is not such a file.
    """
    data = read_bytes(path, max_bytes)
    try:
        return parse_json(data)
    except ValueError as error:
        raise errors.DataError(f"{path} is not valid JSON: {error}. Restore it, or move it away.") from None


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a file.

    Raises errors.DataError if it is larger than `max_bytes` or not a file, errors.StorageError if it cannot be read.
    """
    with files.storage_errors("read", path):
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
            return path.read_bytes()
    # Reading a pipe could take forever.
    size = f"is larger than {max_bytes // MIB} MiB" if stat.S_ISREG(status.st_mode) else "is not a file"
    raise errors.DataError(f"{path} {size}. Restore it, or move it away.")


def parse_json(
    data: bytes | str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None, any_text: bool = False
) -> Any:
    """Returns the value of a JSON document, text in UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    `pairs_hook` makes the value of an object from its pairs, like `object_pairs_hook` of json.loads; by default objects
    are dictionaries, in which no name may occur twice. NaN and infinity are accepted, see `expect`.

    Raises ValueError if it is no JSON, is nested too deeply or, unless `any_text` is set, holds text that is no
    Unicode.
    """
    text = data if isinstance(data, str) else decode(data)
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook or _unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _depth(value) > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if not any_text and re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it holds half of a surrogate pair, which is no Unicode character") from None
    return value


def decode(data: bytes) -> str:
    """Returns text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; the mark is removed. Raises ValueError."""
    encoding = next((encoding for bom, encoding in BOMS if data.startswith(bom)), "utf-8-sig")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        raise ValueError(f"it is not {name} text (byte {error.start + 1}: {error.reason})") from None


def split_lines(data: bytes) -> list[bytes]:
    """Returns the lines of a text as `decode` reads it, each in UTF-8, so that a faulty one does not hide the others.

    Raises ValueError if a text in UTF-16 or UTF-32 is damaged.
    """
    if any(data.startswith(bom) for bom, _ in BOMS):
        data = decode(data).encode()
    return data.removeprefix(codecs.BOM_UTF8).split(b"\n")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dictionary. Raises ValueError if a name occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object in it has the name {next(n for n in names if names.count(n) > 1)!r:.80} twice")
    return result


def _depth(value: Any) -> int:
    """Returns how many levels of containers are inside each other; stops counting above `MAX_DEPTH`."""
    level: list[Any] = [[value]]
    depth = -1
    while level and depth <= MAX_DEPTH:
        items = (item for container in level for item in _items(container))
        level, depth = [item for item in items if isinstance(item, dict | list | tuple)], depth + 1
    return depth


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


@overload
def expect(value: object, kind: type[T], where: str) -> T: ...
@overload
def expect(value: object, kind: UnionType, where: str) -> Any: ...
def expect(value: object, kind: Any, where: str) -> Any:
    """Returns `value` if it is of the type `kind`: `str`, `int`, `bool`, `list[str]`, `dict[str, float] | None`, ...

    A whole number is also accepted, and converted, where a float is expected; whole numbers have at most 64 bits, and
    floats are finite. `where` names the file and the place in it. Raises errors.DataError.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is UnionType:
        kinds = [option for option in arguments if _is_a(value, get_origin(option) or option)]
        if kinds:
            return expect(value, kinds[0], where)
    elif _is_a(value, origin):
        if origin is float:
            return float(value)  # type: ignore[arg-type]
        if arguments and isinstance(value, list):
            return [expect(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value)]
        if arguments and isinstance(value, dict):
            return {name: expect(item, arguments[1], f"{where}.{name}") for name, item in value.items()}
        return value
    raise errors.DataError(f"{where} must be {_name(kind)}, but is {_describe(value)}. Restore the file.")


_REQUIRED: Any = object()


def entry(mapping: Mapping[str, object], name: str, kind: type[T], where: str, default: T = _REQUIRED) -> T:
    """Returns the value of a name in a mapping, see `expect`; `default` if it has no such name.

    Raises errors.DataError.
    """
    if name not in mapping:
        if default is not _REQUIRED:
            return default
        raise errors.DataError(f"{where} has no {name}. Restore the file.")
    return expect(mapping[name], kind, f"{where}: {name}")


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if isinstance(value, float):
        return kind is float and math.isfinite(value)
    return kind in (int, float) and -(2**63) <= value < 2**64


_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object with names and values",
    NoneType: "null",
}


def _name(kind: Any) -> str:
    """Returns the name of a type for messages."""
    if get_origin(kind) is UnionType:
        return " or ".join(map(_name, get_args(kind)))
    return _NAMES[get_origin(kind) or kind]


def _describe(value: object) -> str:
    if value is None or isinstance(value, list | dict | bool):
        return str(value).lower() if isinstance(value, bool) else _NAMES[type(value)]
    return f"{value!r:.60}"
