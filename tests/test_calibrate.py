"""The `fpsattention calibrate` command: real files, an interrupted run."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fpsattention import AttentionConfig, WindowTable
from fpsattention.cli import calibrate
from fpsattention.cli import main as cli
from local_heads import GRID, HEAD_DIM, REACHES, TILE, TOKENS, WHOLE, heads_of

RESOLVED = AttentionConfig(tile=TILE).resolve(GRID, 1)
FIRST = "step0_layer0.safetensors"
BUDGET = 0.15

pytestmark = pytest.mark.usefixtures("one_thread")


def capture(folder, step, layer, reaches=tuple(REACHES), layout="NHD", **tensors):
    q, k, v = heads_of(reaches, seed=100 * step + 10 * layer)
    tensors = {"q": q, "k": k, "v": v} | tensors
    if layout == "HND":
        tensors = {name: x.transpose(1, 2).contiguous() for name, x in tensors.items()}
    path = folder / f"step{step}_layer{layer}.safetensors"
    save_file({name: x for name, x in tensors.items() if x is not None}, path)
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "captures"
    folder.mkdir()
    return folder


def command(folder, *more):
    output = folder.parent / "windows.json"
    argv = ["calibrate", folder, "--grid", *GRID, "--tile", *TILE, "--budget", BUDGET, "--num-steps", 5]
    return [str(x) for x in (*argv, "--device", "cpu", "--output", output, *more)]


def run(folder, capsys, *more):
    """(table, JSON) of a run that must succeed."""
    assert cli.main(command(folder, "--json", *more)) == 0
    result = json.loads(capsys.readouterr().out)
    return WindowTable.load(result["table"]), result


def fails(folder, capsys, *more):
    assert cli.main(command(folder, *more)) == 2
    message = capsys.readouterr().err
    assert "fpsattention calibrate: error: " in message and "Traceback" not in message
    return message


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_folder_becomes_a_table(folder, capsys, layout):
    reversed_reaches = tuple(reversed(REACHES))
    capture(folder, 1, 0, layout=layout)
    capture(folder, 1, 1, reversed_reaches, layout=layout)
    capture(folder, 4, 0, reversed_reaches, layout=layout)
    capture(folder, 4, 1, layout=layout)
    table, result = run(folder, capsys, "--layout", layout)
    assert (table.grid, table.num_steps, table.num_layers, table.heads) == (GRID, 5, 2, 4)
    straight = tuple(REACHES.values())
    layers = straight, straight[::-1]
    assert table.windows == (layers, layers, layers, layers[::-1], layers[::-1])  # 3 is nearer to 4 than to 1
    first, last = result["captured_steps"]
    assert (first["step"], last["step"]) == (1, 4) and first["dense_heads"] == 2 and first["over_budget"] == 0
    assert 0 < first["mean_error"] < first["worst_error"] <= BUDGET
    mean = sum(RESOLVED.geometry.density(window, "clamp") for window in straight) / 4
    assert result["mean_density"] == pytest.approx(mean) == pytest.approx(first["density"])


def test_heads_are_read_in_parts(folder, capsys, monkeypatch):
    capture(folder, 0, 0)
    want, _ = run(folder, capsys)
    monkeypatch.setattr(calibrate, "ELEMENTS_AT_ONCE", 3 * TOKENS * HEAD_DIM)
    sizes = [q.shape[2] for q, _, _ in calibrate._parts(*calibrate._captures(folder, GRID, "NHD", 5), "NHD")]
    assert sizes == [3, 1]
    got, _ = run(folder, capsys, "--restart")
    assert got == want


def test_named_candidates_are_the_only_ones_and_the_whole_grid_is_the_last_resort(folder, capsys):
    capture(folder, 0, 0)
    table, _ = run(folder, capsys, "--candidate", "2", "1", "9", "--candidate", "1", "1", "3")
    assert table.windows[0][0] == ((1, 1, 3), (2, 1, 3), (1, 1, 3), WHOLE)


def test_heads_over_the_budget_are_reported(folder, capsys):
    capture(folder, 0, 0)
    assert cli.main([*command(folder), "--budget", "0.0001"]) == 0
    assert "4 heads are over the budget of 0.0001" in " ".join(capsys.readouterr().out.split())


def test_an_interrupted_run_goes_on(folder, capsys, monkeypatch):
    for layer in range(3):
        capture(folder, 0, layer)
    search, searched = calibrate.search, []

    def stops_at_the_third(*args, **keywords):
        if len(searched) == 2:
            raise KeyboardInterrupt
        searched.append(1)
        return search(*args, **keywords)

    with monkeypatch.context() as context:
        context.setattr(calibrate, "search", stops_at_the_third)
        assert cli.main(command(folder)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (folder.parent / "windows.json").exists()
    state = json.loads((folder.parent / "windows.state.json").read_text())
    assert sorted(state["files"]) == ["step0_layer0.safetensors", "step0_layer1.safetensors"]

    calls = []
    monkeypatch.setattr(calibrate, "search", lambda *a, **k: calls.append(1) or search(*a, **k))
    table, _ = run(folder, capsys)
    assert len(calls) == 1  # the third file only
    assert table.windows == ((tuple(REACHES.values()),) * 3,) * 5
    run(folder, capsys)
    assert len(calls) == 1
    capture(folder, 0, 1, tuple(reversed(REACHES)))  # a file that has changed is searched again
    table, _ = run(folder, capsys)
    assert len(calls) == 2 and table.windows[0][1] == tuple(REACHES.values())[::-1]
    run(folder, capsys, "--restart")
    assert len(calls) == 5


def test_a_run_with_other_settings_does_not_go_on(folder, capsys):
    capture(folder, 0, 0)
    run(folder, capsys)
    assert "other settings (budget: 0.15)" in fails(folder, capsys, "--budget", "0.3")
    assert "other settings (candidates: other ones)" in fails(folder, capsys, "--candidate", 1, 1, 1)
    run(folder, capsys, "--budget", "0.3", "--restart")
    (folder.parent / "windows.state.json").write_text("{}")
    assert "is not the progress of an earlier run" in fails(folder, capsys)


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": []},
        {"settings": {}},
        {"files": []},
        {"files": {FIRST: None}},
        {"files": {FIRST: {}}},
        {"windows": None},
        {"windows": [[1, 1, 1]]},
        {"windows": [[1, 1]] * 4},
        {"errors": []},
        {"errors": [None] * 4},
        {"errors": [float("nan")] * 4},
        {"windows": [], "errors": []},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(folder, capsys, damage):
    capture(folder, 0, 0)
    run(folder, capsys)
    path = folder.parent / "windows.state.json"
    state = json.loads(path.read_text())
    (state if damage.keys() <= state.keys() else state["files"][FIRST]).update(damage)
    path.write_text(json.dumps(state))
    assert "windows.state.json: is not the progress of an earlier run" in fails(folder, capsys)


def test_a_state_of_fewer_heads_is_searched_again(folder, capsys):
    capture(folder, 0, 0)
    want, _ = run(folder, capsys)
    path = folder.parent / "windows.state.json"
    state = json.loads(path.read_text())
    entry = state["files"][FIRST]
    entry["windows"], entry["errors"] = entry["windows"][:1], entry["errors"][:1]
    path.write_text(json.dumps(state))
    assert run(folder, capsys)[0] == want


def test_an_output_that_is_a_folder_is_refused_before_the_search(folder, capsys):
    capture(folder, 0, 0)
    with pytest.raises(SystemExit) as error:
        cli.main(command(folder, "--output", folder))
    assert error.value.code == 2 and f"'{folder}': is a folder" in capsys.readouterr().err


def test_folders_that_do_not_fit_are_refused(folder, capsys):
    assert "holds no file" in fails(folder, capsys)
    assert "is not a folder" in fails(folder / "nowhere", capsys)
    capture(folder, 0, 1)
    assert "step 0 lacks layer 0" in fails(folder, capsys)
    capture(folder, 0, 0, tuple(REACHES)[:2])
    assert "has heads, tokens, channels (4, 96, 64)" in fails(folder, capsys)
    capture(folder, 0, 0)
    path = capture(folder, 5, 0)
    assert "step 5 is out of range, --num-steps is 5" in fails(folder, capsys)
    path.rename(folder / "step00_layer1.safetensors")
    assert "is the same step and layer as" in fails(folder, capsys)
    (folder / "step00_layer1.safetensors").rename(folder / "layer1.safetensors")
    assert "must be named step<N>_layer<M>.safetensors" in fails(folder, capsys)


def test_files_that_do_not_fit_are_refused(folder, capsys):
    (folder / FIRST).mkdir()
    assert f"{FIRST}: is not a safetensors file" in fails(folder, capsys)
    (folder / FIRST).rmdir()
    (folder / FIRST).write_text("no tensors")
    assert "is not a safetensors file" in fails(folder, capsys)
    capture(folder, 0, 0, v=None)
    assert "must hold the tensors q, k and v and no others, holds ['k', 'q']" in fails(folder, capsys)
    capture(folder, 0, 0, mask=torch.zeros(1))
    assert "no others" in fails(folder, capsys)
    capture(folder, 0, 0, v=torch.zeros(1, TOKENS, 2, HEAD_DIM))
    assert "must have one shape" in fails(folder, capsys)
    capture(folder, 0, 0)
    assert "has 4 tokens in layout HND, grid (4, 4, 6) has 96" in fails(folder, capsys, "--layout", "HND")
    q, *_ = heads_of(REACHES)
    capture(folder, 0, 0, q=q.masked_fill(q > 2, float("nan")))
    assert "step0_layer0.safetensors: the exact attention is not finite" in fails(folder, capsys)
    capture(folder, 0, 0, v=q.float())
    assert "v: dtype torch.float32 must be that of q" in fails(folder, capsys)
    capture(folder, 0, 0, **{name: q.to(torch.float8_e4m3fn) for name in "qkv"})
    message = fails(folder, capsys)
    assert f"{FIRST}: q: " in message and "torch.float8_e4m3fn" in message


def test_windows_and_tiles_that_do_not_fit_are_refused(folder, capsys):
    capture(folder, 0, 0)
    assert "nearest legal values 1 and 3" in fails(folder, capsys, "--candidate", 1, 1, 2)
    assert "512" in fails(folder, capsys, "--tile", 9, 9, 9)
    with pytest.raises(SystemExit) as error:
        cli.main(command(folder, "--budget", "-1"))
    assert error.value.code == 2


def test_a_missing_gpu_is_status_1(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capture(folder, 0, 0)
    assert cli.main([*command(folder), "--device", "cuda"]) == 1
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_kernel_finds_the_same_windows(folder, capsys):
    capture(folder, 0, 0)
    table, _ = run(folder, capsys, "--device", "cuda")
    assert table.windows[0][0] == tuple(REACHES.values())
