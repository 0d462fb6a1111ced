"""`Fused`, the base of the processors that repeat a host's, to fuse norms and rotary embedding with the rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.normalization import MochiRMSNorm, RMSNorm
from torch import Tensor, nn

from ...core.checks import Triple
from ...core.prologue import Norm
from ..fp8_linear import has_hooks
from .processor import Attn, Forward, Processor

KNOWN_NORMS = (nn.RMSNorm, nn.LayerNorm, RMSNorm, MochiRMSNorm)
"""Whose arithmetic is that of `fpsattention.Norm`. A class derived from one may do something else."""


@dataclass(frozen=True)
class Stream:
    """Q, K and V of tokens that share weights, [B, L, H, D], projected but neither normalised nor rotated, and the
    norms of Q and K: of each head's channels, of all heads' channels, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: nn.Module | None
    norm_k: nn.Module | None

    @property
    def tokens(self) -> int:
        return self.q.shape[1]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the video's tokens: of channel pairs (2i, 2i + 1), by angles with these cosines and sines.

    Attributes:
        cos, sin: [L, 1 or H, D / 2].
    """

    cos: Tensor
    sin: Tensor

    def tables(self, grid: Triple) -> Any:
        """As `norm_rope_quantize` takes it."""
        return torch.stack((self.cos, self.sin), dim=-1)

    def rotate(self, x: Tensor) -> Tensor:
        """x [B, L, H, D] rotated, in fp32, and rounded to its dtype."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = even * self.cos - odd * self.sin, even * self.sin + odd * self.cos
        return torch.stack(pairs, dim=-1).flatten(-2).type_as(x)


class Fused(Processor, ABC):
    """Repeats a processor of the host.

    Attributes:
        stock: the host's processor class that it repeats.
        unknown: arguments of `__call__` that the host never gives to its self-attention layers.
    """

    stock: type
    unknown: tuple[str, ...] = ()

    @abstractmethod
    def self_attention(
        self,
        attn: Attn,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        image_rotary_emb: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What the layer returns, from the arguments of `__call__`."""

    # The host passes on by keyword only what this signature names.
    def __call__(
        self,
        attn: Attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.scope.current().parts is None:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        for name in self.unknown:
            if given[name] is not None:
                raise ValueError(
                    f"{name}: was given to a self-attention layer, where FPSAttention has no place for it"
                )
        return self.self_attention(attn, hidden_states, encoder_hidden_states, image_rotary_emb)

    def attend_streams(
        self,
        video: Stream,
        text: Stream | None = None,
        *,
        rope: Rope | None,
        prefix_len: int = 0,
        suffix_len: int = 0,
    ) -> Tensor:
        """Attention of the video's tokens and of text, after their norms and the rotation of the video's.

        Args:
            video: the video's tokens, with prefix_len text tokens before or suffix_len after them.
            text: tokens after these that have weights of their own.
            rope: None: positions are in the tokens.

        Returns [B, L, H * D].
        """
        streams = [video] if text is None else [video, text]
        lengths: dict[str, Any] = {"prefix_len": prefix_len, "suffix_len": suffix_len}
        if text is not None:
            lengths["suffix_len"] += text.tokens
        v = _joined([stream.v for stream in streams])
        prologue = self._prologue(streams, rope)
        if prologue is not None:
            q, k = (_joined([getattr(stream, name) for stream in streams]) for name in "qk")
            return self.attend(q, k, v, **lengths, prologue=prologue)
        q, k = (
            _joined([_rotated(of_video, rope, prefix_len, suffix_len), *of_text])
            for of_video, *of_text in zip(*map(_normalised, streams), strict=True)
        )
        return self.attend(q, k, v, **lengths)

    def _prologue(self, streams: Sequence[Stream], rope: Rope | None) -> dict[str, Any] | None:
        """Norms and rotation as `norm_rope_quantize` takes them; None where they run by themselves."""
        norms = _norm_arguments(streams) if self._fuses(streams) else None
        if norms is None or rope is None:
            return norms
        return norms | {"rope": rope.tables(self.scope.current().grid)}

    def _fuses(self, streams: Sequence[Stream]) -> bool:
        """Whether `attend` may get a prologue in this forward."""
        forward: Forward = self.scope.current()
        norms = [norm for stream in streams for norm in (stream.norm_q, stream.norm_k) if norm is not None]
        inputs = [x for stream in streams for x in (stream.q, stream.k, stream.v)]
        inputs += [x for norm in norms for x in norm.parameters()]
        if forward.group is not None or (forward.windows is not None and torch.compiler.is_compiling()):
            return False
        if torch.is_autocast_enabled(inputs[0].device.type) or any(map(has_hooks, norms)):
            return False
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return False
        # What the prologue makes is rounded, and K's mean and a choice of tiles come before that.
        return all(
            config.quant == "fp8" and not config.smooth_k and config.select is None
            for config, _ in forward.parts or ()
        )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _normalised(stream: Stream) -> tuple[Tensor, Tensor]:
    """Q and K after their norms."""
    return _after(stream.norm_q, stream.q), _after(stream.norm_k, stream.k)


def _after(norm: nn.Module | None, x: Tensor) -> Tensor:
    """x [B, L, H, D] after its norm."""
    if norm is None:
        return x
    size = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None) or x.shape[3:]
    return norm(x) if tuple(size) == x.shape[3:] else norm(x.flatten(2)).view_as(x)


def _rotated(x: Tensor, rope: Rope | None, prefix_len: int, suffix_len: int) -> Tensor:
    """x [B, L, H, D] with its video tokens rotated; text tokens before and after them stay as they are."""
    if rope is None:
        return x
    if prefix_len == suffix_len == 0:
        return rope.rotate(x)
    before, video, after = x.split([prefix_len, x.shape[1] - prefix_len - suffix_len, suffix_len], dim=1)
    return torch.cat([before, rope.rotate(video), after], dim=1)


def _norm_arguments(streams: Sequence[Stream]) -> dict[str, Any] | None:
    """The norms as `norm_rope_quantize` takes them; None for those that it has no place for."""
    norms: list[tuple[Any, Any]] = [(stream.norm_q, stream.norm_k) for stream in streams]
    flat = [norm for pair in norms for norm in pair]
    first, *others = flat
    if all(norm is None for norm in flat):
        return {}
    if type(first) not in KNOWN_NORMS or not isinstance(first.eps, float) or first.weight is None:
        return None
    for norm in others:
        if type(norm) is not type(first) or norm.eps != first.eps or norm.weight is None:
            return None
        if norm.weight.shape != first.weight.shape:
            return None
    is_layer_norm = isinstance(first, nn.LayerNorm)
    if any((getattr(norm, "bias", None) is not None) != is_layer_norm for norm in flat):
        return None
    if is_layer_norm and (len(streams) > 1 or first.weight.numel() != streams[0].q.shape[3]):
        return None
    text = streams[1] if len(streams) > 1 else None
    return {
        f"{x}_norm": Norm(
            norm.weight,
            bias=norm.bias if is_layer_norm else None,
            text_weight=None if text is None else getattr(text, f"norm_{x}").weight,
            eps=norm.eps,
        )
        for x, norm in zip("qk", norms[0], strict=True)
    }
