import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
def test_bring_your_own_dit(capsys):
    model = runpy.run_path(str(EXAMPLES / "bring_your_own_dit.py"))["model"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "training at sigma 0.86: early",
        "step 0: early",
        "step 1: early",
        "step 2: mid",
        "step 3: mid",
        "step 4: late",
    ]
    assert model.qkv.weight.grad.abs().max() > 0
