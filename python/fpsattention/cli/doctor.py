"""`fpsattention doctor`: what is installed, which backend runs here, and whether its results are right.

It needs torch alone: the rest may be missing where it runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys

import torch

from .. import _C, __version__
from ..core import reference
from ..core.api import attention
from ..core.config import AttentionConfig
from ..core.support import backend_for
from . import options
from .timing import first_line

EXTRAS = ("rich", "matplotlib", "numpy", "av", "safetensors", "torchmetrics")  # of the command line
PEERS = ("diffusers", "flash-attn-3", "sageattention")

GRID, HEADS, HEAD_DIM = (6, 12, 12), 2, 128
CONFIG = AttentionConfig(tile=(2, 6, 6), window=(1, 1, 1))
# Legal relative RMS errors on Gaussian inputs, where FP8 costs about 0.05 in the output and in each gradient. An error
# far below that is wrong as well: nothing was rounded.
FP8_ERROR = (0.01, 0.10)
# On Hopper, the largest relative RMS difference between the kernel and the emulation, as in the GPU tests.
KERNEL_TO_EMULATION = 1.5e-2


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List what is installed and which backend runs on this machine, and compare a small forward and backward with "
        "exact attention. Status 1 if something is broken; the lack of a Hopper GPU is not a fault."
    )
    options.add_json(parser)


def run(*, as_json: bool) -> int:
    """The `doctor` command. Returns 0 when the self-test passes, else 1."""
    out = sys.stderr if as_json else sys.stdout
    installed = _installed()
    for name, value in installed.items():
        print(f"{name:<16} {value}", file=out)
    devices = _devices()
    for i, device in enumerate(devices):
        print(f"{f'GPU {i}':<16} {device}", file=out)
    if not devices:
        print(f"{'GPU':<16} none that torch finds", file=out)

    on = torch.device("cuda" if devices else "cpu")
    backend, reason = backend_for(torch.empty(1, 1, 1, HEAD_DIM, dtype=torch.bfloat16, device=on), CONFIG)
    print(f"{'attention runs':<16} {backend}: {reason}", file=out)
    if backend == "reference":
        print(f"{'':<16} It works, but slowly: it is for tests, not for generating video.", file=out)
    checks = _self_test(on, backend)
    for check in checks:
        print(f"{'ok' if check['ok'] else 'FAILED':<16} {check['check']}: {check['detail']}", file=out)
    ok = all(check["ok"] for check in checks)
    print("All is well." if ok else "Something is broken: see FAILED.", file=out)
    if as_json:
        result = {
            "ok": ok,
            "installed": installed,
            "gpus": devices,
            "backend": backend,
            "reason": reason,
            "self_test": checks,
        }
        print(json.dumps(result, indent=2, allow_nan=False))
    return 0 if ok else 1


def _installed() -> dict[str, str]:
    versions = {
        "fpsattention": __version__,
        "compiled module": f"loaded from {_C.__file__}, kernels for sm_90a",
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, {_built_for()}",
    }
    for name in EXTRAS:
        versions[name] = _version(name) or "not installed: pip install 'fpsattention[cli]'"
    return versions | {name: version for name in PEERS if (version := _version(name))}


def _built_for() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = [
        p.gcnArchName if torch.version.hip else f"compute capability {p.major}.{p.minor}" for p in properties
    ]
    return [
        f"{p.name}, {kind}, {p.total_memory / 2**30:.0f} GiB"
        for p, kind in zip(properties, kinds, strict=True)
    ]


def _self_test(device: torch.device, backend: str) -> list[dict]:
    """Each check as {check, ok, detail}."""
    generator = torch.Generator().manual_seed(0)
    tokens = GRID[0] * GRID[1] * GRID[2]
    q, k, v, dout = (
        torch.randn(1, tokens, HEADS, HEAD_DIM, generator=generator).to(device, torch.bfloat16)
        for _ in range(4)
    )
    # "reference" by name gives no warning: the listing says what ran.
    use = "reference" if backend == "reference" else "auto"

    def gradients(call) -> list[torch.Tensor]:
        """out, and the gradients of q, k and v."""
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = call(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]

    try:
        got = gradients(lambda *x: attention(*x, grid=GRID, config=CONFIG, backend=use))
        exact = gradients(
            lambda *x: reference.exact_attention(*x, grid=GRID, config=CONFIG, dtype=torch.float32)[0]
        )
        emulated, _ = reference.emulated_attention(q, k, v, grid=GRID, config=CONFIG)
    except Exception as error:  # any failure is a result of the self-test
        return [{"check": "a forward and a backward", "ok": False, "detail": first_line(error)}]
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    checks = [
        _check(f"{name} against exact attention", _error(x, y), *FP8_ERROR)
        for name, x, y in zip(names, got, exact, strict=True)
    ]
    if backend == "sm90":
        checks.append(
            _check("output against the emulation", _error(got[0], emulated), 0, KERNEL_TO_EMULATION)
        )
    return checks


def _error(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def _check(what: str, error: float, low: float, high: float) -> dict:
    return {
        "check": what,
        "ok": low <= error <= high,
        "detail": f"relative error {error:.4f}, must be in {low:g} to {high:g}",
    }
