"""A language model and a denoiser with few layers and random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.model.sd15 import SD15
from trainer.model.unet import tiny


def save(denoiser: Path, llm: Path) -> None:
    """The denoiser's folder and that of a LLaMA that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tiny.save(denoiser, SD15)
    vocabulary = {
        piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    bytewise = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytewise.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(llm)
    torch.manual_seed(tiny.SEED)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(llm)
