"""The processes of a run: one alone, or those that torchrun started. Each has one device."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fpsattention.cli.errors import chosen_device


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


def start(device: str) -> Machine:
    """The machine of this process, in its group if there is one. Raises MachineError for a GPU that is not there."""
    chosen = chosen_device(device)
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun sets it
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "cpu:gloo")
    if not dist.is_initialized():
        return Machine(chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    return Machine(chosen, dist.get_rank(), dist.get_world_size())
