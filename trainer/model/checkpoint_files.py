"""The files of a checkpoint: where they are, their digests, and copies of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import documents, files
from trainer.core.errors import DataError, StorageError, WeightsError
from trainer.core.hub import download_advice
from trainer.core.tensor_files import check_safetensors

if TYPE_CHECKING:
    from trainer.core.digests import Digests

SUFFIXES = (".json", ".model", ".safetensors", ".txt")
"""Files of weights, configs and tokenizers. Other files, such as pickles, are neither read nor copied."""
CHAT_TEMPLATE = ".jinja"
"""Files of a tokenizer's chat template, for `Checkpoint.suffixes`."""
UNUSED_VARIANTS = ["*.fp16.*", "*.non_ema.*"]
"""Second copies of the weights in some checkpoints, which are not downloaded."""
MODEL_INDEX = "model_index.json"
"""The file of diffusers that lists the components of a checkpoint."""
PACKAGE_PREFIX = "package:"
"""Start of a path inside this package."""


def is_plain_name(name: str) -> bool:
    """Returns whether a name of a file has no folder in it."""
    return bool(name) and name not in (".", "..") and not any(separator in name for separator in "/\\\0")


def locate(setting: str, path: str, revision: str | None, patterns: list[str]) -> Path:
    """Returns the folder of the checkpoint that the setting `model.<setting>` names.

    `path` is a folder, `package:` and a folder inside this package, or a hub id. The files of a hub id that match
    `patterns` are downloaded, or found in the hub's cache. Raises errors.WeightsError.
    """
    if path.startswith(PACKAGE_PREFIX):
        return Path(__file__).parents[1] / path.removeprefix(PACKAGE_PREFIX)
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise WeightsError(
            f"model.{setting}={path}: there is no such folder or file, and it is not a hub id (owner/name); type the "
            "path of a diffusers folder or a safetensors file"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=UNUSED_VARIANTS)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"model.{setting}={path}: the weights cannot be downloaded from the hub ({reason}). Type "
            f"model.{setting}=FOLDER for a copy on this machine, {download_advice(error)}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config of one component of a diffusers folder. Raises errors.DataError."""
    path = folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")
    try:
        return documents.expect(documents.read_json(path), dict, f"{path}")
    except (DataError, StorageError) as error:
        raise DataError(
            f"{error} Without it, the folder is not a checkpoint of this model; type a different model.path"
        ) from error


def recipe_digest(*ingredients: object) -> str:
    """Returns one digest of digests and settings (anything that JSON can hold)."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def folder_digest(
    folder: Path, digests: Digests, with_weights: bool = True, suffixes: tuple[str, ...] = SUFFIXES
) -> str:
    """Returns a digest of the names and contents of a component's files. Raises errors.WeightsError, DataError.

    With `with_weights=False`, files of weights are left out.
    """
    if not folder.is_dir():
        raise WeightsError(
            f"{folder.parent} has no folder {folder.name}/, so it is not a checkpoint of this model; type a different "
            "model.path"
        )
    every = sorted(folder.rglob("*"))
    root = folder.parent if (folder.parent / MODEL_INDEX).exists() else folder
    check_links(root, [folder, *every])
    paths = [path for path in every if path.is_file() and path.suffix in suffixes]
    if not with_weights:
        paths = [path for path in paths if ".safetensors" not in path.name]
    for path in paths:
        if path.name.endswith(".safetensors.index.json"):
            read_weight_map(path)
        if path.suffix == ".safetensors":
            # Checked here because few libraries name the damaged file when they fail to read it.
            check_safetensors(path)
    return recipe_digest([(path.relative_to(folder).as_posix(), file_digest(path, digests)) for path in paths])


def read_weight_map(index: Path) -> dict[str, str]:
    """Returns tensor -> file, from the index of weights in several files.

    The files lie beside the index and hold safetensors, as only such files are part of the digest. Raises
    errors.DataError.
    """
    content = documents.expect(documents.read_json(index), dict, f"{index}")
    weight_map = documents.expect(content.get("weight_map"), dict, f"{index}: weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain_name(name) or not name.endswith(".safetensors"):
            raise DataError(
                f"{index}: {tensor!r:.80} is in {name!r:.80}, which is not a safetensors file beside the index. Put "
                "the file there, or type a different model.path"
            )
    return weight_map


def check_links(root: Path, paths: Iterable[Path]) -> None:
    """Raises errors.DataError for a link that leads out of the folder `root` of a checkpoint.

    Links into the blobs of the hub's cache, of which its snapshots consist, are accepted.
    """
    inside = [root.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    for path in paths:
        target = path.resolve()
        if not any(target.is_relative_to(folder) for folder in inside):
            raise DataError(
                f"{path} is a link out of the checkpoint, to {target}. Put the file itself there, or type the folder "
                "that it is in as the path of the model"
            )


def file_digest(path: Path, digests: Digests) -> str:
    """Returns the sha256 of a file."""
    # The hub's cache names large files by their sha256, so they need not be read again.
    blob = path.resolve()
    if path.is_symlink() and len(blob.name) == 64 and blob.parent.name == "blobs":
        return blob.name
    return digests.sha256(path)


def copy_component(source: Path, target: Path, with_weights: bool = True, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Copies the folder of a component, without files that are not part of a checkpoint. Raises OSError."""

    def ignore(folder: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if (not with_weights and ".safetensors" in name)
            or ((Path(folder) / name).is_file() and Path(name).suffix not in suffixes)
        ]

    shutil.copytree(source, target, ignore=ignore)


def copy_model_index(source: Path, target: Path, components: tuple[str, ...]) -> None:
    """Copies diffusers' `model_index.json`, if there is one, into a folder that holds only these components."""
    path = source / MODEL_INDEX
    if path.exists():
        index = documents.read_json(path)
        # diffusers marks a component that a checkpoint lacks, such as the safety checker, with [None, None].
        absent = {
            name: [None, None] for name, value in index.items() if isinstance(value, list) and name not in components
        }
        files.write_json(target / path.name, index | absent)
