"""The processors of the video transformers of diffusers: one class per model holds all that is special to it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, MochiAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_ltx
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from ...core.checks import Triple
from ..fp8_linear import apply_all
from ..hosts import TRAIN_TIMESTEPS, host_class, patches
from .processor import Attn, Processor


class Wan(Processor):
    """Wan2.1 and 2.2, text or image to video. Text is attended in layers of its own."""

    stock = WanAttnProcessor
    unknown = ("encoder_hidden_states", "attention_mask")
    context_parallel = True

    @staticmethod
    def layers(transformer: Any) -> list[Attn]:
        return [block.attn1 for block in transformer.blocks]

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> Triple:
        return patches(inputs["hidden_states"].shape[2:], config.patch_size)

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


class LTXVideo(Processor):
    """LTX-Video, text or image to video. Text is attended in layers of its own. The forward gets packed tokens."""

    stock = transformer_ltx.LTXVideoAttnProcessor
    symbolic_dims = ()  # the grid is given as numbers
    unknown = ("encoder_hidden_states", "attention_mask")
    context_parallel = True

    @staticmethod
    def layers(transformer: Any) -> list[Attn]:
        return [block.attn1 for block in transformer.transformer_blocks]

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> Triple:
        frames, height, width = (inputs.get(name) for name in ("num_frames", "height", "width"))
        if frames is None or height is None or width is None:
            raise ValueError(
                f"num_frames, height, width: {(frames, height, width)} must all be given to "
                f"LTXVideoTransformer3DModel; without them its packed tokens have no grid (LTXConditionPipeline gives "
                f"coordinates instead and is not supported)"
            )
        return frames, height, width

    def self_attention(
        self, attn: Attn, hidden_states: Tensor, encoder_hidden_states: Any, image_rotary_emb: Any
    ) -> Tensor:
        q, k, v = apply_all(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        q = transformer_ltx.apply_rotary_emb(attn.norm_q(q), image_rotary_emb)
        k = transformer_ltx.apply_rotary_emb(attn.norm_k(k), image_rotary_emb)
        return _project_out(attn, self.attend(*_split_heads(attn, q, k, v)))


class CogVideoX(Processor):
    """CogVideoX 1.0 and 1.5, text or image to video. Text comes first; the host treats none of it as padding."""

    stock = CogVideoXAttnProcessor2_0
    symbolic_dims = (1, 3, 4)  # [B, T, C, H, W]
    unknown = ("attention_mask",)

    @staticmethod
    def layers(transformer: Any) -> list[Attn]:
        return [block.attn1 for block in transformer.transformer_blocks]

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> Triple:
        frames, _, height, width = inputs["hidden_states"].shape[1:]
        p = config.patch_size
        return patches((frames, height, width), (config.patch_size_t or 1, p, p))

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


class HunyuanVideo(Processor):
    """HunyuanVideo, text or image to video. Text comes last, padded. Dual-stream blocks run before single-stream."""

    stock = HunyuanVideoAttnProcessor2_0

    @staticmethod
    def layers(transformer: Any) -> list[Attn]:
        return [x.attn for x in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> Triple:
        p = config.patch_size
        return patches(inputs["hidden_states"].shape[2:], (config.patch_size_t, p, p))

    @staticmethod
    def text_valid(inputs: dict[str, Any]) -> Tensor:
        # The host reads only the sum of its mask, and takes that many tokens from the start.
        return inputs["encoder_attention_mask"].sum(1, dtype=torch.int32)

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


class Mochi(Processor):
    """Mochi 1. Text comes last, padded. Timesteps run from 0 (noise) to 1000 (clean)."""

    stock = MochiAttnProcessor2_0
    symbolic_dims = ()  # the host makes positions by torch.linspace, whose length is a constant

    @staticmethod
    def layers(transformer: Any) -> list[Attn]:
        return [block.attn1 for block in transformer.transformer_blocks]

    @staticmethod
    def grid(config: Any, inputs: dict[str, Any]) -> Triple:
        return patches(inputs["hidden_states"].shape[2:], (1, config.patch_size, config.patch_size))

    @staticmethod
    def text_valid(inputs: dict[str, Any]) -> Tensor:
        mask = inputs["encoder_attention_mask"].bool()
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError(
                "encoder_attention_mask: has a real token after padding; real tokens must come first, as tokenizers "
                "put them with padding_side='right'"
            )
        return mask.sum(1, dtype=torch.int32)

    @staticmethod
    def sigma(timestep: Tensor) -> Tensor:
        return 1 - timestep / TRAIN_TIMESTEPS

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


MODELS: dict[type, type[Processor]] = {
    CogVideoXTransformer3DModel: CogVideoX,
    HunyuanVideoTransformer3DModel: HunyuanVideo,
    LTXVideoTransformer3DModel: LTXVideo,
    MochiTransformer3DModel: Mochi,
    WanTransformer3DModel: Wan,
}


def model_of(transformer: nn.Module) -> type[Processor] | None:
    """The processor class for a transformer; None if there is none."""
    return MODELS.get(host_class(transformer))


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
