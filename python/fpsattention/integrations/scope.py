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


class Scope:
    """The forward of one transformer that each thread is in."""

    def __init__(self):
        # Of this very type: of a subclass, torch.compile (2.11) reads the class's attributes, not the thread's.
        self._here = threading.local()

    def __reduce__(self):  # a copy of the transformer has forwards of its own
        return type(self), ()

    def enter(self, forward: Any) -> None:
        """Begin a forward in this thread, inside of the one that it is in."""
        here = self._here
        here.outer = vars(here).copy()
        here.forward, here.backward = forward, _backward_pass()

    def leave(self) -> None:
        """End it. Does nothing outside of a forward."""
        outer = vars(self._here).get("outer")
        if outer is not None:
            vars(self._here).clear()
            vars(self._here).update({"forward": None} | outer)

    @property
    def forward(self) -> Any:
        """What the layers need to know of the forward that this thread is in; None outside of one."""
        return getattr(self._here, "forward", None)

    @forward.setter
    def forward(self, forward: Any) -> None:
        self._here.forward = forward

    def current(self) -> Any:
        """The same, for a layer. Raises RuntimeError outside of a forward, and when a checkpoint that is not carried
        recomputes the layer.
        """
        here = self._here
        if torch.compiler.is_compiling():  # the hooks of the transformer have run: the attribute is there
            forward = here.forward
        else:
            forward = self.forward
            if forward is not None and here.backward != _backward_pass():
                forward = None
        if forward is None:
            raise RuntimeError(NOT_IN_A_FORWARD)
        return forward

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
