"""FPSAttention over several processes, compared with one process: gloo on CPUs, NCCL on GPUs.

    torchrun --nproc-per-node 4 examples/many_gpus.py

The processes split the tokens of one video. First they compute attention alone: by Ulysses, in a ring, and by both on a
mesh. Then they train a small video transformer for some steps; FSDP2 shards its weights and gradients as well.
"""

import os
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fpsattention as fps
from fpsattention.parallel import ring_attention, ulysses_attention, usp_attention

# Wan2.1-14B at 720p, 93 frames: the ring needs 24 frames of tokens, which split into 2, 4 or 8 slabs of whole tiles.
ATTENTION_ON_GPU = {"grid": (24, 45, 80), "heads": 40, "head_dim": 128, "dtype": torch.bfloat16}
TRAINING_ON_GPU = {"grid": (24, 18, 40), "heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
ON_CPU = {"grid": (24, 9, 4), "heads": 8, "head_dim": 16, "dtype": torch.float32}  # for both
TILE = (3, 9, 4)
STEPS = 3


def share_of(x: torch.Tensor) -> torch.Tensor:
    """The tokens of x [B, L, ...] that this process holds."""
    return x.tensor_split(dist.get_world_size(), dim=1)[dist.get_rank()]


def everywhere(x: float, how: dist.ReduceOp, device: torch.device) -> float:
    x = torch.tensor(x, device=device)
    dist.all_reduce(x, how)
    return x.item()


def timed(call, device: torch.device):
    """(result, milliseconds of the slowest process) of a call, after one to warm up."""
    call()
    dist.barrier()
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, everywhere(1e3 * (time.perf_counter() - start), dist.ReduceOp.MAX, device)


def compare_attention(device: torch.device, grid, heads: int, head_dim: int, dtype: torch.dtype):
    """Yields (what, ms of one process, ms of all, largest difference relative to the largest value)."""
    g = torch.Generator(device).manual_seed(0)
    shape = 1, grid[0] * grid[1] * grid[2], heads, head_dim
    q, k, v, dout = (torch.randn(shape, generator=g, device=device, dtype=dtype) for _ in range(4))
    windows = [(3, 3, 9) if head % 2 else (5, 1, 5) for head in range(heads)]
    sparse, dense = fps.AttentionConfig(TILE, windows), fps.AttentionConfig(TILE)

    def run(attend, inputs, config):
        q, k, v, dout = inputs
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = attend(q, k, v, grid=grid, config=config)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    # Consecutive tokens are shares of consecutive slabs of frames, so `share_of` serves the mesh as well.
    size = dist.get_world_size()
    sizes = (2, size // 2) if size % 2 == 0 else (1, size)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("ring", "ulysses"))

    everything = q, k, v, dout
    mine = [share_of(x) for x in everything]
    for name, attend, config in (
        ("Ulysses, windows of each head", ulysses_attention, sparse),
        ("ring, dense", ring_attention, dense),
        (
            f"a ring of {sizes[0]} times Ulysses of {sizes[1]}, dense",
            partial(usp_attention, mesh=mesh),
            dense,
        ),
    ):
        expected, alone = timed(partial(run, fps.attention, everything, config), device)
        ours, together = timed(partial(run, attend, mine, config), device)
        pairs = list(zip(ours, expected, strict=True))
        difference = max(((x - share_of(y)).abs().max() / y.abs().max()).item() for x, y in pairs)
        yield name, alone, together, everywhere(difference, dist.ReduceOp.MAX, device)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.out, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, attend):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(attend(q, k, v).flatten(2))
        return x + self.mlp(F.gelu(x))


class SmallDiT(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))

    def forward(self, x, attend):
        for block in self.blocks:
            x = block(x, attend)
        return x


def train(model: nn.Module, attend, noisy: torch.Tensor, target: torch.Tensor) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        loss = (model(noisy, attend) - target).square().mean()
        optimiser.zero_grad()
        # FSDP2 averages gradients over the processes. Equal shares make that the gradient of the mean over all tokens.
        loss.backward()
        optimiser.step()


def compare_training(device: torch.device, grid, heads: int, head_dim: int, dtype: torch.dtype):
    """Yields a row like `compare_attention`'s; the difference is of the weights, relative to their largest change."""
    g = torch.Generator(device).manual_seed(0)
    dim = heads * head_dim
    noisy, target = (
        torch.randn(1, grid[0] * grid[1] * grid[2], dim, generator=g, device=device) for _ in range(2)
    )
    config = fps.AttentionConfig(TILE, window=(3, 1, 1))

    def run(operation, inputs, shard):
        def attend(q, k, v):
            q, k, v = (x.to(dtype) for x in (q, k, v))
            return operation(q, k, v, grid=grid, config=config).float()

        torch.manual_seed(0)
        model = SmallDiT(dim, heads, layers=2).to(device)
        before = [x.detach().clone() for x in model.parameters()]
        if shard:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        _, milliseconds = timed(lambda: train(model, attend, *inputs), device)
        after = [x.full_tensor() if shard else x.detach() for x in model.parameters()]
        return milliseconds / STEPS, [x - y for x, y in zip(after, before, strict=True)]

    alone, expected = run(fps.attention, (noisy, target), shard=False)
    together, moved = run(ulysses_attention, (share_of(noisy), share_of(target)), shard=True)
    pairs = zip(moved, expected, strict=True)
    difference = max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)
    yield "a training step, Ulysses and FSDP2", alone, together, difference


def main() -> None:
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start it with torchrun: torchrun --nproc-per-node 4 examples/many_gpus.py")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        attention, training = ATTENTION_ON_GPU, TRAINING_ON_GPU
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        attention = training = ON_CPU
        dist.init_process_group("gloo")
    say = print if dist.get_rank() == 0 else lambda *_: None
    say(f"{dist.get_world_size()} processes, {dist.get_backend()}")
    say(f"{'':40}{'one, ms':>10}{'all, ms':>10}{'difference':>12}")
    for rows in (compare_attention(device, **attention), compare_training(device, **training)):
        for name, alone, together, difference in rows:
            say(f"{name:40}{alone:10.1f}{together:10.1f}{difference:12.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
