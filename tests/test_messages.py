"""Error messages stay short whatever the value, and name the argument."""

import pytest
import torch
import torch.distributed as dist

import fpsattention as fps
from fpsattention import parallel, reference
from fpsattention.core import geometry
from fpsattention.core.checks import shown

MOST = 400  # characters
GRID = (2, 4, 4)
CONFIG = fps.AttentionConfig(tile=(2, 2, 2))


class Broken:
    """An object whose repr fails, as that of a half-made object may."""

    def __repr__(self):
        raise RuntimeError("no repr")


def tensor():
    return torch.zeros(1, 32, 2, 64)


VALUES = {
    "10,000 windows": ((3, 3, 3),) * 10_000,
    "10,000 odd windows": tuple((1, 1, i) for i in range(10_000)),
    "200 wrong windows": ((1, 2, 10**60),) * 200,
    "10,000 numbers": list(range(10_000)),
    "a large tensor": torch.zeros(1000, 1000),
    "three large tensors": (torch.zeros(1000), torch.zeros(1000), torch.zeros(1000)),
    "a tensor of many axes": torch.zeros((1,) * 60),
    "a tensor of long axes": torch.zeros(0, *[1000] * 6),
    "four long axes": torch.zeros(10**15, 0, 10**9, 10**6),
    "a tensor of integers": torch.zeros(1, 32, 2, 64, dtype=torch.int32),
    "another tensor": torch.zeros(1, 32, 1, 64),
    "a sparse tensor": torch.zeros(1, 32, 2, 64).to_sparse(),
    "a long string": "x" * 10_000,
    "bytes": b"x" * 10_000,
    "a dict": {i: "y" * 100 for i in range(1000)},
    "a set": set(range(10_000)),
    "nested": [[[[list(range(100))] * 50] * 50] * 50] * 3,
    "10**5000": 10**5000,
    "-10**5000": -(10**5000),
    "three of 10**5000": (10**5000,) * 3,
    "three of 10**30": (10**30,) * 3,
    "three of -10**30": (-(10**30),) * 3,
    "infinite": float("inf"),
    "nan": float("nan"),
    "broken": Broken(),
    "three broken": (Broken(),) * 3,
    "a type": Broken,
    "none": None,
    "a truth value": True,
    "a schedule": fps.StepSchedule(CONFIG, CONFIG, CONFIG),
    "a config of 256 windows": fps.AttentionConfig(window=tuple((1, 1, 2 * i + 1) for i in range(256))),
    "a config with a brick": fps.AttentionConfig(quant_tile=(10**30, 7, 10**30)),
    "a config with a long window": fps.AttentionConfig(tile=(1, 1, 1), window=(10**40, 2, 10**40)),
}


def attention(**change):
    call = dict.fromkeys("qkv", tensor()) | {"grid": GRID, "config": CONFIG, "backend": "reference"}
    return fps.attention(**call | change)


def quantized(**change):
    with torch.no_grad():
        x = fps.quantize_qkv(*[tensor()] * 3, grid=GRID, config=CONFIG, backend="reference")
    return fps.attention(x, **change)


def reference_call(function):
    return lambda **change: function(
        **dict.fromkeys("qkv", tensor()) | {"grid": GRID, "config": CONFIG} | change
    )


def backward(**change):
    rows = dict.fromkeys(("q", "k", "v", "out", "dout"), tensor())
    return reference.emulated_backward(
        **rows | {"lse": torch.zeros(1, 2, 32), "grid": GRID, "config": CONFIG} | change
    )


def norm_rope(**change):
    return fps.norm_rope(**{"x": tensor(), "norm": fps.Norm(torch.ones(64)), "grid": GRID} | change)


def norm_rope_quantize(**change):
    call = dict.fromkeys("qkv", tensor()) | {"grid": GRID, "config": CONFIG, "backend": "reference"}
    return fps.norm_rope_quantize(**call | change)


def ulysses(function):
    call = dict.fromkeys("qkv", tensor()) | {"grid": GRID, "config": CONFIG, "backend": "reference"}
    return lambda **change: function(**call | change)


SCHEDULE = fps.StepSchedule(CONFIG, CONFIG, CONFIG)
WINDOWS = [[[(1, 1, 1)] * 2]]
QKV = ("q", "k", "v")
TEXT = ("prefix_len", "suffix_len", "prefix_valid", "suffix_valid")
ABOUT = ("grid", "config", "scale", "tensor_layout")
CALLS = {
    "attention": (
        attention,
        (*QKV, *TEXT, *ABOUT, "backend", "deterministic", "key_tiles", "attn_mask"),
    ),
    "attention, quantised": (
        quantized,
        ("k", "v", *TEXT, *ABOUT, "backend", "deterministic", "key_tiles"),
    ),
    "quantize_qkv": (
        reference_call(fps.quantize_qkv),
        (*QKV, *TEXT, *ABOUT, "backend"),
    ),
    "exact_attention": (
        reference_call(reference.exact_attention),
        (*QKV, *TEXT, *ABOUT, "dtype", "key_tiles"),
    ),
    "emulated_attention": (
        reference_call(reference.emulated_attention),
        (*QKV, *TEXT, *ABOUT, "dtype", "key_tiles"),
    ),
    "emulated_backward": (
        backward,
        (*QKV, *TEXT, "out", "lse", "dout", "dlse", "grid", "config", "scale", "key_tiles"),
    ),
    "norm_rope": (
        norm_rope,
        ("x", "norm", "grid", "rope", "tensor_layout", *TEXT[:2]),
    ),
    "norm_rope_quantize": (
        norm_rope_quantize,
        (*QKV, *TEXT, *ABOUT, "q_norm", "k_norm", "rope", "backend"),
    ),
    "KeyTiles": (
        lambda **change: fps.KeyTiles(
            **{"indices": torch.zeros(1, 1, 4, 2).int(), "counts": torch.zeros(1, 1, 4).int()} | change
        ),
        ("indices", "counts"),
    ),
    "KeyTiles.of_mask": (fps.KeyTiles.of_mask, ("mask",)),
    "KeyTiles.of_window": (
        lambda **change: fps.KeyTiles.of_window(
            **{"grid": GRID, "tile": (2, 2, 2), "window": (1, 1, 1)} | change
        ),
        ("grid", "tile", "window", "border"),
    ),
    "AttentionConfig": (
        fps.AttentionConfig,
        ("tile", "window", "border", "quant", "quant_tile", "smooth_k"),
    ),
    "AttentionConfig with a tile": (
        lambda **change: fps.AttentionConfig(**{"tile": (2, 2, 2)} | change).resolve(GRID, 2),
        ("window", "quant_tile"),
    ),
    "resolve": (
        lambda **change: CONFIG.resolve(**{"grid": GRID, "heads": 2} | change),
        ("grid", "heads", "prefix_len", "suffix_len"),
    ),
    "plan": (
        lambda **change: fps.plan(**{"grid": GRID} | change),
        ("grid", "top", "density", "reach", "border", "heads", "head_dim"),
    ),
    "explain": (
        fps.plan(GRID).explain,
        ("config", "heads", "head_dim", "prefix_len", "suffix_len"),
    ),
    "backend_for": (
        lambda **change: fps.backend_for(**{"q": tensor(), "config": CONFIG} | change),
        ("config", "backend"),
    ),
    "StepSchedule": (
        lambda **change: fps.StepSchedule(**dict.fromkeys(("early", "mid", "late"), CONFIG) | change),
        ("early", "mid", "late", "alpha"),
    ),
    "for_sigma": (
        lambda **change: SCHEDULE.for_sigma(**{"sigma": 0.5, "shift": 1.0} | change),
        ("sigma", "shift"),
    ),
    "at": (lambda **change: SCHEDULE.at(**{"step": 0, "num_steps": 5} | change), ("step", "num_steps")),
    "WindowTable": (
        lambda **change: fps.WindowTable(**{"grid": GRID, "config": CONFIG, "windows": WINDOWS} | change),
        ("grid", "config", "windows"),
    ),
    "WindowTable.at": (
        lambda **change: fps.WindowTable(GRID, CONFIG, WINDOWS).at(**{"step": 0, "layer": 0} | change),
        ("step", "layer", "num_steps"),
    ),
    "merge_states": (
        lambda **change: parallel.merge_states(
            **{"outs": [tensor()], "lses": [torch.zeros(1, 2, 32)]} | change
        ),
        ("tensor_layout",),
    ),
    "merge_states of one": (
        lambda out=None, lse=None: parallel.merge_states(
            [tensor() if out is None else out], [torch.zeros(1, 2, 32) if lse is None else lse]
        ),
        ("out", "lse"),
    ),
    "ulysses_attention": (
        ulysses(parallel.ulysses_attention),
        (*QKV, *TEXT, *ABOUT, "backend", "key_tiles", "attn_mask"),
    ),
    "ring_attention": (
        ulysses(parallel.ring_attention),
        (*QKV, *ABOUT, "backend", "key_tiles", "attn_mask"),
    ),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A process group of this process alone."""
    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "name"),
    [pytest.param(call, name, id=f"{of}: {name}") for of, (call, names) in CALLS.items() for name in names],
)
def test_messages_are_short_and_name_the_argument(call, name, one_process):
    refused = 0
    for value in VALUES.values():
        try:
            call(**{name: value})
        except (TypeError, ValueError, RuntimeError) as error:
            refused += 1
            text = str(error)
            assert len(text) <= MOST, f"{len(text)} characters: {text[:MOST]}"
            assert ":" in text or "unexpected keyword" in text, f"names no argument: {text}"
    assert refused > len(VALUES) // 2


def test_values_are_shown_as_they_are_where_they_are_short():
    for value in ((21, 45, 80), [1, 2.5], "NHD", None, True, 0.125, (1, (2, 3)), CONFIG):
        assert len(shown(value)) <= shown.MOST
    for value in ((21, 45, 80), [1, 2.5], "NHD", None, True, 0.125, ((1, 1, 1), (3, 3, 9))):
        assert shown(value) == repr(value)
    assert shown(torch.zeros(2, 3)) == "a torch.float32 tensor of shape [2, 3]"
    assert shown((torch.zeros(2, 3), 1)) == "(a torch.float32 tensor of shape [2, 3], 1)"
    assert shown(10**5000) == "<int>" and "Broken" in shown(Broken())
    assert geometry.shown("x" * 1000).startswith("'xxx")


def test_every_value_is_shown_in_short():
    for value in VALUES.values():
        assert 0 < len(shown(value)) <= shown.MOST
