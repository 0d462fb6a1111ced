"""The video transformers of diffusers that FPSAttention runs in, and those that it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.checks import Triple
from ..hosts import TRAIN_TIMESTEPS, host_class, patches
from .description import Description, Inputs
from .processor import Attn


def _attention_in(block_lists: str, attention: str, transformer: Any) -> list[Attn]:
    """The attention modules of that name in the blocks of these lists, one list after another."""
    blocks = [block for name in block_lists.split() for block in getattr(transformer, name)]
    return [block.get_submodule(attention) for block in blocks]


def _each(block_lists: str, attention: str = "attn1") -> Callable[[Any], list[Attn]]:
    return partial(_attention_in, block_lists, attention)  # pickles, as a closure does not


def _triple_patches(config: Any, inputs: Inputs) -> Triple:
    """Of a latent [B, C, T, H, W] and a patch (T, H, W)."""
    return patches(inputs["hidden_states"].shape[2:], config.patch_size)


def _square_patches(config: Any, inputs: Inputs) -> Triple:
    """Of a latent [B, C, T, H, W] and a patch with one number for height and width."""
    p = config.patch_size
    return patches(inputs["hidden_states"].shape[2:], (config.get("patch_size_t") or 1, p, p))


def _frames_first(config: Any, inputs: Inputs) -> Triple:
    """Of a latent [B, T, C, H, W]."""
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    p = config.patch_size
    patch = (config.get("patch_size_t") or 1, p, p) if isinstance(p, int) else p
    return patches((frames, height, width), patch)


def _channels_last(config: Any, inputs: Inputs) -> Triple:
    """Of a latent [B, T, H, W, C]."""
    return patches(inputs["hidden_states"].shape[1:4], config.patch_size)


def _given(config: Any, inputs: Inputs) -> Triple:
    """Of packed tokens, of which the forward is told the grid."""
    frames, height, width = (inputs.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or height is None or width is None:
        raise ValueError(
            f"num_frames, height, width: {(frames, height, width)} must all be given to LTX's transformers; without "
            f"them the packed tokens have no grid (LTXConditionPipeline gives coordinates instead and is not supported)"
        )
    return frames, height, width


def _given_alike(config: Any, inputs: Inputs) -> Triple:
    """Of packed tokens of LTX-Video, whose samples all have the same coordinates."""
    coords = inputs.get("video_coords")
    if coords is not None and len(coords) > 1:
        raise ValueError(
            f"video_coords: of {len(coords)} samples were given, which may differ; leave them out, so that num_frames, "
            f"height and width hold for all"
        )
    return _given(config, inputs)


def _length_of(names: tuple[str, ...], config: Any, inputs: Inputs) -> int:
    """The tokens of those arguments [B, L, C] that are given."""
    return sum(inputs[name].shape[1] for name in names if inputs.get(name) is not None)


def _lengths(*names: str) -> Callable[[Any, Inputs], int]:
    return partial(_length_of, names)


def _count(config: Any, inputs: Inputs) -> Tensor:
    """HunyuanVideo reads only the sum of its mask, and takes that many tokens from the start."""
    return inputs["encoder_attention_mask"].sum(1, dtype=torch.int32)


def _leading(config: Any, inputs: Inputs) -> Tensor | None:
    """Of a mask of real text tokens, which must come first."""
    mask = inputs.get("encoder_attention_mask")
    if mask is None:
        return None
    mask = mask.bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            "encoder_attention_mask: has a real token after padding; real tokens must come first, as tokenizers put "
            "them with padding_side='right'"
        )
    return mask.sum(1, dtype=torch.int32)


def _motif_valid(config: Any, inputs: Inputs) -> Tensor | None:
    """An image's tokens come before the text's, and all of them are real."""
    text, image = _leading(config, inputs), inputs.get("image_embeds")
    return text if text is None or image is None else text + image.shape[1]


def _hunyuan15_valid(config: Any, inputs: Inputs) -> Tensor:
    """The host puts real tokens first. Those of an image of zeros are padding."""
    image = inputs["image_embeds"]
    masks = (inputs["encoder_attention_mask"], inputs["encoder_attention_mask_2"])
    text = sum(mask.bool().sum(1, dtype=torch.int32) for mask in masks)
    return text + (image != 0).any() * image.shape[1]


def _framepack_valid(config: Any, inputs: Inputs) -> Tensor | None:
    """A single sample comes without its padding. The image's tokens come before the text's."""
    if len(inputs["hidden_states"]) == 1:
        return None
    return _count(config, inputs) + inputs["image_embeds"].shape[1]


def _framepack_after(config: Any, inputs: Inputs) -> int:
    image, mask = inputs["image_embeds"], inputs["encoder_attention_mask"]
    return image.shape[1] + (int(mask.sum()) if len(inputs["hidden_states"]) == 1 else mask.shape[1])


def _history_of(names: tuple[str, ...], config: Any, inputs: Inputs) -> int:
    """Tokens of earlier frames, in patches of three sizes; the host pads what they do not divide."""
    total = 0
    for name, patch in zip(names, ((1, 2, 2), (2, 4, 4), (4, 8, 8)), strict=True):
        if inputs.get(name) is not None and inputs.get(f"indices_{name}") is not None:
            size = inputs[name].shape[2:]
            total += math.prod(-(-n // p) for n, p in zip(size, patch, strict=True))
    return total


def _history(*names: str) -> Callable[[Any, Inputs], int]:
    return partial(_history_of, names)


def _motif_layers(transformer: Any) -> list[Attn]:
    """Not those of its decoder, which attend the latent and its encoding side by side."""
    single = transformer.single_transformer_blocks
    encoder = single[: len(single) - transformer.num_decoder_layers]
    return [block.attn for block in (*transformer.transformer_blocks, *encoder)]


def _mochi_sigma(config: Any, timestep: Tensor) -> Tensor:
    """Mochi's timesteps run from 0 (noise) to 1000 (clean)."""
    return 1 - timestep / TRAIN_TIMESTEPS


def _cosmos_sigma(config: Any, timestep: Tensor) -> Tensor:
    """Cosmos 1.0, which alone has learnt positions, gets ln(s) / 4 of EDM's noise level s; others get s / (1 + s)."""
    if config.extra_pos_embed_type is None:
        return timestep
    return torch.sigmoid(4 * timestep)


_WAN: dict[str, Any] = {"grid": _triple_patches, "symbolic_dims": (2, 3, 4)}

DESCRIPTIONS: dict[str, Description] = {
    "AnyFlowTransformer3DModel": Description(
        layers=_each("blocks"), grid=_frames_first, symbolic_dims=(1, 3, 4)
    ),
    "ChronoEditTransformer3DModel": Description(layers=_each("blocks"), **_WAN),
    "CogVideoXTransformer3DModel": Description(
        layers=_each("transformer_blocks"),
        grid=_frames_first,
        before=_lengths("encoder_hidden_states"),
        symbolic_dims=(1, 3, 4),
    ),
    "ConsisIDTransformer3DModel": Description(
        layers=_each("transformer_blocks"),
        grid=_frames_first,
        before=_lengths("encoder_hidden_states"),
        symbolic_dims=(1, 3, 4),
    ),
    "CosmosTransformer3DModel": Description(
        layers=_each("transformer_blocks"),
        grid=_triple_patches,
        sigma=_cosmos_sigma,
        symbolic_dims=(2, 3, 4),
        note="in pipelines of Cosmos 2 and 2.5 enable the transformer alone",
    ),
    "EasyAnimateTransformer3DModel": Description(
        layers=_each("transformer_blocks"),
        grid=_square_patches,
        before=_lengths("encoder_hidden_states", "encoder_hidden_states_t5"),
    ),
    "HeliosTransformer3DModel": Description(
        layers=_each("blocks"),
        grid=_triple_patches,
        before=_history("latents_history_short", "latents_history_mid", "latents_history_long"),
    ),
    "HunyuanVideo15Transformer3DModel": Description(
        layers=_each("transformer_blocks", "attn"),
        grid=_square_patches,
        after=_lengths("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states"),
        valid=_hunyuan15_valid,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Description(
        layers=_each("transformer_blocks single_transformer_blocks", "attn"),
        grid=_square_patches,
        before=_history("latents_clean", "latents_history_2x", "latents_history_4x"),
        after=_framepack_after,
        valid=_framepack_valid,
    ),
    "HunyuanVideoTransformer3DModel": Description(
        layers=_each("transformer_blocks single_transformer_blocks", "attn"),
        grid=_square_patches,
        after=_lengths("encoder_hidden_states"),
        valid=_count,
        symbolic_dims=(2, 3, 4),
    ),
    "Kandinsky5Transformer3DModel": Description(
        layers=_each("visual_transformer_blocks", "self_attention"),
        grid=_channels_last,
        note="not with its own sparse attention (NABLA)",
    ),
    "Kandinsky6Transformer3DModel": Description(
        layers=_each("visual_transformer_blocks", "video_dec_block.self_attention"), grid=_channels_last
    ),
    "LTX2VideoTransformer3DModel": Description(
        layers=_each("transformer_blocks"),
        grid=_given,
        may_skip=True,  # in its spatio-temporal guidance
        note="audio keeps the host's own attention",
    ),
    "LTXVideoTransformer3DModel": Description(
        layers=_each("transformer_blocks"), grid=_given_alike, context_parallel=True
    ),
    "MochiTransformer3DModel": Description(
        layers=_each("transformer_blocks"),
        grid=_square_patches,
        after=_lengths("encoder_hidden_states"),
        valid=_leading,
        sigma=_mochi_sigma,
        one_by_one=True,
    ),
    "MotifVideoTransformer3DModel": Description(
        layers=_motif_layers,
        grid=_square_patches,
        after=_lengths("image_embeds", "encoder_hidden_states"),
        valid=_motif_valid,
        symbolic_dims=(2, 3, 4),
        note="its decoder layers keep the host's own attention",
    ),
    "SkyReelsV2Transformer3DModel": Description(
        layers=_each("blocks"), note="not with causal blocks of frames (num_frame_per_block > 1)", **_WAN
    ),
    "WanAnimateTransformer3DModel": Description(layers=_each("blocks"), grid=_triple_patches),
    "WanTransformer3DModel": Description(layers=_each("blocks"), context_parallel=True, **_WAN),
    "WanVACETransformer3DModel": Description(
        layers=_each("vace_blocks blocks"), note="the layers of vace_blocks count first", **_WAN
    ),
}
"""By the name of the transformer's class in diffusers."""

REFUSED: dict[str, str] = {
    "AllegroTransformer3DModel": "its heads have 96 channels; the kernels take 64 and 128",
    "AnyFlowFARTransformer3DModel": "its attention is causal from chunk to chunk of frames",
    "Cosmos3OmniTransformer": "its video tokens attend text that does not attend them, and its heads are grouped",
    "JoyImageEditPlusTransformer3DModel": "it makes images",
    "JoyImageEditTransformer3DModel": "it makes images",
    "Kandinsky6SRTransformer3DModel": "its attention is sparse itself (NABLA)",
    "LatteTransformer3DModel": "it attends space and time apart, never a 3D grid",
    "MiniMaxH3Transformer3DModel": "its forward gets packed rows, and is not told the video's grid in them",
    "SanaVideoTransformer3DModel": "its self-attention is linear",
    "SanaWMLTX2RefinerTransformer3DModel": "its queries attend the keys of earlier windows too, from a cache",
    "SanaWMTransformer3DModel": "most of its self-attention is linear, and the rest has no processor",
    "WanAnimate2Transformer3DModel": "its video tokens attend reference tokens that do not attend them, by a mask",
}
"""Why FPSAttention cannot run in it, by the name of the transformer's class in diffusers."""


def description_of(transformer: nn.Module, name: str) -> Description:
    """The description of a transformer of diffusers.

    Args:
        name: of the transformer in its pipeline, for the error.

    Raises ValueError when there is none.
    """
    host = host_class(transformer)
    kind, of_diffusers = host.__name__, host.__module__.startswith("diffusers.")
    if of_diffusers and kind in DESCRIPTIONS:
        return DESCRIPTIONS[kind]
    if of_diffusers and kind in REFUSED:
        raise ValueError(f"model: {name} is a {kind}, where FPSAttention cannot run: {REFUSED[kind]}")
    raise ValueError(
        f"model: {name} is a {kind}; it must be one of {', '.join(sorted(DESCRIPTIONS))}; for another one give its "
        f"description=Description(...)"
    )
