"""The files of a base model: a diffusers folder, or configs from a folder and weights from single files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from trainer.core.errors import UsageError, WeightsError
from trainer.core.settings import added, path_setting
from trainer.model import checkpoint_files, published, single_file
from trainer.model.single_file import FileWeights, Layout, TensorFile
from trainer.model.weights import DIFFUSERS_WEIGHTS, ComponentWeights, WeightReader, required_tensors

if TYPE_CHECKING:
    import torch

    from trainer.core.digests import Digests


@dataclass(slots=True)
class Checkpoint:
    """Where the components of a base model come from.

    `path` is a diffusers folder, a hub id, `package:` and a folder of this package, or for some families a safetensors
    file in the layout of the original program. Such a file has weights only: configs and tokenizers come from `config`,
    a diffusers folder or a hub id; null: those of the published model, which come with the program. A setting with the
    name of a component replaces it: a safetensors file, in the original layout or diffusers', or a diffusers folder or
    hub id.
    """

    path: str | None = path_setting(None)
    revision: str | None = None
    config: str | None = added(None, path=True)

    suffixes: ClassVar[tuple[str, ...]] = checkpoint_files.SUFFIXES
    """Ends of the names of files that belong to the checkpoint.

    A family whose pipeline uses the tokenizer's chat template adds `checkpoint_files.CHAT_TEMPLATE`.
    """
    denoiser: ClassVar[str] = "transformer"
    """Component of the checkpoint that is trained."""
    default_config: ClassVar[str | None] = None
    """Hub id of a model whose configs and tokenizers come with the program and fit each single file.

    If it is None, `path` cannot be a file.
    """
    file_prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("", "model.diffusion_model.", "diffusion_model.")
    }
    """Components that a single file may hold, and what their names start with there. The first is written."""
    unused_file_keys: ClassVar[tuple[str, ...]] = ()
    """Starts of the names of tensors in single files that this family does not use."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UsageError(
                "model.path is not set; type model.path=FOLDER (a diffusers folder) or a hub id such as owner/name"
            )
        if self.config is not None and not single_file.is_file_name(self.path):
            raise UsageError(
                f"model.config={self.config} says where configs come from if model.path is a single file, but "
                f"model.path={self.path} has its own; leave model.config out"
            )

    @property
    def components(self) -> tuple[str, ...]:
        """Components of the checkpoint that training needs; each has a folder of its own."""
        raise NotImplementedError

    @property
    def replacements(self) -> dict[str, str]:
        """Components that do not come from `path`, each with the value of the setting of its name."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name in self.components}
        return {component: path for component, path in named.items() if path is not None}

    def source(self, component: str) -> tuple[str, str]:
        """Returns the setting that says where a component comes from, and its value."""
        assert self.path is not None
        replacement = self.replacements.get(component)
        return ("path", self.path) if replacement is None else (component, replacement)

    def original_layout(self, component: str) -> Layout:
        """Returns where the tensors of a component are in a single file, without the prefix."""
        return single_file.same_names

    def readable_layouts(self, component: str) -> tuple[Layout, ...]:
        """Returns the layouts in which a component is looked for in a single file, the usual one first."""
        return (self.original_layout(component), single_file.same_names)

    def meta_component(self, component: str) -> torch.nn.Module:
        """Returns a component of `file_prefixes` on the meta device, without weights."""
        raise NotImplementedError

    # Folders

    def folder(self) -> Path:
        """Returns the checkpoint's folder; downloads a hub id (weights, configs and tokenizers) if necessary.

        If `path` is a single file, this is the folder with the configs and tokenizers.
        """
        assert self.path is not None
        patterns = [f"{name}/*{suffix}" for name in self.components for suffix in self.suffixes]
        if not single_file.is_file_name(self.path):
            return checkpoint_files.locate("path", self.path, self.revision, ["model_index.json", *patterns])
        single_file.find_file("path", self.path)
        if self.default_config is None:
            raise WeightsError(
                f"model.path={self.path} is a single file, and this model also needs components that such files lack; "
                f"type model.{self.denoiser}={self.path} to take the {self.denoiser} from it, and the model.path of "
                "a diffusers folder or a hub id for the rest"
            )
        return self._config_folder([pattern for pattern in patterns if not pattern.endswith(single_file.SUFFIX)])

    def _config_folder(self, patterns: list[str]) -> Path:
        """Returns the folder with the configs and tokenizers for a single file."""
        if self.config is None:
            assert self.default_config is not None
            folder = published.config_folder(self.default_config)
            assert folder is not None
            return folder
        remedy = "type model.config=FOLDER, any diffusers folder of this kind of model; its weights are not read"
        try:
            folder = checkpoint_files.locate("config", self.config, self.revision, ["model_index.json", *patterns])
        except WeightsError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise WeightsError(
                f"model.path={self.path} holds weights only. Its configs and tokenizers come from "
                f"model.config={self.config}, which cannot be read ({reason}); {remedy}"
            ) from error
        absent = [name for name in self.components if name not in self.replacements and not (folder / name).is_dir()]
        if absent:
            raise WeightsError(f"model.config={self.config} has no folder {absent[0]}/; {remedy}")
        return folder

    def component_folder(self, component: str) -> Path:
        """Returns the folder with a component's config or tokenizer, and with its weights unless they are in a file."""
        setting, path = self.source(component)
        if setting == "path" or single_file.is_file_name(path):
            return self.folder() / component
        names = ["config.json", f"{DIFFUSERS_WEIGHTS}*.json", f"{DIFFUSERS_WEIGHTS}*.safetensors"]
        folder = checkpoint_files.locate(setting, path, None, [*names, *(f"{component}/{name}" for name in names)])
        return folder / component if (folder / component).is_dir() else folder

    def component_config(self, component: str) -> dict[str, Any]:
        """Returns the JSON config of one component. Raises errors.DataError."""
        return checkpoint_files.read_config(self.component_folder(component))

    def component_file(self, component: str) -> Path | None:
        """Returns the single file that holds the weights of a component; None if they are in its folder."""
        setting, path = self.source(component)
        if component not in self.file_prefixes or not single_file.is_file_name(path):
            return None
        return single_file.find_file(setting, path)

    def with_published_configs(self) -> Self:
        """Returns this model with the configs that come with the program, if `path` is the hub id of such a model.

        They are enough for shapes and for networks on the meta device. Nothing is downloaded, and weights are absent.
        """
        assert self.path is not None
        folder = published.config_folder(self.path)
        return self if folder is None else replace(self, path=str(folder), revision=None)

    def is_absent(self) -> bool:
        """Returns whether `path` is the hub id of a model that is not on this machine, but whose configs are."""
        from huggingface_hub import try_to_load_from_cache

        assert self.path is not None
        if published.config_folder(self.path) is None or Path(self.path).is_dir():
            return False
        index = try_to_load_from_cache(self.path, checkpoint_files.MODEL_INDEX, revision=self.revision)
        return not isinstance(index, str)

    # Weights

    def component_weights(self, component: str, checkpoint: Path | None = None) -> WeightReader:
        """Returns a reader of one component's weights, from this checkpoint or from another folder or single file.

        Raises errors.WeightsError if a single file lacks some of them, and errors.DataError if it is damaged.
        """
        path = self.component_file(component) if checkpoint is None else checkpoint
        if path is None or path.is_dir():
            return self.folder_weights(
                component, self.component_folder(component) if path is None else path / component
            )
        return self.file_weights(component, TensorFile(path))

    def folder_weights(self, component: str, folder: Path) -> WeightReader:
        """Returns a reader of one component's weights in its folder."""
        return ComponentWeights(folder)

    def file_weights(self, component: str, file: TensorFile) -> FileWeights:
        """Returns a reader of one component's weights in a single file. Raises errors.WeightsError."""
        from trainer.model.single_file_contents import describe_kind

        tensors = required_tensors(self.meta_component(component))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        found = single_file.find_weights(file, shapes, self.readable_layouts(component), self.file_prefixes[component])
        wrong = [f"it lacks {name}" for name in found.missing] or found.wrong_shapes()
        if wrong:
            setting, _ = self.source(component)
            remedy = "" if setting != "path" else "; or, if it is, a model.config with the configs of this model"
            raise WeightsError(
                f"model.{setting}={file.path} seems to hold {describe_kind(file)}, not the {component} of this model: "
                f"{'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Type the path of a "
                f"file of this model{remedy}"
            )
        return found

    def not_read(self) -> dict[Path, set[str]]:
        """Returns the tensors of each single file that are known and need not be read.

        Raises errors.WeightsError if a file lacks tensors, or has tensors that are unknown.
        """
        from trainer.model.single_file_contents import reason_not_read

        files: dict[Path, TensorFile] = {}
        used: dict[Path, set[str]] = {}
        prefixes: dict[Path, tuple[str, ...]] = {}
        for component in self.components:
            path = self.component_file(component)
            if path is not None:
                weights = self.file_weights(component, files.setdefault(path, TensorFile(path)))
                used[path] = used.get(path, set()) | weights.keys()
                prefixes[path] = (*prefixes.get(path, ()), weights.prefix)
        found = {path: file.shapes.keys() - used[path] for path, file in files.items()}
        for path, keys in found.items():
            # A file that replaces a component may hold others. So may a base whose component is replaced.
            is_base = path == self.base_file()
            replaced = [prefix for name in self.replacements for prefix in self.file_prefixes.get(name, ()) if prefix]
            unused = (*self.unused_file_keys, *replaced) if is_base else self.unused_file_keys
            unknown = sorted(
                key
                for key in keys
                if (is_base or key.startswith(prefixes[path]))
                and not key.startswith(unused)
                and not reason_not_read(key)
            )
            if unknown:
                raise WeightsError(
                    f"{path} holds {len(unknown)} tensors that this model does not know ({', '.join(unknown[:3])}), so "
                    "its images would not be those of this file; type the path of a file of this model"
                )
        return found

    def base_file(self) -> Path | None:
        """Returns the file that `path` names; None if it names a folder or a hub id."""
        assert self.path is not None
        return single_file.find_file("path", self.path) if single_file.is_file_name(self.path) else None

    def component_digests(self, digests: Digests) -> dict[str, str]:
        """Returns component -> digest of the names and contents of its files.

        Raises errors.WeightsError, DataError, also if a single file is not one of this model.
        """
        self.not_read()
        return {name: self._component_digest(name, digests) for name in self.components}

    def _component_digest(self, component: str, digests: Digests) -> str:
        folder, file = self.component_folder(component), self.component_file(component)
        if file is None:
            return checkpoint_files.folder_digest(folder, digests, suffixes=self.suffixes)
        configs = checkpoint_files.folder_digest(folder, digests, with_weights=False, suffixes=self.suffixes)
        return checkpoint_files.recipe_digest(checkpoint_files.file_digest(file, digests), configs)

    def checkpoint_warnings(self) -> list[str]:
        """Returns a sentence for each single file with tensors that are not read."""
        from trainer.model.single_file_contents import summarize_not_read

        return [
            f"Not read from {path.name}: {summarize_not_read(keys)}" for path, keys in self.not_read().items() if keys
        ]
