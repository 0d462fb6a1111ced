"""The forwards of a transformer: `Scope` tells a layer which forward it runs in, `Hooks` begin and end forwards.

Each thread has forwards of its own. A checkpoint recomputes layers during the backward, after their forward has ended.
So the function that a checkpoint will run is bound to the current forward when the checkpoint gets it (`Scope.carry`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Attributes of modules that hold a function which checkpoints their parts: in diffusers' models and those made like
# them, and in torch.distributed's CheckpointWrapper. The function takes another one to run, then that one's arguments.
CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")

NOT_IN_A_FORWARD = (
    "a layer was called outside of its transformer's forward, where neither the token grid nor the noise level is "
    "known; call the transformer itself (not .forward, which skips hooks), and checkpoint it by its own "
    "enable_gradient_checkpointing() or by torch.distributed's checkpoint_wrapper (FPSAttention does not know of "
    "others, which recompute a layer when its forward is over)"
)


class Scope:
    """The forward of one transformer that each thread is in. Forwards can nest."""

    def __init__(self) -> None:
        # Must be threading.local itself: for a subclass, torch.compile (2.11) reads the class's attributes.
        self._here = threading.local()
        self._asked = threading.local()

    def __reduce__(self):
        """A copy of the transformer has forwards of its own."""
        return type(self), ()

    def hooks(self, transformer: nn.Module, forward_of: Callable[[nn.Module, tuple, dict], Any]) -> Hooks:
        """Put hooks in a transformer, so that each call of it is a forward.

        Args:
            forward_of: returns what the layers need to know of a call, from (transformer, args, kwargs). A bound
                method, not a closure, so that a deep copy of the transformer calls the copy's.
        """
        return Hooks(self, transformer, forward_of)

    def enter(self, forward: Any) -> None:
        """Begin a forward in this thread, inside the one that it is in."""
        here = self._here
        here.outer = vars(here).copy()
        here.forward, here.backward = forward, _backward_pass()

    def leave(self) -> None:
        """End the current forward. Does nothing outside of one."""
        outer = vars(self._here).get("outer")
        if outer is not None:
            vars(self._here).clear()
            vars(self._here).update({"forward": None} | outer)

    @property
    def forward(self) -> Any:
        """What the layers need to know of this thread's forward; None outside of one."""
        return getattr(self._here, "forward", None)

    @forward.setter
    def forward(self, forward: Any) -> None:
        self._here.forward = forward

    def current(self) -> Any:
        """`forward`, for a layer. Raises RuntimeError outside of a forward, and when a checkpoint that `carry` does not
        know recomputes the layer.
        """
        here = self._here
        if torch.compiler.is_compiling():  # the hooks have run, so the attribute is there
            forward = here.forward
        else:
            forward = self.forward
            if forward is not None and here.backward != _backward_pass():
                forward = None
        if forward is None:
            raise RuntimeError(NOT_IN_A_FORWARD)
        return forward

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Ask that the forwards which this thread begins in here run the host's own attention. Can be nested."""
        before = self.asked_dense
        self._asked.dense = True
        try:
            yield
        finally:
            self._asked.dense = before

    @property
    def asked_dense(self) -> bool:
        """Whether a forward that this thread begins now is to run the host's own attention."""
        return getattr(self._asked, "dense", False)

    @contextmanager
    def _entered(self, forward: Any) -> Iterator[None]:
        self.enter(forward)
        try:
            yield
        finally:
            self.leave()

    def bind(self, function: Callable) -> Callable:
        """`function`, to run in this thread's current forward, whenever and in whichever thread it is called."""
        # A compiled graph recomputes by itself: it contains what it was traced with.
        if torch.compiler.is_compiling() or self.forward is None:
            return function
        forward = self.forward

        def in_its_forward(*args, **kwargs):
            with self._entered(forward):
                return function(*args, **kwargs)

        return in_its_forward

    def carry(self, transformer: nn.Module) -> None:
        """Let every checkpoint in the transformer recompute in the forward in which it was called. Call it in every
        forward: checkpointing may be switched on at any time.
        """
        for module, name, checkpoint in _checkpoints(transformer):
            if not (isinstance(checkpoint, _Carried) and checkpoint.scope is self):
                setattr(module, name, _Carried(self, checkpoint))

    def put_down(self, transformer: nn.Module) -> None:
        """Undo `carry`."""
        for module, name, checkpoint in _checkpoints(transformer):
            if isinstance(checkpoint, _Carried) and checkpoint.scope is self:
                setattr(module, name, checkpoint.checkpoint)


class Hooks:
    """The hooks of a scope in a transformer, until `remove`. Arguments as in `Scope.hooks`."""

    def __init__(self, scope: Scope, transformer: nn.Module, forward_of: Callable):
        self._scope, self._transformer, self._forward_of = scope, transformer, forward_of
        self._handles = (
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            transformer.register_forward_hook(self._after, always_call=True),
        )

    def remove(self) -> None:
        """Take the hooks out, and give checkpoints their own functions back. Can be repeated."""
        self._scope.put_down(self._transformer)
        for handle in self._handles:
            handle.remove()

    # Hooks of a compiled module run outside of its graph. They must not be compiled themselves: torch.compile would
    # make another graph for every timestep.

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._scope.enter(None)  # first: `_after` leaves the forward even if the next line raises
        self._scope.forward = self._forward_of(module, args, kwargs)
        if torch.is_grad_enabled():
            self._scope.carry(module)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._scope.leave()


class _Carried:
    """A checkpoint function that binds the function that it is to run."""

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
    return torch._C._current_graph_task_id()  # by which torch.utils.checkpoint distinguishes backward passes
