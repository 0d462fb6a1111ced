"""Key tiles as data: for each query tile of a grid, the list of the tiles that it attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import dispatches, kind_of, refuse_transforms, shown
from .config import AttentionConfig, Border

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SHAPES = {"indices": "[1 or B, 1 or H, n, cap]", "counts": "[1 or B, 1 or H, n]"}


@dataclass(frozen=True, eq=False, repr=False)
class KeyTiles:
    """For each tile of a grid, the list of the tiles whose keys its queries attend; `attention` takes it as
    `key_tiles`.

    It is for tiles that are chosen by content; a window (`AttentionConfig`) needs no lists, and no memory for them.
    A tile attends the tiles of its list and all valid text tokens. Text queries attend everything. The order within a
    list does not matter, but for the order of sums. Queries with an empty list, in a sample without valid text, have
    out 0, lse -inf and gradient 0.

    Values are checked on the CPU, outside of torch.compile: then each count is in 0 to cap, each index in 0 to n - 1,
    and no tile is twice in a list. Elsewhere nothing waits for the values: counts and indices are clamped, and a tile
    that is twice in a list counts twice, as if its keys stood there twice; once under quant="none" on a GPU. Objects
    compare by identity.

    Attributes:
        indices: int32 [1 or B, 1 or H, n, cap], contiguous: the lists of all n tiles of the grid, which are numbered in
            raster order (t, h, w), text tiles left out. 1 stands for all samples, or all heads. cap is 1 to n.
        counts: int32 [1 or B, 1 or H, n], contiguous, on the same device: how many entries of each list count, the
            first ones. The others are never read.

    Raises TypeError or ValueError that name the attribute, its value, the rule and the nearest legal value.
    """

    indices: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        for name, shape in SHAPES.items():
            _check_tensor(f"key_tiles.{name}", getattr(self, name), shape)
        n, cap = self.indices.shape[2:]
        if self.counts.shape != self.indices.shape[:3]:
            raise ValueError(
                f"key_tiles.counts: shape {shown(list(self.counts.shape))} must be that of indices without its last "
                f"axis, {shown(list(self.indices.shape[:3]))}"
            )
        if self.counts.device != self.indices.device:
            raise ValueError(
                f"key_tiles.counts: device {self.counts.device} must be that of indices, {self.indices.device}"
            )
        if not min(n, 1) <= cap <= n:
            raise ValueError(
                f"key_tiles.indices: shape {shown(list(self.indices.shape))} has lists of {cap} entries, must have "
                f"{min(n, 1)} to {n}, as many as there are tiles; nearest legal value {min(n, 1) if cap < 1 else n}"
            )
        # A traced tensor has no values, and reading a GPU's would wait for the GPU.
        if (
            self.indices.is_cpu
            and not torch.compiler.is_compiling()
            and not any(dispatches(x) for x in (self.indices, self.counts))
        ):
            self._check_values()

    def __repr__(self) -> str:
        return f"KeyTiles(int32 {list(self.indices.shape)} on {self.indices.device})"

    def _check_values(self) -> None:
        n, cap = self.indices.shape[2:]
        _check_range("counts", self.counts, 0, cap)
        _check_range("indices", self.indices, 0, n - 1, self._in_use())
        lists = self.ascending()
        again = (lists[..., 1:] == lists[..., :-1]) & (lists[..., 1:] < n)
        if again.any():
            sample, head, tile, at = again.nonzero()[0].tolist()
            raise ValueError(
                f"key_tiles.indices: tile {int(lists[sample, head, tile, at])} is twice in the list of tile {tile} "
                f"(sample {sample}, head {head}); each tile may be there once: leave the other out"
            )

    def _in_use(self) -> Tensor:
        """bool, as indices: the entries that count."""
        return torch.arange(self.indices.shape[3], device=self.counts.device) < self.counts[..., None]

    def ascending(self) -> Tensor:
        """int64, as indices, on the CPU: each list in ascending order, then n in place of entries that do not count."""
        n = self.indices.shape[2]
        lists = self.indices.long().clamp(0, n - 1).masked_fill(~self._in_use(), n)
        return lists.cpu().sort(dim=-1).values

    def mask(self) -> Tensor:
        """bool [1 or B, 1 or H, n, n]: True where the query tile (row) attends the key tile (column)."""
        *_, n, _ = shape = self.indices.shape
        at = self.indices.long().clamp(0, n - 1).masked_fill(~self._in_use(), n)
        mask = torch.zeros(*shape[:3], n + 1, dtype=torch.bool, device=at.device)
        return mask.scatter_(3, at, True)[..., :n]

    @classmethod
    def of_mask(cls, mask: Tensor) -> KeyTiles:
        """The lists of a mask; cap is n. Nothing waits for a GPU.

        Args:
            mask: bool [.., n, n], True where the query tile (row) attends the key tile (column), with leading axes as
                those of `indices`; axes that are left out are 1.

        Raises TypeError for another dtype, ValueError for another shape.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: must be a bool tensor, got {kind_of(mask)}")
        if not 2 <= mask.dim() <= 4 or mask.shape[-1] != mask.shape[-2]:
            raise ValueError(
                f"mask: shape {shown(list(mask.shape))} must be [n, n], [H, n, n] or [1 or B, 1 or H, n, n]"
            )
        mask = mask[(None,) * (4 - mask.dim())]
        # Stable, so ascending; of bytes, because CUDA sorts no bool.
        indices = mask.byte().argsort(dim=3, descending=True, stable=True).int()
        return cls(indices.contiguous(), mask.sum(3, dtype=torch.int32).contiguous())

    @classmethod
    def of_window(
        cls,
        grid: Sequence[int],
        tile: Sequence[int],
        window: Sequence[int] | Sequence[Sequence[int]] | None,
        border: Border = "clamp",
    ) -> KeyTiles:
        """A window as lists, on the CPU: to combine it with a choice by content, or to compare with it.

        Args:
            grid: tokens (T, H, W).
            tile, window, border: as in `AttentionConfig`; one window, one for each head, or None for all tiles.

        Raises TypeError or ValueError as `AttentionConfig` does.
        """
        config = AttentionConfig(tile=tile, window=window, border=border)  # type: ignore[arg-type]  # it converts them
        per_head = config.window is not None and isinstance(config.window[0], tuple)
        resolved = config.resolve(grid, len(config.window) if per_head and config.window else 1)
        geometry = resolved.geometry
        video = slice(geometry.n_video_tiles)
        windows = resolved.windows
        lists = cls.of_mask(torch.stack([geometry.tile_mask(w, border)[video, video] for w in windows]))
        cap = int(lists.counts.max()) if geometry.n_video_tiles else 0
        return cls(lists.indices[..., :cap].contiguous(), lists.counts)

    def to(self, device: torch.device | str) -> KeyTiles:
        """The same lists on a device."""
        return KeyTiles(self.indices.to(device), self.counts.to(device))

    def of_heads(self, first: int, heads: int) -> KeyTiles:
        """The lists of so many heads, from the first on; the same lists if all heads share them."""
        if self.indices.shape[1] == 1:
            return self
        some = slice(first, first + heads)
        return KeyTiles(self.indices[:, some].contiguous(), self.counts[:, some].contiguous())

    @classmethod
    def of_block_mask(cls, block_mask: BlockMask, grid: Sequence[int], tile: Sequence[int]) -> KeyTiles:
        """The lists of a FlexAttention `BlockMask` whose blocks are the tiles of a grid.

        Blocks count as a whole, those that FlexAttention takes for partial as well: what `mask_mod` says within a block
        is left out. So it must mask nothing there but padding.

        Args:
            block_mask: over the n tiles of the grid in raster order, tile after tile: the rows of a tile are its
                tokens, padded to a whole number of 128 (`fpsattention.core.geometry.TileGeometry.slot_tokens`). Its
                BLOCK_SIZE is that number of rows.
            grid, tile: tokens (T, H, W) and (t, h, w).

        Raises ValueError for another block size or another number of blocks.
        """
        geometry = AttentionConfig(tile=tile).resolve(grid, 1).geometry  # type: ignore[arg-type]  # it converts it
        slot, n = geometry.slot, geometry.n_video_tiles
        if tuple(block_mask.BLOCK_SIZE) != (slot, slot):
            raise ValueError(
                f"block_mask: BLOCK_SIZE {shown(block_mask.BLOCK_SIZE)} must be {(slot, slot)}, the rows of a tile "
                f"{geometry.tile}"
            )
        blocks = tuple(block_mask.kv_indices.shape[2:])
        if blocks != (n, n):
            raise ValueError(
                f"block_mask: has {blocks} blocks, must have {(n, n)}, as the grid has {n} tiles"
            )
        mask = _listed(block_mask.kv_num_blocks, block_mask.kv_indices)
        full = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        if full[0] is not None and full[1] is not None:
            mask = mask | _listed(full[0], full[1])
        return cls.of_mask(mask)

    def block_mask(self, grid: Sequence[int], tile: Sequence[int]) -> BlockMask:
        """The FlexAttention `BlockMask` [1 or B, 1 or H, rows, rows] of these lists, as `of_block_mask` takes it.

        Its `mask_mod` masks padding and, because FlexAttention without torch.compile looks at nothing else, all tiles
        that are not listed.

        Raises ValueError for a grid with another number of tiles.
        """
        # It brings torch's compiler, which takes a second to import.
        from torch.nn.attention.flex_attention import BlockMask

        geometry = AttentionConfig(tile=tile).resolve(grid, 1).geometry  # type: ignore[arg-type]  # it converts it
        self._check_tiles(geometry.n_video_tiles)
        device, slot, mask = self.indices.device, geometry.slot, self.mask()
        is_token = (geometry.slot_tokens >= 0).flatten().to(device)
        several = [n > 1 for n in mask.shape[:2]]

        def attended(b, h, q, kv):
            sample, head = (i * more for i, more in zip((b, h), several, strict=True))
            return is_token[kv] & mask[sample, head, q // slot, kv // slot]

        lists = KeyTiles.of_mask(mask)
        return BlockMask.from_kv_blocks(lists.counts, lists.indices, BLOCK_SIZE=slot, mask_mod=attended)

    @classmethod
    def of_full_blocks(cls, full_block_cnt: Tensor, full_block_idx: Tensor) -> KeyTiles:
        """From the full-block lists of FlashAttention-4 and cuDNN: int32 [B, H, n] and [B, H, n, cap], whose blocks are
        the tiles of the grid. Raises as `KeyTiles` does.
        """
        return cls(full_block_idx, full_block_cnt)

    def full_blocks(self, batch: int, heads: int) -> tuple[Tensor, Tensor]:
        """(full_block_cnt int32 [B, H, n], full_block_idx int32 [B, H, n, cap]) for FlashAttention-4 and cuDNN.

        Raises ValueError for lists of another number of samples or heads.
        """
        self._check_broadcast(batch, heads)
        counts, indices = (x.expand(batch, heads, *x.shape[2:]) for x in (self.counts, self.indices))
        return counts.contiguous(), indices.contiguous()

    def _check_broadcast(self, batch: int, heads: int) -> None:
        for axis, (what, n) in enumerate((("samples", batch), ("heads", heads))):
            own = self.indices.shape[axis]
            if own not in (1, n):
                raise ValueError(
                    f"key_tiles: has lists of {own} {what}, q has {n}; nearest legal values 1 (the same for all) and "
                    f"{n}"
                )

    def _check_tiles(self, tiles: int) -> None:
        own = self.indices.shape[2]
        if own != tiles:
            raise ValueError(
                f"key_tiles: has lists of {own} tiles, must have {tiles}, one for each tile of the grid"
            )


def check_key_tiles(
    key_tiles: KeyTiles | None,
    config: AttentionConfig,
    grid: Sequence[int],
    batch: int,
    heads: int,
    device: torch.device,
) -> None:
    """Raises TypeError or ValueError unless `key_tiles` fit a call with this config, grid, batch, heads and device."""
    if key_tiles is None:
        return
    if not isinstance(key_tiles, KeyTiles):
        raise TypeError(
            f"key_tiles: {shown(key_tiles)} must be a KeyTiles or None, got {kind_of(key_tiles)}; KeyTiles.of_mask "
            f"makes one of a bool [.., n, n]"
        )
    if config.window is not None:
        raise ValueError(
            f"config: window={shown(config.window)} and key_tiles both say what is attended; give a config with "
            f"window=None (KeyTiles.of_window makes lists of a window), or leave key_tiles out"
        )
    if config.select is not None:
        raise ValueError(
            f"config: select={shown(config.select)} and key_tiles both say what is attended; give a config with "
            f"select=None, or leave key_tiles out"
        )
    key_tiles._check_broadcast(batch, heads)
    if key_tiles.indices.device != device:
        raise ValueError(f"key_tiles: device {key_tiles.indices.device} must be that of q, {device}")
    if not torch.compiler.is_compiling():  # in a graph sizes may be symbols; the op checks it
        key_tiles._check_tiles(config.resolve(grid, heads).geometry.n_video_tiles)


def tensors_of(key_tiles: KeyTiles | None) -> tuple[Tensor | None, Tensor | None]:
    """(indices, counts), as ops take them."""
    return (None, None) if key_tiles is None else (key_tiles.indices, key_tiles.counts)


def key_tiles_of(indices: Tensor | None, counts: Tensor | None) -> KeyTiles | None:
    """The inverse of `tensors_of`. Raises as `KeyTiles` does, also if one of the two is missing."""
    return None if indices is None and counts is None else KeyTiles(indices, counts)  # type: ignore[arg-type]


def _check_tensor(name: str, x: Any, shape: str) -> None:
    """Raises unless x is a contiguous int32 tensor with the dimensions of `shape`."""
    refuse_transforms(name, x)
    if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: must be a dense int32 tensor {shape}, got {kind_of(x)}")
    if x.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: shape {shown(list(x.shape))} must be {shape}")
    if not x.is_contiguous():
        raise ValueError(
            f"{name}: strides {shown(x.stride())} must be those of a contiguous tensor; pass {name}.contiguous()"
        )


def _check_range(name: str, x: Tensor, least: int, most: int, in_use: Tensor | None = None) -> None:
    """Raises ValueError unless the elements of x [sample, head, tile, ...] that are in use are in this range."""
    wrong = (x < least) | (x > most)
    wrong = wrong if in_use is None else wrong & in_use
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        value = int(x[tuple(at)])
        raise ValueError(
            f"key_tiles.{name}: {value} of tile {at[2]} (sample {at[0]}, head {at[1]}) must be from {least} to {most}; "
            f"nearest legal value {min(max(value, least), most)}"
        )


def _listed(num_blocks: Tensor, indices: Tensor) -> Tensor:
    """bool [B, H, n, n] of one kind of lists of a BlockMask."""
    return KeyTiles(indices.int().contiguous(), num_blocks.int().contiguous()).mask()
