"""The transformer that is trained: LoRA or all weights, FPSAttention, checkpoints, FSDP2; and its dense teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fpsattention as fps
from fpsattention.cli.errors import UserError
from fpsattention.integrations.diffusers.folder import ADAPTER

from .machine import Machine


@dataclass(frozen=True)
class Make:
    """How the student is made.

    Attributes:
        rank: of the adapter's matrices; None: all weights are trained.
        targets: the linear layers that get an adapter, by the end of their names.
        shift: as in `StepSchedule.for_sigma`.
    """

    schedule: fps.StepSchedule
    shift: float
    dense_layers: tuple[int, ...]
    rank: int | None
    targets: tuple[str, ...]
    checkpointing: bool
    compiled: bool
    backend: str


class Student:
    """A transformer with FPSAttention in it, and the dense model that teaches it.

    With an adapter both are one transformer: the teacher's forward leaves adapter and FPSAttention out. If all weights
    are trained, the teacher is a frozen copy, made when it is needed.

    Attributes:
        parameters: those that are trained, by name.
    """

    def __init__(self, transformer: nn.Module, make: Make, machine: Machine, with_teacher: bool):
        self.make, self.machine, self.transformer = make, machine, transformer.to(machine.device)
        self._copy = None
        if make.rank is not None:
            self._add_adapter()
        elif with_teacher:
            self._copy = copy.deepcopy(self.transformer).requires_grad_(False).eval()
        self.transformer.train()
        if make.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if make.compiled:
            for block in blocks_of(self.transformer):
                block.compile()
        self.handle = fps.integrations.diffusers.enable(
            self.transformer,
            make.schedule,
            shift=make.shift,
            dense_layers=make.dense_layers,
            backend=make.backend,
        )
        if machine.world > 1:
            for model in filter(None, (self.transformer, self._copy)):
                _shard(model, machine)
        # Last: sharding replaces the parameters.
        self.parameters = {n: p for n, p in self.transformer.named_parameters() if p.requires_grad}

    def _add_adapter(self) -> None:
        from peft import LoraConfig

        self.transformer.requires_grad_(False)
        config = LoraConfig(
            r=self.make.rank, lora_alpha=self.make.rank, target_modules=list(self.make.targets)
        )
        try:
            self.transformer.add_adapter(config, ADAPTER)
        except ValueError as error:
            raise UserError(f"--targets {' '.join(self.make.targets)}: {error}") from error

    def forward(self, arguments: dict[str, Any]) -> Tensor:
        """What the student returns."""
        return self.transformer(**arguments, return_dict=False)[0]

    @torch.no_grad()
    def teach(self, arguments: dict[str, Any]) -> Tensor:
        """What the dense model returns."""
        if self._copy is not None:
            return self._copy(**arguments, return_dict=False)[0]
        if self.make.rank is None:
            raise RuntimeError("the student was made without a teacher")
        with self.handle.dense(), self._without_adapter():
            return self.forward(arguments)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        self.transformer.disable_adapters()
        # diffusers freezes a disabled adapter, and FSDP2 would keep what it unshards now frozen.
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    def shares(self) -> list[Tensor]:
        """This process's share of each parameter, in which writing writes the parameter."""
        return [_share(p.detach()) for p in self.parameters.values()]

    def gradients(self) -> list[Tensor | None]:
        """The gradients of `shares`, means over the processes, in float32; None where nothing depended on one."""
        grads = [p.grad for p in self.parameters.values()]
        shares = [None if grad is None else _share(grad).float() for grad in grads]
        for grad, share in zip(grads, shares, strict=True):
            if grad is not None and not isinstance(grad, DTensor):  # FSDP2 has not averaged it
                self.machine.sum(share).div_(self.machine.world)
        return shares

    def norm(self, shares: list[Tensor | None]) -> float:
        """The norm over all processes of tensors that are shared out as the parameters are."""
        squares = torch.zeros(2, device=self.machine.device)
        for parameter, share in zip(self.parameters.values(), shares, strict=True):
            if share is not None:
                squares[int(isinstance(parameter, DTensor))] += share.square().sum()
        return (squares[0] + self.machine.sum(squares[1])).sqrt().item()

    def whole(self) -> dict[str, Tensor]:
        """All weights that are saved, whole, on the CPU of the first process; empty elsewhere. All must call it."""
        names = self.parameters if self.make.rank is not None else self.transformer.state_dict()
        state, weights = self.transformer.state_dict(), {}
        for name in names:
            weight = state[name]
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if self.machine.is_first:
                weights[name] = weight.detach().cpu()
        return weights


def load_transformer(model: str, name: str, dtype: torch.dtype) -> nn.Module:
    """A pipeline's transformer, without the pipeline."""
    try:
        return AutoModel.from_pretrained(model, subfolder=name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: its {name} cannot be loaded: {error}") from error


def load_pipeline(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        # diffusers 0.41 knows torch_dtype only, later versions warn of it.
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: cannot be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer."""
    return [block for x in transformer.children() if isinstance(x, nn.ModuleList) for block in x]


def _shard(transformer: nn.Module, machine: Machine) -> None:
    """Share out the weights, but for the few that diffusers keeps in float32: FSDP2 wants one dtype in a block."""
    odd = {p for p in transformer.parameters() if p.dtype != transformer.dtype}
    how = {
        "mesh": init_device_mesh(machine.device.type, (machine.world,)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "ignored_params": odd,
    }
    for block in blocks_of(transformer):
        fully_shard(block, **how)
    fully_shard(transformer, **how)


def _share(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
