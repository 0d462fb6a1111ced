"""Published video models by name: the token grid, heads and text tokens of one self-attention call of each."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from ..core.checks import Triple, shown
from ..core.config import AttentionConfig, ResolvedConfig


@dataclass(frozen=True)
class VideoModel:
    """One model at one size of video.

    Attributes:
        name: name on the command line and of the preset.
        setting: frames and pixels of the video.
        grid: tokens (T, H, W) after VAE and patches.
        heads, head_dim, layers: of self-attention.
        source: where the numbers come from.
        text_tokens: most text tokens in the self-attention; 0 where text has a cross-attention of its own.
        text_place: "first" or "last" in the sequence; "" without text tokens.
    """

    name: str
    setting: str
    grid: Triple
    heads: int
    head_dim: int
    layers: int
    source: str
    text_tokens: int = 0
    text_place: str = ""

    @property
    def tokens(self) -> int:
        """Video tokens, without text tokens."""
        return math.prod(self.grid)

    @property
    def text_lengths(self) -> tuple[int, int]:
        """prefix_len and suffix_len of a call of `attention`, with the most text tokens."""
        return (self.text_tokens, 0) if self.text_place == "first" else (0, self.text_tokens)

    @property
    def text_sentence(self) -> str:
        return f"up to {self.text_tokens} text tokens come {self.text_place} in the same sequence; all are counted"

    def resolve(self, config: AttentionConfig) -> ResolvedConfig:
        """A config on the model's video and text tokens. Raises ValueError for one that does not fit."""
        return config.resolve(self.grid, self.heads, *self.text_lengths)


# Wan: VAE (4, 8, 8), in the 5B model (4, 16, 16); patch (1, 2, 2); (frames - 1) / 4 + 1 latent frames.
_WAN21 = "github.com/Wan-Video/Wan2.1, wan/configs"
_WAN22 = "github.com/Wan-Video/Wan2.2, wan/configs"
# HunyuanVideo, CogVideoX, Mochi and LTX: the transformer's config in the checkpoint for diffusers.
_HUNYUAN = (
    "hf.co/hunyuanvideo-community/HunyuanVideo, transformer/config.json (20 double and 40 single blocks)"
)
_HUNYUAN15 = "hf.co/hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v, transformer/config.json"
_COG = "hf.co/THUDM/CogVideoX{}, transformer/config.json".format
_LTX = "hf.co/Lightricks/LTX-Video, transformer/config.json"
_LTX2 = "hf.co/Lightricks/LTX-2, transformer/config.json"
_MOCHI = "hf.co/genmo/mochi-1-preview, transformer/config.json"

MODELS = {
    model.name: model
    for model in (
        VideoModel("wan2.1-1.3b-480p", "81 frames of 832 x 480", (21, 30, 52), 12, 128, 30, _WAN21),
        VideoModel("wan2.1-14b-480p", "81 frames of 832 x 480", (21, 30, 52), 40, 128, 40, _WAN21),
        VideoModel("wan2.1-14b-720p", "81 frames of 1280 x 720", (21, 45, 80), 40, 128, 40, _WAN21),
        VideoModel("wan2.2-a14b-480p", "81 frames of 832 x 480", (21, 30, 52), 40, 128, 40, _WAN22),
        VideoModel("wan2.2-a14b-720p", "81 frames of 1280 x 720", (21, 45, 80), 40, 128, 40, _WAN22),
        VideoModel("wan2.2-ti2v-5b-720p", "121 frames of 1280 x 704", (31, 22, 40), 24, 128, 30, _WAN22),
        VideoModel(
            "hunyuanvideo-540p", "129 frames of 960 x 544", (33, 34, 60), 24, 128, 60, _HUNYUAN, 256, "last"
        ),
        VideoModel(
            "hunyuanvideo-720p", "129 frames of 1280 x 720", (33, 45, 80), 24, 128, 60, _HUNYUAN, 256, "last"
        ),
        # Of these tokens 729 are of an image, 256 of ByT5 and 1000 of Qwen2.5-VL.
        VideoModel(
            "hunyuanvideo1.5-720p",
            "121 frames of 1280 x 720",
            (31, 45, 80),
            16,
            128,
            54,
            _HUNYUAN15,
            1985,
            "last",
        ),
        VideoModel(
            "cogvideox-2b", "49 frames of 720 x 480", (13, 30, 45), 30, 64, 30, _COG("-2b"), 226, "first"
        ),
        VideoModel(
            "cogvideox-5b", "49 frames of 720 x 480", (13, 30, 45), 48, 64, 42, _COG("-5b"), 226, "first"
        ),
        VideoModel(
            "cogvideox1.5-5b",
            "81 frames of 1360 x 768",
            (11, 48, 85),
            48,
            64,
            42,
            _COG("1.5-5B"),
            226,
            "first",
        ),
        VideoModel("ltx-video", "161 frames of 704 x 512", (21, 16, 22), 32, 64, 28, _LTX),
        VideoModel("ltx-2", "121 frames of 768 x 512", (16, 16, 24), 32, 128, 48, _LTX2),
        VideoModel("mochi", "163 frames of 848 x 480", (28, 30, 53), 24, 128, 48, _MOCHI, 256, "last"),
    )
}


def named(name: str) -> VideoModel:
    """The model with this name. Raises TypeError, or ValueError that has the nearest names."""
    if not isinstance(name, str):
        raise TypeError(f"model {shown(name)}: must be a name, for example {next(iter(MODELS))!r}")
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(MODELS)}"
    raise ValueError(f"model {shown(name)}: is unknown; {hint}")
