"""A whole Wan pipeline in a folder, as a download would be: tokenizer, text encoder, VAE and transformer, all small."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import tiny_diffusers as tiny

WORDS = ("a", "red", "fox", "runs", "through", "tall", "grass", "at", "dawn")


def transformer() -> diffusers.WanTransformer3DModel:
    """Attends to few tokens and changes much by it, as trained models do and random ones do not: windows matter."""
    made = tiny.wan_transformer()
    with torch.no_grad():
        for block in made.blocks:
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.mul_(1.5)
            for linear in (block.attn1.to_v, block.attn1.to_out[0]):
                linear.weight.mul_(4)
    return made


def save_wan(folder: Path, **parts) -> Path:
    """Save the pipeline, with these parts in place of its own or beside them."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"d_model": tiny.TEXT_DIM, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    own = {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"),
        "text_encoder": UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), **sizes)).eval(),
        "vae": tiny.wan_vae(),
        "scheduler": tiny.flow(),
        "transformer": transformer(),
    }
    diffusers.WanPipeline(**own | parts).save_pretrained(folder)
    return folder
