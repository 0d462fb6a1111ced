"""examples/train_tiny_dit.py: data, model, stages, training that resumes exactly, evaluation, export, the commands."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

import fpsattention as fps
import train_tiny_dit
import training_log
from tiny_dit import clips, distillation, evaluation, export, flow, model, training

GRID = (2, 4, 4)  # tokens: 4 frames of 32 x 32 pixels
WINDOWS = {"early": (1, 1, 1), "mid": (2, 3, 3), "late": (1, 3, 1)}
PLAN = flow.Plan(GRID, tile=(1, 1, 1), **WINDOWS, alpha=(0.25, 0.75), shift=3.0)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with pytest.MonkeyPatch.context() as context:
        context.setattr(clips, "FIT_BLOCKS", 5_000)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips of smooth colours that drift."""
    made = tmp_path_factory.mktemp("clips")
    for name, speed in (("a.pt", 0.2), ("b.pt", 0.45)):
        t, y, x = torch.meshgrid(torch.arange(48), torch.arange(48), torch.arange(64), indexing="ij")
        waves = [torch.sin(0.1 * x + speed * t + c) * torch.cos(0.07 * y - 0.1 * t * c) for c in range(3)]
        torch.save((127.5 + 100 * torch.stack(waves, -1)).to(torch.uint8), made / name)
    return made


@pytest.fixture(scope="module")
def loaded(folder):
    return clips.Clips(clips.find(folder), frames=4, size=32)


def settings(mode="dense", **changes):
    values = {
        "size": "tiny",
        "plan": PLAN,
        "mode": mode,
        "start": None,
        "clips": ("a.pt", "b.pt"),
        "steps": 6,
    }
    values |= {"batch": 3, "lr": 1e-3, "warmup": 2, "ema": 0.9, "t_std": 1.4, "seed": 1}
    return training.Settings(**values | changes)


def begin(path, loaded, mode="dense", **changes):
    """(run, what trains it)"""
    run = training.Run(path, settings(mode, **changes), None, loaded, CPU)
    return run, flow.Attention(PLAN, mode)


def train(path, loaded, mode="dense", save_every=2, minutes=math.inf, **changes):
    run, attention = begin(path, loaded, mode, **changes)
    run.train(attention, minutes, save_every, training.Console(quiet=True))
    return run


def random_model(shape, seed=0):
    """A model without zero weights; in an untrained one every block is the identity."""
    torch.manual_seed(seed)
    made = model.VideoDiT(shape)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


# Clips


def test_held_out_frames_lie_apart_from_training(loaded):
    assert {i for i, _ in loaded.windows["train"]} == {i for i, _ in loaded.windows["val"]} == {0, 1}
    last_train = max(start for _, start in loaded.windows["train"]) + loaded.frames
    first_val = min(start for _, start in loaded.windows["val"])
    assert (last_train, first_val) == (
        32,
        36,
    )  # of 48 frames: the last quarter, and before it a gap of one crop
    assert max(start for _, start in loaded.windows["val"]) == 44


def test_no_crop_spans_a_cut(tmp_path):
    grey = torch.full((40, 48, 48, 3), 60, dtype=torch.uint8)
    grey[7:20], grey[34:] = 200, 10
    torch.save(grey, tmp_path / "cut.pt")
    windows = clips.Clips([tmp_path / "cut.pt"], frames=4, size=32).windows
    assert [s for _, s in windows["train"]] == [0, 1, 2, 3, *range(7, 17), 20, 21, 22]
    assert [s for _, s in windows["val"]] == [30, 34, 35, 36]


def test_crops_come_from_their_split_and_are_seeded(tmp_path):
    """Frame n has brightness n, so a crop shows its frames' numbers."""
    ramp = torch.arange(48, dtype=torch.uint8)[:, None, None, None].expand(-1, 48, 64, 3)
    torch.save(ramp.contiguous(), tmp_path / "ramp.pt")
    source = clips.Clips([tmp_path / "ramp.pt"], frames=4, size=32)
    for split, bounds in (("train", (0, 31)), ("val", (36, 47))):
        crops = source.draw(split, 60, torch.Generator().manual_seed(0))
        assert crops.shape == (60, 4, 32, 32, 3)
        frames = ((crops + 1) * 127.5)[:, :, 5, 7, 0].round().int()
        assert (frames.min(), frames.max()) == bounds
        steps = frames.diff(dim=1)
        assert (steps.abs() == 1).all() and {int(s) for s in steps[:, 0]} == {1, -1}  # forwards and backwards
    again, other = (source.draw("val", 60, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(crops, again) and not torch.equal(crops, other)


def test_a_short_clip_is_refused(tmp_path):
    torch.save(torch.zeros(15, 48, 48, 3, dtype=torch.uint8), tmp_path / "short.pt")
    with pytest.raises(clips.UserError, match="has 15 frames; crops of 4 need at least 16"):
        clips.Clips([tmp_path / "short.pt"], frames=4, size=32)


def test_the_bundled_clips_serve():
    source = clips.Clips(clips.find(None)[1:2], frames=16, size=32)  # bikes: cuts at 30, 76, 137, 187, 242
    assert [s for _, s in source.windows["train"]] == [
        *range(15),
        *range(30, 61),
        *range(76, 122),
        *range(137, 156),
    ]
    assert [s for _, s in source.windows["val"]] == [*range(187, 227)]


def test_the_code_is_linear_orthonormal_and_keeps_distances(loaded):
    codec = clips.Codec.fit(loaded, seed=0)
    torch.testing.assert_close(codec.basis.T @ codec.basis, torch.eye(16), atol=1e-5, rtol=0)
    pixels = loaded.draw("val", 8, torch.Generator().manual_seed(0))
    latent, back = codec.encode(pixels), codec.decode(codec.encode(pixels))
    assert latent.shape == (8, 2, 8, 8, 16) and back.shape == pixels.shape
    assert 0.8 < latent.square().mean() < 1.25
    assert (back - pixels).square().mean() < 1e-3
    by_pixels = (back[0] - back[1]).square().sum()
    by_latent = (latent[0] - latent[1]).square().sum() * codec.scale**2
    torch.testing.assert_close(by_pixels, by_latent, rtol=1e-3, atol=0)
    # A change in one block of pixels changes one latent pixel.
    changed = pixels.clone()
    changed[0, 2:4, 12:16, 20:24] += 0.5
    moved = (codec.encode(changed) - latent).abs().amax(-1) > 1e-3
    assert moved.nonzero().tolist() == [[0, 1, 3, 5]]


# Model


def test_patches_are_tokens_in_raster_order():
    x = torch.arange(2 * 3 * 8 * 10 * 5).view(2, 3, 8, 10, 5)
    tokens = model.patchify(x)
    assert tokens.shape == (2, 3 * 4 * 5, 4 * 5)
    for t, h, w in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 3, 4)):
        assert torch.equal(
            tokens[1, (t * 4 + h) * 5 + w], x[1, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].flatten()
        )
    assert torch.equal(model.unpatchify(tokens, (3, 4, 5)), x)


def test_rope_turns_each_token_by_its_place():
    """With equal tokens, q of a token is q of token (0, 0, 0) turned by Wan's angles."""
    grid = (3, 2, 5)
    made, seen = random_model(model.Shape("tiny", grid, 16)), []

    def attend(q, k, v):
        seen.append((q, k))
        return v

    x = torch.randn(16, generator=torch.Generator().manual_seed(0)).expand(1, 3, 4, 10, 16)
    made(x, torch.tensor([0.5]), attend)
    for y in seen[0]:
        y = torch.view_as_complex(y[0].detach().view(30, 2, 32, 2))
        for token in range(30):
            t, h, w = token // 10, token // 5 % 2, token % 5
            places = torch.tensor([t] * 12 + [h] * 10 + [w] * 10)
            pair = torch.cat([torch.arange(n) / n for n in (12, 10, 10)])
            turn = torch.polar(torch.ones(32), places / 10_000**pair)
            torch.testing.assert_close(y[token], y[0] * turn, atol=1e-4, rtol=1e-4)


def test_q_and_k_are_normed_over_all_heads():
    made, seen = random_model(model.Shape("tiny", GRID, 16)), []
    block = made.blocks[0]
    for norm in (block.norm_q, block.norm_k):
        torch.nn.init.ones_(norm.weight)
    made(torch.randn(1, 2, 8, 8, 16), torch.tensor([0.5]), lambda q, k, v: seen.extend((q, k)) or v)
    for x in seen[:2]:
        square = x[0].detach().square().mean(-1)  # tokens, heads
        torch.testing.assert_close(square.mean(-1), torch.ones(32), atol=1e-3, rtol=0)
        assert square.std(-1).mean() > 0.02


def test_a_token_depends_on_the_tokens_in_its_window_only():
    """Patches and attention order tokens alike: with a window of one tile, nothing crosses a tile."""
    grid, tile = (2, 4, 6), (1, 2, 3)
    made = random_model(model.Shape("tiny", grid, 16))
    config = fps.AttentionConfig(tile=tile, window=(1, 1, 1), quant="none")
    attend = flow.Attention(replace(PLAN, grid=grid), "dense").of_config(config)
    x = torch.randn(1, 2, 8, 12, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = model.patchify(made(x, torch.tensor([0.5]), attend))
    for t, h, w in ((0, 0, 0), (1, 2, 3), (0, 3, 2)):
        (grad,) = torch.autograd.grad(out[0, (t * 4 + h) * 6 + w].sum(), x, retain_graph=True)
        reached = model.patchify(grad)[0].abs().sum(-1).view(grid) > 0
        expected = torch.zeros(grid, dtype=torch.bool)
        expected[t, h // 2 * 2 : h // 2 * 2 + 2, w // 3 * 3 : w // 3 * 3 + 3] = True
        assert torch.equal(reached, expected)


def test_sizes_are_what_the_help_says():
    counts = {
        name: sum(p.numel() for p in model.VideoDiT(model.Shape(name, GRID, 16)).parameters())
        for name in model.SIZES
    }
    assert {name: round(n / 1e6, 1) for name, n in counts.items()} == {
        "tiny": 0.6,
        "small": 5.3,
        "base": 22.5,
    }


def test_an_untrained_model_predicts_nothing(loaded):
    made = model.VideoDiT(model.Shape("tiny", GRID, 16))
    x = torch.randn(2, 2, 8, 8, 16)
    assert not made(
        x, torch.tensor([0.1, 0.9]), flow.Attention(PLAN, "dense").of_batch(torch.tensor([0.1, 0.9]))
    ).any()


# Flow and stages


def test_each_sample_attends_under_the_config_of_its_stage(monkeypatch):
    sigma = torch.tensor([0.4, 0.99, 0.8, 0.05, 0.95, 0.6])  # without the shift: mid, early, early, ...
    progress = PLAN.shift * (1 - sigma) / (sigma + PLAN.shift * (1 - sigma))
    stages = ["early" if p < 0.25 else "mid" if p < 0.75 else "late" for p in progress.tolist()]
    assert stages == ["late", "early", "mid", "late", "early", "mid"]

    q, k, v = torch.randn(3, 6, 32, 2, 64, generator=torch.Generator().manual_seed(0))
    attention, calls = flow.Attention(PLAN, "window"), []
    real = fps.attention
    monkeypatch.setattr(fps, "attention", lambda q, *a, **kw: calls.append(len(q)) or real(q, *a, **kw))
    together = attention.of_batch(sigma)(q, k, v)
    assert calls == [2, 2, 2]
    for i, stage in enumerate(stages):
        results = {
            name: real(
                *(x[i : i + 1] for x in (q, k, v)),
                grid=GRID,
                config=fps.AttentionConfig(tile=(1, 1, 1), window=window, quant="none"),
                backend="reference",
            )[0]
            for name, window in WINDOWS.items()
        }
        distances = {name: (together[i] - result).abs().max().item() for name, result in results.items()}
        assert distances[stage] < 1e-5 and all(d > 0.1 for name, d in distances.items() if name != stage)

    calls.clear()
    dense = flow.Attention(PLAN, "dense", "reference").of_batch(sigma)(q, k, v)  # one config: not split
    assert calls == [6]
    # Without a GPU "auto" takes SDPA for dense attention.
    torch.testing.assert_close(flow.Attention(PLAN, "dense").of_batch(sigma)(q, k, v), dense)
    assert calls == [6]


def test_the_sampler_and_training_agree_on_the_stage():
    attention = flow.Attention(PLAN, "fps")
    sigmas = flow.shifted(1 - torch.arange(40, dtype=torch.float64) / 40, PLAN.shift).float()
    stages = [attention.stage(s) for s in sigmas.tolist()]
    assert stages == ["early"] * 10 + ["mid"] * 20 + ["late"] * 10
    for step, stage in enumerate(stages):
        assert attention.schedule.at(step=step, num_steps=40) == getattr(attention.schedule, stage)


def test_modes_differ_in_rounding_and_window_only():
    configs = {mode: PLAN.schedule(mode) for mode in flow.MODES}
    for stage, window in WINDOWS.items():
        of = {mode: getattr(schedule, stage) for mode, schedule in configs.items()}
        assert {mode: (c.quant, c.window) for mode, c in of.items()} == {
            "dense": ("none", None),
            "fp8": ("fp8", None),
            "window": ("none", window),
            "fps": ("fp8", window),
        }
        assert of["fps"].quant_tile == of["fp8"].quant_tile == ((1, 2, 2) if stage == "early" else None)


def test_a_plan_may_choose_its_tiles():
    """In place of windows, in the modes that have windows; each stage its share."""
    shares = dict(zip(flow.STAGES, (0.25, 0.5, 0.75), strict=True))
    plan = replace(PLAN, chosen=tuple(shares.values()), always=(1, 1, 3))
    configs = {mode: plan.schedule(mode) for mode in flow.MODES}
    for stage, share in shares.items():
        of = {mode: getattr(schedule, stage) for mode, schedule in configs.items()}
        select = fps.TopTiles(share, always=(1, 1, 3))
        assert {mode: (c.quant, c.window, c.select) for mode, c in of.items()} == {
            "dense": ("none", None, None),
            "fp8": ("fp8", None, None),
            "window": ("none", None, select),
            "fps": ("fp8", None, select),
        }
        assert plan.density(stage) == pytest.approx(share)
    q, k, v = torch.randn(3, 2, math.prod(GRID), 2, 64).unbind()
    for mode in ("window", "fps"):
        config = configs[mode].mid
        found = flow.Attention(plan, mode).of_config(config)(q, k, v)
        lists = fps.select_tiles(q, k, grid=GRID, config=config)
        fixed = replace(config, select=None)
        expected = fps.attention(q, k, v, grid=GRID, config=fixed, key_tiles=lists, backend="reference")
        torch.testing.assert_close(found, expected)


def test_noise_levels_are_logit_normal_and_shifted():
    sigma = flow.draw_sigma(20_000, 1.4, 3.0, torch.Generator().manual_seed(0)).double()
    logit = torch.logit(sigma / (3 - 2 * sigma))  # the shift undone
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1.4) < 0.03
    stages = [flow.Attention(PLAN, "dense").stage(s) for s in sigma.tolist()]
    shares = [stages.count(stage) / 20_000 for stage in flow.STAGES]
    assert shares == pytest.approx([0.216, 0.567, 0.216], abs=0.015)  # Phi(+-log(3) / 1.4)


def test_a_perfect_model_restores_the_clean_video():
    clean, noise = torch.randn(2, 2, 2, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    attention, levels, ticks = flow.Attention(PLAN, "dense"), [], []

    def perfect(x, sigma, attend):
        levels.append(sigma[0].item())
        return noise - clean

    sigma = flow.shifted(torch.tensor([0.7, 0.2]), 3.0)
    guess = flow.one_step(perfect, flow.mix(clean, noise, sigma), sigma, attention)
    torch.testing.assert_close(guess, clean, atol=1e-5, rtol=0)
    levels.clear()
    out = flow.resample(perfect, clean, noise, 3, 10, attention, lambda: ticks.append(1))
    torch.testing.assert_close(out, clean, atol=1e-5, rtol=0)
    assert levels == pytest.approx([3 * u / (1 + 2 * u) for u in (0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)])
    assert len(ticks) == 7


# Training


@pytest.mark.parametrize("mode", ["dense", "window"])
def test_the_loss_falls(tmp_path, loaded, mode):
    train(tmp_path, loaded, mode, steps=60, batch=4, warmup=5, save_every=60)
    rows = [float(row[1]) for row in training_log.read(tmp_path)]
    assert sum(rows[:5]) / 5 > 1.5 and sum(rows[-10:]) / 10 < 0.7 * sum(rows[:5]) / 5
    training.plot(tmp_path)
    assert (tmp_path / training_log.PLOT).stat().st_size > 5000


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def checkpoint(path):
    return torch.load(path / training.CHECKPOINT, weights_only=True)


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, loaded, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, loaded, "window")

    real = training.Run._one_step

    def killed(run, attention):
        if run.step == 3:
            raise KeyboardInterrupt  # one step past the checkpoint of step 2
        real(run, attention)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(training.Run, "_one_step", killed)
        train(parts, loaded, "window")
    assert checkpoint(parts)["step"] == 2
    with open(
        parts / training_log.LOG, "a", newline=""
    ) as file:  # a log that got further than the checkpoint
        csv.writer(file).writerow([3, 9, "", "", "", 9, 9])
    assert not same(checkpoint(whole), checkpoint(parts))
    torch.manual_seed(99)
    train(parts, loaded, "window")

    assert same(checkpoint(whole), checkpoint(parts))
    assert (whole / training_log.LOG).read_text() == (parts / training_log.LOG).read_text()
    assert [int(row[0]) for row in training_log.read(whole)] == [1, 2, 3, 4, 5, 6]
    assert not (parts / f"{training.CHECKPOINT}.new").exists()


def test_time_that_is_up_stops_at_a_checkpoint(tmp_path, loaded):
    run = train(tmp_path, loaded, minutes=1e-9)
    assert run.step == 0 and not (tmp_path / training.CHECKPOINT).exists()
    # Each look at the clock takes half a second; two looks come before the first step.
    clock = iter([0.0, *(x / 2 for x in range(100))])
    with pytest.MonkeyPatch.context() as context:
        context.setattr(training.time, "monotonic", lambda: next(clock))
        run = train(tmp_path, loaded, minutes=1.5 / 60, save_every=4)
    assert 0 < run.step < 4 and checkpoint(tmp_path)["step"] == run.step
    assert train(tmp_path, loaded).step == 6


def test_runs_of_one_seed_see_the_same_draws(tmp_path, loaded, monkeypatch):
    real, drawn = flow.losses, []

    def spy(model, clean, noise, sigma, *rest):
        drawn.append((clean, noise, sigma))
        return real(model, clean, noise, sigma, *rest)

    monkeypatch.setattr(flow, "losses", spy)
    for i, (mode, seed) in enumerate([("dense", 1), ("window", 1), ("dense", 2)]):
        train(tmp_path / str(i), loaded, mode, seed=seed, steps=2)
    (a0, a1), (b0, b1), (c0, _) = drawn[:2], drawn[2:4], drawn[4:]
    assert same(a0, b0) and same(a1, b1)
    for other in (a1, c0):
        assert not any(torch.equal(x, y) for x, y in zip(a0, other, strict=True))


def test_evaluation_seeds_are_beyond_those_of_training():
    last = training._seed(training.MOST_SEED, training.MOST_STEPS, 1)
    assert last < evaluation.SEEDS_BEGIN and evaluation.SEEDS_BEGIN + 1000 < 2**32
    few = [
        training._seed(seed, step, stream)
        for seed in (0, 1, 63)
        for step in (0, 1, 2**24 - 1)
        for stream in (0, 1)
    ]
    assert len(set(few)) == 18
    first = [
        torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (*few, evaluation.SEEDS_BEGIN)
    ]
    assert torch.stack(first).unique(dim=0).shape == (19, 4)


def test_averaged_weights_follow_the_weights(tmp_path, loaded):
    run, attention = begin(tmp_path, loaded)
    average = [p.detach().clone() for p in run.model.parameters()]
    for step in range(12):
        run._one_step(attention)
        decay = min(0.9, (1 + step) / (10 + step))
        average = [
            decay * a + (1 - decay) * p.detach() for a, p in zip(average, run.model.parameters(), strict=True)
        ]
    for a, b in zip(average, run.ema, strict=True):
        torch.testing.assert_close(a, b)
    run.save()
    used = training.load(tmp_path, CPU).model
    assert all(torch.equal(a, b) for a, b in zip(run.ema, used.parameters(), strict=True))


def test_the_learning_rate_warms_up_and_falls(tmp_path, loaded):
    train(tmp_path, loaded)
    lr = [float(row[-1]) for row in training_log.read(tmp_path)]
    expected = [0.5, 1, *(0.1 + 0.45 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]
    assert lr == pytest.approx([1e-3 * x for x in expected])


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, loaded, monkeypatch):
    run, attention = begin(tmp_path, loaded)
    with torch.no_grad():
        run.model.head.bias[0] = math.nan
    run._one_step(attention)
    with pytest.raises(training.UserError, match="not finite at step 1.*lower --lr than 0.001"):
        run.save()
    assert not (tmp_path / training.CHECKPOINT).exists()


def test_a_run_is_not_continued_with_other_settings(tmp_path, loaded):
    train(tmp_path, loaded, steps=2)
    with pytest.raises(training.UserError, match="batch 3, this one has 4"):
        begin(tmp_path, loaded, steps=2, batch=4)


# Evaluation


EFFORT = evaluation.Effort(seeds=2, crops=3, points=8, steps=6, start=1, batch=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, loaded):
    path = tmp_path_factory.mktemp("run")
    train(path, loaded, steps=40, batch=4)
    return path


def measure(loaded, *arms, effort=EFFORT):
    return evaluation.evaluate(list(arms), PLAN, loaded, effort, "auto", CPU, lambda: None)


def test_evaluation_is_deterministic_and_paired(trained, loaded):
    weights = training.load(trained, CPU)
    dense, again = evaluation.Arm("dense", weights, "dense"), evaluation.Arm("again", weights, "dense")
    results, _ = measure(loaded, dense, again)
    assert results["dense"] == results["again"]
    torch.manual_seed(5)
    assert measure(loaded, dense, again)[0] == results
    assert all(len(x) == 2 and x[0] != x[1] for x in results["dense"].values())  # seeds differ


def test_what_is_measured(trained, loaded):
    weights = training.load(trained, CPU)
    results, pictures = measure(
        loaded, evaluation.Arm("dense", weights, "dense"), evaluation.Arm("w", weights, "window")
    )
    dense = results["dense"]
    for metric, values in dense.items():
        assert all(map(math.isfinite, values)), metric
        if not metric.startswith("SSIM"):
            assert values != results["w"][metric]
    for seed in range(2):
        parts = [dense[f"loss {stage}"][seed] for stage in flow.STAGES]
        assert dense["loss"][seed] == pytest.approx((2 * parts[0] + 4 * parts[1] + 2 * parts[2]) / 8)
        assert (
            dense["PSNR one step early"][seed]
            < dense["PSNR one step mid"][seed]
            < dense["PSNR one step late"][seed]
        )
    assert set(pictures) == {"held-out", "dense", "w"} and pictures["w"].shape == (4, 32, 32, 3)
    # The loss of the first seed again, by hand.
    generator = torch.Generator().manual_seed(evaluation.SEEDS_BEGIN)
    clean = weights.codec.encode(loaded.draw("val", 3, generator))
    noise = torch.randn(clean.shape, generator=generator)
    u = (torch.arange(8) + 0.5) / 8
    sigma = 3 * u / (1 + 2 * u)
    with torch.no_grad():
        losses = [
            (
                weights.model(
                    (1 - s) * clean + s * noise, s.expand(3), flow.Attention(PLAN, "dense").of_step(0, 1)
                )
                - (noise - clean)
            )
            .square()
            .mean()
            .item()
            for s in sigma
        ]
    assert dense["loss"][0] == pytest.approx(sum(losses) / 8, rel=1e-4)


def test_similarity_of_known_videos():
    target = torch.rand(2, 3, 16, 16, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    off = target + torch.tensor([0.02, 0.2])[:, None, None, None, None]
    found = evaluation.similarity(off, target, "x")
    assert found["PSNR x"] == pytest.approx((40 + 20) / 2, abs=1e-3)  # mean of decibels; the range is 2
    assert found["SSIM x"] < 0.999
    assert evaluation.similarity(target, target, "x")["SSIM x"] == pytest.approx(1)


def test_fp8_is_measured_without_training(trained, loaded):
    weights = training.load(trained, CPU)
    effort = replace(EFFORT, seeds=1, points=4, crops=1)
    results, _ = measure(loaded, *(evaluation.Arm(m, weights, m) for m in flow.MODES), effort=effort)
    losses = [results[mode]["loss"][0] for mode in flow.MODES]
    assert len(set(losses)) == 4 and max(losses) < 2 * min(losses)


@pytest.mark.parametrize(
    ("untrained", "tuned", "expected"),
    [
        (
            [1.2, 1.21],
            [1.01, 1.02],
            ["20.50 % (± 0.71) above its own", "1.50 %", "returns 93 %", ": the same direction"],
        ),
        (
            [1.2, 1.21],
            [1.15, 1.17],
            ["16.00 % (± 1.41) above that", "returns 22 %", ": not the same direction"],
        ),
        ([1.2, 1.21], [0.99, 0.98], ["1.50 % (± 0.71) below that", ": the same direction"]),
        ([0.99, 1.02], [1.0, 1.0], ["0.50 %", "Nothing measurable was lost"]),
    ],
)
def test_the_verdict_follows_the_numbers(untrained, tuned, expected):
    losses = {"dense": [1.0, 1.0], "fps, untrained": untrained, "fps, fine-tuned": tuned}
    losses["dense, fine-tuned"] = [1.0, 1.0]
    text = evaluation.verdict({name: {"loss": values} for name, values in losses.items()}, "fps", steps=7)
    assert "after 7 steps" in text
    for part in expected:
        assert part in text


def test_without_a_dense_fine_tuning_the_verdict_compares_with_the_base():
    losses = {"dense": [1.0, 1.0], "fps, untrained": [1.2, 1.22], "fps, fine-tuned": [1.02, 1.03]}
    text = evaluation.verdict({name: {"loss": values} for name, values in losses.items()}, "fps", steps=7)
    assert "2.50 % (± 0.71) above that of the dense model. So training returns 88 %" in text


# Distillation


def distil(path, trained, mode, **changes):
    """The run after training, and the losses of its steps."""
    weights = training.load(trained, CPU)
    teacher = distillation.Teacher(weights.model, PLAN, "auto", 5, 1, CPU)
    run = training.Run(path, settings(mode, clips=(), latents=5, **changes), weights, teacher, CPU)
    run.train(flow.Attention(PLAN, mode), math.inf, 2, training.Console(quiet=True))
    return run, [float(row[1]) for row in training_log.read(path)]


def test_the_teacher_is_the_dense_start_model(trained):
    weights = training.load(trained, CPU)
    teacher = distillation.Teacher(weights.model, PLAN, "auto", 11, 1, CPU)
    noise = torch.randn(11, 2, 8, 8, 16, generator=torch.Generator().manual_seed(1))
    dense = flow.Attention(PLAN, "dense")
    with torch.no_grad():
        expected = flow.sample(weights.model, noise, 0, 30, dense)
    torch.testing.assert_close(teacher.latents, expected, atol=1e-4, rtol=1e-4)
    drawn = teacher.draw(100, torch.Generator().manual_seed(0))
    assert len(drawn.unique(dim=0)) == 11 and all(
        any(torch.equal(x, y) for y in teacher.latents) for x in drawn[:5]
    )
    with torch.no_grad():
        for parameter in weights.model.parameters():
            parameter.zero_()
    assert (
        teacher.velocity(drawn[:2], torch.tensor([0.3, 0.9])).abs().max() > 0.1
    )  # training does not change it


def test_distillation_measures_what_attention_changes(tmp_path, trained):
    """Nothing where attention stays dense; under windows less and less of it."""
    _, dense = distil(tmp_path / "dense", trained, "dense", steps=2)
    assert max(dense) < 1e-10
    _, window = distil(tmp_path / "window", trained, "window", steps=60, warmup=5, batch=4)
    assert 1e-6 < sum(window[-10:]) < 0.7 * sum(window[:10])


def test_a_resumed_distillation_is_bit_equal(tmp_path, trained, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distil(whole, trained, "window")
    real = training.Run._one_step

    def killed(run, attention):
        if run.step == 3:
            raise KeyboardInterrupt
        real(run, attention)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(training.Run, "_one_step", killed)
        distil(parts, trained, "window")
    distil(parts, trained, "window")
    assert same(checkpoint(whole), checkpoint(parts))


# Export


def test_an_exported_model_loads_back(trained, tmp_path, loaded):
    weights, path = training.load(trained, CPU), tmp_path / "new" / "model.safetensors"
    size = export.save(weights, path, limit_mb=12)
    assert size == path.stat().st_size < 2 * sum(p.numel() for p in weights.model.parameters()) + 20_000
    back = export.load(path)
    assert back.settings == weights.settings and back.step == 40 and back.codec.equals(weights.codec)
    for a, b in zip(weights.model.parameters(), back.model.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.bfloat16().float(), b)
    arms = [evaluation.Arm(name, w, "dense") for name, w in (("run", weights), ("file", back))]
    results, _ = measure(loaded, *arms)
    assert results["file"]["loss"] == pytest.approx(results["run"]["loss"], rel=0.02)
    with export.safe_open(path, framework="pt") as file:
        assert {"format", "settings", "step", "weights", "made_by"} == set(file.metadata())


def test_export_refuses_what_is_too_large_or_foreign(trained, tmp_path):
    with pytest.raises(export.UserError, match=r"--limit 1: .* takes 1\.\d MB; raise the limit to 2"):
        export.save(training.load(trained, CPU), tmp_path / "model.safetensors", limit_mb=1)
    assert not (tmp_path / "model.safetensors").exists()
    export.save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(export.UserError, match="its format is None"):
        export.load(tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing of the kind")
    with pytest.raises(export.UserError, match="cannot be read as safetensors"):
        export.load(tmp_path / "text.safetensors")


# Commands


def command(*argv):
    return train_tiny_dit.main([str(x) for x in argv])


def commands(folder, runs, mode):
    """train, two fine-tunings, evaluate, export; returns evaluate's report."""
    short = ["--data", folder, "--device", "cpu"]
    optimisation = ["--batch", 2, "--steps", 3, "--save-every", 2]
    first = [*short, *optimisation, "--size", "tiny", "--grid", 2, 4, 4]
    assert command("train", "--out", runs / "dense", *first, "--mid", 1, 3, 3) == 0
    for out, attention in (("tuned", mode), ("more", "dense")):
        tuning = [
            "--start",
            runs / "dense",
            "--attention",
            attention,
            "--out",
            runs / out,
            *short,
            *optimisation,
        ]
        assert command("finetune", *tuning, "--early", 1, 1, 1) == 0
    effort = ["--seeds", 2, "--crops", 1, "--points", 4, "--sampler-steps", 4, "--sampler-start", 1]
    arms = ["--base", runs / "dense", "--tuned", runs / "tuned", "--dense-tuned", runs / "more"]
    assert command("evaluate", *arms, "--out", runs / "report", *effort, *short) == 0
    assert command("export", runs / "tuned", runs / "tiny.safetensors") == 0
    assert export.load(runs / "tiny.safetensors").settings.plan.early == (1, 1, 1)
    return json.loads((runs / "report" / "report.json").read_text())


def test_all_commands(folder, tmp_path, capsys):
    report = commands(folder, tmp_path, "window")
    printed = capsys.readouterr().out
    arms = ["dense", "window, untrained", "window, fine-tuned", "dense, fine-tuned"]
    assert list(report["results"]) == arms and report["density"]["early"] < report["density"]["mid"] < 1
    assert report["settings"]["window, fine-tuned"]["plan"]["early"] == [1, 1, 1]
    assert report["settings"]["window, fine-tuned"]["plan"]["mid"] == [1, 3, 3]  # inherited
    assert report["verdict"].startswith(
        "Without training, the dense model's validation loss under window attention"
    )
    for words in (
        "0.6 M parameters, 32 tokens",
        "3 of 3 steps, done",
        "validation loss",
        "PSNR",
        "2 seeds",
        "1.14 MB",
    ):
        assert words in printed
    assert (tmp_path / "report" / "samples.png").stat().st_size > 10_000
    # An exported file serves as --start and as an arm; a finished run is left alone.
    argv = ["--batch", 2, "--steps", 3, "--data", folder, "--device", "cpu"]
    start = tmp_path / "tiny.safetensors"
    assert (
        command("finetune", "--start", start, "--attention", "dense", "--out", tmp_path / "third", *argv) == 0
    )
    before = (tmp_path / "third" / "checkpoint.pt").stat().st_mtime_ns
    assert (
        command("finetune", "--start", start, "--attention", "dense", "--out", tmp_path / "third", *argv) == 0
    )
    assert (tmp_path / "third" / "checkpoint.pt").stat().st_mtime_ns == before


def test_fine_tuning_in_fp8(folder, tmp_path):
    report = commands(folder, tmp_path, "fps")
    assert len(report["results"]) == 6 and "fps, fine-tuned" in report["results"]


def test_distillation_by_its_command(folder, tmp_path, trained, capsys):
    short = ["--device", "cpu", "--batch", 2, "--steps", 3]
    tuning = ["--start", trained, "--attention", "fps", "--loss", "distill", "--latents", 4]
    assert command("finetune", *tuning, "--out", tmp_path / "fps", *short) == 0
    assert "4 latents sampled by" in capsys.readouterr().out
    effort = ["--seeds", 2, "--crops", 1, "--points", 4, "--sampler-steps", 4, "--sampler-start", 1]
    arms = ["--base", trained, "--tuned", tmp_path / "fps", "--out", tmp_path / "report"]
    assert command("evaluate", *arms, *effort, "--data", folder, "--device", "cpu") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(report["results"])[-1] == "fps, fine-tuned" and "of the dense model." in report["verdict"]
    chosen = ["--chosen", 0.25, 0.5, 0.5, "--always", 1, 1, 1]
    assert command("finetune", *tuning, *chosen, "--out", tmp_path / "chosen", *short) == 0
    assert "density early 0.25, mid 0.50, late 0.50" in capsys.readouterr().out
    arms = ["--base", trained, "--tuned", tmp_path / "chosen", "--out", tmp_path / "report"]
    assert command("evaluate", *arms, *effort, "--data", folder, "--device", "cpu") == 0
    settings = json.loads((tmp_path / "report" / "report.json").read_text())["settings"]
    assert settings["fps, fine-tuned"]["plan"]["chosen"] == [0.25, 0.5, 0.5]
    more = ["--start", trained, "--attention", "fps", "--out", tmp_path / "x", *short]
    assert "--always (1, 1, 1): belongs to a choice" in fails(capsys, "finetune", *more, *chosen[4:])
    assert "--latents 4: --loss flow has no use" in fails(capsys, "finetune", *more, "--latents", 4)
    assert "--loss distill has no use" in fails(
        capsys, "finetune", *more, "--loss", "distill", "--data", folder
    )


def fails(capsys, *argv):
    assert command(*argv) == 2
    message = capsys.readouterr().err
    assert f"train_tiny_dit.py {argv[0]}: error: " in message and "Traceback" not in message
    return message


def test_a_wrong_request_is_status_2_and_names_what_is_legal(folder, tmp_path, trained, capsys, monkeypatch):
    tiny = ["--out", tmp_path, "--data", folder, "--device", "cpu", "--size", "tiny", "--grid", 2, 4, 4]
    assert "nearest legal value (2, 4, 4)" in fails(capsys, "train", *tiny[:-1], 6)
    assert "nearest legal values 1 and 3" in fails(
        capsys, "train", *tiny, "--tile", 1, 1, 1, "--early", 1, 2, 1
    )
    assert "512" in fails(capsys, "train", *tiny[:-3], 40, 4, 4, "--tile", 40, 4, 4)
    assert "is not a folder" in fails(capsys, "train", *tiny, "--data", tmp_path / "none")
    assert "holds no video" in fails(capsys, "train", *tiny, "--data", tmp_path)
    assert "try --grid with 6 on axis t" in fails(capsys, "train", *tiny[:-3], 8, 4, 4)
    assert "holds no checkpoint.pt" in fails(capsys, "export", tmp_path, tmp_path / "x.safetensors")
    half = clips.Clips(clips.find(folder)[:1], 4, 32)  # has another latent code
    train(tmp_path / "short", half, steps=2)
    train(tmp_path / "window", half, "window", steps=40)

    def evaluate(tuned, dense_tuned, *more):
        arms = ["--base", trained, "--tuned", tuned, "--dense-tuned", dense_tuned, "--out", tmp_path / "r"]
        return fails(capsys, "evaluate", *arms, "--data", folder, "--device", "cpu", *more)

    assert "has 2 steps, --tuned has 40" in evaluate(tmp_path / "window", tmp_path / "short")
    assert "--attention dense and dense" in evaluate(trained, trained)
    assert "window, fine-tuned: has another grid or latent code" in evaluate(tmp_path / "window", trained)
    assert "nearest legal value 29" in evaluate(trained, trained, "--sampler-start", 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in fails(capsys, "train", *tiny, "--device", "cuda")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required"),
        (["train"], "--out"),
        (["train", "--out", "x", "--lr", "0"], "must be a number, at least 1e-09; nearest legal value 1e-09"),
        (["train", "--out", "x", "--steps", "2.5"], "'2.5' must be a whole number, at least 1"),
        (["train", "--out", "x", "--ema", "1.5"], "at least 0 and at most 1; nearest legal value 1"),
        (["finetune", "--out", "x", "--start", "y", "--attention", "sparse"], "window"),
    ],
)
def test_wrong_options_exit_with_2(argv, expected, capsys):
    with pytest.raises(SystemExit) as error:
        train_tiny_dit.main(argv)
    assert error.value.code == 2 and expected in capsys.readouterr().err


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        train_tiny_dit.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "(default: 1 3 3)",
        "(default: 0.2 0.8)",
        "(default: 4000)",
        "(default: 0.0005)",
        "8 32 32",
    ):
        assert words in text
