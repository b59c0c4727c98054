"""FLUX Kontext against diffusers' own pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.method import Lora, adapter, trained
from trainer.model.flux_kontext import FluxKontext, pack
from trainer.streams import draws, normal

HEIGHT, WIDTH = 32, 48
CAPTIONS = ["make it night", "paint the photo"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> FluxKontext:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("flux")
    FluxKontext.tiny(folder)
    return FluxKontext(path=str(folder), text_length=8)


def pipeline(family: FluxKontext):
    from diffusers import FluxKontextPipeline

    loaded = FluxKontextPipeline.from_pretrained(family.path, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def controls() -> list[np.ndarray]:
    return [draws("control", i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for i in range(2)]


def noise(family: FluxKontext) -> torch.Tensor:
    shape = family.spec(HEIGHT, WIDTH, 1)["latents"]
    return torch.stack([normal(shape, "noise", i) for i in range(2)])


def conditions(family: FluxKontext) -> dict[str, torch.Tensor]:
    encoder = family.encoder(torch.device("cpu"))
    rows = [
        {
            "control": encoder.encode("control", [image], ""),
            "prompt": encoder.encode("prompt", [], text),
            "pooled": encoder.encode("pooled", [], text),
        }
        for image, text in zip(controls(), CAPTIONS, strict=True)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def theirs(family: FluxKontext, pipe, steps: int = 3) -> np.ndarray:
    return pipe(
        image=torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in controls()]),
        prompt=CAPTIONS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=2.5,
        latents=pack(noise(family)),
        max_area=HEIGHT * WIDTH,
        _auto_resize=False,
        max_sequence_length=family.text_length,
        output_type="np",
    ).images


def ours(family: FluxKontext, network, steps: int = 3) -> np.ndarray:
    cond, start = conditions(family), noise(family)
    with torch.no_grad():
        latents = family.objective.sample(
            lambda x, t: family.predict(network, x, t, cond, 2.5), start, steps, family.shift(*start.shape[2:])
        )
        return family.encoder(torch.device("cpu")).decode(latents).permute(0, 2, 3, 1).numpy()


def watch(network, calls: list) -> None:
    """Note every argument and the result of each forward pass."""
    forward = network.forward

    def noted(**arguments):
        result = forward(**arguments)
        calls.append({**arguments, "result": result[0]})
        return result

    network.forward = noted


def test_transformer_inputs_and_predictions_equal_those_of_the_pipeline(family: FluxKontext):
    pipe, network = pipeline(family), family.network(torch.float32).eval()
    expected, found = [], []
    watch(pipe.transformer, expected)
    watch(network, found)
    np.testing.assert_allclose(ours(family, network), theirs(family, pipe), atol=1e-5)
    assert len(found) == len(expected) == 3
    for mine, other in zip(found, expected, strict=True):
        tensors = {name for name, value in mine.items() if torch.is_tensor(value)}
        assert tensors >= {
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
            "guidance",
            "result",
        }
        for name in tensors:
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=1e-5, msg=name)
        assert mine["result"].abs().mean() > 0.01


def test_resolution_shift_has_the_published_values(family: FluxKontext):
    # Tokens of the real model's latents: f = 8 and 2 x 2 patches.
    assert [round(family.shift(side // 8, side // 8), 2) for side in (512, 768, 1024)] == [1.88, 2.33, 3.16]


def test_an_exported_adapter_changes_a_fresh_pipeline_as_it_changed_the_network(family: FluxKontext, tmp_path: Path):
    network = family.network(torch.float32).eval()
    before = ours(family, network)
    Lora(rank=4, alpha=8.0).attach(network, family.targets, seed=0)
    with torch.no_grad():
        for name, parameter in trained(network).items():
            parameter.copy_(0.3 * normal(tuple(parameter.shape), name))
    after = ours(family, network)
    assert np.abs(after - before).max() > 0.01
    pipe = pipeline(family)
    pipe.load_lora_weights(family.save_adapter(*adapter(network), tmp_path))
    np.testing.assert_allclose(theirs(family, pipe), after, atol=1e-5)


def test_a_saved_checkpoint_folder_loads_again_here_and_in_diffusers(family: FluxKontext, tmp_path: Path):
    network = family.network(torch.float32).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(1.5)
    family.save_checkpoint(network, tmp_path / "whole")
    again = dataclasses.replace(family, path=str(tmp_path / "whole"))
    expected = ours(family, network)
    np.testing.assert_array_equal(ours(again, again.network(torch.float32).eval()), expected)
    np.testing.assert_allclose(theirs(again, pipeline(again)), expected, atol=1e-5)
