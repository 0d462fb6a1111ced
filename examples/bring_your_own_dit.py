"""FPSAttention in your own video transformer: its self-attention needs a grid and a config beside Q, K and V."""

import torch
from torch import nn

import fpsattention as fps


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, grid, config):  # x: [B, T * H * W, dim], raster order, w fastest; grid: (T, H, W)
        q, k, v = (
            self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        )  # [B, L, heads, 64 or 128]
        return x + self.out(fps.attention(q, k, v, grid=grid, config=config).flatten(2))


torch.manual_seed(0)
grid, shift, steps = (4, 8, 8), 3.0, 5
tile = (2, 4, 8)  # fps.plan(grid) ranks the tiles of your grid
sparse, dense = fps.AttentionConfig(tile, window=(1, 1, 1)), fps.AttentionConfig(tile)
schedule = fps.StepSchedule(early=sparse, mid=dense, late=sparse, alpha=(0.4, 0.8))
model = Block(dim=128, heads=2)
clean = torch.randn(1, 4 * 8 * 8, 128)

# Training: the random noise level selects the config.
sigma = torch.rand(1).item()
noise = torch.randn_like(clean)
noisy = (1 - sigma) * clean + sigma * noise
loss = (model(noisy, grid, schedule.for_sigma(sigma, shift=shift)) - (noise - clean)).square().mean()
loss.backward()
print(
    f"training at sigma {sigma:.2f}: {schedule.stage_for_sigma(sigma, shift=shift)}, loss {loss.item():.3f}"
)

# Sampling: the step selects the config. Training used the sampler's shift, so equal noise has equal configs.
with torch.no_grad():
    u = torch.linspace(1, 0, steps + 1)
    sigmas = (shift * u / (1 + (shift - 1) * u)).tolist()
    x = noise
    for step in range(steps):
        x = x + (sigmas[step + 1] - sigmas[step]) * model(x, grid, schedule.at(step=step, num_steps=steps))
        print(f"step {step}: {schedule.stage(step=step, num_steps=steps)}, x {x.std().item():.3f}")
