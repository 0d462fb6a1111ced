"""Rectified flow, and the attention of each noise level: only this file calls `fpsattention`'s attention.

x = (1 - sigma) * clean + sigma * noise; the model predicts noise - clean. u is sigma before the timestep shift; a
sampler of n steps starts step i at u = 1 - i / n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fpsattention as fps

from .model import Attend, VideoDiT

STAGES = ("early", "mid", "late")
MODES = {
    "dense": "16 bits, every pair of tokens",
    "fp8": "FP8, every pair of tokens",
    "window": "16 bits under the schedule's windows, or over the tiles that it chooses",
    "fps": "FP8 under the schedule's windows, or over the tiles that it chooses",
}
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """The numbers of a schedule over denoising steps (arXiv 2506.04648, section 3.3).

    Attributes:
        grid: tokens (T, H, W).
        tile: tokens of a tile, in every stage. In early steps a brick of 2 x 2 tiles shares one FP8 scale.
        early, mid, late: windows in tiles.
        alpha: progress at which mid and late begin.
        shift: timestep shift, in training and sampling.
        chosen: shares of the key tiles that early, mid and late choose by content, in place of windows; None: windows.
        always: window in tiles that belongs to every choice; None: none.
    """

    grid: Triple
    tile: Triple
    early: Triple
    mid: Triple
    late: Triple
    alpha: tuple[float, float]
    shift: float
    chosen: tuple[float, float, float] | None = None
    always: Triple | None = None

    def schedule(self, mode: str) -> fps.StepSchedule:
        """The attention of each stage in a mode of `MODES`."""
        t, h, w = self.tile
        sparse, quant = mode in ("window", "fps"), "fp8" if mode in ("fp8", "fps") else "none"
        configs = {
            stage: fps.AttentionConfig(tile=self.tile, quant=quant, **self._attended(stage) if sparse else {})
            for stage in STAGES
        }
        if mode in ("fp8", "fps"):
            configs["early"] = replace(configs["early"], quant_tile=(t, 2 * h, 2 * w))
        return fps.StepSchedule(**configs, alpha=self.alpha)

    def _attended(self, stage: str) -> dict:
        """The window of a stage, or its choice, as arguments of a config."""
        if self.chosen is None:
            return {"window": getattr(self, stage)}
        return {"select": fps.TopTiles(self.chosen[STAGES.index(stage)], always=self.always)}

    def density(self, stage: str) -> float:
        return getattr(self.schedule("window"), stage).resolve(self.grid, 1).density


class Attention:
    """The self-attention of a run; `of_config`, `of_batch` and `of_step` make the function that the model calls.

    Attributes:
        backend: backend of `fpsattention.attention`.
    """

    def __init__(self, plan: Plan, mode: str, backend: str = "auto"):
        self.plan, self.backend = plan, backend
        self.schedule = plan.schedule(mode)
        self._configs = [getattr(self.schedule, stage) for stage in STAGES]

    def stage(self, sigma: float) -> str:
        return self.schedule.stage_for_sigma(sigma, shift=self.plan.shift)

    def of_config(self, config: fps.AttentionConfig) -> Attend:
        def attend(q, k, v):
            backend = self.backend
            if backend == "auto" and not q.is_cuda:
                # Without a GPU only plain torch can run, so name it, to avoid the warning. For dense fp32 attention
                # SDPA is many times as fast as the reference.
                if config.quant == "none" and config.window is None and config.select is None:
                    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(
                        1, 2
                    )
                backend = "reference"
            return fps.attention(q, k, v, grid=self.plan.grid, config=config, backend=backend)

        return attend

    def of_batch(self, sigma: Tensor) -> Attend:
        """For noise levels [B] (on the CPU): each sample attends under the config of its own stage.

        Only the attention splits the batch by stage, into at most three calls a layer. One stage for a whole batch
        would need one call, but the gradient of a step would be of one stage, and differ more from step to step.
        """
        if len(set(self._configs)) == 1:
            return self.of_config(self._configs[0])

        def attend(q, k, v):
            return self.schedule.map_by_stage(
                lambda config, *qkv: self.of_config(config)(*qkv), sigma, q, k, v, shift=self.plan.shift
            )

        return attend

    def of_step(self, step: int, steps: int) -> Attend:
        return self.of_config(self.schedule.at(step=step, num_steps=steps))


def shifted(u: Tensor, shift: float) -> Tensor:
    return shift * u / (1 + (shift - 1) * u)


def draw_sigma(count: int, std: float, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels: logit-normal u, with mean 0 of the logit, shifted; fp32 [count] on the CPU."""
    return shifted(torch.sigmoid(std * torch.randn(count, generator=generator)), shift)


def mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    sigma = sigma.to(clean.device)[:, None, None, None, None]
    return (1 - sigma) * clean + sigma * noise


def velocity(model: VideoDiT, x: Tensor, sigma: Tensor, attend: Attend) -> Tensor:
    """The model's velocity, in mixed precision on a GPU and in fp32 elsewhere."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return model(x, sigma.to(x.device), attend)


def losses(
    model: VideoDiT,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    attention: Attention,
    teach: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Mean squared error of the velocity of each sample, fp32 [B]; sigma [B] on the CPU.

    Args:
        teach: gives the velocity to predict, from the noisy latent and sigma; None: noise - clean.
    """
    x = mix(clean, noise, sigma)
    target = noise - clean if teach is None else teach(x, sigma)
    predicted = velocity(model, x, sigma, attention.of_batch(sigma))
    return (predicted - target).square().mean(dim=(1, 2, 3, 4))


def one_step(model: VideoDiT, x: Tensor, sigma: Tensor, attention: Attention) -> Tensor:
    """The clean latent that the model predicts from a noisy one in one step."""
    return x - sigma.to(x.device)[:, None, None, None, None] * velocity(
        model, x, sigma, attention.of_batch(sigma)
    )


def sample(
    model: VideoDiT, x: Tensor, start: int, steps: int, attention: Attention, tick: Callable = lambda: None
) -> Tensor:
    """Euler's method from x, with the noise of step `start` of `steps`, to sigma 0. Calls `tick` after each step."""
    sigmas = shifted(1 - torch.arange(steps + 1, dtype=torch.float64) / steps, attention.plan.shift).float()
    for step in range(start, steps):
        here, there = sigmas[step], sigmas[step + 1]
        x = x + (there - here).item() * velocity(
            model, x, here.expand(len(x)), attention.of_step(step, steps)
        )
        tick()
    return x


def resample(
    model: VideoDiT,
    clean: Tensor,
    noise: Tensor,
    start: int,
    steps: int,
    attention: Attention,
    tick: Callable = lambda: None,
) -> Tensor:
    """`sample` from a clean latent with the noise of step `start`."""
    sigma = shifted(torch.tensor(1 - start / steps, dtype=torch.float64), attention.plan.shift).float()
    return sample(model, mix(clean, noise, sigma.expand(len(clean))), start, steps, attention, tick)
