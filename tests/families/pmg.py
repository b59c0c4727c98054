"""PMG; see tests/families/__init__.py. tests/test_pmg.py compares it with a language model and diffusers' pipeline."""

from __future__ import annotations

from families import Case


class PMGCase(Case):
    left_out = {
        "pictures": "no pipeline has its soft prompt; tests/test_pmg.py passes this prompt to StableDiffusionPipeline",
        "published": "its UNet is that of sd15, and the language model is any",
    }
    golden = {
        "torch 2.13.0, AVX512": [
            0.9656844530449684,
            0.1445836161101129,
            1.0418503607118974,
            0.369096909846615,
            1.1681318276588022,
            0.2802728812012267,
            1.127737031200523,
            0.7583065700815934,
            1.0969710106257191,
            0.15001804932727927,
        ],
    }


CASE = PMGCase()
