"""The mini Kontext: FLUX Kontext's own classes at a few million parameters, for 64 px pictures on two CPU cores.

`python -m trainer.model.mini_kontext FOLDER` makes the untrained base: a VAE trained on pictures of the demo world,
frozen random text encoders with a vocabulary of whole words, and a transformer with random weights. The trainer's own
full fine-tune then teaches the transformer (`make mini`). Findings behind the choices:

- VAE with f = 4; f = 8 at this size gives 25 dB and wrong colours. GroupNorm with one group: two channels a group wipe
  out colour. A KL weight of 1e-5 kept the pictures at 27 dB after 1,800 steps; 1e-6 gave 30 dB after 2,000.
- random text encoders suffice to tell instructions apart, provided that each word is a token of its own.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from trainer.dataset import demo
from trainer.model.mini_kontext.build import SEED, save_folder
from trainer.streams import draws, number

SIDE = 64
TEXT_LENGTH = 12
TEXT_WIDTH = 64
TRANSFORMER = {
    "in_channels": 32,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}


def words() -> list[str]:
    """Every word an instruction of the demo world can hold."""
    nouns = (*demo.SHAPES, *demo.COLOURS, *demo.BACKGROUNDS)
    verbs = ("paint", "the", "remove", "enlarge", "move", "to")
    return sorted({*nouns, *verbs, *" ".join(text for text, _ in demo.PICTURE_EDITS.values()).split()})


def pictures(split: str, start: int, count: int) -> torch.Tensor:
    """`count` pictures of the demo world, of all kinds, as (count, 3, SIDE, SIDE) in [-1, 1]."""
    images = []
    for index in range(start, start + count):
        rng = draws("vae pictures", split, index)
        kind = str(rng.choice(demo.EDITS)) if rng.random() < 0.7 else None
        control, _, target = demo.pair(kind or "mirror", f"vae {split}", index, SIDE)
        images.append(np.asarray(target if kind else control))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def trained_vae(steps: int, batch: int = 16, peak: float = 3e-3) -> torch.nn.Module:
    """A VAE trained on MSE + L1 + a small KL, float32, with the scaling that makes its latents unit normal."""
    from diffusers import AutoencoderKL

    torch.manual_seed(number(SEED, "vae"))
    vae = AutoencoderKL(
        block_out_channels=(16, 24, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIDE,
    ).to(memory_format=torch.channels_last)
    print(f"VAE: {sum(p.numel() for p in vae.parameters()):,} parameters, {steps} steps of {batch}", flush=True)
    optimizer = torch.optim.AdamW(vae.parameters(), peak, betas=(0.9, 0.99), weight_decay=1e-4)
    held_out = pictures("validation", 0, 128)
    for step in range(steps):
        rate = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * rate
        images = pictures("train", step * batch, batch).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        loss = F.mse_loss(output, images) + 0.5 * F.l1_loss(output, images) + 1e-6 * posterior.kl().float().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            with torch.no_grad():
                latents = vae.encode(held_out).latent_dist.mode()
                error = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), held_out)
            print(f"step {step}: loss {loss.item():.4f}, held-out PSNR {10 * math.log10(4 / error.item()):.2f} dB", flush=True)
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def untrained_transformer() -> torch.nn.Module:
    """A FLUX transformer of random weights, with adaLN and output projections at zero, or the first hundred steps are lost
    (Peebles & Xie 2023, adaLN-Zero)."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(number(SEED, "transformer"))
    network = FluxTransformer2DModel(**TRANSFORMER)
    for name, parameter in network.named_parameters():
        if (".norm" in name and ".linear." in name) or name.startswith(("norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(parameter)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description="make the untrained base of the mini Kontext: VAE, text encoders, transformer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae-steps", type=int, default=4500)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    vae = trained_vae(arguments.vae_steps)
    save_folder(arguments.folder, vae, untrained_transformer(), words(), text_length=TEXT_LENGTH, text_width=TEXT_WIDTH)


if __name__ == "__main__":
    main()
