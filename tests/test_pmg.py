"""Soft prompts: a language model that is told more than its text, and a denoiser that draws what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import start
from safetensors import safe_open
from synthetic import noise_sample
from transformers import AutoModelForCausalLM

from trainer.config.schema import Run
from trainer.config.sections import Export
from trainer.core.batch import collate
from trainer.core.errors import DataError, UsageError
from trainer.core.rng import normal
from trainer.export.write import export_after_training, write_exports
from trainer.method.soft_prompt import SoftPrompt
from trainer.method.soft_prompt_encoder import PromptSizes, SoftPromptEncoder
from trainer.method.trainable import trainable_parameters
from trainer.model.pmg import PMG
from trainer.model.weights import on_meta_device
from trainer.precision import Precision
from trainer.training.build import load_initial_weights

HISTORY = ["The user liked: a red teapot.", "The user liked: a grey cat; a dog. Their style: soft."]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> PMG:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pmg")
    return PMG(
        **dict(setting.removeprefix("model.").split("=") for setting in PMG.save_tiny_checkpoint(folder)[:2]),
        max_sequence_length=64,
    )


def network_of(family: PMG, **settings) -> torch.nn.Module:
    network = family.load_network(torch.float32)
    SoftPrompt(**settings).attach(network, (), seed=0)
    return network.eval()


def words(family: PMG, captions: list[str]) -> dict[str, torch.Tensor]:
    encoder = family.build_encoder(torch.device("cpu"))
    return collate(
        [
            {part: encoder.encode(part, noise_sample(caption, 32, 32)) for part in ("tokens", "tokens_mask")}
            for caption in captions
        ]
    )


def test_a_prefix_and_learnt_tokens_are_to_the_language_model_what_words_would_be(family: PMG):
    """Keys and values, and embeddings, of words that it knows: then it must say what it says of a text with these words in it."""
    network = network_of(family, num_image_prompt=3, num_prefix_prompt=2)
    llm, prompt = (
        AutoModelForCausalLM.from_pretrained(family.llm, dtype=torch.float32).model.eval(),
        network.soft_prompt,
    )
    before, after = torch.tensor([[1, 70]]), torch.tensor([[80, 81, 82]])
    row = words(family, HISTORY[:1])
    with torch.no_grad():
        known = llm(before, use_cache=True).past_key_values
        layers = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in known.layers])
        prompt.prefix.copy_(layers.permute(3, 0, 1, 2, 4).flatten(1))
        prompt.tokens.copy_(llm.embed_tokens(after)[0])
        expected = prompt.map(llm(torch.cat([before, row["tokens"].long(), after], 1)).last_hidden_state[:, -3:])
        found = network.encode_prompt(row["tokens"].long(), row["tokens_mask"].long())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_a_history_says_the_same_alone_and_beside_a_longer_one(family: PMG, projection: bool):
    network = network_of(family, prefix_projection=projection)
    with torch.no_grad():
        both = network.encode_prompt(*(tensor.long() for tensor in words(family, HISTORY).values()))
        alone = [network.encode_prompt(*(tensor.long() for tensor in words(family, [text]).values())) for text in HISTORY]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_of_a_long_history_the_end_is_read(family: PMG):
    ids = family.tokens("", "x" * 200 + "end")
    assert len(ids) == 64 and ids[0] == 1 and torch.equal(ids[-3:], family.tokens("", "end")[1:])


def test_a_picture_equals_that_of_the_pipeline_given_the_same_condition(family: PMG):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    network, start = network_of(family), normal((1, 4, 4, 4), "start")
    rows = [words(family, [text]) for text in (HISTORY[0], "")]
    pipe = StableDiffusionPipeline.from_pretrained(family.path, torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return family.apply_guidance(*(family.predict(network, x, t, row) for row in rows), 3.0)

    with torch.no_grad():
        liked, nothing = (network.encode_prompt(row["tokens"].long(), row["tokens_mask"].long()) for row in rows)
        latents = family.objective.sample(predict, start, 4, 1.0)
        mine = family.build_encoder(torch.device("cpu")).decode(latents).permute(0, 2, 3, 1).numpy()
        theirs = pipe(
            prompt_embeds=liked,
            negative_prompt_embeds=nothing,
            latents=start,
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="np",
        ).images
    np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_only_what_is_said_between_them_trains_and_all_of_it_gets_a_gradient(family: PMG):
    network = network_of(family, prefix_projection=True)
    x = normal((1, 4, 4, 4), "x")
    family.predict(network.train(), x, torch.tensor([300.0]), words(family, HISTORY[:1])).square().sum().backward()
    assert set(trainable_parameters(network)) == {
        name for name in network.state_dict() if name.startswith("soft_prompt.")
    }
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.soft_prompt.parameters()
    )
    assert not network.llm.training


@pytest.mark.parametrize(("width", "count"), [(None, 3_678_976), (64, 20_464_448), (4096, 1_093_948_160)])
def test_beside_a_real_language_model_as_many_parameters_train_as_is_written(width: int | None, count: int):
    with on_meta_device():
        prompt = SoftPromptEncoder(PromptSizes(hidden=4096, layers=32, heads=32, head=128, width=768), 2, 2, width)
    assert sum(parameter.numel() for parameter in prompt.parameters()) == count
    assert f"{count:,}" in (Path(__file__).parents[1] / "conf" / "method" / "soft_prompt.yaml").read_text()


def write_histories(folder: Path, users: int = 12) -> Path:
    """A user's history names a colour, and the picture to be drawn next is of that colour."""
    (folder / "images").mkdir(parents=True)
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 230)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 40), colour).save(folder / "images" / f"{name}.png")

    def record(split: str, number: int) -> dict:
        name = list(colours)[number % 3]
        item = {"item_id": name, "caption": f"a {name} thing", "image_path": f"images/{name}.png"}
        ids = {"user_id": f"{split}_{number}", "target_item_id": name, "user_style": "plain"}
        return {**ids, "history_items_info": [item], "target_item_info": item}

    for split, count in (("train", users), ("val", 3), ("test", 3)):
        (folder / f"{split}.json").write_text(json.dumps([record(split, number) for number in range(count)]))
    return folder


@pytest.fixture
def trained_run(family: PMG) -> tuple[Run, torch.nn.Module]:
    run = Run(model=family, method=SoftPrompt(), precision=Precision(), export=Export())
    network = network_of(family)
    with torch.no_grad():
        for parameter in network.soft_prompt.parameters():
            parameter.add_(0.1)
    return run, network


def test_a_soft_prompt_is_written_read_again_and_begun_from(trained_run, tmp_path: Path):
    run, network = trained_run
    parameters = trainable_parameters(network)
    (path,) = export_after_training(run, network, dict(parameters), tmp_path)
    assert path.name == "soft_prompt.safetensors" and safe_open(path, "pt").metadata()["method"]
    fresh = network_of(run.model)
    load_initial_weights(dataclasses.replace(run, method=dataclasses.replace(run.method, init_from=str(path))), fresh)
    assert all(
        torch.equal(parameter, network.state_dict()[name]) for name, parameter in trainable_parameters(fresh).items()
    )
    with pytest.raises(UsageError, match="do not fit"):
        load_initial_weights(
            dataclasses.replace(run, method=SoftPrompt(num_image_prompt=4, init_from=str(path))),
            network_of(run.model, num_image_prompt=4),
        )


def test_a_soft_prompt_that_did_not_move_is_not_written(trained_run, tmp_path: Path):
    run, _ = trained_run
    network = network_of(run.model)
    with pytest.raises(DataError, match="the one that training started with"):
        write_exports(run, network, dict(trainable_parameters(network)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_histories_train_resume_and_are_drawn_for_users_of_the_test_split(tmp_path: Path):
    settings = PMG.save_tiny_checkpoint(tmp_path / "tiny")
    histories = write_histories(tmp_path / "set")
    line = [
        "experiment=pmg_flickr",
        "precision=fp32",
        "hardware=cpu",
        *settings,
        f"dataset.path={histories}",
        f"out={tmp_path / 'runs'}",
    ]
    line += [
        "epochs=5",
        "batch=6",
        "lr_scheduler.warmup=2",
        "optimizer.lr=1e-2",
        "sample.steps=2",
        "tracking=none",
        "save.every=3",
    ]

    def trainer(*arguments: str) -> str:
        ended = start(list(arguments), tmp_path / "output.txt").wait()
        assert ended.code == 0, ended.text
        return ended.text

    assert "12 samples, 3 held out, 720 trainable parameters" in trainer(*line)
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    assert "is finished" in trainer(*line)
    drawn = trainer("stage=sample", f"run={folder}", "sample.split=test")
    assert drawn.count(".png: The user liked: a ") == 3
    assert (folder / "export" / "soft_prompt.safetensors").is_file()
