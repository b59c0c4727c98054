"""FLUX.1 [dev]; see tests/families/__init__.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from families import Pictures, Published, Request
from families.flux_kontext import FluxKontextCase
from trainer.model.flux.tokens import pack


class FluxDevCase(FluxKontextCase):
    pictures = {"text": Pictures(guidance=3.5)}
    published = {
        "dev": Published(
            "black-forest-labs/FLUX.1-dev",
            11_901_408_320,
            trainable=9_338_880,
            layers=190,
            configs={"transformer": {"guidance_embeds": True}},
        ),
        "schnell": Published(
            "black-forest-labs/FLUX.1-schnell",
            11_891_178_560,
            trainable=9_338_880,
            layers=190,
            configs={"transformer": {"guidance_embeds": False}},
        ),
    }
    golden = {
        "torch 2.13.0, AVX512": [
            1.3189472383136787,
            0.05247904719362736,
            1.3703102048272404,
            0.05636378788388952,
            1.4327971880705328,
            0.05349610897247711,
            1.4983903322534744,
            0.06146953802258336,
            1.3565841764277267,
            0.09169206171540585,
        ],
    }

    def generate(self, pipeline: Any, request: Request) -> np.ndarray:
        return pipeline(
            prompt=list(request.captions),
            height=request.height,
            width=request.width,
            num_inference_steps=request.pictures.steps,
            guidance_scale=request.pictures.guidance,
            latents=pack(request.noise),
            max_sequence_length=request.family.text_length,
            output_type="np",
        ).images


CASE = FluxDevCase()
