"""examples/finetune_diffusers.py by its own main: samples, training that resumes exactly, processes, the result."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

import fpsattention as fps
import imports
from processes import Processes

with imports.or_skip():
    import diffusers
    import peft  # noqa: F401 (an adapter needs it)
    from safetensors.torch import load_file

    import finetune_diffusers
    import tiny_diffusers as tiny
    import tiny_pipeline
    import training_log
    from finetune import machine as machines
    from finetune import samples, student, training, videos
    from finetune.machine import Machine
    from fpsattention.integrations.diffusers import enable, load

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
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's, of float32
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
    values |= {
        "held_out": 2,
        "steps": 4,
        "rank": 4,
        "warmup": 1,
        "lr": 1e-2,
        "dtype": "fp32",
        "save_every": 2,
    }
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
    with open(run / "transformer" / training_log.LOG, newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model" / "transformer").glob("*.safetensors")
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
        for x, y, at in zip(found, teacher, taken, strict=True):
            stage = "early" if at.progress < 0.4 else "mid" if at.progress < 0.8 else "late"
            by_stage[stage].append((x, y))
        expected = {stage: distance(pairs) for stage, pairs in by_stage.items() if pairs}
        expected["all"] = distance(itertools.chain.from_iterable(by_stage.values()))
        assert reported[when] == pytest.approx(expected, rel=1e-4)
    assert reported["before"]["early"] > 0.1 > 10 * reported["before"]["mid"]
    assert reported["before"] != reported["after"]

    log = log_of(tmp_path)
    assert log[0] == list(training.COLUMNS[:-1]) and [row[0] for row in log[1:]] == ["1", "2", "3", "4"]
    assert (tmp_path / "transformer" / training_log.PLOT).stat().st_size > 1000
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
    """The teacher runs beside the student; flow matching joins it. The schedule is a file's."""
    file = tmp_path / "schedule.json"
    replace(SCHEDULE, num_steps=4).save(file)
    of_file = dict.fromkeys(("tile", "early", "late", "alpha")) | {"schedule": file}
    finetune(model, tmp_path, data=clips, method=method, held_out=1, lr=1e-3, **of_file)
    rows = [dict(zip(training.COLUMNS, row, strict=False)) for row in log_of(tmp_path)[1:]]
    for row in rows:
        distilled = float(row["early"] or row["mid"] or row["late"])
        assert float(row["loss"]) == pytest.approx(distilled + float(row["flow"]))
        assert 0.5 < float(row["flow"]) < 5 and distilled < 1
    reported = json.loads((tmp_path / "transformer" / training.VALIDATION).read_text())
    assert set(reported["after"]) == {"all", "early", "mid", "late"}
    load(tiny_pipeline.transformer(), tmp_path / "model")
    assert fps.StepSchedule.load(tmp_path / "model" / "schedule.json") == replace(SCHEDULE, num_steps=4)
    assert len(samples.read(tmp_path / "cache" / "transformer" / "a.pt-00.pt").clean) == 1


def test_both_transformers_of_wan22(tmp_path):
    """A run for each, into one folder. Samples are calls of that transformer alone."""
    parts = {"transformer_2": tiny.wan_transformer(1), "boundary_ratio": 0.7}
    model = tiny_pipeline.save_wan(tmp_path / "model22", **parts)
    for name, steps in (("transformer", {0, 0.2, 0.4}), ("transformer_2", {0.6, 0.8})):
        finetune(model, tmp_path / "run", transformer=name, points=10, videos=2, held_out=1, steps=1)
        taken = map(samples.read, (tmp_path / "run" / "cache" / name).glob("*.pt"))
        assert {x.progress for x in taken} == steps
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    handle = load(pipe, tmp_path / "run" / "model")
    pipe("a red fox", num_frames=9, height=64, width=96, num_inference_steps=STEPS, output_type="latent")
    assert {row.transformer for row in handle.report().rows} == {"transformer", "transformer_2"}


def in_a_process(words: list[str]) -> int:
    return finetune_diffusers.main(words)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    made = Processes(2, tmp_path_factory.mktemp("store"))
    yield made
    made.stop()


@pytest.mark.parametrize("method", ["lora", "weights"])
def test_two_processes_equal_one(model, tmp_path, two_processes, method):
    """With one sample to train with, both processes see what one alone sees."""
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {"cache": tmp_path / "cache", "videos": 2, "points": 1, "held_out": 1, "method": method}
    changes["lr"] = 1e-3
    finetune(model, one, **changes)
    assert two_processes.run(in_a_process, options(model, two, **changes)) == [0, 0]
    for ours, expected in zip(log_of(two)[1:], log_of(one)[1:], strict=True):
        numbers = ([float(x or 0) for x in row] for row in (ours, expected))
        assert next(numbers) == pytest.approx(next(numbers), rel=1e-3)
    ours, expected = weights_of(two), weights_of(one)
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert (ours[name] - x).norm() <= 1e-3 * x.norm(), name
    found, wanted = (json.loads((x / "transformer" / training.VALIDATION).read_text()) for x in (two, one))
    for when in ("before", "after"):
        assert found[when] == pytest.approx(wanted[when], rel=1e-3)


def gradients_of(model: Path, files: list[Path], rank: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    """Norm and gradients, whole, of the mean loss on the samples. `rank` trains an adapter of it, else all weights."""
    with machines.started("cpu") as machine:
        return _gradients_of(model, files, rank, machine)


def _gradients_of(model, files, rank, machine):
    make = student.Make(SCHEDULE, 3.0, (), rank, ("to_q", "ffn.net.2"), True, False, "auto")
    torch.manual_seed(0)
    transformer = student.load_transformer(str(model), "transformer", torch.bfloat16)
    pupil = student.Student(transformer, make, machine, with_teacher=False)
    own = files[machine.rank :: machine.world]
    for path in own:
        taken = samples.read(path)
        out = pupil.forward(samples.to_device(taken.arguments, "cpu"))
        ((out.float() - taken.output.float()).square().mean() / len(own)).backward()
    shares = pupil.gradients()
    whole = {}
    for (name, parameter), share in zip(pupil.parameters.items(), shares, strict=True):
        if isinstance(parameter, DTensor):
            share = torch.cat(machine.gather(share))
        whole[name] = share
    return pupil.norm(shares), whole


@pytest.mark.parametrize("rank", [4, None], ids=["lora", "weights"])
def test_gradients_are_means_over_the_processes(model, tmp_path, two_processes, rank):
    """In bf16, in which diffusers keeps a few weights in fp32."""
    finetune(model, tmp_path, dtype="bf16", sampler_steps=2, videos=2, points=1, held_out=1, steps=1)
    files = sorted((tmp_path / "cache" / "transformer").glob("*.pt"))
    norm, expected = gradients_of(model, files, rank)
    assert norm == pytest.approx(torch.cat([x.flatten() for x in expected.values()]).norm().item(), rel=1e-4)
    for ours_norm, ours in two_processes.run(gradients_of, model, files, rank):
        assert ours_norm == pytest.approx(norm, rel=1e-2)
        assert ours.keys() == expected.keys() and len(ours) >= 12
        for name, x in expected.items():
            assert (ours[name] - x).norm() <= 0.02 * x.norm() + 1e-4 * norm, name


# Samples


def arguments_of(model: tiny.Tiny) -> dict:
    return model.kwargs | {"generator": tiny.noise(), "num_inference_steps": STEPS, "output_type": "latent"}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_calls_of_every_model_can_be_repeated(name):
    """The teacher returns for a sample what the pipeline's transformer did; the student learns from it."""
    model = tiny.MODELS[name]()
    model.pipe.set_progress_bar_config(disable=True)
    which, taken = model.names[-1], []
    transformer = getattr(model.pipe, which)
    samples.follow(model.pipe, transformer, arguments_of(model), taken.append)
    first = model.switch % STEPS  # of Wan2.2's second transformer
    assert [x.progress for x in taken] == [
        i / STEPS for i in range(first, STEPS) for _ in range(model.passes)
    ]
    schedule = fps.StepSchedule(*[fps.AttentionConfig((1, 2, 2), (1, 1, 1))] * 3)
    make = student.Make(schedule, 3.0, (), 4, ("to_q", "to_k", "to_v"), True, False, "auto")
    pupil = student.Student(transformer, make, CPU, with_teacher=True)
    for parameter in pupil.parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    for x in (taken[0], taken[-1]):
        assert torch.equal(pupil.teach(x.arguments), x.output)
        loss = (pupil.forward(x.arguments) - x.output).square().mean()
        loss.backward()
        assert loss > 0
    assert len(pupil.parameters) >= 12 and all(p.requires_grad for p in pupil.parameters.values())
    assert any(grad is not None and grad.abs().max() > 0 for grad in pupil.gradients())


def test_a_compiled_student_equals_another(monkeypatch):
    """Blocks compiled, checkpointed, with an adapter: as student and as teacher, one after the other."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda x: compile_(x, backend="aot_eager", fullgraph=True)
    )
    arguments = {
        "hidden_states": torch.randn(1, 16, 3, 8, 12, generator=tiny.noise()),
        "encoder_hidden_states": tiny.embeds(8, 1),
        "timestep": torch.tensor([990.0]),
    }
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        make = student.Make(SCHEDULE, 3.0, (), 4, ("to_q", "to_out.0"), True, compiled, "auto")
        pupil = student.Student(tiny_pipeline.transformer(), make, CPU, with_teacher=True)
        for parameter in pupil.parameters.values():
            torch.nn.init.normal_(parameter, std=0.1)
        for _ in range(2):
            target = pupil.teach(arguments)
            out = pupil.forward(arguments)
            (out - target).square().mean().backward()
        results.append([target, out, *pupil.gradients()])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert (results[0][0] - results[0][1]).abs().max() > 0.1


def test_kept_calls_are_a_random_choice(tmp_path, model):
    pipe = student.load_pipeline(str(model), torch.float32, torch.device("cpu"))
    request = samples.Request(str(model), "transformer", SIZE, None, STEPS, 5.0, 10, None, "fp32", 0)
    whole = samples.Cache(tmp_path / "whole", request, ["0", "1", "2"])
    some = samples.Cache(tmp_path / "some", replace(request, points=3), ["0", "1", "2"])
    for cache in (whole, some):
        cache.claim()
        samples.sample(pipe, cache, CPU, lambda: None)
    places = []
    for video in whole.videos:
        calls = [samples.read(whole.path(video, i)) for i in range(10)]
        assert [x.progress for x in calls] == [i / STEPS for i in range(STEPS) for _ in range(2)]
        kept = [samples.read(some.path(video, i)) for i in range(3)]
        found = [[i for i, call in enumerate(calls) if torch.equal(call.output, x.output)] for x in kept]
        assert all(len(x) == 1 for x in found)
        places.append(tuple(sorted(x for (x,) in found)))
        assert len(set(places[-1])) == 3
    assert len(set(places)) > 1
    prompts = [samples.prompts_of(None, seed)(video) for seed in (0, 1) for video in range(20)]
    assert len(set(prompts)) == 40


def test_more_videos_join_those_of_the_cache(model, cache, tmp_path):
    finetune(model, tmp_path / "first", cache, steps=1)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.pt")}
    finetune(model, tmp_path / "second", cache, steps=1, videos=5)
    after = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.pt")}
    assert before.items() <= after.items() and len(after) == len(before) + 4
    request = samples.Request(**json.loads((cache / samples.SETTINGS).read_text()))
    train, rest = samples.Cache(cache, request, ["000001", "000003"]).split(1)
    assert [path.name for path in train + rest] == [
        f"{v}-0{i}.pt" for v in ("000001", "000003") for i in range(4)
    ]
    assert len(train) == len(rest) == 4


def test_two_processes_share_the_videos(tmp_path, model):
    pipe = student.load_pipeline(str(model), torch.float32, torch.device("cpu"))
    request = samples.Request(str(model), "transformer", SIZE, None, 2, 1.0, 1, None, "fp32", 0)
    cache = samples.Cache(tmp_path, request, ["0", "1", "2"])
    cache.claim()
    samples.sample(pipe, cache, Machine(torch.device("cpu"), 1, 2), lambda: None)
    assert [cache.has(video) for video in cache.videos] == [False, True, False]
    first = samples.read(cache.path("1", 0))
    samples.sample(pipe, cache, CPU, lambda: None)  # what is there stays
    assert [cache.has(video) for video in cache.videos] == [True] * 3
    assert torch.equal(samples.read(cache.path("1", 0)).output, first.output)
    assert not torch.equal(samples.read(cache.path("0", 0)).output, first.output)


def test_a_wan_latent_is_the_hosts(model, clips):
    """That of the host's video-to-video pipeline, before it adds noise."""
    pipe = student.load_pipeline(str(model), torch.float32, torch.device("cpu"))
    pixels = videos._frames(pipe, clips / "a.pt", SIZE)
    assert pixels.shape == (1, 3, *SIZE) and pixels.min() < -0.5 and pixels.max() > 0.5
    parts = {name: x for name, x in pipe.components.items() if name != "transformer_2"}
    host = diffusers.WanVideoToVideoPipeline(**parts)
    host.scheduler.scale_noise = lambda clean, timestep, noise: clean
    expected = host.prepare_latents(pixels, dtype=torch.float32, timestep=torch.tensor([500.0]))
    ours = videos.LATENTS["WanTransformer3DModel"](pipe, videos._vae_latent(pipe.vae, pixels))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("patch", [None, 2])
def test_a_cogvideox_latent_is_the_hosts(patch):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    ).eval()
    model = tiny.cogvideox15() if patch else tiny.cogvideox()
    model.pipe.register_modules(vae=vae)
    host = diffusers.CogVideoXVideoToVideoPipeline(**model.pipe.components)
    host.scheduler.add_noise = lambda clean, noise, timestep: clean
    pixels = torch.rand(1, 3, 9, 64, 96, generator=tiny.noise()) * 2 - 1
    torch.manual_seed(0)
    latent = videos._vae_latent(vae, pixels)
    host.vae.encode = lambda x: type("Encoded", (), {"latents": latent})()
    expected = host.prepare_latents(pixels, height=64, width=96, dtype=torch.float32)
    ours = videos.LATENTS["CogVideoXTransformer3DModel"](model.pipe, latent)
    missing = 1 if patch else 0  # 3 latent frames in patches of two
    assert torch.equal(ours[:, missing:], expected) and torch.equal(ours[:, :missing], expected[:, :missing])
    taken = []
    samples.follow(model.pipe, model.pipe.transformer, arguments_of(model), taken.append)
    assert ours.shape == taken[0].arguments["hidden_states"][:1].shape


def test_an_ltx_latent_is_the_hosts():
    """The host's way from latents to its VAE leads back."""
    model = tiny.ltx()
    g = tiny.noise()
    mean, std = torch.randn(8, generator=g), torch.rand(8, generator=g) + 0.5
    vae = SimpleNamespace(latents_mean=mean, latents_std=std, config=SimpleNamespace(scaling_factor=0.8))
    pipe = SimpleNamespace(
        vae=vae,
        transformer_spatial_patch_size=1,
        transformer_temporal_patch_size=1,
        _pack_latents=model.pipe._pack_latents,
        _normalize_latents=model.pipe._normalize_latents,
    )
    latent = torch.randn(1, 8, *model.grid, generator=g)
    ours = videos.LATENTS["LTXVideoTransformer3DModel"](pipe, latent)
    taken: list[samples.Sample] = []
    samples.follow(model.pipe, model.pipe.transformer, arguments_of(model), taken.append)
    assert ours.shape == taken[0].arguments["hidden_states"][:1].shape
    back = model.pipe._denormalize_latents(model.pipe._unpack_latents(ours, *model.grid), mean, std, 0.8)
    torch.testing.assert_close(back, latent)


@pytest.mark.parametrize("u", [0.9, 0.3])
def test_a_noised_video_is_at_its_noise_level(u):
    """From the target and the noisy latent the clean one follows, by the host's own step to the end."""
    clean, noise = torch.randn(2, 1, 3, 4, 8, 12, generator=tiny.noise())
    taken = samples.Sample({"timestep": torch.zeros(1), "hidden_states": clean}, 0.0, clean=clean)
    made, target = videos.noised(tiny.flow(), taken, u, 3.0, noise)
    sigma = 3 * u / (1 + 2 * u)
    assert made.progress == pytest.approx(1 - u)
    torch.testing.assert_close(made.arguments["timestep"], torch.tensor([1000 * sigma]))
    torch.testing.assert_close(made.arguments["hidden_states"] - sigma * target, clean)
    torch.testing.assert_close(made.arguments["hidden_states"] + (1 - sigma) * target, noise)

    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")  # as the real models'
    made, target = videos.noised(scheduler, taken, u, 1.0, noise)
    assert made.arguments["timestep"].item() == round(999 * u)
    scheduler.set_timesteps(1)
    step = scheduler.step(target, made.arguments["timestep"].long().item(), made.arguments["hidden_states"])
    torch.testing.assert_close(step.pred_original_sample, clean, atol=1e-4, rtol=1e-4)


def test_a_shift_that_is_not_the_samplers_is_noticed(model, cache, tmp_path, capsys):
    finetune(model, tmp_path / "right", cache, steps=1)
    assert "another stage" not in capsys.readouterr().out
    finetune(model, tmp_path / "wrong", cache, steps=1, shift=9)
    assert re.search(
        r"\d\d% of the samples are trained in another stage .* --shift 9 is not", capsys.readouterr().out
    )


# Requests that cannot be met


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile": None}, "--tile: must be given"),
        ({"schedule": "x.json"}, "--schedule: .* leave --early out"),
        ({"tile": (9, 9, 9)}, "tile: .* at most 512"),
        ({"early": (2, 1, 1)}, "window: .* nearest legal"),
        ({"alpha": (0.8, 0.2)}, "alpha: .* nearest legal value"),
        ({"flow": 1}, "--flow 1: needs videos"),
        ({"data": "nowhere", "size": SIZE}, "--data nowhere: is not a folder"),
        ({"data": "clips", "size": None}, "--size: must be given with --data"),
        ({"data": "clips", "size": (13, 64, 96)}, "--size 13 64 96: a.pt has 11 frames only"),
        ({"transformer": "unet"}, "--transformer unet: the WanPipeline has none"),
        ({"targets": "to_z"}, "--targets to_z: "),
        (
            dict.fromkeys(("tile", "early", "late", "alpha")) | {"schedule": "of 4 steps"},
            "schedule: num_steps: 2 is not the schedule's, 4",
        ),
        ({"held_out": 4}, "--held-out 4: leaves 0 samples .* 4 videos"),
        ({"model": "clips"}, "--model .*clips.*: is no pipeline of diffusers"),
        ({"prompts": "nowhere"}, "--prompts nowhere: cannot be read"),
        ({"dense_layers": (7,)}, "dense_layers: 7 must be from -2 to 1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors_name_the_option(model, clips, tmp_path, capsys, changes, words):
    replace(SCHEDULE, num_steps=4).save(tmp_path / "schedule.json")
    known = {"clips": clips, "of 4 steps": tmp_path / "schedule.json"}
    changes = {name: known.get(value, value) for name, value in changes.items()}
    changes = {"sampler_steps": 2, "points": 1} | changes
    assert finetune_diffusers.main(options(changes.pop("model", model), tmp_path, **changes)) == 2
    message = capsys.readouterr().err
    (message,) = re.findall("finetune_diffusers.py: error: (.*)", message)
    assert re.search(words, message), message
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": 2}, "--cache .* holds samples for points 4, this run has 2"),
        ({"lr": 1e-4}, "--out .* holds a run with lr 0.01, this one has 0.0001"),
        ({"late": (1, 1, 1)}, "--out .* holds a run with schedule"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_run_is_resumed_as_it_was(model, cache, tmp_path, capsys, changes, words):
    finetune(model, tmp_path, cache, steps=1)
    capsys.readouterr()
    assert finetune_diffusers.main(options(model, tmp_path, cache, steps=1, **changes)) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_loss_that_is_not_finite_ends_the_run(model, cache, tmp_path, capsys):
    finetune(model, tmp_path, cache, steps=1)  # fills the cache, whichever test runs first
    spoilt = shutil.copytree(cache, tmp_path / "cache")
    for path in spoilt.glob("00000[01]-*.pt"):
        taken = samples.read(path)
        taken.output[0, 0, 0, 0, 0] = math.nan
        torch.save(vars(taken), path)
    assert finetune_diffusers.main(options(model, tmp_path / "run", spoilt)) == 2
    assert "loss or gradient is not finite at step 1" in capsys.readouterr().err
