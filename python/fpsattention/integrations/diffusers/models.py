"""The processors that repeat those of diffusers, so that norms and rotary embedding can be fused with the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, MochiAttnProcessor2_0
from diffusers.models.transformers import transformer_ltx
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from ...core.checks import Triple
from ..fp8_linear import apply_all
from .fused import Fused, Rope, Stream
from .processor import Attn


class AxisRope(Rope):
    """Wan's: of the D channels, 2 * (D // 6) are rotated by h, as many by w, the others by t."""

    def tables(self, grid: Triple) -> list[Tensor]:
        """Those of each axis."""
        pairs = self.cos.shape[2]
        of_hw = 2 * pairs // 6

        def by_axis(x: Tensor) -> list[Tensor]:
            t, h, w = x.view(*grid, pairs).split([pairs - 2 * of_hw, of_hw, of_hw], dim=3)
            return [t[:, 0, 0], h[0, :, 0], w[0, 0]]

        return [torch.stack(pair, dim=-1) for pair in zip(by_axis(self.cos), by_axis(self.sin), strict=True)]


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
        rope = AxisRope(image_rotary_emb[0][0, ..., 0::2], image_rotary_emb[1][0, ..., 1::2])
        video = _stream(attn, (q, k, v), attn.norm_q, attn.norm_k)
        return _project_out(attn, self.attend_streams(video, rope=rope))


class LTXVideo(Fused):
    """LTX-Video. Text is attended in layers of its own."""

    stock = transformer_ltx.LTXVideoAttnProcessor
    unknown = ("encoder_hidden_states", "attention_mask")

    def self_attention(
        self, attn: Attn, hidden_states: Tensor, encoder_hidden_states: Any, image_rotary_emb: Any
    ) -> Tensor:
        # Angles are of the channels of all heads, and those of the first sample are those of all (`descriptions`).
        cos, sin = (x[0, :, 0::2].unflatten(1, (attn.heads, -1)) for x in image_rotary_emb)
        out = self.attend_streams(_video_stream(attn, hidden_states), rope=Rope(cos, sin))
        return _project_out(attn, out)


class CogVideoX(Fused):
    """CogVideoX 1.0 and 1.5. Text comes first."""

    stock = CogVideoXAttnProcessor2_0
    unknown = ("attention_mask",)

    def self_attention(
        self, attn: Attn, hidden_states: Tensor, encoder_hidden_states: Any, image_rotary_emb: Any
    ) -> tuple[Tensor, Tensor]:
        n_text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        out = self.attend_streams(_video_stream(attn, x), rope=_rope(image_rotary_emb), prefix_len=n_text)
        out = _project_out(attn, out)
        return out[:, n_text:], out[:, :n_text]


class HunyuanVideo(Fused):
    """HunyuanVideo, dual-stream and single-stream blocks. Text comes last, padded."""

    stock = HunyuanVideoAttnProcessor2_0

    def self_attention(
        self, attn: Attn, hidden_states: Tensor, encoder_hidden_states: Any, image_rotary_emb: Any
    ) -> tuple[Tensor, Tensor]:
        n_video, n_text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        rope = _rope(image_rotary_emb)
        if attn.add_q_proj is None:  # a single-stream block
            x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            out = self.attend_streams(_video_stream(attn, x), rope=rope, suffix_len=n_text)
        else:
            streams = _video_stream(attn, hidden_states), _text_stream(attn, encoder_hidden_states)
            out = self.attend_streams(*streams, rope=rope)
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
        n_video = hidden_states.shape[1]
        streams = _video_stream(attn, hidden_states), _text_stream(attn, encoder_hidden_states)
        out = self.attend_streams(*streams, rope=Rope(*image_rotary_emb))
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


def _stream(attn: Attn, qkv: Sequence[Tensor], norm_q: Any, norm_k: Any) -> Stream:
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in qkv)
    return Stream(q, k, v, norm_q, norm_k)


def _video_stream(attn: Attn, x: Tensor) -> Stream:
    """The video's tokens, and text that shares their weights."""
    return _stream(attn, apply_all(x, attn.to_q, attn.to_k, attn.to_v), attn.norm_q, attn.norm_k)


def _text_stream(attn: Attn, x: Tensor) -> Stream:
    """Text tokens that have weights of their own."""
    qkv = apply_all(x, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return _stream(attn, qkv, attn.norm_added_q, attn.norm_added_k)


def _rope(image_rotary_emb: Any) -> Rope | None:
    """From cosines and sines [L, D], each twice, for both channels of a pair. None for learnt positions."""
    if image_rotary_emb is None:
        return None
    cos, sin = (x[:, None, 0::2] for x in image_rotary_emb)
    return Rope(cos, sin)


def _project_out(attn: Attn, x: Tensor) -> Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(x))
