"""examples/finetune_diffusers.py, by its own main: samples, training that resumes exactly, processes, what it writes."""

from __future__ import annotations

import csv
import itertools
import json
import os
from pathlib import Path

import pytest
import torch

import fpsattention as fps
from processes import Processes

try:
    import diffusers
    import peft  # noqa: F401 (an adapter needs it)

    import finetune_diffusers
    import tiny_diffusers as tiny
    import tiny_pipeline
    from finetune import samples, student, training, videos
    from finetune.machine import Machine
    from fpsattention.integrations.diffusers import enable, load
except ImportError as error:  # not installed, or a version that was not compared
    if os.environ.get("CI"):
        raise
    pytest.skip(str(error), allow_module_level=True)

SIZE = (9, 64, 96)  # a grid of (3, 4, 6)
STEPS = 5  # of the sampler: two early, two mid, one late
SCHEDULE = fps.StepSchedule(
    fps.AttentionConfig((1, 2, 2), (1, 1, 1)),
    fps.AttentionConfig((1, 2, 2)),
    fps.AttentionConfig((1, 2, 2), (1, 3, 3)),
    alpha=(0.4, 0.8),
    grid=(3, 4, 6),
)
CPU = Machine(torch.device("cpu"))

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pipeline.save_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(("a", "b", "c")):
        frames = torch.randint(0, 256, (11, 72, 96, 3), dtype=torch.uint8, generator=tiny.noise(i))
        torch.save(frames, folder / f"{name}.pt")
        (folder / f"{name}.txt").write_text("a red fox runs at dawn\n")
    return folder


def options(model: Path, out: Path, cache: Path | None = None, **changes) -> list[str]:
    """A command line. An option of None is left out; one of "" has no value."""
    values = {"model": model, "out": out, "cache": cache, "size": SIZE, "tile": (1, 2, 2), "early": (1, 1, 1)}
    values |= {"late": (1, 3, 3), "alpha": (0.4, 0.8), "videos": 4, "points": 4, "sampler_steps": STEPS}
    values |= {"held_out": 2, "steps": 4, "rank": 4, "warmup": 1, "lr": 1e-2, "dtype": "fp32", "save_every": 2}
    words: list[str] = []
    for name, value in (values | changes).items():
        if value is not None:
            words.append(f"--{name.replace('_', '-')}")
            words += map(str, value) if isinstance(value, tuple) else [str(value)] if value != "" else []
    return words


def finetune(*args, **kwargs) -> None:
    assert finetune_diffusers.main(options(*args, **kwargs)) == 0


def log_of(run: Path) -> list[list[str]]:
    """Without the time."""
    with open(run / "transformer" / training.LOG, newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model" / "transformer").glob("*.safetensors")
    from safetensors.torch import load_file

    return load_file(file)


def distance(pairs) -> float:
    """Squared error over the square of the second, over all pairs."""
    sums = [((x - y).square().mean().item(), y.square().mean().item()) for x, y in pairs]
    return sum(a for a, _ in sums) / sum(b for _, b in sums)


@torch.no_grad()
def outputs(transformer, taken: list[samples.Sample]) -> list[torch.Tensor]:
    return [transformer(**x.arguments, return_dict=False)[0] for x in taken]


def held_out(cache: Path) -> list[samples.Sample]:
    return [samples.read(path) for path in sorted(cache.glob("00000[23]-*.pt"))]


# From the command line to a model on a pipeline


def test_what_is_written_is_what_was_trained(model, cache, tmp_path):
    """The distances that the run reports are those of a fresh transformer with the folder on it, and without."""
    finetune(model, tmp_path, cache)
    reported = json.loads((tmp_path / "transformer" / training.VALIDATION).read_text())
    taken = held_out(cache)
    assert len(taken) == 8
    dense = tiny_pipeline.transformer()
    teacher = outputs(dense, taken)
    for ours, x in zip(teacher, taken, strict=True):
        assert torch.equal(ours, x.output)

    handle = enable(dense, SCHEDULE, shift=3.0)
    untrained = outputs(dense, taken)
    handle.remove()
    handle = load(dense, tmp_path / "model")
    trained = outputs(dense, taken)
    with handle.dense():
        assert distance(zip(outputs(dense, taken), teacher, strict=True)) > 1e-6  # the adapter is on
    for when, found in (("before", untrained), ("after", trained)):
        by_stage = {"early": [], "mid": [], "late": []}
        for x, y, taken_at in zip(found, teacher, taken, strict=True):
            by_stage["early" if taken_at.progress < 0.4 else "mid" if taken_at.progress < 0.8 else "late"].append((x, y))
        expected = {stage: distance(pairs) for stage, pairs in by_stage.items() if pairs}
        expected["all"] = distance(itertools.chain.from_iterable(by_stage.values()))
        assert reported[when] == pytest.approx(expected, rel=1e-4)
    assert reported["before"]["early"] > 0.1 > 10 * reported["before"]["mid"]
    assert reported["before"] != reported["after"]

    log = log_of(tmp_path)
    assert log[0] == list(training.COLUMNS[:-1]) and [row[0] for row in log[1:]] == ["1", "2", "3", "4"]
    assert (tmp_path / "transformer" / training.PLOT).stat().st_size > 1000
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    handle = load(pipe, tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    pipe("a red fox", num_frames=9, height=64, width=96, num_inference_steps=STEPS, output_type="latent")
    assert str(handle.report()).count("transformer") == 4  # the header and three stages
    # Any user of diffusers can load the adapter by itself.
    other = diffusers.DiffusionPipeline.from_pretrained(model)
    other.load_lora_weights(tmp_path / "model" / "transformer")
    enable(other.transformer, SCHEDULE, shift=3.0)
    for x, y in zip(outputs(other.transformer, taken), trained, strict=True):
        torch.testing.assert_close(x, y)


def test_training_lowers_the_distance(model, cache, tmp_path):
    finetune(model, tmp_path, cache, method="weights", steps=30, warmup=5, lr=1e-3, save_every=30, ema=0.9)
    reported = json.loads((tmp_path / "transformer" / training.VALIDATION).read_text())
    assert reported["after"]["early"] < 0.9 * reported["before"]["early"]


@pytest.mark.parametrize("method", ["lora", "weights"])
def test_a_killed_run_resumes_exactly(model, cache, tmp_path, monkeypatch, method):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finetune(model, whole, cache, method=method, lr=1e-3)
    one_step = training.Run._one_step

    def killed_in_step_4(run):
        if run.step == 3:
            raise KeyboardInterrupt
        return one_step(run)

    monkeypatch.setattr(training.Run, "_one_step", killed_in_step_4)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, killed, cache, method=method, lr=1e-3)
    monkeypatch.undo()
    assert not (killed / "model").exists()
    assert json.loads((killed / "transformer" / training.CHECKPOINT).read_text())["step"] == 2
    finetune(model, killed, cache, method=method, lr=1e-3)
    assert log_of(killed) == log_of(whole) and len(log_of(whole)) == 5
    ours, expected = weights_of(killed), weights_of(whole)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    # And a second time nothing is left to do.
    finetune(model, killed, cache, method=method, lr=1e-3)
    assert log_of(killed) == log_of(whole)


@pytest.mark.parametrize("method", ["lora", "weights"])
def test_videos(model, clips, tmp_path, method):
    """The teacher runs beside the student; flow matching joins it."""
    finetune(model, tmp_path, data=clips, method=method, held_out=1, lr=1e-3)
    rows = [dict(zip(training.COLUMNS, row, strict=False)) for row in log_of(tmp_path)[1:]]
    for row in rows:
        distilled = float(row["early"] or row["mid"] or row["late"])
        assert float(row["loss"]) == pytest.approx(distilled + float(row["flow"]))
        assert 0.5 < float(row["flow"]) < 5 and distilled < 1
    reported = json.loads((tmp_path / "transformer" / training.VALIDATION).read_text())
    assert set(reported["after"]) == {"all", "early", "mid", "late"}
    transformer = tiny_pipeline.transformer()
    load(transformer, tmp_path / "model")
    assert len(samples.read(tmp_path / "cache" / "000000-00.pt").clean) == 1


def in_a_process(words: list[str]) -> int:
    return finetune_diffusers.main(words)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    made = Processes(2, tmp_path_factory.mktemp("store"))
    yield made
    made.stop()


@pytest.mark.parametrize("method", ["lora", "weights"])
def test_two_processes_equal_one(model, tmp_path, two_processes, method):
    """With one sample to train with, both processes see what one alone sees; FSDP2 averages their gradients."""
    changes = {"cache": tmp_path / "cache", "videos": 2, "points": 1, "held_out": 1, "method": method, "lr": 1e-3}
    finetune(model, tmp_path / "one", **changes)
    words = options(model, tmp_path / "two", **changes)
    assert two_processes.run(in_a_process, words) == [0, 0]
    for ours, one in zip(log_of(tmp_path / "two")[1:], log_of(tmp_path / "one")[1:], strict=True):
        assert [float(x or 0) for x in ours] == pytest.approx([float(x or 0) for x in one], rel=1e-3)
    ours, expected = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(ours[name], x, atol=1e-5, rtol=1e-3)
    read = [json.loads((tmp_path / x / "transformer" / training.VALIDATION).read_text()) for x in ("one", "two")]
    for when in ("before", "after"):
        assert read[1][when] == pytest.approx(read[0][when], rel=1e-3)
