"""AttentionConfig: what it accepts, its errors, and how it resolves for a grid."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpsattention import _C
from fpsattention.core.config import AttentionConfig
from fpsattention.core.explain import plan

GRID, TILE = (21, 45, 80), (7, 9, 2)  # 3 x 5 x 40 tiles


def test_defaults_are_dense_fp8_with_the_planned_tile():
    resolved = AttentionConfig().resolve(GRID, 40)
    assert resolved.tile == resolved.quant_tile == plan(GRID).best.tile
    assert resolved.windows == (resolved.geometry.tiles,)
    assert (resolved.quant, resolved.border, resolved.truncate) == ("fp8", "clamp", False)
    assert resolved.smooth_k is False
    assert resolved.density == 1.0


@pytest.mark.parametrize("window", [None, (1, 1, 1), (99, 99, 1)])
@pytest.mark.parametrize("heads", [1, 40])
def test_the_planned_tile_is_that_of_the_grid(window, heads):
    """Calls with other windows or heads, on another share of the heads for example, cut Q, K and V in the same way."""
    assert AttentionConfig(window=window).resolve(GRID, heads).tile == plan(GRID).best.tile


def test_lists_become_tuples_and_configs_hash():
    config = AttentionConfig(tile=[7, 9, 2], window=[[3, 3, 9], [3, 5, 1]], quant_tile=[14, 9, 8])
    assert config == AttentionConfig(tile=TILE, window=((3, 3, 9), (3, 5, 1)), quant_tile=(14, 9, 8))
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tile = (1, 1, 1)


def test_resolve_is_cached_and_hashable():
    config = AttentionConfig(tile=TILE, window=(3, 3, 9))
    assert config.resolve(GRID, 40) is config.resolve(list(GRID), 40)
    assert hash(config.resolve(GRID, 40)) == hash(config.resolve(GRID, 12))


@pytest.mark.parametrize(
    ("window", "heads", "windows"),
    [
        ((3, 3, 9), 40, ((3, 3, 9),)),
        ((4, 5, 41), 2, ((3, 5, 40),)),  # an entry that covers its axis is the axis, even or odd
        ((99, 1, 39), 2, ((3, 1, 39),)),
        (((3, 3, 9),), 4, ((3, 3, 9),)),
        (((1, 1, 1), (3, 3, 9)), 2, ((1, 1, 1), (3, 3, 9))),
        (((9, 3, 9), (3, 3, 9)), 2, ((3, 3, 9),)),  # equal once they are cut, so one for all heads
        (None, 2, ((3, 5, 40),)),
    ],
)
def test_windows_are_cut_to_the_grid(window, heads, windows):
    assert AttentionConfig(tile=TILE, window=window).resolve(GRID, heads).windows == windows


def test_density_is_the_mean_over_heads():
    resolved = AttentionConfig(tile=TILE, window=((3, 5, 40), (3, 1, 40))).resolve(GRID, 2)
    assert resolved.density == pytest.approx((1 + 1 / 5) / 2)


def test_bricks():
    config = AttentionConfig(tile=TILE, quant_tile=(28, 18, 8))
    resolved = config.resolve(GRID, 1)
    assert resolved.quant_tile == (28, 18, 8)
    assert resolved.brick == (3, 2, 4)  # 4 tiles along t are cut to the 3 of the grid
    assert AttentionConfig(tile=TILE).resolve(GRID, 1).brick == (1, 1, 1)


@given(st.integers(1, 60), st.integers(1, 70))
def test_a_window_is_legal_when_odd_or_whole(n, w):
    config = AttentionConfig(tile=(1, 1, 1), window=(1, w, 1))
    if w % 2 or w >= n:
        assert config.resolve((1, n, 1), 1).windows == ((1, min(w, n), 1),)
    else:
        with pytest.raises(ValueError) as caught:
            config.resolve((1, n, 1), 1)
        for word in ("window", f"{w} on axis h", f"{n} tiles", f"{w - 1} and {w + 1}"):
            assert word in str(caught.value)


def test_empty_grid_resolves():
    resolved = AttentionConfig(window=(1, 3, 3)).resolve((0, 4, 4), 2)
    assert resolved.geometry.n_tiles == 0
    assert resolved.windows[0][0] == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"tile": (8, 8, 9)}, ValueError, ["tile", "(8, 8, 9)", "576", "512", "(8, 8, 8)"]),
        ({"tile": (0, 8, 8)}, ValueError, ["tile", "(0, 8, 8)", "at least 1", "(1, 8, 8)"]),
        ({"tile": 8}, TypeError, ["tile", "8", "three integers"]),
        ({"tile": (7, 9.0, 2)}, TypeError, ["tile", "9.0", "three integers"]),
        ({"window": (3, 3)}, ValueError, ["window", "(3, 3)", "three integers"]),
        ({"window": ()}, ValueError, ["window", "()", "three integers"]),
        ({"window": (0, 3, 3)}, ValueError, ["window", "(0, 3, 3)", "at least 1", "(1, 3, 3)"]),
        ({"window": 3}, TypeError, ["window", "3", "three integers"]),
        ({"window": ((3, 3, 3), (3, 3))}, ValueError, ["window[1]", "(3, 3)", "three integers"]),
        ({"window": ((3, 3, 3), 3)}, TypeError, ["window[1]", "three integers"]),
        ({"window": ((1, 1, 1),) * 257}, ValueError, ["window", "257", str(_C.MAX_WINDOWS)]),
        ({"border": "wrap"}, ValueError, ["border", "'wrap'", '"clamp"', '"truncate"']),
        ({"quant": "int8"}, ValueError, ["quant", "'int8'", '"fp8"', '"none"']),
        ({"smooth_k": 1}, TypeError, ["smooth_k", "1", "True or False"]),
        ({"quant_tile": (1, 0, 1)}, ValueError, ["quant_tile", "(1, 0, 1)", "(1, 1, 1)"]),
        (
            {"tile": (6, 8, 8), "quant_tile": (13, 4, 20)},
            ValueError,
            ["quant_tile", "(13, 4, 20)", "multiple of the tile (6, 8, 8)", "(12, 8, 16)"],
        ),
        ({"quant": "none", "smooth_k": True}, ValueError, ["smooth_k", "True", '"none"', '"fp8"']),
        (
            {"quant": "none", "tile": TILE, "quant_tile": TILE},
            ValueError,
            ["quant_tile", "(7, 9, 2)", '"none"', '"fp8"'],
        ),
    ],
)
def test_errors_of_the_config(kwargs, error, words):
    with pytest.raises(error) as caught:
        AttentionConfig(**kwargs)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "grid", "heads", "error", "words"),
    [
        ({"tile": TILE, "window": (2, 3, 9)}, GRID, 1, ValueError, ["window", "2 on axis t", "1 and 3"]),
        ({"tile": TILE, "window": (3, 3, 38)}, GRID, 1, ValueError, ["window", "38 on axis w", "37 and 39"]),
        (
            {"tile": TILE, "window": ((1, 1, 1), (3, 3, 3))},
            GRID,
            40,
            ValueError,
            ["window", "2 windows", "40 heads", "one triple, or 40"],
        ),
        (
            {"quant_tile": (8, 8, 8)},
            GRID,
            1,
            ValueError,
            ["quant_tile", "(8, 8, 8)", "(7, 9, 2)", "(7, 9, 8)"],
        ),
        ({}, (21, 45), 1, ValueError, ["grid", "(21, 45)", "three integers"]),
        ({}, (21, -45, 1), 1, ValueError, ["grid", "(21, -45, 1)", "(21, 0, 1)"]),
        ({}, GRID, 0, ValueError, ["heads", "0", "at least 1"]),
        ({}, GRID, 2.0, TypeError, ["heads", "2.0", "integer"]),
    ],
)
def test_errors_of_the_fit(kwargs, grid, heads, error, words):
    with pytest.raises(error) as caught:
        AttentionConfig(**kwargs).resolve(grid, heads)
    for word in words:
        assert word in str(caught.value)


SPECS = [
    AttentionConfig(),
    AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9), border="truncate"),
    AttentionConfig(tile=(2, 2, 2), window=((1, 1, 3), (3, 1, 1)), quant="none"),
    AttentionConfig(tile=(2, 2, 20), quant_tile=(4, 2, 40), smooth_k=True),
    AttentionConfig(window=(10**5000 + 1, 1, 1)),
]


@pytest.mark.parametrize("config", SPECS, ids=range(len(SPECS)))
def test_a_config_has_a_spec(config):
    """It is what torch's ops take; a copy in another process must be found under it, too."""
    again = AttentionConfig.from_spec(config.spec)
    assert again == config and hash(again) == hash(config) and again.spec == config.spec
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and {config: 1}[copy] == 1
    assert config.spec not in {x.spec for x in SPECS if x != config}


@pytest.mark.parametrize(
    "spec",
    [
        "", "garbage", "2.2.2|||clamp|fp8|False|", "2.2.2,3.3.3|||clamp|fp8||", "2.2|||clamp|fp8||",
        "02.2.2|||clamp|fp8||", "9.9.9|||clamp|fp8||", "2.2.2||3.3.3|wrap|fp8||", "2.2.2|||clamp|fp4||",
        "2.2.2|||clamp|fp8|", "2.2.2|||clamp|fp8|||", "||||fp8||", "|||clamp|fp8||TopTiles", "|||clamp|fp8||Top:0.5:",
        "|||clamp|fp8||TopTiles:.5:", "|||clamp|fp8||TopTiles:2.0:", "|||clamp|fp8||TopTiles:0.5:3.3",
        "|||clamp|fp8||TopMass:0.5:3.3.3", "||1.1.1|clamp|fp8||TopTiles:0.5:", "x" * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_spec_is_refused(spec):
    with pytest.raises(ValueError, match=r"^config: .* must be the spec of an AttentionConfig") as error:
        AttentionConfig.from_spec(spec)
    assert len(str(error.value)) < 300
