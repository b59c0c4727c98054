"""The mini Kontext: FLUX Kontext's own classes at a few million parameters, for 64 px pictures on two CPU cores.

`python -m trainer.model.mini_kontext FOLDER` makes the untrained base: a VAE trained on pictures of the demo world,
frozen random text encoders with a vocabulary of whole words, and a transformer with random weights. The trainer's own
full fine-tune then teaches the transformer (`make mini`). Findings behind the choices:

- VAE with f = 4; f = 8 at this size gives 25 dB and wrong colours. GroupNorm with one group: two channels a group wipe
  out colour. A KL weight of 1e-5 kept the pictures at 27 dB after 1,800 steps; 1e-6 gave 30 dB after 2,000.
- the norms of one group forget how dark a whole picture is: a decoder that had seen no dark pictures drew them at 24 dB,
  though the latents knew. Training the decoder alone on all kinds mended that and keeps the latents as they are.
- random text encoders suffice to tell instructions apart, provided that each word is a token of its own.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from trainer.core.rng import generator, seed_for
from trainer.dataset import demo
from trainer.model.mini_kontext.build import SEED, save_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

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
        rng = generator("vae pictures", split, index)
        kind = str(rng.choice(demo.EDITS)) if rng.random() < 0.7 else None
        control, _, target = demo.pair(kind or "mirror", f"vae {split}", index, SIDE)
        images.append(np.asarray(target if kind else control))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def trained_vae(steps: int, decoder_steps: int) -> AutoencoderKL:
    """A VAE in float32, with the scaling that makes its latents unit normal: trained whole, then its decoder alone."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed_for(SEED, "vae"))
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
    print(f"VAE: {sum(p.numel() for p in vae.parameters()):,} parameters", flush=True)
    fit_vae(vae, "train", steps, peak=3e-3)
    vae.encoder.requires_grad_(False)
    fit_vae(vae, "decoder", decoder_steps, peak=1e-3)
    with torch.no_grad():
        latents = vae.encode(pictures("validation", 0, 128)).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def fit_vae(vae: AutoencoderKL, split: str, steps: int, peak: float, batch: int = 16) -> None:
    """Adam with a cosine on MSE + L1 + a small KL, over pictures of `split`; what is frozen stays as it is."""
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, peak, betas=(0.9, 0.99), weight_decay=1e-4)
    held_out = pictures("validation", 0, 128)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        images = pictures(split, step * batch, batch).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        loss = F.mse_loss(output, images) + 0.5 * F.l1_loss(output, images) + 1e-6 * posterior.kl().float().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            with torch.no_grad():
                error = F.mse_loss(vae.decode(vae.encode(held_out).latent_dist.mode()).sample.clamp(-1, 1), held_out)
            print(
                f"{split} step {step}: loss {loss.item():.4f}, held-out PSNR {10 * math.log10(4 / error.item()):.2f} dB",
                flush=True,
            )


def untrained_transformer() -> torch.nn.Module:
    """A FLUX transformer of random weights, with adaLN and output projections at zero, or the first hundred steps are lost
    (Peebles & Xie 2023, adaLN-Zero)."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed_for(SEED, "transformer"))
    network = FluxTransformer2DModel(**TRANSFORMER)
    for name, parameter in network.named_parameters():
        if (".norm" in name and ".linear." in name) or name.startswith(("norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(parameter)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(
        description="make the untrained base of the mini Kontext: VAE, text encoders, transformer"
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    vae = trained_vae(arguments.vae_steps, arguments.decoder_steps)
    save_folder(arguments.folder, vae, untrained_transformer(), words(), text_length=TEXT_LENGTH, text_width=TEXT_WIDTH)


if __name__ == "__main__":
    main()
