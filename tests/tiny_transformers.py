"""Transformers of diffusers' real classes, with small random weights, and what their forwards get.

All have heads of 64 channels, one to three self-attention layers and 3 x 4 x 6 tokens of video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

import tiny_configs as configs
from tiny_case import GRID, Case, built, latent, mask, randn, text
from tiny_configs import FOUR_CHANNELS, HEADS, HUNYUAN_LIKE, TEXT_DIM

WAN = configs.WAN | FOUR_CHANNELS


def wan() -> Case:
    return Case(built("WanTransformer3DModel", **WAN), latent() | {"encoder_hidden_states": text()})


def wan_vace() -> Case:
    transformer = built("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=6, **WAN)
    inputs = latent() | {"encoder_hidden_states": text(), "control_hidden_states": randn(1, 6, 3, 8, 12)}
    return Case(transformer, inputs, layers=3)


def wan_animate() -> Case:
    transformer = built(
        "WanAnimateTransformer3DModel",
        **WAN | {"in_channels": 12},
        latent_channels=4,
        image_dim=None,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = latent(channels=12) | {
        "encoder_hidden_states": text(),
        "pose_hidden_states": randn(1, 4, 2, 8, 12),
        "face_pixel_values": randn(1, 3, 5, 16, 16),
    }
    return Case(transformer, inputs)


def skyreels(**config) -> Case:
    return Case(
        built("SkyReelsV2Transformer3DModel", **WAN, **config), latent() | {"encoder_hidden_states": text()}
    )


def chronoedit() -> Case:
    return Case(built("ChronoEditTransformer3DModel", **WAN), latent() | {"encoder_hidden_states": text()})


def anyflow() -> Case:
    """A timestep for each frame, and the one that it goes to."""
    inputs = {
        "hidden_states": randn(1, 3, 4, 8, 12),
        "timestep": torch.full((1, 3), 500.0),
        "r_timestep": torch.full((1, 3), 300.0),
        "encoder_hidden_states": text(),
    }
    return Case(built("AnyFlowTransformer3DModel", **WAN), inputs)


def helios() -> Case:
    """Three sizes of history, of which two are padded: 6 + 6 + 4 tokens."""
    config = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
    transformer = built("HeliosTransformer3DModel", rope_dim=(24, 20, 20), **config)
    history = {
        f"{start}latents_history_{name}": x
        for name, size in (("short", (1, 4, 12)), ("mid", (3, 4, 10)), ("long", (5, 4, 12)))
        for start, x in (("", randn(1, 4, *size)), ("indices_", torch.arange(size[0])[None]))
    }
    inputs = latent() | {"encoder_hidden_states": text()} | history
    return Case(transformer, inputs | {"indices_hidden_states": torch.arange(3)[None]}, before=12 + 6 + 4)


def hunyuan() -> Case:
    """Two samples, with 5 and 7 real tokens of 7."""
    transformer = built("HunyuanVideoTransformer3DModel", **configs.HUNYUAN)
    inputs = latent(2) | {
        "encoder_hidden_states": text(2),
        "encoder_attention_mask": mask(5, 7),
        "pooled_projections": randn(2, 16),
        "guidance": torch.full((2,), 6000.0),
    }
    return Case(transformer, inputs, after=7)


def framepack(batch: int = 2) -> Case:
    """History of 24 + 6 + 4 tokens before, an image's 3 and text after: padded, but for a single sample."""
    transformer = built(
        "HunyuanVideoFramepackTransformer3DModel",
        image_proj_dim=8,
        has_image_proj=True,
        has_clean_x_embedder=True,
        **configs.HUNYUAN,
    )
    history = {
        f"{start}{name}": x
        for name, frames in (("latents_clean", 1), ("latents_history_2x", 2), ("latents_history_4x", 4))
        for start, x in (
            ("", randn(batch, 4, frames, 8, 12)),
            ("indices_", torch.arange(frames)),
        )
    }
    valid = (5, 7)[:batch]
    inputs = (
        latent(batch)
        | history
        | {
            "encoder_hidden_states": text(batch),
            "encoder_attention_mask": mask(*valid).int(),
            "pooled_projections": randn(batch, 16),
            "guidance": torch.full((batch,), 6000.0),
            "image_embeds": randn(batch, 3, 8),
            "indices_latents": torch.arange(3),
        }
    )
    return Case(transformer, inputs, before=24 + 6 + 2, after=3 + (7 if batch > 1 else 5))


def framepack_alone() -> Case:
    return framepack(1)


def hunyuan15(image: bool = True) -> Case:
    """Text of two encoders and an image's tokens, which are padding if it is of zeros."""
    transformer = built(
        "HunyuanVideo15Transformer3DModel",
        text_embed_2_dim=12,
        image_embed_dim=8,
        patch_size=2,
        **HUNYUAN_LIKE | {"num_layers": 2},
    )
    inputs = latent(2) | {
        "encoder_hidden_states": text(2),
        "encoder_attention_mask": mask(5, 7),
        "encoder_hidden_states_2": randn(2, 4, 12, seed=8),
        "encoder_attention_mask_2": mask(0, 3, length=4),
        "image_embeds": randn(2, 3, 8) * image,
    }
    return Case(transformer, inputs, after=7 + 4 + 3)


def hunyuan15_of_text() -> Case:
    return hunyuan15(image=False)


def motif() -> Case:
    """A dual-stream and an encoder layer; the decoder's does not count. An image's tokens come before the text's."""
    transformer = built(
        "MotifVideoTransformer3DModel",
        num_single_layers=2,
        num_decoder_layers=1,
        image_embed_dim=8,
        **{k: v for k, v in HUNYUAN_LIKE.items() if k != "num_refiner_layers"},
    )
    # Or the decoder would hardly depend on what the other layers make of the video.
    transformer.single_transformer_blocks[1].attn.to_v.weight.data.mul_(30)
    inputs = latent(2) | {
        "encoder_hidden_states": text(2),
        "encoder_attention_mask": mask(5, 7),
        "image_embeds": randn(2, 3, 8),
    }
    return Case(transformer, inputs, after=3 + 7)


def frames_first(kind: str) -> Case:
    angles = randn(72, 32, seed=8).repeat_interleave(2, dim=1)  # one for both channels of a pair
    rotation = (angles.cos(), angles.sin())
    inputs = latent() | {"encoder_hidden_states": text(), "image_rotary_emb": rotation}
    inputs["hidden_states"] = inputs["hidden_states"].transpose(1, 2)
    return Case(built(kind, max_text_seq_length=7, **configs.COGVIDEOX), inputs, before=7)


def cogvideox() -> Case:
    return frames_first("CogVideoXTransformer3DModel")


def consisid() -> Case:
    return frames_first("ConsisIDTransformer3DModel")


def ltx() -> Case:
    transformer = built("LTXVideoTransformer3DModel", **FOUR_CHANNELS, **configs.ltx())
    inputs = {
        "hidden_states": randn(1, 72, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": torch.ones(1, 7),
        **dict(zip(("num_frames", "height", "width"), GRID, strict=True)),
    }
    return Case(transformer, inputs)


def ltx2(**config) -> Case:
    """Video beside audio."""
    transformer = built(
        "LTX2VideoTransformer3DModel",
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        **FOUR_CHANNELS,
        **configs.ltx(),
        **config,
    )
    inputs = {
        "hidden_states": randn(1, 72, 4),
        "audio_hidden_states": randn(1, 5, 4),
        "encoder_hidden_states": text(),
        "audio_encoder_hidden_states": text(seed=7),
        "timestep": torch.full((1, 72), 500.0),
        "audio_timestep": torch.tensor([500.0]),
        "audio_num_frames": 5,
        **dict(zip(("num_frames", "height", "width"), GRID, strict=True)),
    }
    return Case(transformer, inputs)


def ltx23() -> Case:
    """As LTX-2.3 is: with a gate for each head, and a processor that can leave attention out."""
    return ltx2(gated_attn=True, audio_gated_attn=True, perturbed_attn=True)


def mochi() -> Case:
    """Two samples, with 5 and 3 real tokens of 7. Timesteps rise."""
    transformer = built("MochiTransformer3DModel", max_sequence_length=7, **configs.MOCHI)
    inputs = latent(2) | {"encoder_hidden_states": text(2), "encoder_attention_mask": mask(5, 3)}
    return Case(transformer, inputs, after=7, timesteps=(10.0, 500.0, 980.0))


def kandinsky5() -> Case:
    transformer = built(
        "Kandinsky5Transformer3DModel",
        in_text_dim=TEXT_DIM,
        in_text_dim2=12,
        time_dim=16,
        model_dim=128,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
    )
    inputs = {
        "hidden_states": randn(1, 3, 8, 12, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": text(),
        "pooled_projections": randn(1, 12),
        "visual_rope_pos": [torch.arange(n) for n in GRID],
        "text_rope_pos": torch.arange(7),
    }
    return Case(transformer, inputs)


def kandinsky6() -> Case:
    """Video beside audio."""
    transformer = built(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT_DIM,
        in_text_dim2=12,
        time_dim=16,
        model_dim=128,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(16, 24, 24),
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
    )
    inputs = {
        "hidden_states": randn(1, 3, 8, 12, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": text(),
        "pooled_projections": randn(1, 12),
        "audio_hidden_states": randn(1, 5, 4),
    }
    return Case(transformer, inputs)


def cosmos(**config) -> Case:
    """Cosmos 2: timesteps are noise levels."""
    transformer = built(
        "CosmosTransformer3DModel",
        **{
            "num_layers": 2,
            "mlp_ratio": 1.0,
            "text_embed_dim": TEXT_DIM,
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        }
        | HEADS
        | FOUR_CHANNELS
        | config,
    )
    inputs = latent() | {"encoder_hidden_states": text(), "timestep": torch.tensor([0.5])}
    return Case(transformer, inputs, timesteps=(0.99, 0.5, 0.02))


def cosmos1() -> Case:
    """Timesteps are ln(s) / 4 of the noise levels s that noise is multiplied with."""
    case = cosmos(extra_pos_embed_type="learnable")
    return replace(case, timesteps=(1.1, 0.0, -1.0))


def easyanimate() -> Case:
    """A dual-stream and a single-stream layer, with text of two encoders."""
    transformer = built(
        "EasyAnimateTransformer3DModel",
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=TEXT_DIM,
        text_embed_dim_t5=TEXT_DIM,
        **HEADS,
        **FOUR_CHANNELS,
    )
    inputs = {"encoder_hidden_states": text(), "encoder_hidden_states_t5": text(length=4, seed=7)}
    return Case(transformer, latent() | inputs, before=11)


CASES: dict[str, Callable[[], Case]] = {
    x.__name__: x
    for x in (
        anyflow,
        chronoedit,
        cogvideox,
        consisid,
        cosmos,
        cosmos1,
        easyanimate,
        framepack,
        framepack_alone,
        helios,
        hunyuan,
        hunyuan15,
        hunyuan15_of_text,
        kandinsky5,
        kandinsky6,
        ltx,
        ltx2,
        ltx23,
        mochi,
        motif,
        skyreels,
        wan,
        wan_animate,
        wan_vace,
    )
}
