"""`Description`, what FPSAttention has to know of a video transformer to run in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...core.checks import Triple
from ..hosts import TRAIN_TIMESTEPS
from .processor import Attn

Inputs = dict[str, Any]
"""The arguments of a transformer's forward that were given, by name."""


def _no_tokens(config: Any, inputs: Inputs) -> int:
    return 0


def _no_padding(config: Any, inputs: Inputs) -> Tensor | None:
    return None


def _of_thousand(config: Any, timestep: Tensor) -> Tensor:
    return timestep / TRAIN_TIMESTEPS


@dataclass(frozen=True, kw_only=True)
class Description:
    """What FPSAttention has to know of a video transformer, a module whose forward has the arguments `hidden_states`
    and `timestep`. Where a function gets `config`, that is the transformer's, None if it has none; `inputs` are the
    arguments of its forward by name.

    The tokens of a self-attention layer are `before` others, the video's in raster order (w fastest), and `after`
    others. Each forward checks their number. Every query attends the others, and they attend all, whatever the window.

    Attributes:
        layers: from the transformer, its self-attention modules in the order they run in. Each has a `processor`, an
            object whose `__call__` calls diffusers' `dispatch_attention_fn` or torch's `scaled_dot_product_attention`,
            and its number of heads as `heads` or `num_heads`.
        grid: from (config, inputs), the video's tokens (T, H, W).
        before, after: from (config, inputs), how many tokens of text or else share the sequence.
        valid: from (config, inputs), int32 [B], how many of `after` are real in each sample, the first ones; None if
            all are. Where it is not None, the attention call must have a mask that says the same.
        sigma: from (config, timesteps that the forward gets), their noise levels, 1 at pure noise.
        symbolic_dims: the dimensions of hidden_states that the grid depends on; empty where the host makes constants of
            them, so that torch.compile has one graph for each size.
        context_parallel: whether diffusers can split the tokens among processes, all of which are the video's.
        may_skip: whether the host leaves attention out in some forwards.
        one_by_one: whether the host calls attention for one sample after another, without its padding and a mask.
        note: for the documentation.
    """

    layers: Callable[[Any], Sequence[Attn]]
    grid: Callable[[Any, Inputs], Triple]
    before: Callable[[Any, Inputs], int] = _no_tokens
    after: Callable[[Any, Inputs], int] = _no_tokens
    valid: Callable[[Any, Inputs], Tensor | None] = _no_padding
    sigma: Callable[[Any, Tensor], Tensor] = _of_thousand
    symbolic_dims: tuple[int, ...] = ()
    context_parallel: bool = False
    may_skip: bool = False
    one_by_one: bool = False
    note: str = ""

    @property
    def others(self) -> str:
        """Where tokens of text or else lie, in words."""
        sides = [x for x in ("before", "after") if getattr(self, x) is not _no_tokens]
        padded = ", padded" if self.valid is not _no_padding else ""
        return (" and ".join(sides) or "-") + padded
