"""The part of LightX2V's interface that fpsattention.integrations.lightx2v uses, as of f8aee98 (2026-08-21).

LightX2V is not on PyPI, so its registry and the base class of attention types are written down here.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch.nn.functional as F

from imports import import_anew


class Register(dict):
    """Registers by name as a decorator; a name can be taken once."""

    def __call__(self, name):
        def add(cls):
            assert name not in self, f"{name} already exists."
            self[name] = cls
            return cls

        return add


class AttnWeightTemplate:
    def __init__(self, weight_name):
        self.weight_name = weight_name
        self.config = {}


class TorchSDPAWeight(AttnWeightTemplate):
    def __init__(self):
        self.calls = []

    def apply(self, q, k, v, **kwargs):
        self.calls.append(kwargs)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=kwargs.get("softmax_scale"))
        return out.transpose(0, 1).flatten(1)


def install(monkeypatch) -> Register:
    """Make LightX2V importable, as if it were installed, until the test ends."""
    registry = Register(torch_sdpa=TorchSDPAWeight)
    for name in ("", ".utils", ".common", ".common.ops", ".common.ops.attn"):
        monkeypatch.setitem(sys.modules, f"lightx2v{name}", ModuleType(f"lightx2v{name}"))
    factory = ModuleType("lightx2v.utils.registry_factory")
    factory.ATTN_WEIGHT_REGISTER = registry
    template = ModuleType("lightx2v.common.ops.attn.template")
    template.AttnWeightTemplate = AttnWeightTemplate
    for module in (factory, template):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    import_anew(monkeypatch, "lightx2v")
    return registry
