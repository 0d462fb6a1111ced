"""`hopper_obstacle`: its answers, and that nothing else asks for the capability of a GPU."""

import ast
from pathlib import Path

import pytest
import torch

import fpsattention as fps
from fpsattention.cli.errors import MachineError, require_hopper
from fpsattention.core import support
from fpsattention.core.explain import plan

ROOT = Path(__file__).parent.parent
CONFIG = fps.AttentionConfig(tile=(1, 3, 2))


class Query:
    """The attributes that `backend_for` reads, as of a tensor on the first GPU."""

    is_cuda, device, dtype, shape = True, torch.device("cuda", 0), torch.bfloat16, (1, 36, 2, 64)


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends there is a GPU of a capability; `rocm` pretends that torch is built for AMD GPUs."""

    def pretend(capability, rocm=None):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.version, "hip", rocm)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(support, "_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")

    return pretend


def test_a_hopper_gpu(gpu):
    gpu((9, 0))
    assert support.hopper_obstacle() is support.hopper_obstacle(0) is None
    assert fps.backend_for(Query(), CONFIG)[0] == "sm90"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus(gpu, capability):
    gpu(capability)
    assert f"Some GPU has {capability[0]}.{capability[1]}" in support.hopper_obstacle(0)


def test_rocm_is_not_hopper(gpu):
    """AMD's MI200 reports capability (9, 0)."""
    gpu((9, 0), rocm="6.2")
    name, reason = fps.backend_for(Query(), CONFIG)
    assert name == "reference" and "AMD" in reason and "ROCm 6.2" in reason
    with pytest.raises(RuntimeError, match=r"sm90.*Hopper.*ROCm 6\.2"):
        fps.backend_for(Query(), CONFIG, "sm90")
    assert fps.backend_for(Query(), fps.AttentionConfig(quant="none"))[0] == "torch", (
        "torch's own kernels run there"
    )
    assert "the reference" in plan((4, 4, 8)).explain(CONFIG) and "ROCm 6.2" in plan((4, 4, 8)).explain(
        CONFIG
    )
    with pytest.raises(MachineError, match="ROCm 6.2"):
        require_hopper()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU" in support.hopper_obstacle()


def test_nothing_else_asks_for_the_capability():
    """Only support.py reads `get_device_capability`."""
    asking = {
        path.relative_to(ROOT).as_posix()
        for folder in ("python", "tests", "examples", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if any(
            isinstance(node, ast.Attribute) and node.attr == "get_device_capability"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert asking == {"python/fpsattention/core/support.py"}
