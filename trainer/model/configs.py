"""What the configs of a checkpoint may say.

A class of diffusers follows the arguments of its constructor, and transformers follows its own configs. Whatever else
a config says is either followed by the family, or has no effect here for a reason that is written down, or is refused:
nothing that a checkpoint says is ignored silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core import documents
from trainer.core.errors import DataError
from trainer.model.checkpoint_files import is_plain_name

METADATA = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"})
"""Keys about the file itself. Nothing is read from the place that `_name_or_path` names."""
FILE_KEYS = ("fast_tokenizer_files", "merges_file", "tokenizer_file", "vocab_file")
"""Keys of a tokenizer's config that name files."""


@dataclass(frozen=True, slots=True)
class ConfigRules:
    """What the config of one component may say."""

    class_name: str
    """The class that reads it. If diffusers has it, its constructor names the keys that it follows."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """The values that are followed of keys whose other values are not."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """Keys that the class does not know, and why they may be ignored."""
    model_type: str | None = None
    """For classes of transformers: the type of model in their configs."""


def refuse(path: Path, key: str, value: Any, reason: str = "this program does not know it") -> DataError:
    """Returns the error about a key that is not followed."""
    return DataError(
        f"{path} says {key}={value!r:.80}, which would be ignored: {reason}. Type a different model.path; or, if the "
        f"model does not need it, the path of a copy whose file lacks {key}"
    )


def class_defaults(name: str) -> dict[str, Any]:
    """Returns argument -> default of the constructor of a diffusers class. Raises AttributeError if there is none."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "self"}


def check_checkpoint(
    folders: Mapping[str, Path], rules: Mapping[str, ConfigRules], index: Path, index_keys: Mapping[str, str]
) -> None:
    """Checks the configs of a checkpoint. Raises errors.DataError for a key, value or reference that is not followed.

    `folders` maps each component to its folder, `index` is diffusers' `model_index.json`, which may be absent, and
    `index_keys` maps its keys besides the components to what becomes of them.
    """
    for name, folder in folders.items():
        check_references(folder, {path: documents.read_json(path) for path in sorted(folder.glob("*config.json"))})
        if name in rules:
            path = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
            check_model_config(path, documents.expect(documents.read_json(path), dict, f"{path}"), rules[name])
    if not index.is_file():
        return
    content = documents.expect(documents.read_json(index), dict, f"{index}")
    for key, value in content.items():
        library = value[0] if isinstance(value, list) and value else None
        if key in folders and library not in (None, "diffusers", "transformers"):
            raise DataError(
                f"{index}: the {key} is of {library!r:.80}, and this program never runs the code of a checkpoint; "
                "type a different model.path"
            )
    options = {key: value for key, value in content.items() if not isinstance(value, list)}
    check_known_keys(index, options, set(index_keys))


def check_model_config(path: Path, config: Mapping[str, Any], rules: ConfigRules) -> None:
    """Checks the config of a model. Raises errors.DataError for a key or value that is not followed.

    transformers follows its own configs; only what diffusers' pipelines read in them is checked.
    """
    if rules.model_type is not None:
        check_class(path, config.get("model_type", rules.model_type), (rules.model_type,))
        if config.get("use_attention_mask"):
            raise refuse(path, "use_attention_mask", True, "the text encoder also attends to padding here")
        return
    check_class(path, config.get("_class_name", rules.class_name), (rules.class_name,))
    defaults = class_defaults(rules.class_name)
    check_known_keys(path, config, {*defaults, *rules.unused, "quantization_config"})
    for key, accepted in rules.only.items():
        value = config.get(key, defaults.get(key))
        if value not in accepted:
            expected = " or ".join(map(repr, accepted))
            raise refuse(path, key, value, f"this model is trained with {expected}")


def check_known_keys(path: Path, config: Mapping[str, Any], known: set[str] | frozenset[str]) -> None:
    """Raises errors.DataError for a key that is not known, unless it is switched off: null or false."""
    for key, value in config.items():
        if key not in known | METADATA and value is not None and value is not False:
            raise refuse(path, key, value)


def check_class(path: Path, found: str, accepted: tuple[str, ...]) -> None:
    """Raises errors.DataError if a config belongs to another class than the one that reads it."""
    if found not in accepted:
        raise DataError(
            f"{path} belongs to {found!r:.80}, but this model reads it as {' or '.join(accepted)}; "
            "type a different model.path or a different model"
        )


def check_references(folder: Path, configs: Mapping[Path, Any]) -> None:
    """Checks that the configs in the folder of a component name neither code nor files outside of it.

    `configs` maps paths to contents. Raises errors.DataError.
    """
    for path, config in configs.items():
        if not isinstance(config, dict):
            continue
        if config.get("auto_map"):
            raise DataError(
                f"{path} names Python code of its own (auto_map), and this program never runs the code of a "
                "checkpoint. If transformers has the class itself, delete auto_map from a copy of the file; else type "
                "a different model.path"
            )
        for key in FILE_KEYS:
            names = config.get(key) or []
            for name in names if isinstance(names, list) else [names]:
                if not isinstance(name, str) or not is_plain_name(name.removeprefix("./")):
                    raise DataError(
                        f"{path}: {key} names {name!r:.80}, which is not a file in {folder}. Put the file there and "
                        "name it without a folder"
                    )
