"""The processors that repeat those of diffusers, so that norms and rotary embedding can be fused with the rounding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, MochiAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_ltx
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from ...core.checks import Triple
from ..fp8_linear import apply_all
from .processor import Attn, Fused


class Wan(Fused):
    """Wan2.1 and 2.2. Text is attended in layers of its own."""

    stock = WanAttnProcessor
    unknown = ("encoder_hidden_states", "attention_mask")

    def self_attention(
        self, attn: Attn, hidden_states: Tensor, encoder_hidden_states: Any, image_rotary_emb: Any
    ) -> Tensor:
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = apply_all(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        # The host stores each angle's cosine and sine twice, for both channels of a pair.
        cos, sin = image_rotary_emb[0][..., 0::2], image_rotary_emb[1][..., 1::2]
        if self.fuses((attn.norm_q, attn.norm_k), q, k, v):
            norms = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight, "eps": attn.norm_q.eps}
            rope = _axis_tables(cos, sin, self.scope.current().grid)
            out = self.attend(*_split_heads(attn, q, k, v), prologue={**norms, "rope": rope})
        else:
            q, k, v = _split_heads(attn, attn.norm_q(q), attn.norm_k(k), v)
            out = self.attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        return _project_out(attn, out)


class LTXVideo(Fused):
    """LTX-Video. Text is attended in layers of its own."""

    stock = transformer_ltx.LTXVideoAttnProcessor
    unknown = ("encoder_hidden_states", "attention_mask")

    def self_attention(
        self, attn: Attn, hidden_states: Tensor, encoder_hidden_states: Any, image_rotary_emb: Any
    ) -> Tensor:
        q, k, v = apply_all(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        q = transformer_ltx.apply_rotary_emb(attn.norm_q(q), image_rotary_emb)
        k = transformer_ltx.apply_rotary_emb(attn.norm_k(k), image_rotary_emb)
        return _project_out(attn, self.attend(*_split_heads(attn, q, k, v)))


class CogVideoX(Fused):
    """CogVideoX 1.0 and 1.5. Text comes first."""

    stock = CogVideoXAttnProcessor2_0
    unknown = ("attention_mask",)

    def self_attention(
        self, attn: Attn, hidden_states: Tensor, encoder_hidden_states: Any, image_rotary_emb: Any
    ) -> tuple[Tensor, Tensor]:
        n_text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = _video_qkv(attn, x)
        if image_rotary_emb is not None:  # None in the 2B model, which has learnt positions
            rotate = partial(apply_rotary_emb, freqs_cis=image_rotary_emb, sequence_dim=1)
            q, k = (torch.cat([x[:, :n_text], rotate(x[:, n_text:])], dim=1) for x in (q, k))
        out = _project_out(attn, self.attend(q, k, v, prefix_len=n_text))
        return out[:, n_text:], out[:, :n_text]


class HunyuanVideo(Fused):
    """HunyuanVideo, dual-stream and single-stream blocks. Text comes last, padded."""

    stock = HunyuanVideoAttnProcessor2_0

    def self_attention(
        self, attn: Attn, hidden_states: Tensor, encoder_hidden_states: Any, image_rotary_emb: Any
    ) -> tuple[Tensor, Tensor]:
        n_video, n_text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        rotate = partial(apply_rotary_emb, freqs_cis=image_rotary_emb, sequence_dim=1)
        if attn.add_q_proj is None:  # a single-stream block
            x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            q, k, v = _video_qkv(attn, x)
            q, k = (torch.cat([rotate(x[:, :n_video]), x[:, n_video:]], dim=1) for x in (q, k))
        else:
            x = hidden_states
            q, k, v = _video_qkv(attn, x)
            of_text = _text_qkv(attn, encoder_hidden_states)
            q, k, v = (torch.cat(x, dim=1) for x in zip((rotate(q), rotate(k), v), of_text, strict=True))
        out = self.attend(q, k, v, suffix_len=n_text)
        video, text = out[:, :n_video], out[:, n_video:]
        if attn.to_out is not None:
            video = _project_out(attn, video)
        if attn.to_add_out is not None:
            text = attn.to_add_out(text)
        return video, text


class HunyuanVideo15(HunyuanVideo):
    """HunyuanVideo-1.5, dual-stream blocks. In each layer the host's processor writes a mask of a byte for each pair of
    tokens; this one does without.
    """

    stock = HunyuanVideo15AttnProcessor2_0


class Mochi(Fused):
    """Mochi 1. Text comes last, padded."""

    stock = MochiAttnProcessor2_0

    def self_attention(
        self, attn: Attn, hidden_states: Tensor, encoder_hidden_states: Any, image_rotary_emb: Any
    ) -> tuple[Tensor, Tensor]:
        x, n_video = hidden_states, hidden_states.shape[1]
        q, k, v = _video_qkv(attn, x)
        q, k = _rotate(q, *image_rotary_emb), _rotate(k, *image_rotary_emb)
        of_text = _text_qkv(attn, encoder_hidden_states)
        q, k, v = (torch.cat(x, dim=1) for x in zip((q, k, v), of_text, strict=True))
        out = self.attend(q, k, v, suffix_len=encoder_hidden_states.shape[1])
        video, text = _project_out(attn, out[:, :n_video]), out[:, n_video:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return video, text


FUSED: dict[str, type[Fused]] = {
    "CogVideoXTransformer3DModel": CogVideoX,
    "ConsisIDTransformer3DModel": CogVideoX,
    "HunyuanVideo15Transformer3DModel": HunyuanVideo15,
    "HunyuanVideoTransformer3DModel": HunyuanVideo,
    "LTXVideoTransformer3DModel": LTXVideo,
    "MochiTransformer3DModel": Mochi,
    "WanTransformer3DModel": Wan,
    "WanVACETransformer3DModel": Wan,
}
"""By the name of the transformer's class."""


def _split_heads(attn: Attn, *xs: Tensor) -> list[Tensor]:
    return [x.unflatten(2, (attn.heads, -1)) for x in xs]


def _video_qkv(attn: Attn, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised Q, K, V of the video's tokens, and of text that shares their weights, [B, L, H, D]."""
    q, k, v = _split_heads(attn, *apply_all(x, attn.to_q, attn.to_k, attn.to_v))
    return q if attn.norm_q is None else attn.norm_q(q), k if attn.norm_k is None else attn.norm_k(k), v


def _text_qkv(attn: Attn, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised Q, K, V of text tokens that have weights of their own, [B, L, H, D]."""
    q, k, v = _split_heads(attn, *apply_all(x, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    q = q if attn.norm_added_q is None else attn.norm_added_q(q)
    return q, k if attn.norm_added_k is None else attn.norm_added_k(k), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i + 1) of x [B, L, H, D]; cos and sin broadcast to [B, L, H, D / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def _axis_tables(cos: Tensor, sin: Tensor, grid: Triple) -> list[Tensor]:
    """Wan's angles, [1, L, 1, D / 2] each, split by axis as `norm_rope_quantize` takes them. Of the D channels,
    2 * (D // 6) are rotated by h, as many by w, the others by t.
    """
    pairs = cos.shape[3]
    of_hw = 2 * pairs // 6

    def by_axis(x: Tensor) -> list[Tensor]:
        t, h, w = x.view(*grid, pairs).split([pairs - 2 * of_hw, of_hw, of_hw], dim=3)
        return [t[:, 0, 0], h[0, :, 0], w[0, 0]]

    return [torch.stack(pair, dim=-1) for pair in zip(by_axis(cos), by_axis(sin), strict=True)]


def _project_out(attn: Attn, x: Tensor) -> Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(x))
