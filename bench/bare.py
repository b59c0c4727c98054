"""The baseline of the benchmark: LoRA training of a FLUX Kontext, written for this one case in at most sixty lines.

`python bench/bare.py FOLDER TENSORS BATCH STEPS` trains the transformer in FOLDER on the cached tensors (N, ...) of the
safetensors file TENSORS.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file


def pack(x: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C)."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * w // 2, c * 4)


def train(folder: Path, tensors: Path, batch: int, steps: int, lr: float = 2e-3) -> Iterator[int]:
    """Yields the number of each step after its update."""
    torch.manual_seed(0)
    data = load_file(tensors)
    latents, control, prompt, pooled = (data[name].float() for name in ("latents", "control", "prompt", "pooled"))
    count, _, height, width = latents.shape
    latents, control = pack(latents), pack(control)
    tokens = latents.shape[1]
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2).float()
    image_ids = torch.cat([torch.cat([grid.new_full((tokens, 1), image), grid], 1) for image in (0, 1)])
    text_ids = torch.zeros(prompt.shape[1], 3)
    network = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for step in range(1, steps + 1):
        indices = torch.randint(count, (batch,))
        clean, t = latents[indices], torch.sigmoid(torch.randn(batch))
        noise = torch.randn_like(clean)
        noisy = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
        inputs = torch.cat([noisy, control[indices]], 1)
        output = network(inputs, prompt[indices], pooled[indices], t, image_ids, text_ids, return_dict=False)[0]
        torch.nn.functional.mse_loss(output[:, :tokens], noise - clean).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        yield step


if __name__ == "__main__":
    for _ in train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])):
        pass
