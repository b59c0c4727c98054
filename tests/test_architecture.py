"""The structure of the code: import layers, no import cycles, one place for each library, short modules."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from trainer.config.groups import GROUPS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trainer"

LAYERS = (
    {"core"},
    {"distributed"},
    {*GROUPS, "objective"},
    {"config"},
    {"cache"},
    {"export"},
    {"training"},
    {"forecast"},
    {"sweep"},
    {"comparison"},
    {"report"},
    {"stages"},
    {"run"},
    {"api"},
    {"__main__"},
)
"""From bottom to top. A package imports from the layers below its own."""
GROUPS_MAY_IMPORT = {
    "model": {"objective", "dataset"},
    "evaluation": {"objective", "model"},
}
"""Config groups import nothing from each other, with these exceptions."""
LIBRARIES = {
    "hydra": {"config", "__main__"},
    "omegaconf": {"config", "__main__"},
    "mlflow": {"tracking"},
    "matplotlib": {"tracking"},
    "peft": {"method"},
    "diffusers": {"model"},
    "transformers": {"model", "optimizer", "evaluation"},
    "lpips": {"evaluation"},
    "PIL": {"dataset"},
    "datasets": {"dataset"},
    "bitsandbytes": {"core", "optimizer", "precision"},
    "optuna": {"sweep"},
    "prodigyopt": {"optimizer"},
    "pytorch_optimizer": {"optimizer"},
    "ray": {"sweep"},
    "schedulefree": {"optimizer"},
    "submitit": {"sweep"},
    "torchao": {"precision"},
    "accelerate": {"model", "distributed"},
    "huggingface_hub": {"core", "model"},
}
"""The packages that may import a library."""
HEAVY = {
    "numpy",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "mlflow",
    "peft",
    "PIL",
    "matplotlib",
    "accelerate",
    "datasets",
    "pandas",
}
"""Libraries that composing a configuration must not import."""
FAMILY_NAMES = re.compile(r"flux|kontext|qwen|sdxl|sd15|stable.?diffusion|\bpmg\b", re.IGNORECASE)
HOME_FOLDER = re.compile(r"(?<![\w.:/])/(?:home|Users|root|work|mnt|opt|private|scratch)/\w+")
"""An absolute path on somebody's machine."""
LONGEST_MODULE = 350
LONGEST_FUNCTION = 60
LONGER_FUNCTIONS: dict[str, str] = {}
"""`module:function` -> why it is not split."""


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def package_of(path: Path) -> str:
    """`trainer/model/sdxl.py` -> "model", `trainer/run.py` -> "run"."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported_names(path: Path) -> tuple[str, ...]:
    """Dotted names that a file imports, also inside functions, but not under `if TYPE_CHECKING`."""
    found: list[str] = []
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def may_import(importer: str, imported: str) -> bool:
    """Whether package `importer` may import package `imported`."""
    if importer == imported:
        return True
    if importer == "__init__":
        return imported in {"core", "api"}
    level = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    if level[importer] == level[imported]:
        return imported in GROUPS_MAY_IMPORT.get(importer, set())
    return level[imported] < level[importer]


def module_graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    modules = {module_name(path): path for path in source_files()}

    def target(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    return {
        module: {found for name in imported_names(path) if (found := target(name)) and found != module}
        for module, path in modules.items()
    }


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_packages_import_from_lower_layers_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in source_files()
        for name in imported_names(path)
        if name.startswith("trainer.") and not may_import(package_of(path), name.split(".")[1])
    ]
    assert wrong == []


def test_there_are_no_import_cycles():
    try:
        TopologicalSorter(module_graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_each_library_is_imported_by_its_packages_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in source_files()
        for name in imported_names(path)
        if package_of(path) not in LIBRARIES.get(name.split(".")[0], {package_of(path)})
    ]
    assert wrong == []


def test_non_public_parts_of_mlflow_are_used_in_one_module_only():
    private = re.compile(r"mlflow\.\w*\b.*\b_\w+|sharedViewState|compress_image_size|experimentKind|_metric_objs")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in source_files()
        if path.name != "mlflow_internals.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line)
    ]
    assert wrong == []


def test_every_group_of_conf_has_a_package_and_every_option_its_settings():
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert groups - {"experiment", "sweep", "hydra"} == set(GROUPS)
    for group, options in GROUPS.items():
        assert (PACKAGE / group / "__init__.py").is_file()
        shipped = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        # A model family may come in several sizes with a yaml file each; elsewhere each option has settings of its own.
        assert shipped >= set(options) if group == "model" else shipped == set(options), group


def test_family_names_appear_in_the_model_package_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in source_files()
        if package_of(path) != "model"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FAMILY_NAMES.search(line)
    ]
    assert wrong == []


def test_modules_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in source_files()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_MODULE} == {}


def test_functions_are_short():
    lengths = {
        f"{module_name(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in source_files()
        for node in functions(path)
    }
    longer = {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert set(longer) == set(LONGER_FUNCTIONS), longer


def test_no_file_contains_a_path_of_somebodys_machine():
    folders = [ROOT / name for name in ("trainer", "conf", "tests", "docs", "launch", "bench")]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    files += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt"} or path.name == "Makefile"]
    wrong = []
    for path in files:
        text = path.read_bytes()
        if b"\0" not in text:
            wrong += [f"{path.relative_to(ROOT)}: {found[0]}" for found in HOME_FOLDER.finditer(text.decode())]
    assert wrong == []


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help"]])
def test_composing_imports_no_heavy_library(flags: list[str], tmp_path: Path):
    """`-X importtime` prints a line for each imported module."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trainer", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    imported = {
        line.rpartition("|")[2].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert done.returncode == 0 and "max_grad_norm" in done.stdout
    assert {"hydra", "trainer"} <= imported
    assert imported & HEAVY == set()
    assert list(tmp_path.iterdir()) == []


def test_files_from_outside_are_read_with_limits():
    """`trainer.core.documents` and `yaml_documents` bound size and nesting, and name the file."""
    others = {
        "trainer/core/documents.py",
        "trainer/core/yaml_documents.py",
        "trainer/core/tensor_files.py",  # a header that it has just written
        "trainer/distributed/processes.py",  # a message of another process of the run
        "trainer/model/qwen/tiny.py",  # a tokenizer in memory
    }
    reads = re.compile(r"\bjson\.loads?\(|\byaml\.(safe_)?load\(|OmegaConf\.load\(")
    found = {path.relative_to(ROOT).as_posix() for path in source_files() if reads.search(path.read_text())}
    assert found == others
