"""Stable Diffusion XL; see tests/families/__init__.py."""

from __future__ import annotations

from families import Published
from families.unet import UNetCase


class SDXLCase(UNetCase):
    published = {
        "base": Published(
            "stabilityai/stable-diffusion-xl-base-1.0",
            2_567_463_684,
            trainable=11_612_160,
            layers=560,
            components={"vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        )
    }
    golden = {
        "torch 2.13.0, AVX512": [
            0.9839146764228286,
            0.687204275720285,
            1.189288481432434,
            1.290379276857514,
            1.0827222386306248,
            0.5680566029395461,
            1.1299941687315491,
            0.4651890832460931,
            0.999687900041343,
            0.46190906831537815,
        ],
    }


CASE = SDXLCase()
