"""Stable Diffusion 1.5; see tests/families/__init__.py."""

from __future__ import annotations

from families import Published
from families.unet import UNetCase


class SD15Case(UNetCase):
    published = {
        # Published for this model at rank 8: 1,594,368 of 861,115,332.
        "1.5": Published(
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            859_520_964,
            trainable=1_594_368,
            layers=128,
            components={"vae": 83_653_863, "text_encoder": 123_060_480},
        )
    }
    golden = {
        "torch 2.13.0, AVX512": [
            0.9629697546104405,
            0.11384877745714225,
            1.0629197366667653,
            0.1614411082719154,
            1.1487053808334795,
            0.16829014192755776,
            1.1617841277710894,
            0.24885483104124764,
            1.0911668724515966,
            0.14174321267481943,
        ],
    }


CASE = SD15Case()
