"""State dictionaries of optimizers as JSON and tensors, which can be saved without pickle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def split_tensors(state: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Returns a state dictionary as a JSON value and the tensors that it refers to by their dotted paths.

    `join_tensors` restores everything, including the types of containers and keys. Raises TypeError if the state holds
    other things than tensors, numbers, texts and containers.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(state, "", tensors), tensors


def join_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns the state dictionary that `split_tensors` has split."""
    if isinstance(value, list):
        return [join_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(join_tensors(item, tensors) for item in content)
    return {key: join_tensors(item, tensors) for key, item in content}


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Converts `value` to JSON, and moves its tensors to `tensors` under their dotted paths."""
    from torch import Tensor

    def child_name(key: object) -> str:
        return f"{name}.{key}" if name else str(key)

    if isinstance(value, Tensor):
        while name in tensors:  # {"a.b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(type(key) in (int, str) for key in value):
            raise TypeError(f"the optimizer state has keys that JSON cannot represent, in {name!r}")
        return {"dict": [[key, _pack(item, child_name(key), tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, child_name(index), tensors) for index, item in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(item, child_name(index), tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the optimizer state has a {type(value).__name__} at {name!r}, which is neither a tensor nor JSON")
