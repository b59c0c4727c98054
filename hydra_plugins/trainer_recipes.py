"""Hydra's source of the user's yaml files: `recipes://FOLDER` in its search path.

Hydra finds sources only in this namespace package, and imports this module at every start.
"""

from __future__ import annotations

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf


class Recipes(FileConfigSource):
    """Like Hydra's source of files, but checks each file and keeps the characters of text, such as name: 1.10."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        from trainer.config.recipes import read_recipe
        from trainer.core.errors import UsageError

        if config_path.startswith("hydra/"):
            raise UsageError(f"{self.path}/{config_path}: settings of Hydra itself cannot be changed; remove the file.")
        header, values = read_recipe(Path(self.path) / self._normalize_file_name(config_path))
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(values), header)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        from trainer.core.files import storage_errors

        with storage_errors("read", Path(self.path) / config_path):
            return super().list(config_path, results_filter)
