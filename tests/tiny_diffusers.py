"""Pipelines of diffusers' real classes, with small random weights and embeddings instead of text encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import tiny_configs as configs
from tiny_configs import TEXT_DIM

STEPS = 5


@dataclass
class Tiny:
    """A pipeline and what to expect of it.

    Attributes:
        kwargs: for a call of the pipeline, in addition to those of `run`.
        grid: tokens (T, H, W).
        layers: self-attention layers of each transformer.
        passes: forwards of a transformer in a step, with guidance.
        switch: the first step of transformer_2, if there is one.
    """

    pipe: diffusers.DiffusionPipeline
    kwargs: dict
    grid: tuple[int, int, int]
    layers: int = 2
    passes: int = 1
    switch: int = STEPS
    names: tuple[str, ...] = field(default=("transformer",))

    def run(self, steps: int = STEPS, **kwargs) -> torch.Tensor:
        self.pipe.set_progress_bar_config(disable=True)
        call = (
            {"generator": noise(), "num_inference_steps": steps, "output_type": "latent"}
            | self.kwargs
            | kwargs
        )
        return self.pipe(**call).frames


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeds(length: int, seed: int, dim: int = TEXT_DIM) -> torch.Tensor:
    return torch.randn(1, length, dim, generator=noise(seed))


def text(length: int, dim: int = TEXT_DIM) -> dict:
    return {"prompt_embeds": embeds(length, 1, dim), "negative_prompt_embeds": embeds(length, 2, dim)}


def flow(shift: float = 3.0, **kwargs) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **kwargs)


def wan_transformer(seed: int = 0, **kwargs) -> diffusers.WanTransformer3DModel:
    torch.manual_seed(seed)
    return diffusers.WanTransformer3DModel(**configs.WAN | kwargs).eval()


def wan_vae() -> diffusers.AutoencoderKLWan:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def wan(**kwargs) -> Tiny:
    """Decodes its latents; the other pipelines here do not, as we change nothing in the VAE."""
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": flow(), "transformer": wan_transformer()}
    pipe = diffusers.WanPipeline(**parts | {"vae": wan_vae()} | kwargs)
    return Tiny(
        pipe, text(8) | {"height": 64, "width": 96, "num_frames": 9, "output_type": "pt"}, (3, 4, 6), passes=2
    )


def wan22() -> Tiny:
    """The timesteps are 1000, 900, 751, 503 and 9: the boundary lies between steps 2 and 3."""
    tiny = wan(vae=None, transformer_2=wan_transformer(1), boundary_ratio=0.7)
    tiny.kwargs["output_type"] = "latent"
    tiny.switch, tiny.names = 3, ("transformer", "transformer_2")
    return tiny


def wan_ti2v() -> Tiny:
    """A timestep per token, as Wan2.2 5B has."""
    tiny = wan(vae=None, expand_timesteps=True)
    tiny.kwargs["output_type"] = "latent"
    return tiny


def wan_i2v() -> Tiny:
    """Has cross-attention to an image's embedding as well, for which the host needs 512 text tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    encoder = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **sizes)).eval()
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        image_encoder=encoder,
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
        vae=wan_vae(),
        scheduler=flow(),
        transformer=wan_transformer(in_channels=36, image_dim=24, added_kv_proj_dim=128),
    )
    image = Image.linear_gradient("L").convert("RGB")
    kwargs = {"image": image, "height": 64, "width": 96, "num_frames": 9}
    return Tiny(pipe, text(512) | kwargs, (3, 4, 6), passes=2)


def ltx(heads: int = 2) -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, **configs.ltx(heads)
    ).eval()
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": transformer}
    pipe = diffusers.LTXPipeline(scheduler=flow(), **parts)
    masks = {name: torch.ones(1, 8) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    return Tiny(pipe, text(8) | masks | {"height": 128, "width": 192, "num_frames": 17}, (3, 4, 6))


def masks(length: int, valid: int, negative_valid: int | None = None) -> dict:
    """Prompts of `valid` real tokens in `length`."""
    mask = {"prompt_attention_mask": torch.arange(length)[None] < valid}
    if negative_valid is not None:
        mask["negative_prompt_attention_mask"] = torch.arange(length)[None] < negative_valid
    return mask


def hunyuan(**kwargs) -> Tiny:
    """A dual-stream and a single-stream block; 7 of 11 text tokens are real."""
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(**configs.HUNYUAN, **kwargs).eval()
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=transformer, scheduler=flow(7.0), **dict.fromkeys(names)
    )
    prompt = {"prompt_embeds": embeds(11, 1), "pooled_prompt_embeds": embeds(1, 2, 16)[0]}
    return Tiny(pipe, prompt | masks(11, 7) | {"height": 64, "width": 96, "num_frames": 9}, (3, 4, 6))


def cogvideox(**kwargs) -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        max_text_seq_length=10, **configs.COGVIDEOX, **kwargs
    ).eval()
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing"),
    )
    return Tiny(pipe, text(10) | {"height": 64, "width": 96, "num_frames": 9}, (3, 4, 6))


def cogvideox15() -> Tiny:
    """Patches of two frames: the host pads the latent's 3 frames to 4."""
    tiny = cogvideox(patch_size_t=2, patch_bias=False)
    tiny.grid = (2, 4, 6)
    return tiny


def mochi() -> Tiny:
    """Prompts of 5 and 3 real tokens in 9."""
    torch.manual_seed(0)
    transformer = diffusers.MochiTransformer3DModel(max_sequence_length=9, **configs.MOCHI).eval()
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": transformer}
    pipe = diffusers.MochiPipeline(scheduler=flow(1.0, invert_sigmas=True), **parts)
    return Tiny(pipe, text(9) | masks(9, 5, 3) | {"height": 64, "width": 96, "num_frames": 13}, (3, 4, 6))


MODELS: dict[str, Callable[[], Tiny]] = {
    "wan": wan,
    "wan22": wan22,
    "wan_ti2v": wan_ti2v,
    "wan_i2v": wan_i2v,
    "ltx": ltx,
    "hunyuan": hunyuan,
    "cogvideox": cogvideox,
    "cogvideox15": cogvideox15,
    "mochi": mochi,
}
