"""Composing a run, rules about its settings, resolving nulls, and the identity of a run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.compose import compose_config, read_run, to_run
from trainer.config.groups import CONF, GROUPS
from trainer.config.identity import differences, flatten, identity_settings, run_id, to_plain
from trainer.config.schema import DECIDES_WEIGHTS, Run
from trainer.config.suggestions import all_keys, explain_unknown_key
from trainer.core import errors
from trainer.core.settings import added
from trainer.training.run_folder import acquire_run_folder

OPTIONS = [
    (path.parent.name, path.stem) for group in (*GROUPS, "experiment") for path in sorted((CONF / group).glob("*.yaml"))
]
FREE = {
    "hardware",
    "evaluation",
    "tracking",
    "sample",
    "save",
    "export",
    "log",
    "alerts",
    "cache",
    "stage",
    "run",
    "resume",
    "name",
    "out",
    "fresh",
    "skip_nonfinite",
}
"""Root settings that do not decide the trained weights. `skip_nonfinite` decides only whether there is a result."""
DECISIVE = """
    optimizer.lr=5e-4 optimizer.weight_decay=0.5 optimizer.betas=[0.8,0.9]
    lr_scheduler=constant lr_scheduler.warmup=3
    method.rank=8 method.alpha=8 method.dropout=0.1 method.targets=[to_q] method.init=gaussian
    method.init_from=x method=full
    seed=1 batch=4 steps=50 epochs=2 ema=0.9 max_grad_norm=0.5 precision=bf16 precision.compute=bfloat16
    dataset.limit=4 dataset.flip=true dataset.caption_dropout=0.1 dataset.resolution=32 dataset.validation_fraction=0.3
    dataset.pairs=9 dataset.held_out=9 dataset.edits=[sketch] model.revision=x model.path=other
"""


@cache
def composed(*choices: str) -> DictConfig:
    return compose_config(choices)


def compose(*overrides: str) -> DictConfig:
    """Returns what Hydra composes for these overrides, in a tenth of the time.

    Groups are independent of each other, except that an option may select options of other groups. Hence several
    options are composed at once and combined here, and values are then set as Hydra sets them.
    """
    pairs = [text.partition("=") for text in overrides]
    pairs = [*(pair for key, _, option in pairs if key in GROUPS for pair in selected_by(key, option)), *pairs]
    result = copy.deepcopy(composed(*(text for text in overrides if text.startswith("experiment="))))
    for key, _, option in pairs:
        if key in GROUPS:
            options = [name for group, name in OPTIONS if group == key]
            result[key] = copy.deepcopy(composed_options(options.index(option))[key])
    for key, _, value in pairs:
        if key not in GROUPS and key != "experiment":
            override = OverridesParser.create().parse_override(f"{key}={value}")
            OmegaConf.update(result, override.key_or_group, override.value(), force_add=override.is_add())
    return result


@cache
def selected_by(group: str, option: str) -> list[tuple[str, str, str]]:
    """Returns the options of other groups that an option selects, as (group, "=", option)."""
    defaults = yaml.safe_load((CONF / group / f"{option}.yaml").read_text()).get("defaults", [])
    entries = [item for default in defaults if isinstance(default, dict) for item in default.items()]
    return [
        (key.removeprefix("override /").partition("@")[0], "=", value)
        for key, value in entries
        if key.startswith("override /")
    ]


def composed_options(index: int) -> DictConfig:
    """Returns a configuration that selects the option with this index in every group, or the last one."""
    options = {key: [name for group, name in OPTIONS if group == key] for key in GROUPS}
    return composed(*(f"{group}={names[min(index, len(names) - 1)]}" for group, names in options.items()))


def run_of(*overrides: str) -> Run:
    return to_run(compose(*overrides))


def required_path(group: str, option: str, folder: Path) -> list[str]:
    values = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    return [f"{group}.path={folder}"] if values.get("path", "given") is None else []


def required(group: str, option: str, folder: Path) -> list[str]:
    """Returns the overrides that a user must type together with an option."""
    path = required_path(group, option, folder)
    if group == "model":
        methods = OmegaConf.get_type(compose(f"model={option}").model).methods
        return path if "lora" in methods else [*path, f"method={methods[0]}"]
    if group == "method" and option not in OmegaConf.get_type(compose().model).methods:
        # Any model that the method applies to.
        model = min(name for name, family in GROUPS["model"].items() if option in family.methods)
        return [*path, f"model={model}", *required_path("model", model, folder)]
    return path


def to_override(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(to_override, value))}]"
    return json.dumps(value)


def save(run: Run, folder: Path) -> Path:
    """Saves the settings of a run in its folder, and returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(run), sort_keys=False))
    return folder


# Options


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=map("=".join, OPTIONS))
def test_every_option_composes_and_can_be_read_again(group: str, option: str, tmp_path: Path):
    run = run_of(f"{group}={option}", *required(group, option, tmp_path))
    assert run.optimizer.lr > 0 and (run.steps or run.epochs) and run.batch and run.dataset.size()
    path = save(run, tmp_path / "run") / "config.yaml"
    assert read_run(path) == run
    assert run_id(read_run(path)) == run_id(run)


@pytest.mark.parametrize("model", [option for group, option in OPTIONS if group == "model"])
@pytest.mark.parametrize("method", [option for group, option in OPTIONS if group == "method"])
def test_learning_rate_defaults_to_the_models_suggestion_for_the_method(model: str, method: str, tmp_path: Path):
    choice = [f"model={model}", *required("model", model, tmp_path), f"method={method}"]
    config = compose(*choice)
    suggested = config.model.suggested.learning_rate
    if method not in OmegaConf.get_type(config.model).methods:
        with pytest.raises(errors.UsageError, match="this model can be trained by .*; type method="):
            run_of(*choice)
        return
    if method in suggested:
        assert run_of(*choice).optimizer.lr == suggested[method]
    else:
        with pytest.raises(errors.UsageError, match=r"type optimizer\.lr="):
            run_of(*choice)
    assert run_of(*choice, "optimizer.lr=3e-4").optimizer.lr == 3e-4


def test_nulls_are_resolved_from_the_models_suggestions():
    run = run_of()
    suggested = run.model.suggested
    assert (run.steps, run.batch, run.dataset.resolution) == (
        suggested.steps,
        suggested.batch,
        str(suggested.resolution),
    )
    assert (run.sample.steps, run.sample.guidance, run.evaluation.images) == (
        suggested.sample_steps,
        suggested.guidance,
        suggested.evaluation_images,
    )
    assert run.method.targets == list(run.model.target_modules)
    typed = run_of(
        "steps=7",
        "batch=3",
        "dataset.resolution=32x16",
        "sample.steps=2",
        "sample.guidance=5",
        "evaluation.images=1",
        "method.targets=[a]",
    )
    assert (typed.steps, typed.batch, typed.dataset.size(), typed.sample.steps, typed.sample.guidance) == (
        7,
        3,
        (32, 16),
        2,
        5.0,
    )
    assert (typed.evaluation.images, typed.method.targets) == (1, ["a"])
    assert run_of("epochs=2").steps is None


def test_alpha_is_alpha_per_rank_times_rank_unless_typed():
    for rank in (1, 4, 64):
        run = run_of(f"method.rank={rank}", "method.alpha_per_rank=2")
        assert run.method.alpha == 2 * rank
    assert run_of("method.rank=4", "method.alpha=1").method.alpha == 1


# Refused settings


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("steps=10 epochs=1", "epochs=null"),
        ("steps=0", "type steps=1"),
        ("epochs=-1", "type epochs=1"),
        ("batch=0", "type batch=1"),
        ("log.every=0", r"type log\.every=1"),
        ("save.every=0", r"save\.every=1"),
        ("save.keep=0", r"save\.keep=1"),
        ("max_grad_norm=0", "1e9 for no clipping"),
        ("max_grad_norm=nan", "not finite"),
        ("skip_nonfinite=-1", "type 0 to stop"),
        ("optimizer.lr=0", "such as 1e-4"),
        ("optimizer.lr=-1", "such as 1e-4"),
        ("optimizer.lr=inf", "not finite"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas=\[0\.9,0\.999\]"),
        ("optimizer.betas=[0.9,1]", r"optimizer\.betas=\[0\.9,0\.999\]"),
        ("ema=1", r"ema=0\.999"),
        ("ema=0", r"ema=0\.999"),
        ("method.rank=0", r"method\.rank=16"),
        ("method.alpha=0", "above 0"),
        ("method.alpha_per_rank=-1", "above 0"),
        ("method.dropout=1", r"method\.dropout=0\.1"),
        ("lr_scheduler.warmup=20 steps=20", "from 0 to 19"),
        ("lr_scheduler.warmup=-1", "from 0 to"),
        ("lr_scheduler.min_ratio=2", "from 0 to 1"),
        ("dataset.resolution=big", "832x576"),
        ("dataset.resolution=[]", r"\[512,1024\]"),
        ("dataset.resolution=[64,64x64]", "type different sizes"),
        ("dataset.resolution={64:0}", "0 is not a share of the visits at 64"),
        ("dataset.resolution={64:a}", "a is not a share"),
        ("dataset.resolution={64:null}", "None is not a share"),
        ("dataset.resolution=[32,big]", "big is not a size"),
        ("dataset.resolution=[32,64] dataset.buckets=[32x64]", "dataset.buckets=true"),
        ("dataset.limit=0", "1 or more"),
        ("dataset.validation_fraction=1", "0 to 0.99"),
        ("dataset.caption_dropout=2", r"dataset\.caption_dropout=0\.1"),
        ("dataset.pairs=0", r"dataset\.pairs=1"),
        ("dataset.path=pictures", "dataset=pairs, dataset=imagefolder or another"),
        ("hardware.micro_batch=0", "1 or more"),
        ("hardware.workers=-1", "0 to load"),
        ("evaluation.every=0", "1 or more"),
        ("evaluation.patience=2 dataset.validation_fraction=0", r"dataset\.validation_fraction=0\.15"),
        ("sample.steps=0", "1 or more"),
        ("sample.images=[a.png]", r"sample\.prompts="),
        ("model.path=null", r"model\.path=FOLDER"),
        ("precision=bf16 precision.compute=float32", "precision=fp32"),
        ("tracking.uri=ftp://host", r"tracking\.uri=sqlite"),
        ("out=''", "out=FOLDER"),
        ("cache.verify=never", "quick or full"),
        ("name=hf_abcdefghijklmnopqrstuvwx", "access token"),
        ("evaluation.prompts=[hf_abcdefghijklmnopqrstuvwx]", "access token"),
        ("stage=evaluate", "run=ID"),
        ("stage=sample resume=a run=b", "run=a instead"),
        ("run=a", "resume=a"),
        ("resume=a fresh=true", "contradict"),
        ("+optimizer.lrr=1", r"did you mean optimizer\.lr"),
        ("+save.keeps=1", r"did you mean save\.keep"),
        ("+nonsense=1", "no such setting"),
    ],
)
def test_invalid_setting_is_refused_with_what_to_type(overrides: str, reason: str):
    with pytest.raises(errors.UsageError, match=reason) as refusal:
        run_of(*overrides.split())
    assert refusal.value.code == 64
    assert "\n" not in str(refusal.value)
    assert "abcdefghijklmnop" not in str(refusal.value)


@pytest.mark.parametrize("group", GROUPS)
def test_unknown_key_in_yaml_file_is_refused(group: str, tmp_path: Path):
    (tmp_path / group).mkdir()
    option = next(name for key, name in OPTIONS if key == group)
    (tmp_path / group / "mine.yaml").write_text(f"defaults: [{option}]\nnonsense: 1\n")
    with pytest.raises((HydraException, OmegaConfBaseException), match="nonsense"):
        composed(f"{group}=mine", f"hydra.searchpath=['file://{tmp_path}']")


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optimizer.lrr", "optimizer.lr?"),
        ("lr", "optimizer.lr?"),
        ("learning_rate", "optimizer.lr?"),
        ("rank", "method.rank?"),
        ("optimizer.rank", "method.rank?"),
        ("batch_size", "batch?"),
        ("modell", "model?"),
        ("evaluation.zzzzzzzzz", "evaluation has only every, samples"),
        ("nonsense", "--cfg job lists all"),
    ],
)
def test_similar_key_is_suggested_for_an_unknown_key(key: str, suggestion: str):
    assert suggestion in explain_unknown_key(key, all_keys(compose()))


# Identity


@pytest.mark.parametrize(
    "overrides",
    [
        "hardware=cpu hardware.micro_batch=1 hardware.workers=2 hardware.gradient_checkpointing=true",
        "evaluation.every=3 evaluation.samples=1 evaluation.images=0 evaluation.patience=2",
        "tracking=none",
        "tracking.experiment=other",
        "out=elsewhere name=mine",
        "log.every=9 save.every=3 save.keep=9",
        "sample.steps=1 sample.seed=4 sample.guidance=2",
        "cache.path=elsewhere",
        "fresh=true",
        "stage=check",
        "method.alpha=16 method.alpha_per_rank=7",
        "dataset.resolution=64x64 model=mini_kontext",
    ],
)
def test_identity_does_not_depend_on_speed_and_monitoring(overrides: str):
    assert run_id(run_of(*overrides.split())) == run_id(run_of())


def test_identity_depends_on_settings_that_decide_weights():
    choices = DECISIVE.split()
    identities = {run_id(run_of(choice)) for choice in choices}
    assert len(identities | {run_id(run_of())}) == len(choices) + 1


def test_identity_does_not_depend_on_the_dataset_path():
    here, there = (run_of("dataset=imagefolder", f"dataset.path={path}") for path in ("here", "there"))
    assert run_id(here) == run_id(there) != run_id(run_of("dataset=pairs", "dataset.path=here"))


def test_resolutions_have_one_spelling_in_the_identity(tmp_path: Path):
    one = [run_of(f"dataset.resolution={typed}") for typed in ("64", "64x64", "[64]", "{64: 2}")]
    assert {run_id(run) for run in one} == {run_id(run_of("dataset.resolution=64"))} and one[
        0
    ].dataset.resolution == "64"
    several = [run_of(f"dataset.resolution={typed}") for typed in ("[32,64]", "[64x64,32]", "{64: 2, 32: 2}")]
    assert {tuple(run.dataset.resolution) for run in several} == {("32", "64")}
    weighted = [run_of(f"dataset.resolution={typed}") for typed in ("{32: 1, 64x32: 3}", "{64x32: 3.0, 32: 1}")]
    assert len({run_id(run) for run in several} | {run_id(run) for run in weighted} | {run_id(one[0])}) == 3
    assert weighted[0].dataset.resolutions() == {(32, 32): 1.0, (64, 32): 3.0}
    for run in (one[0], several[0], weighted[0]):
        assert read_run(save(run, tmp_path / run_id(run)) / "config.yaml") == run


def test_regularization_is_part_of_the_identity_but_not_its_folder():
    typed = ("path=a", "path=b", "path=a weight=0.5", "path=a share=0.3", "path=a caption=dog")
    here, there, *others = (
        run_id(run_of(*(f"dataset.regularization.{setting}" for setting in text.split()))) for text in typed
    )
    assert here == there and len({here, run_id(run_of()), *others}) == 5


def test_a_setting_that_was_added_later_is_part_of_the_identity_unless_it_has_its_default():
    @dataclass
    class Settings:
        old: int = 1
        new: list[int] = added(default_factory=list)

    assert to_plain(Settings(), for_identity=True) == {"old": 1}
    assert to_plain(Settings(new=[2]), for_identity=True) == {"old": 1, "new": [2]}
    assert to_plain(Settings()) == {"old": 1, "new": []}


def test_typing_the_default_values_does_not_change_the_identity():
    settings = flatten(identity_settings(run_of()))
    overrides = [
        f"{name}={to_override(value)}"
        for name, value in settings.items()
        if value is not None and not name.endswith(".kind")
    ]
    assert len(overrides) > 30
    assert run_id(run_of(*overrides)) == run_id(run_of())
    assert run_id(run_of(*reversed(overrides))) == run_id(run_of())


def test_identity_does_not_depend_on_order_and_process(tmp_path: Path):
    def reverse(value: Any) -> Any:
        return {key: reverse(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    run = run_of("method.rank=3")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(reverse(to_plain(run)), sort_keys=False))
    assert run_id(read_run(path)) == run_id(run)
    script = f"""
from pathlib import Path
from trainer.config.compose import read_run
from trainer.config.identity import run_id
print(run_id(read_run(Path({str(path)!r}))))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=CONF.parent,
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == run_id(run)


def test_every_root_setting_either_decides_weights_or_is_free():
    names = set(to_plain(run_of()))
    assert set(DECIDES_WEIGHTS) <= names <= {*DECIDES_WEIGHTS, *FREE}
    assert not FREE & set(DECIDES_WEIGHTS)


def test_kind_is_saved_only_for_options_with_their_own_class():
    settings = to_plain(run_of("precision=bf16", "hardware=cpu", "method=lora"))
    assert "kind" not in settings["precision"] and "kind" not in settings["hardware"]
    assert settings["method"]["kind"] == "lora"


def test_config_with_kind_of_a_shared_class_can_be_read(tmp_path: Path):
    run = run_of("precision=bf16", "hardware=cpu")
    settings = to_plain(run)
    # As older versions saved it: the first option, whatever was selected.
    settings["precision"]["kind"], settings["hardware"]["kind"] = "fp32", "auto"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert read_run(path) == run


# Existing runs


def test_resume_uses_saved_settings_updated_with_typed_ones(tmp_path: Path):
    saved = run_of("method.rank=3", "optimizer.lr=7e-4", "steps=9", "evaluation.samples=5")
    folder = save(saved, tmp_path / "run")

    def resumed_run(*overrides: str) -> Run:
        overrides = (f"resume={folder}", *overrides)
        return to_run(compose(*overrides), overrides, lambda name, out: Path(name))

    assert identity_settings(resumed_run()) == identity_settings(saved)
    assert resumed_run().evaluation == saved.evaluation and resumed_run().resume == str(folder)
    assert resumed_run().out == str(tmp_path) and resumed_run("out=elsewhere").out == "elsewhere"
    assert differences(identity_settings(saved), identity_settings(resumed_run("steps=20"))) == ["steps: 9 -> 20"]
    assert differences(identity_settings(saved), identity_settings(resumed_run("seed=4"))) == ["seed: 0 -> 4"]
    assert differences(identity_settings(saved), identity_settings(resumed_run("epochs=4"))) == [
        "epochs: None -> 4",
        "steps: 9 -> None",
    ]
    assert "method.kind: lora -> full" in differences(
        identity_settings(saved), identity_settings(resumed_run("method=full"))
    )


def test_post_training_stage_uses_saved_settings_and_refuses_others(tmp_path: Path):
    saved = run_of("method.rank=3", "sample.guidance=5", "evaluation.samples=5", "dataset=pairs", "dataset.path=old")
    folder = save(saved, tmp_path / "run")

    def sampling_run(*overrides: str) -> Run:
        overrides = ("stage=sample", f"run={folder}", *overrides)
        return to_run(compose(*overrides), overrides, lambda name, out: Path(name))

    assert identity_settings(sampling_run()) == identity_settings(saved)
    assert (sampling_run().sample, sampling_run().evaluation) == (saved.sample, saved.evaluation)
    assert sampling_run("sample.seed=4").sample.guidance == 5
    assert sampling_run("sample.seed=4", "hardware=cpu", "dataset.path=new").dataset.path == "new"
    for refused in ("method.rank=4", "optimizer=adamw", "dataset.flip=true", "experiment=mini_base", "seed=1"):
        with pytest.raises(errors.UsageError, match="saved settings"):
            sampling_run(refused)


@pytest.mark.parametrize("text", ["", "a: [", "{}", "just words", "model: 3", "model: {kind: nonsense}"])
def test_invalid_config_file_is_a_data_error(text: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(errors.DataError, match="does not hold the settings"):
        read_run(path)
    with pytest.raises(errors.DataError):
        read_run(tmp_path / "missing.yaml")


def test_a_command_finds_the_folder_that_started_with_its_data(tmp_path: Path):
    run = run_of(f"out={tmp_path}")

    def folder(data: str, fresh: bool = False) -> str:
        with acquire_run_folder(replace(run, fresh=fresh), {"data": data}) as acquired:
            return acquired.path.name

    id = run_id(run)
    assert folder("shoes") == id
    with pytest.raises(errors.UsageError, match="started with different data.* type fresh=true"):
        folder("bags")
    assert folder("bags", fresh=True) == f"{id}-2"
    assert (folder("shoes"), folder("bags")) == (id, f"{id}-2")
