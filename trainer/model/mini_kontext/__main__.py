"""The mini Kontext: FLUX Kontext's own classes at a few million parameters, for 64 px pictures on two CPU cores.

`python -m trainer.model.mini_kontext FOLDER` makes the untrained base: a VAE trained on pictures of the demo world,
frozen random text encoders with a vocabulary of whole words, and a transformer with random weights. The trainer's own
full fine-tune then teaches the transformer (`make mini`). Findings behind the choices:

- VAE with f = 4; f = 8 at this size gives 25 dB and wrong colours. GroupNorm with one group: two channels a group wipe
  out colour.
- random text encoders suffice to tell instructions apart, provided that each word is a token of its own.
- AdaLN and output projections start at zero (Peebles & Xie 2023, adaLN-Zero), or the first hundred steps are lost.
"""

from __future__ import annotations

import argparse
import json
import math
import string
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from trainer.dataset import demo
from trainer.streams import draws, number

SIDE = 64
TEXT_LENGTH = 12
TEXT_WIDTH = 64
SEED = 1


def words() -> list[str]:
    """Every word an instruction of the demo world can hold."""
    nouns = (*demo.SHAPES, *demo.COLOURS, *demo.BACKGROUNDS)
    verbs = "paint the remove enlarge move to".split()
    return sorted({*nouns, *verbs, *" ".join(text for text, _ in demo.PICTURE_EDITS.values()).split()})


def save_tokenizers(folder: Path) -> tuple[int, int]:
    """A CLIP and a T5 tokenizer with whole words, and single characters for all else; returns the vocabulary sizes."""
    from transformers import CLIPTokenizer, T5Tokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    ends = ("<|startoftext|>", "<|endoftext|>")
    pieces, merges = [*characters, *(f"{c}</w>" for c in characters)], []
    for word in words():
        left = word[0]
        for i, character in enumerate(word[1:], 2):
            right = character if i < len(word) else f"{character}</w>"
            if (left, right) not in merges:
                merges.append((left, right))
                pieces.append(left + right)
            left += right
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*ends, *pieces]))}
    clip = CLIPTokenizer(vocabulary, merges, model_max_length=TEXT_LENGTH)
    clip.save_pretrained(folder / "tokenizer")

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    whole = [(f"▁{word}", -1.0) for word in words()]
    single = [(c, -4.0) for c in dict.fromkeys(characters + string.ascii_uppercase)]
    t5 = T5Tokenizer(vocab=[*special, *whole, *single], extra_ids=0, model_max_length=TEXT_LENGTH)
    t5.save_pretrained(folder / "tokenizer_2")
    return len(vocabulary), len(special) + len(whole) + len(single)


def save_text_encoders(folder: Path, clip_words: int, t5_words: int) -> None:
    """Frozen random CLIP and T5 encoders of width `TEXT_WIDTH`; large initial weights keep different words far apart."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(number(SEED, "text encoders"))
    shape = {"hidden_size": TEXT_WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPTextConfig(
        vocab_size=clip_words,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_factor=3.0,
        **shape,
    )
    CLIPTextModel(clip).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    t5 = T5Config(
        vocab_size=t5_words,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        initializer_factor=3.0,
    )
    T5EncoderModel(t5).to(torch.bfloat16).save_pretrained(folder / "text_encoder_2")


def save_transformer(folder: Path) -> None:
    """A FLUX transformer of some 2.4 M random parameters, adaLN and output projections at zero."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(number(SEED, "transformer"))
    network = FluxTransformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in network.named_parameters():
        if ".norm" in name and ".linear." in name or name.startswith(("norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(parameter)
    network.to(torch.bfloat16).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")


def pictures(split: str, start: int, count: int) -> torch.Tensor:
    """`count` pictures of the demo world, of all kinds, as (count, 3, SIDE, SIDE) in [-1, 1]."""
    images = []
    for index in range(start, start + count):
        rng = draws("vae pictures", split, index)
        kind = str(rng.choice(demo.EDITS)) if rng.random() < 0.7 else None
        control, _, target = demo.pair(kind or "mirror", f"vae {split}", index, SIDE)
        images.append(np.asarray(target if kind else control))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_vae(folder: Path, steps: int, batch: int = 16, peak: float = 3e-3) -> None:
    """Train the VAE on MSE + L1 + a small KL and save it in float32 with the scaling that makes its latents unit normal."""
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
    vae.eval().save_pretrained(folder / "vae")


def save_index(folder: Path) -> None:
    """The file by which diffusers' FluxKontextPipeline loads the folder."""
    classes = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5Tokenizer"),
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "image_encoder": (None, None),
        "feature_extractor": (None, None),
    }
    index = {"_class_name": "FluxKontextPipeline", "_diffusers_version": "0.42.1", **classes}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="make the untrained base of the mini Kontext: VAE, text encoders, transformer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae-steps", type=int, default=5000)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    save_text_encoders(arguments.folder, *save_tokenizers(arguments.folder))
    save_transformer(arguments.folder)
    save_index(arguments.folder)
    save_vae(arguments.folder, arguments.vae_steps)


if __name__ == "__main__":
    main()
