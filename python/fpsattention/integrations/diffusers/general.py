"""`General`, our attention in the host's own processor.

The processor runs as it is, but for its attention call. Nothing outside of it changes: its code is compiled anew from
its source, with the call exchanged (`rewrite`), and gets what attends as an argument. A name exchanged in the host's
module would reach other models; a backend of the host's registry is not asked for by all processors; a mode of
torch.overrides or a variable of the thread, which a processor could find its attention by, breaks torch.compile.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...core.support import HEAD_DIMS
from ..scope import Scope
from .description import Description
from .processor import Attn, Forward, Processor
from .rewrite import ARGUMENT, with_attention_call


class General(Processor):
    """Self-attention of one layer by the host's processor. `general` makes a subclass for each class of processors.

    Attributes:
        rewritten: the host's `__call__`, with the keyword `rewrite.ARGUMENT`.
    """

    rewritten: Any

    def __init__(
        self, replaced: Any, scope: Scope, layer: int, backend: str, description: Description, first: bool
    ):
        """Args:
        first: whether it is the first layer with our attention, which reads masks on behalf of all.
        """
        super().__init__(replaced, scope, layer, backend)
        self.description = description
        self.first = first

    def __reduce__(self):
        """Subclasses have no name by which pickle could find them."""
        return _unpickled, (type(self.replaced),), vars(self)

    def run(self, attn: Attn, *args, **kwargs) -> Any:
        """The host's `__call__`."""
        forward: Forward = self.scope.current()
        if forward.parts is None:
            return self.replaced(attn, *args, **kwargs)
        call = _Call(self, forward)
        out = type(self).rewritten(self.replaced, attn, *args, **kwargs, **{ARGUMENT: call})
        wanted = 1
        if self.description.one_by_one and forward.text_valid is not None:
            wanted = len(forward.text_valid)
        if call.count != wanted and not (self.description.may_skip and call.count == 0):
            raise RuntimeError(
                f"{self.name}: a layer called attention {call.count} times, but by its model's description it is "
                f"{wanted}"
            )
        return out

    @property
    def name(self) -> str:
        """For errors."""
        return type(self.replaced).__name__


def general(stock: Any) -> type[General]:
    """The class that runs processors of the class `stock`, with the signature of their `__call__`.

    Raises ValueError, with the reason only, when that cannot be.
    """
    if issubclass(stock, nn.Module):
        raise ValueError("it is a module, which nothing else can take the place of")
    return _general(stock)


@functools.cache
def _general(stock: Any) -> type[General]:
    function = inspect.getattr_static(stock, "__call__", None)
    rewritten = with_attention_call(function)

    # The host passes on what the signature names.
    @functools.wraps(function)
    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)

    body = {"__call__": __call__, "rewritten": staticmethod(rewritten), "__module__": __name__}
    return type(f"General{stock.__name__}", (General,), body)


def _unpickled(stock: type) -> General:
    kind = general(stock)
    return kind.__new__(kind)


class _Call:
    """The attention of one call of a layer. Its methods have the signatures of the functions that they stand for."""

    def __init__(self, processor: General, forward: Forward):
        self.processor = processor
        self.forward = forward
        self.count = 0

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """diffusers' `dispatch_attention_fn`, of [B, L, H, D]. Backend and parallelism are the transformer's."""
        if attention_kwargs:
            self._refuse(f"attention_kwargs {sorted(attention_kwargs)}, which FPSAttention does not know")
        return self._attend(query, key, value, attn_mask, dropout_p, is_causal, scale)

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """torch's `scaled_dot_product_attention`, of [B, H, L, D]."""
        if query.dim() != 4:
            self._refuse(f"queries {list(query.shape)}, which are not [B, H, L, D]")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return self._attend(q, k, v, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(f"{self.processor.name}: called attention with {what}")

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        self.count += 1
        if q.dim() != 4 or not q.shape == k.shape == v.shape:
            shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
            self._refuse(
                f"q, k and v of [B, L, H, D] = {shapes}; in self-attention without grouped heads they are alike"
            )
        if causal:
            self._refuse("is_causal=True, but FPSAttention is bidirectional")
        if dropout != 0:
            self._refuse(f"dropout_p={dropout}, but FPSAttention has no dropout; set it to 0")
        if q.shape[3] not in HEAD_DIMS:
            self._refuse(f"heads of {q.shape[3]} channels; FPSAttention's kernels take {HEAD_DIMS}")
        before, after = self.forward.others
        sample = None
        if self.processor.description.one_by_one:
            if torch.compiler.is_compiling():
                self._refuse("lengths that torch.compile does not know; leave the transformer as it is")
            if mask is not None:
                self._refuse("a mask, though by the model's description samples come without padding")
            sample = self.count - 1
            after = q.shape[1] - math.prod(self.forward.grid) - before
            self._check_length(after, sample)
        else:
            self._check_mask(mask, q)
        out = self.processor.attend(q, k, v, prefix_len=before, suffix_len=after, scale=scale, sample=sample)
        return out.unflatten(2, q.shape[2:])

    def _check_length(self, after: int, sample: int) -> None:
        """Let a sample without its padding have as many tokens as `forward.text_valid` says."""
        valid = self.forward.text_valid
        if self.processor.first and valid is not None and (sample >= len(valid) or after != valid[sample]):
            self._refuse(
                f"{after} tokens after the video's in sample {sample}, but by the model's description samples have "
                f"{valid.tolist()}"
            )

    def _check_mask(self, mask: Any, q: Tensor) -> None:
        """Let a mask say what `forward.text_valid` says, and nothing else. Its content is read in one layer, and not
        under torch.compile: that waits for the GPU.
        """
        forward = self.forward
        if forward.text_valid is None:
            if mask is not None:
                self._refuse(
                    "a mask, which FPSAttention takes only for padding that the model's description tells of"
                )
            return
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.dim() not in (2, 4):
            self._refuse("no boolean mask, though the model's description tells of padding")
        if torch.compiler.is_compiling() or not self.processor.first:
            return
        length = q.shape[1]
        valid = forward.text_valid.to(q.device)
        real = torch.arange(length, device=q.device) < (length - forward.others[1] + valid)[:, None]  # [B, L]
        keys = mask[:, None, None] if mask.dim() == 2 else mask
        same = keys.shape[3] == length and keys == real[:, None, None]
        if keys.shape[2] > 1:  # a row for each query; nobody reads what padding attends
            same |= ~real[:, None, :, None]
        if not torch.as_tensor(same).all():
            self._refuse("a mask other than that of the padding which the model's description tells of")
