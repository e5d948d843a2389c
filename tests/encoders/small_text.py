"""Small CLIP and T5 text networks with tokenizers, in folders as diffusers' SD3 pipeline has them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<start>", "<end>", "!", "<unk>", *"a red green apple car on the road of melon".split()]
LENGTH = 9


def write_tokenizer(folder: Path, pad: str, start: str | None) -> None:
    """One token per word, an end token, perhaps a start token."""
    vocab = {word: number for number, word in enumerate([*WORDS, "<last>"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<start> $A <last>" if start else "$A <last>"
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<start>", 0), ("<last>", len(WORDS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<last>", pad_token=pad, unk_token="<unk>", model_max_length=LENGTH
    )
    tokenizer.save_pretrained(folder)


def clip(width: int, projection: int, pad: str, activation: str) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projection,
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        eos_token_id=len(WORDS),
        pad_token_id=WORDS.index(pad) if pad in WORDS else len(WORDS),
        bos_token_id=0,
    )
    return CLIPTextModelWithProjection(config).eval()


def t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(WORDS) + 1,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=2,
        eos_token_id=len(WORDS),
    )
    return T5EncoderModel(config).eval()


def write_three(folder: Path) -> Path:
    """CLIP (12, 12), CLIP (20, 16) and T5 (40) with their tokenizers."""
    torch.manual_seed(0)
    networks = (clip(12, 12, "<last>", "quick_gelu"), clip(20, 16, "!", "gelu"), t5(40))
    for number, (network, pad, start) in enumerate(
        zip(networks, ("<last>", "!", "!"), ("<start>", "<start>", None), strict=True)
    ):
        suffix = f"_{number + 1}" if number else ""
        with torch.no_grad():  # the small initial weights of T5 and CLIP would hide differences
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        network.save_pretrained(folder / f"text_encoder{suffix}")
        write_tokenizer(folder / f"tokenizer{suffix}", pad, start)
    return folder
