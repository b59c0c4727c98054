"""Trials with damaged settings: command lines, recipes and the settings that a run has saved."""

from __future__ import annotations

import os
import random
from pathlib import Path

import yaml
from fault_table import fault
from fuzz import Trial, find_failures, mutate
from program import Harness

from trainer.config import command_line
from trainer.config.compose import read_run, register
from trainer.config.identity import to_plain
from trainer.config.request import check_sweep, requested_run
from trainer.core.errors import DataError, UsageError
from trainer.training.run_folder import find_run_folder

LINES = (
    ["steps=3", "optimizer.lr=1e-4", "name=1.10", "sample.prompts=[a,'b c',1.0]"],
    ["dataset=concepts", "dataset.path=x", "dataset.triggers={a: 1, b: x}", "+dataset.repeats.y=2"],
    ["--multirun", "seed=1,2", "optimizer.lr=choice(1e-4,1e-3)", "hydra.launcher.slots=2"],
    ["experiment=mini_base", "method=lora", "model.path=${oc.env:HOME}", "lr_scheduler=cosine", "epochs=2"],
    ["stage=sample", "run=146730e92337", "sample.images=['~/a.png']", "out=~/runs"],
)
RECIPE = b"""# @package _global_
defaults: [{override /dataset: csv}, _self_]
name: 1.10
steps: 5
optimizer: {lr: 1e-3, betas: [0.5, 0.9]}
dataset: {path: ~/x, buckets: [512, 256x128]}
sample: {prompts: &a [x, 'y'], images: null}
evaluation: {prompts: *a}
hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}
"""
CHANGES = ("", "=", ",", "[", "]", "{", "}", "'", '"', "\\", "$", "${", "}", ":", "~", "+", "@", "/", ".", "..", " ")
CHANGES += (
    "null",
    "nan",
    "1e999",
    "9" * 400,
    "_target_",
    "hydra",
    "hydra/",
    "-",
    "--",
    "\0",
    "\n",
    "\ud800",
    "[" * 300,
)


def mutate_line(number: int) -> list[str]:
    """Returns a command line in which one to three characters were replaced, removed or inserted."""
    state = random.Random(number)
    arguments = list(LINES[number % len(LINES)])
    for _ in range(state.randint(1, 3)):
        index = state.randrange(len(arguments))
        text = arguments[index]
        start = state.randrange(len(text) + 1)
        arguments[index] = text[:start] + state.choice(CHANGES) + text[start + state.randrange(3) :]
    return arguments


def request(arguments: list[str]) -> None:
    """Does what the program does before it starts a run or a sweep."""
    args = command_line.parse(arguments)
    if args.cfg or args.info or args.hydra_help or args.shell_completion or args.help:
        return
    request = requested_run(args, find_run_folder)
    if request is None:
        check_sweep(args)


def line_trial(number: int) -> None:
    try:
        request(mutate_line(number))
    except (UsageError, DataError):
        return  # The exit codes 64 and 65.
    except Exception as error:
        raise AssertionError(mutate_line(number)) from error


def recipe_trial(folder: Path) -> Trial:
    path = folder / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)

    def trial(number: int) -> None:
        path.write_bytes(mutate(RECIPE, number))
        try:
            request(["--config-dir", str(folder), "experiment=mine"])
        except (UsageError, DataError):
            return
        except Exception as error:
            raise AssertionError(path.read_bytes()) from error

    return trial


def saved_trial(folder: Path) -> Trial:
    """Saved settings are refused, or are those that are saved again."""
    args = command_line.parse(["name=1.10", "sample.prompts=[2e5,x]", "dataset=csv", "dataset.path=x"])
    saved = requested_run(args, find_run_folder)
    assert saved is not None
    original = yaml.safe_dump(to_plain(saved.run), sort_keys=False).encode()
    path, again = folder / "config.yaml", folder / "again.yaml"
    folder.mkdir(parents=True, exist_ok=True)

    def trial(number: int) -> None:
        path.write_bytes(mutate(original, number))
        try:
            run = read_run(path)
        except DataError:
            return
        again.write_text(yaml.safe_dump(to_plain(run), sort_keys=False))
        assert to_plain(read_run(again)) == to_plain(run) or "nan" in again.read_text()

    return trial


def check(trial: Trial, count: int, folder: Path) -> None:
    register()
    folder.mkdir(parents=True, exist_ok=True)
    home = os.getcwd()
    os.chdir(folder)
    try:
        failures = find_failures(count, trial)
    finally:
        os.chdir(home)
    assert failures == [], f"{len(failures)} of {count}:\n" + "\n".join(failures[:5])


LONG, SHORT = 1000, 25
"""Mutations in `make faults`, and of the first trial, which `make test` runs."""


@fault("F39", "recipes with mutations", 2, in_make_test=[0])
def damaged_recipes(harness: Harness, out: Path, trial: int) -> None:
    check(recipe_trial(out), LONG if trial else SHORT, out)


@fault("F41", "saved settings of a run with mutations", 2, in_make_test=[0])
def damaged_saved_settings(harness: Harness, out: Path, trial: int) -> None:
    register()
    check(saved_trial(out), LONG if trial else SHORT, out)


@fault("F43", "command lines with mutations", 2, in_make_test=[0])
def damaged_command_lines(harness: Harness, out: Path, trial: int) -> None:
    check(line_trial, LONG if trial else SHORT, out)
