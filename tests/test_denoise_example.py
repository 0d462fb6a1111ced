"""examples/denoise_tiny_dit.py and the two trained models it shows."""

import sys
import threading

import pytest
import torch
from matplotlib.image import imread

import denoise_tiny_dit
import fpsattention as fps
from tiny_dit import denoise, export

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def set_threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)  # as `one_thread` has it


def test_arms_run_side_by_side_and_share_the_threads(set_threads):
    set_threads(4)
    together = threading.Barrier(3, timeout=60)  # broken unless all three run at once

    def arm(name):
        together.wait()
        return name, torch.get_num_threads()

    assert denoise._side_by_side(arm, ["a", "b", "c"], threading.Event()) == [("a", 1), ("b", 1), ("c", 1)]
    assert torch.get_num_threads() == 4


def test_an_arm_that_fails_ends_the_others(set_threads):
    set_threads(2)
    stop = threading.Event()

    def arm(name):
        if name == "a":
            raise OSError("no")
        assert stop.wait(60)

    with pytest.raises(OSError, match="no"):
        denoise._side_by_side(arm, ["a", "b"], stop)
    assert torch.get_num_threads() == 2


def test_three_arms_denoise(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(denoise.EFFORT, "cpu", (6, 5))
    configs, dense_calls, rows = [], [], []
    real, real_dense = fps.attention, torch.nn.functional.scaled_dot_product_attention
    real_run = denoise.run

    def spy(*args, config, **options):
        configs.append(config)
        return real(*args, config=config, **options)

    def dense_spy(q, k, v):
        assert q.shape == (1, 4, 8192, 64)
        dense_calls.append(1)
        return real_dense(q, k, v)

    monkeypatch.setattr(fps, "attention", spy)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", dense_spy)
    monkeypatch.setattr(denoise, "run", lambda *args: rows.extend(real_run(*args)) or rows)
    assert denoise_tiny_dit.main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    names = ["dense", "FPSAttention, training-free", "FPSAttention, fine-tuned"]
    assert [row.arm for row in rows] == names and all(name in printed for name in names)
    assert denoise.CLIP in printed and "from step 5 of 6" in printed
    for metric in ("psnr_db", "ssim"):
        assert len({getattr(row, metric) for row in rows}) == 3
    assert all(20 < row.psnr_db < 60 and 0.5 < row.ssim < 1 and row.ms_per_forward > 0 for row in rows)
    # One forward of 6 blocks for each arm: the first dense, in 16 or more bits; the others FP8 under the late window.
    assert len(dense_calls) == 6 and len(configs) == 12
    assert {(c.quant, c.window, c.tile) for c in configs} == {("fp8", (1, 3, 5), (8, 4, 4))}
    assert str(tmp_path / "denoise.png") in printed.replace("\n", "")
    assert imread(tmp_path / "denoise.png")[..., :3].std() > 0.1


def fails(capsys, *argv) -> str:
    """The message of a command line that ends with status 2."""
    assert denoise_tiny_dit.main(["--device", "cpu", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_wrong_requests_are_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "fps.safetensors").write_text("")
    message = fails(capsys, "--checkpoints", tmp_path)
    assert "holds no dense.safetensors; name the folder examples/tiny_dit" in message
    assert "cannot be made a folder" in fails(capsys, "--output", tmp_path / "fps.safetensors")
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "skvideo", None)
        message = fails(capsys, "--output", tmp_path)
    assert "scikit-video, which is not installed: pip install 'fpsattention[demo]'" in message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert denoise_tiny_dit.main(["--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_the_crop_is_from_held_out_frames(monkeypatch):
    drawn, real = [], denoise.clips.Clips.draw
    monkeypatch.setattr(
        denoise.clips.Clips, "draw", lambda self, *args: drawn.append(args[0]) or real(self, *args)
    )
    a, b = (denoise.prepare(denoise.checkpoints(denoise.CHECKPOINTS), torch.device("cpu")) for _ in range(2))
    assert drawn == ["val", "val"] and a.clean.shape == (1, 8, 64, 64, 16)
    assert torch.equal(a.clean, b.clean) and torch.equal(a.noise, b.noise)
    assert denoise.CLIP in a.tuned.settings.clips


@pytest.mark.parametrize(("name", "mode", "step"), [("dense", "dense", 4000), ("fps", "fps", 1000)])
def test_the_trained_models_say_how_they_were_made(name, mode, step):
    path = denoise.CHECKPOINTS / f"{name}.safetensors"
    with export.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert "EMA" in metadata["weights"] and "train_tiny_dit.py" in metadata["made_by"]
    weights = export.load(path)
    assert weights.step == weights.settings.steps == step and weights.settings.mode == mode
    assert weights.settings.plan.grid == (8, 32, 32) and weights.settings.plan.tile == (8, 4, 4)
    assert sum(p.numel() for p in weights.model.parameters()) == pytest.approx(5.3e6, rel=0.01)
    assert all(p.isfinite().all() for p in weights.model.parameters())
    assert weights.codec.equals(export.load(denoise.CHECKPOINTS / "dense.safetensors").codec)
