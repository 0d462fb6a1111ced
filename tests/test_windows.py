"""Tables of windows: the table, its file, FastVideo's file, and all that is refused."""

import json

import pytest

import fpsattention as fps
from fpsattention import AttentionConfig, StepSchedule, WindowTable
from fpsattention.schedules import files

GRID, CONFIG = (30, 48, 80), AttentionConfig(tile=(6, 8, 8))  # 5 x 6 x 10 tiles: HunyuanVideo in FastVideo
FULL = (5, 6, 10)
# 2 steps, 3 layers, 2 heads.
WINDOWS = [
    [[FULL, FULL], [FULL, FULL], [FULL, FULL]],
    [[(3, 3, 5), (5, 6, 1)], [(3, 3, 5), (5, 6, 1)], [(1, 6, 10), (1, 6, 10)]],
]
SIZES = {"grid": GRID, "num_steps": 2, "num_layers": 3, "heads": 2}


@pytest.fixture
def table():
    return WindowTable(GRID, CONFIG, WINDOWS)


def strategy():
    """WINDOWS in FastVideo's form."""
    return {
        f"{s}_{i}_{h}": list(window)
        for s, layers in enumerate(WINDOWS)
        for i, heads in enumerate(layers)
        for h, window in enumerate(heads)
    }


def write(tmp_path, data):
    path = tmp_path / "file.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


# The table


def test_a_step_and_layer_has_its_config(table):
    assert (table.num_steps, table.num_layers, table.heads) == (2, 3, 2)
    assert table.at(step=1, layer=0) == AttentionConfig(tile=(6, 8, 8), window=((3, 3, 5), (5, 6, 1)))
    assert table.at(step=1, layer=2).window == (1, 6, 10)
    assert table.at(step=0, layer=1).resolve(GRID, 2).density == 1


def test_equal_configs_are_one_object(table):
    assert table.at(step=1, layer=0) is table.at(step=1, layer=1)
    assert table.at(step=0, layer=0) is table.at(step=0, layer=2)
    assert table.at(step=1, layer=0) is not table.at(step=1, layer=2)


def test_the_rest_of_the_config_is_kept():
    config = AttentionConfig(tile=(6, 8, 8), border="truncate", quant_tile=(12, 8, 8), smooth_k=True)
    got = WindowTable(GRID, config, WINDOWS).at(step=1, layer=2)
    assert (got.border, got.quant_tile, got.smooth_k, got.window) == (
        "truncate",
        (12, 8, 8),
        True,
        (1, 6, 10),
    )


def test_windows_beyond_the_grid_are_the_whole_axis(table):
    assert WindowTable(GRID, CONFIG, [[[(9, 6, 99)] * 2] * 3] * 2).windows[0][0][0] == FULL
    assert WindowTable(GRID, CONFIG, [[[(9, 6, 99)] * 2] * 3, WINDOWS[1]]) == table


def test_a_table_answers_as_a_schedule_does(table):
    schedule = StepSchedule(early=CONFIG, mid=CONFIG, late=CONFIG)
    assert schedule.at(step=0, num_steps=2).tile == table.at(step=0, num_steps=2, layer=0).tile
    with pytest.raises(ValueError, match="num_steps: 50 is not the table's, 2"):
        table.at(step=0, layer=0, num_steps=50)


def test_densities_are_means_over_the_heads(table):
    (dense, *_), (mixed, _, sparse) = table.densities()
    assert dense == 1
    assert sparse == pytest.approx(1 / 5)
    assert mixed == pytest.approx((3 * 3 * 5 + 5 * 6 * 1) / (2 * 5 * 6 * 10))


def test_attention_takes_the_config():
    import torch

    grid, tile = (4, 4, 4), (2, 2, 2)
    table = WindowTable(grid, AttentionConfig(tile=tile), [[[(1, 1, 1), (2, 2, 2)]]])
    q, k, v = (torch.randn(1, 64, 2, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = fps.attention(q, k, v, grid=grid, config=table.at(step=0, layer=0), backend="reference")
    for head, window in enumerate(table.windows[0][0]):
        one = AttentionConfig(tile=tile, window=window)
        alone = fps.attention(q, k, v, grid=grid, config=one, backend="reference")
        assert torch.equal(out[:, :, head], alone[:, :, head])
        assert not torch.equal(out[:, :, 1 - head], alone[:, :, 1 - head])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"step": 2, "layer": 0}, "step: 2 .* nearest legal value 1"),
        ({"step": 0, "layer": 3}, "layer: 3 .* nearest legal value 2"),
        ({"step": -1, "layer": 0}, "step: -1"),
        ({"step": 0.5, "layer": 0}, "step: 0.5 must be an integer"),
    ],
)
def test_places_outside_are_refused(table, arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        table.at(**arguments)


@pytest.mark.parametrize(
    ("config", "content", "words"),
    [
        (AttentionConfig(), WINDOWS, "config: tile=None"),
        (AttentionConfig(tile=(6, 8, 8), window=(1, 1, 1)), WINDOWS, "config: window="),
        ("clamp", WINDOWS, "config: 'clamp' must be an AttentionConfig"),
        (CONFIG, [], "windows: is empty"),
        (CONFIG, [[[FULL]], []], r"windows\[1\]: is empty"),
        (CONFIG, [[[FULL, FULL], [FULL]]], r"windows\[0\]\[1\]: has 1 heads, windows\[0\]\[0\] has 2"),
        (CONFIG, [[[FULL]], [[FULL], [FULL]]], r"windows\[1\]: has 2 layers, windows\[0\] has 1"),
        (CONFIG, [[[FULL]], [[FULL, FULL]]], "windows.1.: has 2 heads"),
        (CONFIG, [[[(4, 6, 10)]]], r"windows\[0\]\[0\]\[0\]: .* nearest legal values 3 and 5"),
        (CONFIG, [[[(0, 6, 10)]]], r"windows\[0\]\[0\]\[0\]: .* at least 1"),
        (CONFIG, [[[(1, 6)]]], "three integers"),
        (CONFIG, [[[FULL]], 3], r"windows\[1\]: 3 must be a sequence"),
    ],
)
def test_tables_that_make_no_sense_are_refused(config, content, words):
    with pytest.raises((TypeError, ValueError), match=words):
        WindowTable(GRID, config, content)


# Its file


def test_a_saved_table_loads_again(table, tmp_path):
    config = AttentionConfig(tile=(6, 8, 8), border="truncate", quant_tile=(12, 8, 8), smooth_k=True)
    for some in (table, WindowTable(GRID, config, WINDOWS)):
        some.save(tmp_path / "table.json")
        again = WindowTable.load(tmp_path / "table.json")
        assert again == some and hash(again) == hash(some)
        assert again.at(step=1, layer=0) == some.at(step=1, layer=0)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_failed_save_leaves_the_old_file(table, tmp_path, monkeypatch):
    table.save(tmp_path / "table.json")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        WindowTable(GRID, CONFIG, [[[FULL]]]).save(tmp_path / "table.json")
    assert WindowTable.load(tmp_path / "table.json") == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(format="fpsattention-windows-9"), '"format": .* must be'),
        (lambda data: data.update(head="1"), "unknown key 'head'"),
        (lambda data: data.pop("steps"), "missing key 'steps'"),
        (lambda data: data["config"].update(boarder="clamp"), "\"config\": unknown key 'boarder'"),
        (lambda data: data["config"].pop("tile"), "\"config\": missing key 'tile'"),
        (lambda data: data["config"].update(border="cut"), "border: 'cut'"),
        (lambda data: data["steps"][1][0].__setitem__(0, 17), 'steps": index: 17 .* at most 3'),
        (lambda data: data["steps"][1][0].__setitem__(0, -1), 'steps": index: -1'),
        (lambda data: data["windows"].__setitem__(0, [2, 6, 10]), "nearest legal values 1 and 3"),
        (lambda data: data["windows"].__setitem__(0, "wide"), r'"windows"\[0\]'),
        (lambda data: data.update(windows=[]), '"windows": is empty'),
        (lambda data: data.update(windows=None), '"windows": None must be a sequence'),
        (lambda data: data.update(steps=3), '"steps": 3 must be a sequence'),
        (lambda data: data["steps"].__setitem__(1, None), r'"steps"\[1\]: None must be a sequence'),
        (lambda data: data["steps"][1].__setitem__(2, 0), r'"steps"\[1\]\[2\]: 0 must be a sequence'),
    ],
)
def test_files_of_another_form_are_refused(table, tmp_path, change, words):
    table.save(tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    change(data)
    path = write(tmp_path, data)
    with pytest.raises(ValueError, match=words) as error:
        WindowTable.load(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not the JSON"),
        ("[" * 100_000, "is not the JSON .* recursion"),
        ("[]", "must hold a JSON object, holds list"),
        ('{"a": 1, "a": 2}', "'a': is there twice"),
    ],
)
def test_files_that_are_no_object_are_refused(tmp_path, text, words):
    for read in (WindowTable.load, lambda path: WindowTable.from_fastvideo(path, **SIZES)):
        with pytest.raises(ValueError, match=words):
            read(write(tmp_path, text))
    with pytest.raises(FileNotFoundError):
        WindowTable.load(tmp_path / "nowhere.json")


# FastVideo's file


def test_a_mask_strategy_of_fastvideo_is_read(table, tmp_path):
    assert WindowTable.from_fastvideo(write(tmp_path, strategy()), **SIZES) == table


def test_steps_layers_and_heads_keep_their_order(tmp_path):
    """Every entry has a different window, so that any exchange of two shows."""
    candidates = [(t, h, w) for t in (1, 3, 5) for h in (1, 3, 5, 6) for w in (1, 3)]
    places = [(s, i, h) for s in range(2) for i in range(3) for h in range(4)]
    file = {"_".join(map(str, place)): window for place, window in zip(places, candidates, strict=True)}
    path = write(tmp_path, dict(reversed(file.items())))
    table = WindowTable.from_fastvideo(path, grid=GRID, num_steps=2, num_layers=3, heads=4)
    for (s, i, h), window in zip(places, candidates, strict=True):
        assert table.windows[s][i][h] == window


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"2_0_0": [1, 1, 1]}, "key '2_0_0': step 2 is out of range, num_steps is 2"),
        ({"0_3_0": [1, 1, 1]}, "key '0_3_0': layer 3 is out of range, num_layers is 3"),
        ({"0_0_2": [1, 1, 1]}, "key '0_0_2': head 2 is out of range, heads is 2"),
        ({"tile": [6, 8, 8]}, "key 'tile': is unknown"),
        ({"0_0": [1, 1, 1]}, "key '0_0': is unknown"),
        ({"-1_0_0": [1, 1, 1]}, "key '-1_0_0': is unknown"),
        ({"00_0_0": [1, 1, 1]}, "key '00_0_0': is there twice"),
        ({"0_1_1": None}, "key '0_1_1': None must be three integers"),
        ({"0_1_1": [1, 1]}, "key '0_1_1'.* got 2"),
        ({"0_1_1": [2, 6, 10]}, r"windows\[0\]\[1\]\[1\].* nearest legal values 1 and 3"),
    ],
)
def test_what_fastvideo_passes_over_is_refused(tmp_path, change, words):
    path = write(tmp_path, strategy() | change)
    with pytest.raises(ValueError, match=words) as error:
        WindowTable.from_fastvideo(path, **SIZES)
    assert str(error.value).startswith(f"{path}: ")


def test_only_none_is_the_config_of_fastvideo(tmp_path):
    with pytest.raises(TypeError, match="config: 0 must be an AttentionConfig or None"):
        WindowTable.from_fastvideo(write(tmp_path, strategy()), **SIZES, config=0)


def test_missing_keys_are_counted(tmp_path):
    file = strategy()
    del file["1_2_0"], file["1_2_1"]
    with pytest.raises(ValueError, match="2 of 12 keys are missing, the first is '1_2_0'"):
        WindowTable.from_fastvideo(write(tmp_path, file), **SIZES)
