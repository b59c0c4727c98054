"""Makes the untrained base of the mini Kontext: `python -m trainer.model.mini_kontext FOLDER`.

The mini Kontext has the classes of FLUX Kontext with a few million parameters, for images of 64 px on two CPU cores.
Its base is a VAE trained on images of the demo world, frozen random text encoders with whole words as tokens, and a
transformer with random weights. A full fine-tune with this program then trains the transformer (`make mini`).

Findings behind the choices:

- The VAE reduces sides by f = 4; f = 8 at this size gives 25 dB and wrong colors. GroupNorm has one group: with two
  channels per group, it removes color. A KL weight of 1e-5 kept the images at 27 dB after 1,800 steps; 1e-6 gave
  30 dB after 2,000.
- With one group, the norms discard how dark a whole image is. A decoder that had seen no dark images decoded them at
  24 dB, although the latents held the brightness. Training only the decoder on all kinds of images fixed that, and
  kept the latents as they are.
- Random text encoders suffice to tell instructions apart, provided that each word is a token of its own.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer.core.rng import generator, seed_for
from trainer.dataset import demo_world
from trainer.model.flux.layout import save_checkpoint
from trainer.model.tiny_components import SEED, build_vae

SIDE = 64
"""Side of the images in pixels."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description="make the untrained base of the mini Kontext: VAE, text encoders, transformer"
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    vae = train_vae(arguments.vae_steps, arguments.decoder_steps)
    save_checkpoint(
        arguments.folder,
        vae,
        build_transformer(),
        demo_words(),
        text_length=TEXT_LENGTH,
        text_width=TEXT_WIDTH,
    )


def demo_words() -> list[str]:
    """Returns every word that an instruction of the demo world can contain."""
    nouns = (*demo_world.SHAPES, *demo_world.COLORS, *demo_world.BACKGROUNDS)
    verbs = ("paint", "the", "remove", "enlarge", "move", "to")
    return sorted({*nouns, *verbs, *" ".join(text for text, _ in demo_world.IMAGE_EDITS.values()).split()})


def demo_images(split: str, start: int, count: int) -> torch.Tensor:
    """Returns `count` images of the demo world, of all kinds, as (count, 3, SIDE, SIDE) in [-1, 1]."""
    images = []
    for index in range(start, start + count):
        rng = generator("vae pictures", split, index)
        kind = str(rng.choice(demo_world.EDITS)) if rng.random() < 0.7 else None
        control, _, target = demo_world.render_pair(kind or "mirror", f"vae {split}", index, SIDE)
        images.append(np.asarray(target if kind else control))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(steps: int, decoder_steps: int) -> Any:
    """Returns a float32 VAE, trained as a whole and then its decoder alone, that scales its latents to unit normal."""
    torch.manual_seed(seed_for(SEED, "vae"))
    vae = build_vae(
        (16, 24, 48), latent_channels=8, use_quant_conv=False, use_post_quant_conv=False, sample_size=SIDE
    ).to(memory_format=torch.channels_last)
    print(f"VAE: {sum(p.numel() for p in vae.parameters()):,} parameters", flush=True)
    fit_vae(vae, "train", steps, peak_lr=3e-3)
    vae.encoder.requires_grad_(False)
    fit_vae(vae, "decoder", decoder_steps, peak_lr=1e-3)
    with torch.no_grad():
        latents = vae.encode(demo_images("validation", 0, 128)).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def fit_vae(vae: Any, split: str, steps: int, peak_lr: float, batch: int = 16) -> None:
    """Trains the parameters that require gradients on images of `split`, with AdamW and a cosine schedule.

    The loss is MSE + L1 + a small KL term.
    """
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, peak_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    held_out = demo_images("validation", 0, 128)
    for step in range(steps):
        warmup, cosine = min(1, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak_lr * warmup * cosine
        images = demo_images(split, step * batch, batch).contiguous(memory_format=torch.channels_last)
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
                decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample.clamp(-1, 1)
            psnr = 10 * math.log10(4 / F.mse_loss(decoded, held_out).item())
            print(f"{split} step {step}: loss {loss.item():.4f}, held-out PSNR {psnr:.2f} dB", flush=True)


def build_transformer() -> Any:
    """Returns a FLUX transformer with random weights.

    AdaLN and output projections start at zero (adaLN-Zero, Peebles & Xie 2023); otherwise the first hundred steps are
    lost.
    """
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed_for(SEED, "transformer"))
    transformer: Any = FluxTransformer2DModel(**TRANSFORMER)
    for name, parameter in transformer.named_parameters():
        if (".norm" in name and ".linear." in name) or name.startswith(("norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(parameter)
    return transformer


if __name__ == "__main__":
    main()
