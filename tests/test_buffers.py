"""Persistent buffers: read from the files of a network, checked, kept while it trains, and exported."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core.batch import Batch
from trainer.core.errors import DataError
from trainer.core.rng import normal
from trainer.export.write import write_exports
from trainer.method import Method
from trainer.method.full import Full
from trainer.method.lora import Lora
from trainer.method.trainable import set_train_mode, trainable_parameters
from trainer.model import Family
from trainer.model.weights import empty_model, load_weights, on_meta_device
from trainer.objective import Flow
from trainer.precision import Precision

BUFFER = "pos_embed.pos_embed"


@dataclass(slots=True)
class Denoiser(Family):
    """A checkpoint of a Stable Diffusion 3 transformer alone, which has a persistent buffer."""

    objective: Flow = dataclasses.field(default_factory=Flow)

    components = ("transformer",)
    target_modules = ("to_q",)
    unquantized_modules = ()

    def meta_model(self) -> torch.nn.Module:
        from diffusers import SD3Transformer2DModel

        with on_meta_device():
            return SD3Transformer2DModel.from_config(self.component_config("transformer"))

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        prompt, pooled = conditions["prompt"], conditions["pooled"]
        return network(latents, prompt, pooled, timestep=t * 1000, return_dict=False)[0]


@pytest.fixture
def family(tmp_path: Path) -> Denoiser:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    for module in (network.norm_out.linear, *(block.norm1.linear for block in network.transformer_blocks)):
        torch.nn.init.normal_(module.weight, std=0.2)
    network.save_pretrained(tmp_path / "model" / "transformer")
    return Denoiser(path=str(tmp_path / "model"))


def weights_file(family: Denoiser) -> Path:
    return family.folder() / "transformer" / "diffusion_pytorch_model.safetensors"


def change_file(family: Denoiser, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of the checkpoint; None removes them."""
    tensors = load_file(weights_file(family)) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, weights_file(family))


def predict(family: Denoiser, network: torch.nn.Module) -> torch.Tensor:
    conditions = {"prompt": normal((1, 3, 8), "prompt"), "pooled": normal((1, 8), "pooled")}
    with torch.no_grad():
        return family.predict(network, normal((1, 4, 8, 8), "latents"), torch.tensor([0.3]), conditions)


def test_network_on_the_meta_device_has_no_real_persistent_buffer(family: Denoiser):
    network = family.meta_model()
    assert network.get_buffer(BUFFER).is_meta
    assert empty_model(network).get_buffer(BUFFER).untyped_storage().nbytes() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_are_read_as_by_diffusers_and_matter(family: Denoiser, dtype: torch.dtype):
    from diffusers import SD3Transformer2DModel

    before = predict(family, family.load_network(torch.float32))
    change_file(family, **{BUFFER: normal((1, 64, 16), "buffer")})
    network = family.load_network(dtype)
    theirs = SD3Transformer2DModel.from_pretrained(family.folder() / "transformer", torch_dtype=dtype).state_dict()
    ours = network.state_dict()
    assert ours.keys() == theirs.keys() and BUFFER in ours
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in ours)
    if dtype is torch.float32:
        assert (predict(family, network) - before).abs().max() > 0.01


@pytest.mark.parametrize("method", [Lora(rank=2, alpha=2.0), Full()], ids=["lora", "full"])
def test_exports_hold_the_buffers(family: Denoiser, method: Method, tmp_path: Path):
    change_file(family, **{BUFFER: normal((1, 64, 16), "buffer")})
    formats = [Format.pipeline, Format.single_file]
    run = Run(model=family, export=Export(formats), method=method, precision=Precision())
    network = family.load_network(torch.float32)
    method.attach(network, family.target_modules, seed=0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter += 0.1 * normal(tuple(parameter.shape), name)
    trained = {name: parameter.detach().clone() for name, parameter in trainable_parameters(network).items()}
    expected = predict(family, network.eval())
    folder, file = write_exports(run, network, trained, tmp_path / "export")
    exported = dataclasses.replace(family, path=str(folder))
    torch.testing.assert_close(predict(family, exported.load_network(torch.float32)), expected, rtol=1e-4, atol=1e-5)
    for path in (weights_file(exported), file):
        assert torch.equal(load_file(path)[BUFFER], normal((1, 64, 16), "buffer"))


@pytest.mark.parametrize(
    ("change", "message"),
    [(None, f"lack {BUFFER}"), (torch.zeros(1, 36, 16), r"has shape \(1, 36, 16\), but the config says \(1, 64, 16\)")],
    ids=["missing", "shape"],
)
def test_missing_and_misshapen_buffers_are_refused(family: Denoiser, change: torch.Tensor | None, message: str):
    change_file(family, **{BUFFER: change})
    with pytest.raises(DataError, match=message):
        family.load_network(torch.float32)


class Normalized(torch.nn.Module):
    """Has running statistics, and positions that it counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
        self.register_buffer("position_ids", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def load_normalized() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    with on_meta_device():
        network = Normalized()
    tensors = {name: torch.rand(tensor.shape) for name, tensor in network.norm.state_dict(prefix="norm.").items()}
    tensors["norm.num_batches_tracked"] = torch.tensor(7)
    return load_weights(network, lambda name: tensors[name], torch.bfloat16), tensors


def test_whole_numbers_keep_their_dtype_and_what_a_network_counts_is_not_read():
    network, tensors = load_normalized()
    state = network.state_dict()
    assert torch.equal(state["position_ids"], torch.arange(5))
    assert state["norm.num_batches_tracked"].dtype == torch.int64 and state["norm.num_batches_tracked"] == 7
    assert torch.equal(state["norm.running_mean"], tensors["norm.running_mean"].bfloat16())


def test_running_statistics_stay_those_of_the_checkpoint_in_training():
    network, _ = load_normalized()
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    set_train_mode(network.float())
    assert network.training
    network(torch.rand(4, 3, 2, 2)).sum().backward()
    assert all(torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in network.named_buffers())
