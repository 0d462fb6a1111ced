"""What the layers of a transformer run belongs to one forward of it: `Scope` tells them which forward they are in.

A host's hooks enter a forward and leave it. Layers ask the scope, and get the forward of their own thread. A checkpoint
recomputes layers after their forward has ended, during the backward; so what recomputes is bound to the forward at the
moment in which the checkpoint takes hold of its inputs (`Scope.carry`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# The attributes in which modules hold the function that checkpoints their parts: diffusers' models and those made like
# them, and torch.distributed's CheckpointWrapper. The function takes what it is to run, then the inputs of that.
CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")

NOT_IN_A_FORWARD = (
    "a layer was called outside of its transformer's forward, where neither the token grid nor the noise level is "
    "known; call the transformer itself (not .forward, which skips hooks), and checkpoint it by its own "
    "enable_gradient_checkpointing() or by torch.distributed's checkpoint_wrapper (FPSAttention does not know of "
    "others, which recompute a layer when its forward is over)"
)


class Scope(threading.local):
    """The forward of one transformer that this thread is in.

    Attributes:
        forward: what its layers need to know; None outside of a forward.
    """

    forward: Any = None
    _outer: tuple = ()  # (forward, backward pass) of the forwards that this one is nested in, and so on
    _backward = -1  # the backward pass in which the forward was entered; -1: none

    def __reduce__(self):  # a copy of the transformer has forwards of its own
        return type(self), ()

    def enter(self, forward: Any) -> None:
        self._outer = (self.forward, self._backward, self._outer)
        self.forward, self._backward = forward, _backward_pass()

    def leave(self) -> None:
        if self._outer:
            self.forward, self._backward, self._outer = self._outer

    def current(self) -> Any:
        """The forward that the calling layer is in. Raises RuntimeError when there is none, or when a checkpoint that
        is not carried recomputes the layer.
        """
        if self.forward is None:
            raise RuntimeError(NOT_IN_A_FORWARD)
        if not torch.compiler.is_compiling() and self._backward != _backward_pass():
            raise RuntimeError(NOT_IN_A_FORWARD)
        return self.forward

    @contextmanager
    def _entered(self, forward: Any) -> Iterator[None]:
        self.enter(forward)
        try:
            yield
        finally:
            self.leave()

    def bind(self, function: Callable) -> Callable:
        """`function`, to run in the forward that this thread is in now, whenever and in whichever thread it runs."""
        # A compiled graph recomputes by itself: what it was traced with is in it.
        if torch.compiler.is_compiling() or self.forward is None:
            return function
        forward = self.forward

        def in_its_forward(*args, **kwargs):
            with self._entered(forward):
                return function(*args, **kwargs)

        return in_its_forward

    def carry(self, transformer: nn.Module) -> None:
        """Let every checkpoint in the transformer recompute in the forward that it was called in. Can be repeated, as
        checkpointing may be switched on at any time.
        """
        for module, name, checkpoint in _checkpoints(transformer):
            if not (isinstance(checkpoint, _Carried) and checkpoint.scope is self):
                setattr(module, name, _Carried(self, checkpoint))

    def put_down(self, transformer: nn.Module) -> None:
        """Undo `carry`."""
        for module, name, checkpoint in _checkpoints(transformer):
            if isinstance(checkpoint, _Carried) and checkpoint.scope is self:
                setattr(module, name, checkpoint.checkpoint)


class _Carried:
    """A checkpoint function that binds what it is to run."""

    def __init__(self, scope: Scope, checkpoint: Callable):
        self.scope, self.checkpoint = scope, checkpoint

    def __call__(self, function: Callable, *args, **kwargs):
        return self.checkpoint(self.scope.bind(function), *args, **kwargs)


def _checkpoints(transformer: nn.Module) -> list[tuple[nn.Module, str, Callable]]:
    """(module, attribute, function) of the checkpoints in a transformer."""
    return [
        (module, name, module.__dict__[name])
        for module in transformer.modules()
        for name in CHECKPOINT_ATTRIBUTES
        if callable(module.__dict__.get(name))
    ]


def _backward_pass() -> int:
    return torch._C._current_graph_task_id()  # as torch.utils.checkpoint tells one backward pass from another
