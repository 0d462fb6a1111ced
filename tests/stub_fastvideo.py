"""The part of FastVideo's interface that fpsattention.integrations.fastvideo uses, as of 0.2.1.

FastVideo needs CUDA packages to be installed, so its attention layer and what its Wan model does with it are written
down here, in one process: `Place` says which of how many processes that is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imports import import_anew


@dataclass
class Place:
    rank: int = 0
    size: int = 1


class AttentionImpl:
    def preprocess_qkv(self, qkv: Tensor, attn_metadata) -> Tensor:
        return qkv

    def postprocess_output(self, output: Tensor, attn_metadata) -> Tensor:
        return output


class SDPAImpl(AttentionImpl):
    def __init__(self, scale: float):
        self.scale = scale

    def forward(self, query, key, value, attn_metadata):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)


class DistributedAttention(nn.Module):
    place = Place()

    def __init__(self, num_heads: int, head_size: int):
        super().__init__()
        self.num_heads, self.softmax_scale = num_heads, head_size**-0.5
        self.attn_impl = SDPAImpl(self.softmax_scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """FastVideo's processes exchange tokens for heads and back. Here the heads of other processes stay zero."""
        own = torch.arange(self.num_heads, device=q.device).chunk(self.place.size)[self.place.rank]
        qkv = self.attn_impl.preprocess_qkv(torch.cat([q, k, v])[:, :, own], None)
        out = self.attn_impl.forward(*qkv.chunk(3), None)
        return torch.zeros_like(q).index_copy(2, own, self.attn_impl.postprocess_output(out, None)), None


class DistributedAttention_VSA(DistributedAttention):
    pass


class Block(nn.Module):
    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.to_qkv = nn.Linear(heads * head_dim, 3 * heads * head_dim)
        self.attn1 = DistributedAttention(heads, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.attn1.num_heads, -1)).unbind(2)
        return x + self.attn1(q, k, v)[0].flatten(2)


class WanTransformer3DModel(nn.Module):
    def __init__(self, heads: int = 2, head_dim: int = 64, layers: int = 2):
        super().__init__()
        self.patch_size = (1, 2, 2)
        self.patch_embedding = nn.Conv3d(4, heads * head_dim, self.patch_size, self.patch_size)
        self.blocks = nn.ModuleList(Block(heads, head_dim) for _ in range(layers))
        self.gradient_checkpointing = False

    def forward(self, hidden_states, encoder_hidden_states, timestep, guidance=None, **kwargs) -> Tensor:
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x


def install(monkeypatch, version: str = "0.2.1") -> Place:
    """Make FastVideo importable, as if it were installed, until the test ends."""
    place = Place()
    monkeypatch.setattr(DistributedAttention, "place", place)
    parts = {
        "attention.backends.abstract": {"AttentionImpl": AttentionImpl},
        "attention.layer": {"DistributedAttention": DistributedAttention},
        "distributed.parallel_state": {
            "get_sp_parallel_rank": lambda: place.rank,
            "get_sp_world_size": lambda: place.size,
        },
        "models.dits.wanvideo": {"WanTransformer3DModel": WanTransformer3DModel},
    }
    for path, names in parts.items():
        name = "fastvideo"
        for part in ("", *path.split(".")):
            name += f".{part}" if part else ""
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
        for attribute, value in names.items():
            setattr(sys.modules[name], attribute, value)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "fastvideo" else real(name))
    import_anew(monkeypatch, "fastvideo")
    return place
