"""`Cache`, of tensors that calls on a GPU share: tables that depend on sizes alone."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .geometry import apart


@dataclass
class _Entry:
    """A cached value.

    Attributes:
        value: the value.
        tensors: all its tensors.
        size: their bytes.
        streams: all streams that may read it.
        captured: whether a CUDA graph reads it.
    """

    value: Any
    tensors: tuple[Tensor, ...]
    size: int
    streams: set[torch.cuda.Stream] = field(default_factory=set)
    captured: bool = False


class Cache:
    """Tensors kept from call to call: the most recently used ones, up to `max_bytes`.

    Any stream that got an entry may still read it when the entry is dropped, so the allocator is told of these streams.
    An entry that was handed out during the capture of a CUDA graph is never dropped, because each replay reads it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, make: Callable[..., tuple[Any, tuple[Tensor, ...]]], *args: Any) -> Any:
        """The value that `make(*args)` returns, cached.

        `make` returns (value, all tensors in it). They lie on the last of `args`, a device.
        """
        device, key = args[-1], (make, *args)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self.lock:
            entry = self.entries.get(key)
            if entry is None:
                if capturing:
                    raise RuntimeError(
                        "config: the first call of this kind copies tables of tiles and tokens to the GPU, which a "
                        "CUDA graph cannot capture; make the same call once before the capture"
                    )
                value, tensors = apart(make, *args)
                entry = _Entry(value, tensors, sum(x.nbytes for x in tensors))
                self.entries[key] = entry
                self.bytes += entry.size
            self.entries.move_to_end(key)
            entry.captured |= capturing
            if device.type == "cuda":
                entry.streams.add(torch.cuda.current_stream(device))
            if self.bytes > self.max_bytes:
                self._drop()
            return entry.value

    def _drop(self) -> None:
        for key, entry in list(self.entries.items())[:-1]:  # the last one is about to be used
            if self.bytes > self.max_bytes and not entry.captured:
                for x, stream in product(entry.tensors, entry.streams):
                    x.record_stream(stream)
                self.bytes -= entry.size
                del self.entries[key]
