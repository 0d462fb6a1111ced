"""use_fp8_linears on a GPU with FP8 tensor cores, eager and compiled."""

from __future__ import annotations

import pytest

from test_fp8_linears import LAYERS, check_both, check_product  # skips all without diffusers or torchao

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # the hosts' and torch's own


@LAYERS
def test_product(layer):
    check_product(layer, (2, 40), "cuda")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_transformer_with_both(compiled):
    check_both("cuda", "enable", "sm90", compiled)
