"""`Processor`, the base of our attention processors, and `Forward`, what they need to know of a transformer's forward.

A processor takes the place of the host's in a self-attention layer. A `fused.Fused` one projects, normalises and
rotates Q, K and V as the host's does and hands them to `fpsattention.attention`; `general.General` lets the host's do
that. Steps that stay dense go to the host's own processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ...core.api import attention
from ...core.checks import Triple
from ...core.config import AttentionConfig
from ...core.prologue import norm_rope_quantize
from ...parallel import ulysses_attention
from ..scope import Scope
from ..windowed import attention_in_windows, in_windows

Attn = Any
"""A self-attention module of the host. Those of the models have no class in common."""

Parts = tuple[tuple[AttentionConfig, Tensor | None], ...]
"""Configs, each with the indices of the samples that it is for (int64; None: all samples)."""


@dataclass(frozen=True)
class Forward:
    """What the self-attention layers run in one forward of a transformer.

    Attributes:
        extent: an empty tensor [T, H, W, before, after, 0] whose shape is the token grid and the number of other tokens
            around it: torch.compile makes symbols of the sizes of a tensor, but constants of numbers.
        parts: the configs to run, and for which samples. None: the host's own attention.
        order: int64 [B], the place of each sample in the concatenated parts; None with a single part.
        windows: int64 [layers, H, 3] on the CPU, the windows of all layers, if the schedule is a `WindowTable`.
        text_valid: int32 [B], real text tokens of each sample, in a model that takes padded text; otherwise None.
        group: the processes that share the tokens (`fpsattention.parallel.ulysses_attention`); None: this process has
            all tokens.
    """

    extent: Tensor
    parts: Parts | None
    order: Tensor | None = None
    windows: Tensor | None = None
    text_valid: Tensor | None = None
    group: ProcessGroup | None = None

    @property
    def grid(self) -> Triple:
        """Tokens (T, H, W)."""
        t, h, w, *_ = self.extent.shape
        return t, h, w

    @property
    def others(self) -> tuple[int, int]:
        """Tokens that share the sequence with the video's, before them and after them."""
        before, after, _ = self.extent.shape[3:]
        return before, after

    def of_sample(self, i: int) -> Forward:
        """The forward of sample i alone, without its padding."""
        config = next(config for config, rows in self.parts or () if rows is None or i in rows.tolist())
        return replace(self, parts=((config, None),), order=None, text_valid=None)


class Processor:
    """Self-attention of one layer, in place of the host's processor `replaced`."""

    def __init__(self, replaced: Any, scope: Scope, layer: int, backend: str):
        self.replaced = replaced
        self.scope = scope
        self.layer = torch.tensor(layer, device="cpu")  # torch.compile would make a constant of a number
        self.backend = backend

    @property
    def _attention_backend(self) -> Any:
        """The host's choice of attention kernel (`set_attention_backend`) holds for the dense steps."""
        return self.replaced._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.replaced._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        """How the host splits tokens among processes (`enable_parallelism`) holds for the dense steps too."""
        return self.replaced._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.replaced._parallel_config = value

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        prefix_len: int = 0,
        suffix_len: int = 0,
        scale: float | None = None,
        sample: int | None = None,
        prologue: dict[str, Any] | None = None,
    ) -> Tensor:
        """Attention as this forward's parts and windows say.

        Args:
            q, k, v: [B, L, H, D], the video's tokens with prefix_len text tokens before or suffix_len after them; or
                this process's share of all these.
            scale: of the scores; None: D ** -0.5.
            sample: which one q, k, v are, without its padding; None: all samples.
            prologue: norm and rotary embedding that are still to be applied, as `norm_rope_quantize` takes them.

        Returns [B, L, H * D].
        """
        forward: Forward = self.scope.current()
        if sample is not None:
            forward = forward.of_sample(sample)
        alone = forward.group is None
        total = prefix_len + math.prod(forward.grid) + suffix_len
        if alone and torch.compiler.is_compiling():
            # Not an `if`: the length is unknown to torch.compile where the host cuts off a text's padding.
            torch._check(
                q.shape[1] == total,
                lambda: "a layer got more or fewer tokens than the grid and its text have",
            )
        elif alone and q.shape[1] != total:
            raise RuntimeError(
                f"the transformer's input has the token grid {forward.grid}, but a layer got {q.shape[1]} tokens, of "
                f"which {prefix_len + suffix_len} are text; FPSAttention cannot tell where the others are in the video"
            )
        kwargs: dict[str, Any] = {"grid": forward.grid, "backend": self.backend}
        if not alone:
            kwargs["group"] = forward.group
        if prefix_len or suffix_len:
            kwargs |= {"prefix_len": prefix_len, "suffix_len": suffix_len}
        if scale is not None:
            kwargs["scale"] = scale
        outs = [self._attend_part(part, forward, (q, k, v), kwargs, prologue) for part in forward.parts or ()]
        out = outs[0] if forward.order is None else torch.cat(outs)[forward.order.to(q.device)]
        return out.flatten(2)

    def _attend_part(
        self,
        part: tuple[AttentionConfig, Tensor | None],
        forward: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        kwargs: dict[str, Any],
        prologue: dict[str, Any] | None,
    ) -> Tensor:
        """`attend` for the samples of one part, of which `kwargs` are the keywords of `attention`."""
        config, rows = part
        q, k, v = qkv
        # The host may have moved its inputs to another device since the hook saw them.
        if rows is not None:
            rows = rows.to(q.device)
            q, k, v = q[rows], k[rows], v[rows]
        if forward.text_valid is not None:
            valid = forward.text_valid.to(q.device)
            kwargs = kwargs | {"suffix_valid": valid if rows is None else valid[rows]}
        run: Callable[..., Any] = ulysses_attention
        if forward.group is None:
            run = attention
        if forward.windows is not None and torch.compiler.is_compiling():
            if forward.group is not None:
                raise RuntimeError(
                    "a WindowTable under both torch.compile and context parallelism: switch one of the two off, or "
                    "give a StepSchedule"
                )
            run = partial(attention_in_windows, windows=forward.windows, layer=self.layer)
        elif forward.windows is not None:
            config = in_windows(config, forward.windows, self.layer)
        if prologue is not None:
            quantized = norm_rope_quantize(q, k, v, config=config, **kwargs, **prologue)
            return cast(Tensor, attention(quantized, grid=forward.grid, config=config))
        return run(q, k, v, config=config, **kwargs)
