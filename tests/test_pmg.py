"""The family `pmg`: a soft prompt through which a language model conditions a denoiser."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

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
from trainer.core.batch import Batch, collate
from trainer.core.digests import Digests
from trainer.core.errors import DataError, UsageError
from trainer.core.rng import normal
from trainer.dataset.personalized import Personalized
from trainer.export.write import export_after_training, write_exports
from trainer.method.soft_prompt import SoftPrompt
from trainer.method.soft_prompt_encoder import PromptSizes, SoftPromptEncoder
from trainer.method.trainable import trainable_parameters
from trainer.model.pmg import PMG
from trainer.model.weights import on_meta_device
from trainer.precision import Precision
from trainer.training.build import load_initial_weights

HISTORIES = ["The user liked: a red teapot.", "The user liked: a grey cat; a dog. Their style: soft."]
MAX_LENGTH = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> PMG:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pmg")
    overrides = dict(override.split("=", 1) for override in PMG.save_tiny_checkpoint(folder))
    return PMG(path=overrides["model.path"], llm=overrides["model.llm"], max_sequence_length=MAX_LENGTH)


def load_trainable(family: PMG, **settings: Any) -> Any:
    network = family.load_network(torch.float32)
    SoftPrompt(**settings).attach(network, (), seed=0)
    return network.eval()


def encode_histories(family: PMG, *histories: str) -> Batch:
    encoder = family.build_encoder(CPU)
    samples = [noise_sample(history, 32, 32) for history in histories]
    return collate([{name: encoder.encode(name, sample) for name in family.caption_tensors} for sample in samples])


def encode_prompt(network: Any, batch: Batch) -> torch.Tensor:
    return network.encode_prompt(batch["tokens"].long(), batch["tokens_mask"].long())


def test_language_model_reads_a_soft_prompt_like_text(family: PMG):
    """With the keys, values and embeddings of real tokens, it gives the states of a text with these tokens."""
    network = load_trainable(family, num_image_prompt=3, num_prefix_prompt=2)
    llm = AutoModelForCausalLM.from_pretrained(family.llm, dtype=torch.float32).model.eval()
    prompt = network.soft_prompt
    before, after = torch.tensor([[1, 70]]), torch.tensor([[80, 81, 82]])
    batch = encode_histories(family, HISTORIES[0])
    with torch.no_grad():
        cache = llm(before, use_cache=True).past_key_values
        layers = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        prompt.prefix.copy_(layers.permute(3, 0, 1, 2, 4).flatten(1))
        prompt.tokens.copy_(llm.embed_tokens(after)[0])
        text = torch.cat([before, batch["tokens"].long(), after], 1)
        expected = prompt.map(llm(text).last_hidden_state[:, -3:])
        found = encode_prompt(network, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_prompt_does_not_depend_on_padding(family: PMG, projection: bool):
    network = load_trainable(family, prefix_projection=projection)
    with torch.no_grad():
        together = encode_prompt(network, encode_histories(family, *HISTORIES))
        alone = [encode_prompt(network, encode_histories(family, history)) for history in HISTORIES]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_long_histories_are_cut_at_the_start(family: PMG):
    ids = family.tokenize("tokens", "x" * 200 + "end")
    assert len(ids) == MAX_LENGTH and ids[0] == 1
    assert torch.equal(ids[-3:], family.tokenize("tokens", "end")[1:])


def test_images_match_the_pipeline_with_the_same_prompt(family: PMG):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    network, noise = load_trainable(family), normal((1, 4, 4, 4), "start")
    batches = [encode_histories(family, history) for history in (HISTORIES[0], "")]
    pipeline: Any = StableDiffusionPipeline.from_pretrained(family.path, torch_dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return family.apply_guidance(*(family.predict(network, latents, t, batch) for batch in batches), 3.0, t)

    with torch.no_grad():
        prompt, negative_prompt = (encode_prompt(network, batch) for batch in batches)
        latents = family.sample(predict, noise, 4)
        ours = family.build_encoder(CPU).decode(latents).permute(0, 2, 3, 1).numpy()
        theirs = pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative_prompt,
            latents=noise,
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="np",
        ).images
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_only_the_soft_prompt_trains_and_all_of_it_gets_gradients(family: PMG):
    network = load_trainable(family, prefix_projection=True)
    latents = normal((1, 4, 4, 4), "x")
    conditions = encode_histories(family, HISTORIES[0])
    family.predict(network.train(), latents, torch.tensor([300.0]), conditions).square().sum().backward()
    expected = {name for name in network.state_dict() if name.startswith("soft_prompt.")}
    assert trainable_parameters(network).keys() == expected
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.soft_prompt.parameters()
    )
    assert not network.llm.training


@pytest.mark.parametrize(("width", "count"), [(None, 3_678_976), (64, 20_464_448), (4096, 1_093_948_160)])
def test_trainable_parameters_with_a_7b_model_are_as_documented(width: int | None, count: int):
    with on_meta_device():
        prompt = SoftPromptEncoder(PromptSizes(hidden=4096, layers=32, heads=32, head=128, width=768), 2, 2, width)
    assert sum(parameter.numel() for parameter in prompt.parameters()) == count
    assert f"{count:,}" in (Path(__file__).parents[1] / "conf" / "method" / "soft_prompt.yaml").read_text()


def write_histories(folder: Path, users: int = 12) -> Path:
    """Writes a personalized dataset where a user's history names a color, and the next image has that color."""
    (folder / "images").mkdir(parents=True)
    colors = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 230)}
    for name, color in colors.items():
        Image.new("RGB", (40, 40), color).save(folder / "images" / f"{name}.png")

    def record(split: str, number: int) -> dict:
        name = list(colors)[number % 3]
        item = {"item_id": name, "caption": f"a {name} thing", "image_path": f"images/{name}.png"}
        ids = {"user_id": f"{split}_{number}", "target_item_id": name, "user_style": "plain"}
        return {**ids, "history_items_info": [item], "target_item_info": item}

    for split, count in (("train", users), ("val", 3), ("test", 3)):
        (folder / f"{split}.json").write_text(json.dumps([record(split, number) for number in range(count)]))
    return folder


@pytest.fixture
def run(family: PMG) -> Run:
    return Run(model=family, method=SoftPrompt(), precision=Precision(), export=Export())


def test_exported_soft_prompt_initializes_another_run(run: Run, tmp_path: Path):
    network = load_trainable(run.model)
    with torch.no_grad():
        for parameter in network.soft_prompt.parameters():
            parameter.add_(0.1)
    (path,) = export_after_training(run, network, dict(trainable_parameters(network)), tmp_path)
    assert path.name == "soft_prompt.safetensors" and safe_open(path, "pt").metadata()["method"]
    other = load_trainable(run.model)
    load_initial_weights(dataclasses.replace(run, method=SoftPrompt(init_from=str(path))), other)
    expected = network.state_dict()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in trainable_parameters(other).items())
    with pytest.raises(UsageError, match="do not fit"):
        load_initial_weights(
            dataclasses.replace(run, method=SoftPrompt(num_image_prompt=4, init_from=str(path))),
            load_trainable(run.model, num_image_prompt=4),
        )


def test_unchanged_soft_prompt_is_not_exported(run: Run, tmp_path: Path):
    network = load_trainable(run.model)
    with pytest.raises(DataError, match="the one that training started with"):
        write_exports(run, network, dict(trainable_parameters(network)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_run_trains_on_histories_resumes_and_samples_for_test_users(tmp_path: Path):
    settings = [
        "experiment=pmg_flickr",
        "precision=fp32",
        "hardware=cpu",
        *PMG.save_tiny_checkpoint(tmp_path / "tiny"),
        f"dataset.path={write_histories(tmp_path / 'set')}",
        f"out={tmp_path / 'runs'}",
        "epochs=5",
        "batch=6",
        "lr_scheduler.warmup=2",
        "optimizer.lr=1e-2",
        "sample.steps=2",
        "tracking=none",
        "save.every=3",
    ]

    def trainer(*arguments: str) -> str:
        result = start(list(arguments), tmp_path / "output.txt").wait()
        assert result.code == 0, result.output
        return result.output

    assert "12 samples, 3 held out, 720 trainable parameters" in trainer(*settings)
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    assert "is finished" in trainer(*settings)
    output = trainer("stage=sample", f"run={folder}", "sample.split=test")
    assert output.count(".png: The user liked: a ") == 3
    assert (folder / "export" / "soft_prompt.safetensors").is_file()


def test_data_with_workers_numbered_captions_and_values_of_the_source(tmp_path: Path):
    folder = write_histories(tmp_path / "set", users=2)
    records = json.loads((folder / "train.json").read_text())
    for record in records:
        record |= {"worker_id": record.pop("user_id"), "worker_style": record.pop("user_style"), "window_position": 0}
        record |= {"target_item_info": records[0]["target_item_info"], "target_item_id": "red"}
        record["history_items_info"] *= 2
    (folder / "train.json").write_text(json.dumps(records))
    settings = Personalized(path=str(folder), template="{user}: {history} {style}", numbered=True, separator=" ")
    listing = settings.read(Digests(tmp_path / "digests"))
    assert not listing.faults
    # Users differ though their windows and targets are the same.
    assert [sample.caption for sample in listing.samples if sample.id.startswith("train/")] == [
        "train_0: 1. a red thing 2. a red thing plain",
        "train_1: 1. a green thing 2. a green thing plain",
    ]
    (folder / "train.json").write_text(json.dumps([records[0] | {"user_style": "loud"}, records[1]]))
    (fault,) = settings.read(Digests(tmp_path / "digests")).faults
    assert "user_style and worker_style differ" in str(fault)


def test_learned_tokens_start_with_the_standard_deviation_that_was_asked_for(family: PMG):
    for std in (0.02, 1.0):
        prompt = load_trainable(family, token_std=std, num_image_prompt=64).soft_prompt
        assert prompt.tokens.std().item() == pytest.approx(std, rel=0.1)
        assert prompt.prefix.std().item() == pytest.approx(0.02, rel=0.2)


def test_two_users_of_one_name_are_two_users(tmp_path: Path):
    folder = write_histories(tmp_path / "set", users=4)
    path = folder / "train.json"
    records = json.loads(path.read_text())
    for record, user, window in zip(records, ["anna", "Anna", "anna", "anna/b"], [0, 0, 0, "x"], strict=True):
        record |= {"user_id": user, "window_position": window, "target_item_id": "red"}
    # The third has the history of another user. The fourth is the first once more.
    path.write_text(json.dumps([*records[:3], records[0], records[3]]))
    listing = Personalized(path=str(folder)).read(Digests(tmp_path / "digests"))
    ids = [sample.id for sample in listing.samples if sample.id.startswith("train/")]
    assert ids == ["train/anna/0/red", "train/Anna/0/red/1", "train/anna/0/red/2", "train/anna/b/x/red"]
    (fault,) = listing.faults
    assert str(fault) == "train.json record 3: is the same sample as train.json record 0"


def test_two_styles_of_one_user_are_a_fault(tmp_path: Path):
    folder = write_histories(tmp_path / "set", users=2)
    entries = [{"worker": "a", "style": "x"}, {"user": "a", "style": "x"}, {"user": "a", "style": "y"}]
    (folder / "user_styles.json").write_text(json.dumps(entries))
    path = folder / "train.json"
    record = json.loads(path.read_text())[0] | {"user_id": "a", "user_style": None}
    path.write_text(json.dumps([record]))
    listing = Personalized(path=str(folder)).read(Digests(tmp_path / "digests"))
    (fault,) = listing.faults
    assert "user_styles.json entry 2: 'a' has another style" in str(fault)
    assert listing.samples[0].caption.endswith("Their style: x.")


def test_long_histories_are_read_from_the_end_and_the_rest_is_named(tmp_path: Path):
    folder = write_histories(tmp_path / "set", users=2)
    path = folder / "train.json"
    records = json.loads(path.read_text())
    first, second = (record["history_items_info"][0] for record in records)
    records[0]["history_items_info"] = [first, second, first | {"caption": "the last"}]
    path.write_text(json.dumps(records))
    settings = Personalized(path=str(folder), template="{history}", numbered=True, history_items=2)
    listing = settings.read(Digests(tmp_path / "digests"))
    assert listing.samples[0].caption == "1. a green thing; 2. the last"
    assert listing.samples[1].caption == "1. a green thing"
    assert "leaves out 1 item at the start of the history of 1 record: train.json record 0 (red)" in listing.notes[0]
    with pytest.raises(UsageError, match="leaves no history"):
        Personalized(history_items=0)
