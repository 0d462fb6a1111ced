"""What examples/tiny_dit asks of `fpsattention.StepSchedule`, until the package has it. To be deleted then."""

from dataclasses import dataclass

import torch

import fpsattention


@dataclass(frozen=True)
class StepSchedule:
    early: fpsattention.AttentionConfig
    mid: fpsattention.AttentionConfig
    late: fpsattention.AttentionConfig
    alpha: tuple[float, float]

    def _stage(self, progress):
        return ("early", "mid", "late")[sum(bound <= progress + 1e-5 for bound in self.alpha)]

    def at(self, *, step, num_steps):
        return getattr(self, self._stage(step / num_steps))

    def stage_for_sigma(self, sigma, *, shift):
        return self._stage(shift * (1 - sigma) / (sigma + shift * (1 - sigma)))

    def map_by_stage(self, fn, sigmas, *batched, shift):
        stages = [self.stage_for_sigma(sigma, shift=shift) for sigma in sigmas.tolist()]
        rows = {
            s: [i for i, x in enumerate(stages) if x == s] for s in ("early", "mid", "late") if s in stages
        }
        out = torch.cat([fn(getattr(self, s), *(x[i] for x in batched)) for s, i in rows.items()])
        return out[torch.tensor(sum(rows.values(), [])).argsort()]
