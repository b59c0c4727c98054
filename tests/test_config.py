"""Composition, the rules that cross rooms, what is resolved from several rooms, and the identity of a run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer import config
from trainer.config import Run
from trainer.config.command_line import CONF
from trainer.core import errors

OPTIONS = [
    (path.parent.name, path.stem)
    for room in (*config.GROUPS, "experiment")
    for path in sorted((CONF / room).glob("*.yaml"))
]
FREE = {
    "hardware",
    "evaluation",
    "tracking",
    "sample",
    "save",
    "export",
    "log",
    "cache",
    "stage",
    "run",
    "resume",
    "name",
    "out",
    "fresh",
}
FREE |= {"skip_nonfinite"}
"""Root settings that do not decide the path of the weights. Whether NaN is skipped decides whether there is a result, not which."""
DECISIVE = """
    optimizer.lr=5e-4 optimizer.weight_decay=0.5 optimizer.betas=[0.8,0.9] lr_scheduler=constant lr_scheduler.warmup=3
    method.rank=8 method.alpha=8 method.dropout=0.1 method.targets=[to_q] method.init=gaussian method.init_from=x method=full
    seed=1 batch=4 steps=50 epochs=2 ema=0.9 max_grad_norm=0.5 precision=bf16 precision.compute=bfloat16
    dataset.limit=4 dataset.flip=true dataset.caption_dropout=0.1 dataset.resolution=32 dataset.validation_fraction=0.3
    dataset.pairs=9 dataset.held_out=9 dataset.edits=[sketch] model.revision=x model.path=other
"""


@cache
def composed(*choices: str) -> DictConfig:
    """What Hydra composes of these options."""
    config.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(choices))


def compose(*overrides: str) -> DictConfig:
    """What Hydra composes of these overrides, in a tenth of its time: rooms know nothing of each other, so that their options are composed
    side by side, and what a command line sets is set as Hydra sets it."""
    pairs = [text.partition("=") for text in overrides]
    result = copy.deepcopy(composed(*(text for text in overrides if text.startswith("experiment="))))
    for room, _, option in pairs:
        if room in config.GROUPS:
            options = [name for group, name in OPTIONS if group == room]
            result[room] = copy.deepcopy(shelf(options.index(option))[room])
    for key, _, value in pairs:
        if key not in config.GROUPS and key != "experiment":
            override = OverridesParser.create().parse_override(f"{key}={value}")
            OmegaConf.update(result, override.key_or_group, override.value(), force_add=override.is_add())
    return result


def shelf(place: int) -> DictConfig:
    """The option at this place of every room, or its last."""
    options = {room: [name for group, name in OPTIONS if group == room] for room in config.GROUPS}
    return composed(*(f"{room}={names[min(place, len(names) - 1)]}" for room, names in options.items()))


def run_of(*overrides: str) -> Run:
    return config.typed(compose(*overrides))


def needed(group: str, option: str, folder: Path) -> list[str]:
    """The settings that a user must type beside an option."""
    values = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    path = [f"{group}.path={folder}"] if values.get("path", "given") is None else []
    families = config.GROUPS["model"]
    if group == "method":
        fitting = next(
            name
            for name, kind in {"mini_kontext": families["flux_kontext"], **families}.items()
            if option in kind.methods
        )
        return [*path, f"model={fitting}"]
    return [*path, f"method={families[option].methods[0]}"] if group == "model" and option in families else path


def typed_as(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, list):
        return f"[{','.join(map(typed_as, value))}]"
    return json.dumps(value)


def written(run: Run, folder: Path) -> Path:
    """The folder of a run that wrote down its settings."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.plain(run), sort_keys=False))
    return folder


# Options


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=map("=".join, OPTIONS))
def test_every_shipped_option_composes_keeps_the_rules_and_can_be_read_again(group: str, option: str, tmp_path: Path):
    run = run_of(f"{group}={option}", *needed(group, option, tmp_path))
    assert run.optimizer.lr > 0 and (run.steps or run.epochs) and run.batch and run.dataset.size()
    path = written(run, tmp_path / "run") / "config.yaml"
    assert config.from_yaml(path) == run
    assert config.identity(config.from_yaml(path)) == config.identity(run)


@pytest.mark.parametrize("model", [option for group, option in OPTIONS if group == "model"])
@pytest.mark.parametrize("method", [option for group, option in OPTIONS if group == "method"])
def test_the_learning_rate_is_the_models_own_for_the_method_unless_one_is_typed(
    model: str, method: str, tmp_path: Path
):
    choice = [f"model={model}", *needed("model", model, tmp_path), f"method={method}"]
    composed = compose(*choice)
    suggested = composed.model.suggested.learning_rate
    if method not in OmegaConf.get_type(composed.model).methods:
        with pytest.raises(errors.UsageError, match="this model is trained by .*; type method="):
            run_of(*choice)
        return
    if method in suggested:
        assert run_of(*choice).optimizer.lr == suggested[method]
    else:
        with pytest.raises(errors.UsageError, match=r"type optimizer\.lr="):
            run_of(*choice)
    assert run_of(*choice, "optimizer.lr=3e-4").optimizer.lr == 3e-4


def test_what_no_room_can_know_alone_is_taken_from_the_model():
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
    assert run.method.targets == list(run.model.targets)
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


def test_alpha_follows_the_rank_so_that_a_sweep_over_ranks_keeps_the_scale():
    for rank in (1, 4, 64):
        run = run_of(f"method.rank={rank}", "method.alpha_per_rank=2")
        assert run.method.alpha == 2 * rank
    assert run_of("method.rank=4", "method.alpha=1").method.alpha == 1


# What is refused


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("steps=10 epochs=1", "only one of them"),
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
        ("dataset.limit=0", "1 or more"),
        ("dataset.validation_fraction=1", "0 to 0.99"),
        ("dataset.caption_dropout=2", "0 to 1"),
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
def test_a_setting_that_makes_no_sense_is_refused_with_what_to_type(overrides: str, reason: str):
    with pytest.raises(errors.UsageError, match=reason) as refusal:
        run_of(*overrides.split())
    assert refusal.value.code == 64
    assert "\n" not in str(refusal.value)
    assert "abcdefghijklmnop" not in str(refusal.value)


@pytest.mark.parametrize("group", config.GROUPS)
def test_a_wrong_key_in_a_yaml_file_is_refused(group: str, tmp_path: Path):
    (tmp_path / group).mkdir()
    option = next(option for room, option in OPTIONS if room == group)
    (tmp_path / group / "mine.yaml").write_text(f"defaults: [{option}]\nnonsense: 1\n")
    with pytest.raises((HydraException, OmegaConfBaseException), match="nonsense"):
        composed(f"{group}=mine", f"hydra.searchpath=['file://{tmp_path}']")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("optimizer.lrr", "optimizer.lr?"),
        ("lr", "optimizer.lr?"),
        ("learning_rate", "optimizer.lr?"),
        ("rank", "method.rank?"),
        ("optimizer.rank", "method.rank?"),
        ("batch_size", "batch?"),
        ("modell", "model?"),
        ("evaluation.zzz", "evaluation has only every, samples"),
        ("nonsense", "--cfg job lists all"),
    ],
)
def test_of_an_unknown_key_the_one_that_was_meant_is_named(wrong: str, meant: str):
    assert meant in config.unknown(wrong, config.keys(compose()))


# The identity


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
def test_how_fast_and_how_watched_a_run_is_does_not_change_its_identity(overrides: str):
    assert config.identity(run_of(*overrides.split())) == config.identity(run_of())


def test_what_decides_the_weights_changes_the_identity():
    choices = DECISIVE.split()
    identities = {config.identity(run_of(choice)) for choice in choices}
    assert len(identities | {config.identity(run_of())}) == len(choices) + 1


def test_where_a_data_set_lies_does_not_change_the_identity():
    here, there = (run_of("dataset=imagefolder", f"dataset.path={path}") for path in ("here", "there"))
    assert (
        config.identity(here) == config.identity(there) != config.identity(run_of("dataset=pairs", "dataset.path=here"))
    )


def test_a_default_that_is_typed_gives_the_same_run():
    settings = config.flat(config.decisive(run_of()))
    overrides = [
        f"{name}={typed_as(value)}"
        for name, value in settings.items()
        if value is not None and not name.endswith(".kind")
    ]
    assert len(overrides) > 30
    assert config.identity(run_of(*overrides)) == config.identity(run_of())
    assert config.identity(run_of(*reversed(overrides))) == config.identity(run_of())


def test_the_identity_depends_on_neither_the_order_of_settings_nor_the_process(tmp_path: Path):
    def backwards(value: Any) -> Any:
        return {key: backwards(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    run = run_of("method.rank=3")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(backwards(config.plain(run)), sort_keys=False))
    assert config.identity(config.from_yaml(path)) == config.identity(run)
    script = f"from pathlib import Path; from trainer import config; print(config.identity(config.from_yaml(Path({str(path)!r}))))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=CONF.parent,
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == config.identity(run)


def test_of_every_root_setting_it_is_known_whether_it_decides_the_weights():
    names = set(config.plain(run_of()))
    assert set(config.DECIDES_WEIGHTS) <= names <= {*config.DECIDES_WEIGHTS, *FREE}
    assert not FREE & set(config.DECIDES_WEIGHTS)


def test_nothing_in_a_runs_settings_bears_the_name_of_another_option():
    """Options that share a dataclass cannot be told apart by it."""
    params = config.flat(config.decisive(run_of("precision=bf16")))
    assert params["precision.storage"] == "bf16"
    assert params.get("precision.kind", "bf16") == "bf16"


# Runs that are there


def test_resume_means_the_settings_of_that_run_under_what_is_typed(tmp_path: Path):
    own = run_of("method.rank=3", "optimizer.lr=7e-4", "steps=9", "evaluation.samples=5")
    folder = written(own, tmp_path / "run")

    def resumed(*overrides: str) -> Run:
        overrides = (f"resume={folder}", *overrides)
        return config.typed(compose(*overrides), overrides, lambda name, out: Path(name))

    assert config.decisive(resumed()) == config.decisive(own)
    assert resumed().evaluation == own.evaluation and resumed().resume == str(folder)
    assert resumed().out == str(tmp_path) and resumed("out=elsewhere").out == "elsewhere"
    assert config.differences(config.decisive(own), config.decisive(resumed("steps=20"))) == ["steps: 9 -> 20"]
    assert config.differences(config.decisive(own), config.decisive(resumed("seed=4"))) == ["seed: 0 -> 4"]
    assert config.differences(config.decisive(own), config.decisive(resumed("epochs=4"))) == [
        "epochs: None -> 4",
        "steps: 9 -> None",
    ]
    assert "method.kind: lora -> full" in config.differences(
        config.decisive(own), config.decisive(resumed("method=full"))
    )


def test_a_finished_run_is_used_with_its_own_settings_and_refuses_others(tmp_path: Path):
    own = run_of("method.rank=3", "sample.guidance=5", "evaluation.samples=5", "dataset=pairs", "dataset.path=old")
    folder = written(own, tmp_path / "run")

    def used(*overrides: str) -> Run:
        overrides = ("stage=sample", f"run={folder}", *overrides)
        return config.typed(compose(*overrides), overrides, lambda name, out: Path(name))

    assert config.decisive(used()) == config.decisive(own)
    assert (used().sample, used().evaluation) == (own.sample, own.evaluation)
    assert used("sample.seed=4").sample.guidance == 5
    assert used("sample.seed=4", "hardware=cpu", "dataset.path=new").dataset.path == "new"
    for refused in ("method.rank=4", "optimizer=adamw", "dataset.flip=true", "experiment=mini_base", "seed=1"):
        with pytest.raises(errors.UsageError, match="own settings"):
            used(refused)


@pytest.mark.parametrize("text", ["", "a: [", "{}", "just words", "model: 3", "model: {kind: nonsense}"])
def test_a_config_that_is_none_is_bad_data(text: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(errors.DataError, match="does not hold the settings"):
        config.from_yaml(path)
    with pytest.raises(errors.DataError):
        config.from_yaml(tmp_path / "nowhere.yaml")
