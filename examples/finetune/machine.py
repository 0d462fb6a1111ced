"""The processes of a run: one alone, or those that torchrun started. Each has one device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fpsattention.cli.errors import chosen_device

PATIENCE = timedelta(hours=12)  # a process may wait while another one samples a whole video


@dataclass(frozen=True)
class Machine:
    """This process.

    Attributes:
        rank, world: its number, and how many there are.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value) -> list:
        """What every process has, in order of rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def started(device: str) -> Iterator[Machine]:
    """The machine of this process, among those of torchrun or of a group that is there already.

    Raises MachineError for a GPU that is not there.
    """
    chosen = chosen_device(device)
    own_group = "RANK" in os.environ and not dist.is_initialized()  # torchrun sets RANK
    if own_group:
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "cpu:gloo", timeout=PATIENCE
        )
    try:
        is_alone = not dist.is_initialized()
        yield Machine(chosen) if is_alone else Machine(chosen, dist.get_rank(), dist.get_world_size())
    finally:
        if own_group:
            dist.destroy_process_group()
