"""Windowed FP8 attention over a grid of video tokens: Wan2.1 at 720p on a Hopper GPU, a tiny grid elsewhere."""

import torch

import fpsattention as fps

device = "cuda" if torch.cuda.is_available() else "cpu"
probe = torch.empty(1, 1, 1, 128, device=device, dtype=torch.bfloat16)
backend, _ = fps.backend_for(probe, fps.AttentionConfig())
if backend == "sm90":
    heads, grid = 40, (21, 45, 80)
    config = fps.AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9))  # tile in tokens, window in tiles
else:
    heads, grid = 2, (6, 24, 24)
    config = fps.AttentionConfig(tile=(2, 8, 8), window=(3, 3, 1))

print(fps.plan(grid).explain(config, heads=heads))

tokens = grid[0] * grid[1] * grid[2]
torch.manual_seed(0)
q, k, v = (torch.randn(1, tokens, heads, 128, device=device, dtype=torch.bfloat16) for _ in range(3))

out, lse = fps.attention(q, k, v, grid=grid, config=config, return_lse=True, backend=backend)

# The error of FP8: compare one head with attention without rounding, under the same window.
one_head = [x[:, :, :1] for x in (q, k, v)]
exact, _ = fps.reference.exact_attention(*one_head, grid=grid, config=config, dtype=torch.float32)
error = (out[:, :, :1].float() - exact).norm() / exact.norm()
print(f"\nout {list(out.shape)} {out.dtype}, lse {list(lse.shape)} {lse.dtype}, backend {backend}")
print(f"relative RMS error of head 0 against exact attention under the same window: {error:.2e}")
