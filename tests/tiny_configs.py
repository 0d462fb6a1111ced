"""Configs of diffusers' video transformers with heads of 64 channels and few layers.

What differs between users of a class (channels of the latent, most text tokens) is theirs to add.
"""

from __future__ import annotations

TEXT_DIM = 32

HEADS = {"num_attention_heads": 2, "attention_head_dim": 64}
FOUR_CHANNELS = {"in_channels": 4, "out_channels": 4}

WAN = HEADS | {
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}

# Shared by HunyuanVideo, Framepack, HunyuanVideo-1.5 and Motif-Video.
HUNYUAN_LIKE = (
    HEADS
    | FOUR_CHANNELS
    | {
        "num_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT_DIM,
        "rope_axes_dim": (16, 24, 24),
    }
)
HUNYUAN = HUNYUAN_LIKE | {"num_single_layers": 1, "pooled_projection_dim": 16}

COGVIDEOX = (
    HEADS
    | FOUR_CHANNELS
    | {
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_DIM,
        "num_layers": 2,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": 9,
        "use_rotary_positional_embeddings": True,
    }
)

MOCHI = HEADS | {
    "num_layers": 2,
    "pooled_projection_dim": 16,
    "in_channels": 4,
    "text_embed_dim": TEXT_DIM,
    "time_embed_dim": 8,
}


def ltx(heads: int = 2) -> dict:
    """The cross-attention is as wide as the model."""
    return HEADS | {
        "num_attention_heads": heads,
        "cross_attention_dim": 64 * heads,
        "num_layers": 2,
        "caption_channels": TEXT_DIM,
    }
