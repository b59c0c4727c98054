"""Keywords, weights and negative prompts of the family `pmg`, each against transformers and diffusers used directly."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from program import start
from synthetic import noise_sample
from test_pmg import write_histories
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPTextModel, CLIPTokenizer
from vision_models import save_tiny_clip

from trainer.config.compose import compose_config, to_run
from trainer.config.schema import Run
from trainer.config.sections import Export
from trainer.core.batch import Batch, collate
from trainer.core.digests import Digests
from trainer.core.errors import UsageError
from trainer.core.rng import normal
from trainer.dataset.transform import TransformedSample
from trainer.method.soft_prompt import SoftPrompt
from trainer.model.llm_unet.encoder import parse_keywords
from trainer.model.pmg import PMG
from trainer.precision import Precision
from trainer.stages.data_report import describe_long_captions

CPU = torch.device("cpu")
PROMPTS = {"target_prompt": "Item: a red cup. Keywords:", "preference_prompt": "Liked: 1. a cat. Keywords:"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> PMG:
    torch.set_num_threads(1)
    overrides = dict(text.split("=", 1) for text in PMG.save_tiny_checkpoint(tmp_path_factory.mktemp("pmg")))
    return PMG(
        path=overrides["model.path"],
        llm=overrides["model.llm"],
        max_sequence_length=64,
        keywords=True,
        keyword_tokens=6,
        negative_prompt="red",
    )


def sample_with_prompts(caption: str = "a cat", **prompts: str) -> TransformedSample:
    sample = noise_sample(caption, 32, 32)
    texts = tuple((PROMPTS | prompts).items())
    return dataclasses.replace(sample, sample=dataclasses.replace(sample.sample, texts=texts))


def encode(family: PMG, sample: TransformedSample) -> Batch:
    encoder = family.build_encoder(CPU)
    names = family.recipes(dict.fromkeys(family.components, "x"), 0)
    return collate([{name: encoder.encode(name, sample) for name in names if not name.startswith("latents")}])


def clip_states(family: PMG, text: str, length: int | None = None) -> torch.Tensor:
    tokenizer = CLIPTokenizer.from_pretrained(Path(str(family.path), "tokenizer"))
    model: Any = CLIPTextModel.from_pretrained(Path(str(family.path), "text_encoder")).eval()
    length = length or tokenizer.model_max_length
    ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).last_hidden_state


def write_greedily(family: PMG, prompt: str, count: int) -> str:
    """Returns the most probable next tokens, each found by a pass over the whole text."""
    tokenizer = AutoTokenizer.from_pretrained(family.llm)
    llm = AutoModelForCausalLM.from_pretrained(family.llm, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = llm(ids).logits[0, -1].argmax()
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token.view(1, 1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_keywords_are_what_the_language_model_writes_greedily(family: PMG):
    batch = encode(family, sample_with_prompts())
    for kind in ("target", "preference"):
        words = ", ".join(parse_keywords(write_greedily(family, PROMPTS[f"{kind}_prompt"], 6)))
        torch.testing.assert_close(batch[f"{kind}_keywords"], clip_states(family, words), rtol=0, atol=1e-5)
        assert torch.equal(batch[f"{kind}_words"][0], family.clip_token_ids(words))
        shapes = family.shapes(32, 32)
        assert all(
            tuple(batch[f"{kind}_{what}"].shape[1:]) == shapes[f"{kind}_{what}"] for what in ("words", "keywords")
        )
    dropped = encode(family, dataclasses.replace(sample_with_prompts(), drop_caption=True))
    torch.testing.assert_close(dropped["preference_keywords"], clip_states(family, ""), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "keywords"),
    [
        ("1. soft light 2. pastel, 3. Café\n", ["soft light", "pastel", "Café"]),
        ("soft light, pastel\nold film.", ["soft light", "pastel", "old film"]),
        ("", []),
    ],
)
def test_numbered_lists_and_plain_lists_are_read(text: str, keywords: list[str]):
    assert parse_keywords(text) == keywords


def test_cache_knows_what_the_keywords_were_made_from(family: PMG):
    def digest(model: PMG, **digests: str) -> str:
        return model.recipes(dict.fromkeys(family.components, "x") | digests, 0)["target_keywords"].digest

    others = [
        digest(family, llm="y"),
        digest(family, text_encoder="y"),
        digest(dataclasses.replace(family, keyword_tokens=7)),
    ]
    assert len({digest(family), *others}) == 4
    # The prompt is part of the content. Weights are applied later.
    assert family.recipes(dict.fromkeys(family.components, "x"), 0)["target_keywords"].fields == ("target_prompt",)
    sample = sample_with_prompts()
    assert sample.content_key("target_prompt") == PROMPTS["target_prompt"]
    assert digest(dataclasses.replace(family, preference_weight=2.0)) == digest(family)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_unet_attends_to_weighted_keywords_and_soft_prompt(family: PMG, weight: float | None):
    model = dataclasses.replace(family, preference_weight=weight)
    network: Any = model.load_network(torch.float32)
    SoftPrompt().attach(network, (), seed=0)
    batch, latents, t = encode(model, sample_with_prompts()), normal((1, 4, 4, 4), "x"), torch.tensor([300.0])
    with torch.no_grad():
        soft = network.encode_prompt(batch["tokens"].long(), batch["tokens_mask"].long())
        words = {
            kind: ", ".join(parse_keywords(write_greedily(family, PROMPTS[f"{kind}_prompt"], 6)))
            for kind in ("target", "preference")
        }
        factor = weight or 1.0
        states = [
            clip_states(family, words["target"]),
            factor * clip_states(family, words["preference"]),
            factor * soft,
        ]
        expected = network.unet(latents, t, encoder_hidden_states=torch.cat(states, 1)).sample
        found = model.predict(network, latents, t, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [None, 2])
def test_guidance_leads_away_from_the_negative_prompt(family: PMG, tokens: int | None):
    model = dataclasses.replace(family, keywords=False, negative_tokens=tokens)
    network: Any = model.load_network(torch.float32)
    SoftPrompt().attach(network, (), seed=0)
    samples = [noise_sample("a cat", 32, 32), dataclasses.replace(noise_sample("a cat", 32, 32), drop_caption=True)]
    batches = [encode(model, sample) for sample in samples]
    latents, t = normal((1, 4, 4, 4), "x"), torch.tensor([300.0])
    with torch.no_grad():
        expected = network.unet(latents, t, encoder_hidden_states=clip_states(family, "red", tokens)).sample
        found, positive = (model.predict(network, latents, t, batch, 6.0) for batch in reversed(batches))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        # In training a dropped caption is an empty history, whatever the negative prompt is.
        without = dataclasses.replace(model, negative_prompt=None, negative_tokens=None)
        dropped = encode(without, samples[1])
        assert torch.equal(
            model.predict(network, latents, t, batches[1]), without.predict(network, latents, t, dropped)
        )
        # A batch may hold both.
        both = collate([{name: tensor[0] for name, tensor in batch.items()} for batch in batches])
        mixed = model.predict(network, latents.expand(2, -1, -1, -1), t.expand(2), both, 6.0)
    torch.testing.assert_close(mixed, torch.cat([positive, found]), rtol=0, atol=1e-5)


def test_components_and_digests_include_the_text_encoder_only_if_it_is_read(family: PMG, tmp_path: Path):
    plain = dataclasses.replace(family, keywords=False, negative_prompt=None)
    assert plain.components == ("llm", "vae", "unet", "scheduler")
    assert family.component_digests(Digests(tmp_path)).keys() - plain.components == {"text_encoder", "tokenizer"}
    family.check_configs()


@pytest.mark.slow
def test_sampling_keeps_the_weight_with_the_best_score(tmp_path: Path):
    """The score of the paper, a x log(preference) + (1 - a) x log(target), from CLIP's own similarities."""
    from transformers import CLIPModel, CLIPProcessor

    clip = save_tiny_clip(tmp_path / "clip")
    settings = [
        "experiment=pmg_keywords",
        "precision=fp32",
        "hardware=cpu",
        *PMG.save_tiny_checkpoint(tmp_path / "tiny"),
        "model.keyword_tokens=6",
        f"dataset.path={write_histories(tmp_path / 'set', users=4)}",
        f"out={tmp_path / 'runs'}",
        "epochs=null",
        "steps=1",
        "batch=2",
        "tracking=none",
        "evaluation.images=1",
        "sample.steps=1",
        "export.formats=[]",
    ]

    def trainer(*arguments: str) -> str:
        result = start(list(arguments), tmp_path / "output.txt").wait()
        assert result.code == 0, result.output
        return result.output

    trainer(*settings)
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    search = ["sample.preference_weights=[0,1,3]", f"sample.clip={clip}", "sample.preference_share=0.25"]
    trainer("stage=sample", f"run={folder}", "sample.count=2", *search)
    model: Any = CLIPModel.from_pretrained(clip).eval()
    processor: Any = CLIPProcessor.from_pretrained(clip)
    pictures = sorted((folder / "samples").glob("*/*.png"))
    assert len(pictures) == 2
    for path in pictures:
        scores = json.loads(path.with_suffix(".json").read_text())
        tried = scores["tried"]
        assert [entry["weight"] for entry in tried] == [0, 1, 3]
        for entry in tried:
            similarities = [max(entry[name], 1e-6) for name in ("target", "preference")]
            expected = math.log(similarities[1] ** 0.25 * similarities[0] ** 0.75)
            assert entry["score"] == pytest.approx(expected)
        best = max(tried, key=lambda entry: entry["score"])
        assert scores["best"] == best["weight"]
        # The picture that was kept is the one of the best weight.
        texts = [scores["target"], scores["preference"]]
        inputs = processor(
            text=texts, images=Image.open(path), padding=True, truncation=True, max_length=12, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**inputs).logits_per_image[0] / model.logit_scale.exp()
        assert logits.tolist() == pytest.approx([best["target"], best["preference"]], abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=pmg_flickr", "model.keywords=true"], "needs dataset.target_prompt and dataset.preference_prompt"),
        (["experiment=pmg_flickr", "dataset.target_prompt='{target}'"], "unless model.keywords=true"),
        (["experiment=pmg_keywords", "evaluation.prompts=[a cat]"], "a prompt has no target_prompt"),
        (["experiment=pmg_keywords", "sample.preference_weights=[1,2]"], "needs a CLIP model"),
        (["experiment=pmg_flickr", "sample.preference_weights=[1,2]", "sample.clip=x"], "only a run"),
        (["experiment=pmg_keywords", "dataset.target_prompt='{item}'"], "dataset.target_prompt has {item}"),
        (["experiment=pmg_flickr", "model.negative_tokens=2"], "needs model.negative_prompt"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], message: str):
    with pytest.raises(UsageError, match=re.escape(message)):
        to_run(compose_config(overrides))


def test_prompts_that_the_language_model_cannot_read_whole_are_named(family: PMG):
    run = Run(model=family, method=SoftPrompt(), precision=Precision(), export=Export())
    long = sample_with_prompts(preference_prompt="x" * 80).sample
    (line,) = describe_long_captions(run, [long, sample_with_prompts().sample])
    assert line.startswith("1 texts of dataset.preference_prompt are longer than the 64 tokens") and "a cat" in line
