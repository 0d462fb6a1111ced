"""StepSchedule: which config at which step and noise level, and that training and inference agree on it."""

import dataclasses
import json
import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import fpsattention as fps
from fpsattention.schedules.schedule import STAGES

EARLY = fps.AttentionConfig(tile=(2, 2, 4), window=(1, 1, 1), quant="none")
MID = fps.AttentionConfig(tile=(1, 2, 2), window=(1, 3, 3), quant="none")
LATE = fps.AttentionConfig(tile=(2, 2, 2), window=(1, 3, 1), quant="none")
GRID = (2, 6, 8)

hundredths = st.integers(0, 100).map(lambda k: Fraction(k, 100))
shifts = st.sampled_from([1, 3, 5, 8, 12]) | st.floats(0.1, 20)


def schedule(*alpha):
    return fps.StepSchedule(early=EARLY, mid=MID, late=LATE, alpha=alpha or (0.2, 0.8))


def alphas(*bounds):
    return tuple(float(x) for x in sorted(bounds))


def stages(sched, num_steps):
    return [sched.stage(step=i, num_steps=num_steps) for i in range(num_steps)]


def shifted(u, shift):
    return shift * u / (1 + (shift - 1) * u)


def flow_match_table(num_steps, shift):
    """float32 [num_steps], in the arithmetic of a flow-match Euler sampler given sigmas of 1, 1 - 1/n, ..., 1/n."""
    return shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1].float(), shift)


def wan_table(num_steps, shift):
    """float32 [num_steps], those of Wan's samplers (UniPC, DPM++): as above, but from 0.999."""
    return shifted((1 - torch.linspace(1 / 1000, 1, num_steps + 1, dtype=torch.float64))[:-1], shift).float()


@pytest.mark.parametrize(
    ("alpha", "num_steps", "counts"),
    [
        ((0.2, 0.8), 50, (10, 30, 10)),  # 10 / 50 is the first mid step, 40 / 50 the first late one
        ((0.2, 0.8), 4, (1, 3, 0)),
        ((0.2, 0.8), 1, (1, 0, 0)),
        ((0.1, 0.7), 10, (1, 6, 3)),
        ((0.5, 0.5), 7, (4, 0, 3)),
        ((0, 1), 9, (0, 9, 0)),
        ((0, 0), 9, (0, 0, 9)),
        ((1, 1), 9, (9, 0, 0)),
    ],
)
def test_known_answers(alpha, num_steps, counts):
    expected = [stage for stage, count in zip(STAGES, counts, strict=True) for _ in range(count)]
    assert stages(schedule(*alpha), num_steps) == expected


@pytest.mark.parametrize(
    ("alpha", "noise", "clean"),
    [
        ((0.2, 0.8), "early", "late"),
        ((0, 0.5), "mid", "late"),
        ((0.5, 1), "early", "mid"),
        ((0, 1), "mid", "mid"),
        ((0, 0), "late", "late"),
        ((1, 1), "early", "early"),
    ],
)
@pytest.mark.parametrize("shift", [1e-300, 0.3, 1, 5.0, 1e300])
def test_the_ends_of_sigma(alpha, noise, clean, shift):
    assert schedule(*alpha).stage_for_sigma(1, shift=shift) == noise
    assert schedule(*alpha).stage_for_sigma(0.0, shift=shift) == clean


@pytest.mark.parametrize("shift", [1e-300, 0.2, 2.9, 1e300])
def test_float32_rounding_beyond_the_ends_is_the_end(shift):
    sigma = 1 + 2**-23
    assert schedule().stage_for_sigma(sigma, shift=shift) == "early"
    assert schedule().stage_for_sigma(1 - sigma, shift=shift) == "late"


def test_stages_name_the_configs():
    sched = schedule()
    assert [sched.at(step=i, num_steps=3) for i in range(3)] == [EARLY, MID, MID]
    assert [sched.for_sigma(x, shift=1) for x in (0.9, 0.5, 0.1)] == [EARLY, MID, LATE]
    assert [getattr(sched, stage) for stage in STAGES] == [EARLY, MID, LATE]


@given(hundredths, hundredths, st.integers(1, 300), st.data())
def test_at_is_the_rule_in_exact_fractions(x, y, num_steps, data):
    a, b = sorted((x, y))
    step = data.draw(st.integers(0, num_steps - 1))
    p = Fraction(step, num_steps)
    expected = "early" if p < a or a == 1 else "mid" if p < b or b == 1 else "late"
    assert schedule(float(a), float(b)).stage(step=step, num_steps=num_steps) == expected


@given(st.integers(1, 200), shifts, st.data())
def test_training_and_inference_agree_at_every_step_of_a_shifted_sampler(num_steps, shift, data):
    boundary = hundredths | st.integers(0, num_steps).map(lambda i: Fraction(i, num_steps))
    sched = schedule(*alphas(data.draw(boundary), data.draw(boundary)))
    sigmas = flow_match_table(num_steps, shift).tolist()
    assert [sched.stage_for_sigma(x, shift=shift) for x in sigmas] == stages(sched, num_steps)


@pytest.mark.parametrize("num_steps", [5, 20, 40, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
def test_wans_own_sigmas_and_integer_timesteps_agree_too(num_steps, shift):
    sigmas = wan_table(num_steps, shift)
    for table in (sigmas, (1000 * sigmas).long() / 1000):
        assert [schedule().stage_for_sigma(x, shift=shift) for x in table.tolist()] == stages(
            schedule(), num_steps
        )


@given(st.floats(0, 1), shifts, hundredths, hundredths)
def test_between_the_steps_progress_is_that_of_the_unshifted_walk(u, shift, x, y):
    alpha = alphas(x, y)
    assume(all(abs(1 - u - bound) > 2e-5 for bound in alpha))
    expected = STAGES[sum(bound < 1 - u for bound in alpha)]
    assert schedule(*alpha).stage_for_sigma(shifted(u, shift), shift=shift) == expected


@given(st.floats(0, 1), st.floats(0, 1), st.floats(min_value=1e-300, max_value=1e300))
def test_more_noise_is_never_a_later_stage(x, y, shift):
    noisy, clean = (schedule().stage_for_sigma(s, shift=shift) for s in (max(x, y), min(x, y)))
    assert STAGES.index(noisy) <= STAGES.index(clean)


def test_the_shift_decides_and_cannot_be_forgotten():
    assert schedule().for_sigma(0.9, shift=1) == EARLY
    assert schedule().for_sigma(0.9, shift=5) == MID
    for call in (schedule().for_sigma, schedule().stage_for_sigma, schedule().group_by_stage):
        with pytest.raises(TypeError, match="shift"):
            call(0.9)


@given(
    st.lists(st.floats(0, 1, width=16), max_size=12),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    shifts,
)
def test_groups_partition_the_batch(values, dtype, shift):
    sigmas = torch.tensor(values, dtype=dtype)
    groups = schedule().group_by_stage(sigmas, shift=shift)
    assert list(groups) == [stage for stage in STAGES if stage in groups]
    of_sample = {i: stage for stage, rows in groups.items() for i in rows.tolist()}
    expected = [schedule().stage_for_sigma(x, shift=shift) for x in sigmas.tolist()]
    assert [of_sample.get(i) for i in range(len(values))] == expected
    assert sum(len(rows) for rows in groups.values()) == len(values)
    for rows in groups.values():
        assert rows.dtype == torch.int64
        assert rows.tolist() == sorted(rows.tolist()) != []


def attend(config, q, k, v):
    return fps.attention(q, k, v, grid=GRID, config=config, backend="reference")


def qkv(batch):
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, math.prod(GRID), 2, 4)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]


@settings(max_examples=15)
@given(st.lists(st.sampled_from([1.0, 0.95, 0.6, 0.3, 0.1]), min_size=1, max_size=5))
@example([0.1, 1.0, 0.6, 0.95, 0.3])
def test_a_mixed_batch_gives_the_values_and_gradients_of_its_samples_alone(values):
    sched, sigmas, inputs = schedule(), torch.tensor(values), qkv(len(values))
    out = sched.map_by_stage(attend, sigmas, *inputs, shift=3)
    alone = torch.cat(
        [
            attend(sched.for_sigma(s, shift=3), *(x[i : i + 1] for x in inputs))
            for i, s in enumerate(sigmas.tolist())
        ]
    )
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    torch.testing.assert_close(out, alone)
    got, expected = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, alone))
    for x, y in zip(got, expected, strict=True):
        assert y.abs().max() > 1e-3
        torch.testing.assert_close(x, y)


def test_the_three_configs_of_these_tests_differ_in_what_they_compute():
    outs = [attend(config, *qkv(1)) for config in (EARLY, MID, LATE)]
    for x, y in ((0, 1), (1, 2), (0, 2)):
        assert (outs[x] - outs[y]).abs().max() > 0.1


def test_one_call_a_stage_and_no_copy_of_a_batch_in_one_stage():
    calls = []

    def record(config, x):
        calls.append((config, x))
        return x[:, :1]

    x = torch.arange(10.0).view(5, 2)
    out = schedule().map_by_stage(record, torch.tensor([0.1, 1.0, 0.5, 0.9, 0.4]), x, shift=1)
    assert [(config, part[:, 0].tolist()) for config, part in calls] == [
        (EARLY, [2, 6]),
        (MID, [4, 8]),
        (LATE, [0]),
    ]
    assert torch.equal(out, x[:, :1])
    calls.clear()
    schedule().map_by_stage(record, torch.full((5,), 0.5), x, shift=1)
    assert len(calls) == 1 and calls[0][0] == MID and calls[0][1] is x


def test_a_schedule_is_a_value():
    sched = schedule(0.25, 1)
    assert sched == fps.StepSchedule(EARLY, MID, LATE, alpha=[0.25, 1.0])
    assert hash(sched) == hash(dataclasses.replace(sched))
    assert sched != schedule() and sched.alpha == (0.25, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sched.alpha = (0, 1)


def test_explain():
    late = fps.AttentionConfig(tile=(2, 2, 2), window=((1, 3, 1), (1, 1, 1)), quant_tile=(2, 2, 4))
    text = fps.StepSchedule(early=EARLY, mid=MID, late=late).explain(10, GRID, heads=2).splitlines()
    assert [" ".join(line.split()) for line in text] == [
        "stage steps tile scales window density",
        "early 0-1 (2, 2, 4) none (1, 1, 1) 0.167",  # 1 of 1 x 3 x 2 tiles
        "mid 2-7 (1, 2, 2) none (1, 3, 3) 0.375",  # 1 x 3 x 3 of 2 x 3 x 4 tiles
        "late 8-9 (2, 2, 2) (2, 2, 4) per head 0.167",  # 3 and 1 of 1 x 3 x 4 tiles
        f"mean density over 10 steps: {(2 / 6 + 6 * 9 / 24 + 2 * 2 / 12) / 10:.3f}",
    ]
    assert len({len(line) for line in text[:-1]}) == 1
    assert schedule(0, 1).explain(1, GRID).splitlines()[1].split()[:2] == ["early", "none"]


@pytest.mark.parametrize(
    ("alpha", "error", "words"),
    [
        ((0.8, 0.2), ValueError, ["(0.8, 0.2)", "0 <= a <= b <= 1", "nearest legal value (0.2, 0.8)"]),
        ((-0.1, 0.5), ValueError, ["(-0.1, 0.5)", "nearest legal value (0.0, 0.5)"]),
        ((0.5, 20), ValueError, ["(0.5, 20)", "nearest legal value (0.5, 1.0)"]),
        ((0.5, math.nan), ValueError, ["(0.5, nan)", "0 <= a <= b <= 1"]),
        ((0.5,), ValueError, ["(0.5,)", "two numbers", "got 1"]),
        ((0.2, 0.5, 0.8), ValueError, ["(0.2, 0.5, 0.8)", "two numbers", "got 3"]),
        (0.5, TypeError, ["0.5", "two numbers"]),
        ("ab", TypeError, ["'ab'", "two numbers"]),
        ((False, True), TypeError, ["(False, True)", "two numbers"]),
        ((0.2, None), TypeError, ["(0.2, None)", "two numbers"]),
    ],
)
def test_errors_of_alpha(alpha, error, words):
    with pytest.raises(error) as caught:
        fps.StepSchedule(EARLY, MID, LATE, alpha)
    for word in ["alpha", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", [None, {"tile": (1, 2, 2)}, fps.AttentionConfig])
def test_errors_of_the_configs(stage, value):
    with pytest.raises(TypeError) as caught:
        dataclasses.replace(schedule(), **{stage: value})
    for word in (f"{stage}:", repr(value), "must be an AttentionConfig"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("step", "num_steps", "error", "words"),
    [
        (50, 50, ValueError, ["step: 50", "at least 0 and at most 49", "nearest legal value 49"]),
        (-1, 50, ValueError, ["step: -1", "at least 0 and at most 49", "nearest legal value 0"]),
        (0, 0, ValueError, ["num_steps: 0", "at least 1", "nearest legal value 1"]),
        (0, -3, ValueError, ["num_steps: -3", "at least 1", "nearest legal value 1"]),
        (True, 50, TypeError, ["step: True", "integer"]),
        (1.0, 50, TypeError, ["step: 1.0", "integer"]),
        (torch.tensor(999.0), 50, TypeError, ["step: tensor(999.)", "integer"]),
        ("1", 50, TypeError, ["step: '1'", "integer"]),
        (0, True, TypeError, ["num_steps: True", "integer"]),
        (0, 50.0, TypeError, ["num_steps: 50.0", "integer"]),
    ],
)
def test_errors_of_steps(step, num_steps, error, words):
    for call in (schedule().at, schedule().stage):
        with pytest.raises(error) as caught:
            call(step=step, num_steps=num_steps)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("sigma", "shift", "error", "words"),
    [
        (
            1.0001,
            1,
            ValueError,
            ["sigma: 1.0001", "from 0 (clean) to 1 (pure noise)", "nearest legal value 1.0"],
        ),
        (999, 1, ValueError, ["sigma: 999", "nearest legal value 1.0"]),
        (-0.001, 1, ValueError, ["sigma: -0.001", "nearest legal value 0.0"]),
        (math.nan, 1, ValueError, ["sigma: nan", "from 0 (clean) to 1"]),
        (True, 1, TypeError, ["sigma: True", "number from 0"]),
        ("0.5", 1, TypeError, ["sigma: '0.5'", "number from 0"]),
        (torch.tensor([0.5]), 1, TypeError, ["sigma: tensor([0.5000])", "group_by_stage"]),
        (0.5, 0, ValueError, ["shift: 0", "positive, finite", "1.0 is no shift"]),
        (0.5, -3.0, ValueError, ["shift: -3.0", "positive, finite"]),
        (0.5, math.inf, ValueError, ["shift: inf", "positive, finite"]),
        (0.5, math.nan, ValueError, ["shift: nan", "positive, finite"]),
        (0.5, True, TypeError, ["shift: True", "positive, finite"]),
        (0.5, None, TypeError, ["shift: None", "positive, finite"]),
    ],
)
def test_errors_of_sigma_and_shift(sigma, shift, error, words):
    for call in (schedule().for_sigma, schedule().stage_for_sigma):
        with pytest.raises(error) as caught:
            call(sigma, shift=shift)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("sigmas", "shift", "error", "words"),
    [
        ([0.5], 1, TypeError, ["sigmas: [0.5]", "floating-point tensor [B]"]),
        (torch.tensor([1]), 1, TypeError, ["sigmas: tensor([1])", "floating-point tensor [B]"]),
        (torch.tensor(0.5), 1, ValueError, ["sigmas: shape ()", "[B]"]),
        (torch.zeros(2, 3), 1, ValueError, ["sigmas: shape (2, 3)", "[B]"]),
        (torch.tensor([0.5, 2.0]), 1, ValueError, ["sigmas[1]: 2.0", "nearest legal value 1.0"]),
        (torch.tensor([math.nan]), 1, ValueError, ["sigmas[0]: nan"]),
        (torch.tensor([]), 0, ValueError, ["shift: 0", "positive, finite"]),
    ],
)
def test_errors_of_a_batch(sigmas, shift, error, words):
    with pytest.raises(error) as caught:
        schedule().group_by_stage(sigmas, shift=shift)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("sigmas", "x", "error", "words"),
    [
        ([], torch.zeros(0, 2), ValueError, ["sigmas: shape (0,)", "at least 1"]),
        ([0.5, 0.5], torch.zeros(3, 2), ValueError, ["batched[0]: shape (3, 2)", "begin with 2"]),
        ([0.5, 1.0], torch.zeros(()), ValueError, ["batched[0]: shape ()", "begin with 2"]),
        ([0.5, 1.0], [0, 0], TypeError, ["batched[0]: must be a tensor [B, ...], got list"]),
        ([0.5, 1.0], None, TypeError, ["batched[0]: must be a tensor [B, ...], got NoneType"]),
    ],
)
def test_errors_of_map_by_stage(sigmas, x, error, words):
    with pytest.raises(error) as caught:
        schedule().map_by_stage(lambda config, part: part, torch.tensor(sigmas), x, shift=1)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("sigmas", [[0.5, 0.5], [0.5, 0.5, 1.0]], ids=["one stage", "two stages"])
@pytest.mark.parametrize(
    ("of_mid", "error", "words"),
    [
        (lambda x: x[:1], ValueError, "returned (1, 2) torch.float32 cpu for mid, must return (2, 2) "),
        (lambda x: x.sum(), ValueError, "returned () torch.float32 cpu for mid, must return (2"),
        (lambda x: (x, x), TypeError, "must return a tensor [b, ...], returned tuple for mid"),
        (lambda x: None, TypeError, "must return a tensor [b, ...], returned NoneType for mid"),
    ],
)
def test_results_that_are_no_batch_are_refused(sigmas, of_mid, error, words):
    with pytest.raises(error, match=re.escape(f"fn: {words}")):
        schedule().map_by_stage(
            lambda config, x: of_mid(x) if config == MID else x,
            torch.tensor(sigmas),
            torch.zeros(len(sigmas), 2),
            shift=1,
        )


@pytest.mark.parametrize("of_mid", [torch.Tensor.double, lambda x: x[:, :1]])
def test_results_of_stages_are_alike(of_mid):
    with pytest.raises(ValueError, match=r"fn: returned .* for mid, must return \(1, 2\) torch.float32 cpu"):
        schedule().map_by_stage(
            lambda config, x: of_mid(x) if config == MID else x,
            torch.tensor([0.5, 1.0]),
            torch.zeros(2, 2),
            shift=1,
        )


# The file, and what the schedule is for


SAVED = fps.StepSchedule(
    early=fps.AttentionConfig(
        tile=(2, 2, 4), window=((1, 1, 1), (1, 3, 1)), quant_tile=(2, 4, 4), smooth_k=True
    ),
    mid=MID,
    late=fps.AttentionConfig(border="truncate"),
    alpha=(0.25, 1),
    grid=GRID,
    num_steps=4,
)


@pytest.mark.parametrize("sched", [SAVED, schedule()], ids=["all", "least"])
def test_saved_and_loaded(tmp_path, sched):
    sched.save(tmp_path / "schedule.json")
    again = fps.StepSchedule.load(tmp_path / "schedule.json")
    assert again == sched and hash(again) == hash(sched)
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda data: data.update(format="fpsattention-windows-1"),
            "\"format\": 'fpsattention-windows-1' must be",
        ),
        (lambda data: data.update(later=1), "unknown key 'later'"),
        (lambda data: data.pop("mid"), "missing key 'mid'"),
        (lambda data: data["late"].pop("quant"), "\"late\": missing key 'quant'"),
        (lambda data: data["early"].update(tile=[9, 9, 9]), '"early": tile: .* at most 512'),
        (lambda data: data.update(early=None), '"early": None must be an object'),
        (lambda data: data.update(alpha=[0.8, 0.2]), "alpha: .* nearest legal value"),
        (lambda data: data.update(grid=[1, 2]), "grid: "),
        (lambda data: data.update(num_steps=0), "num_steps: 0"),
    ],
)
def test_another_file_is_refused(tmp_path, change, words):
    path = tmp_path / "schedule.json"
    SAVED.save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{path}: {words}"):
        fps.StepSchedule.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, holds list"):
        fps.StepSchedule.load(path)


def test_another_number_of_steps_is_refused():
    assert stages(SAVED, 4) == ["early", "mid", "mid", "mid"]
    for call in (SAVED.at, SAVED.stage):
        with pytest.raises(ValueError, match="num_steps: 50 is not the schedule's, 4; nearest legal value 4"):
            call(step=0, num_steps=50)
    with pytest.raises(ValueError, match="num_steps: 50 is not the schedule's"):
        SAVED.explain(50, GRID)
    assert dataclasses.replace(SAVED, num_steps=None).stage(step=49, num_steps=50) == "mid"
    assert SAVED.stage_for_sigma(0.5, shift=1.0) == "mid"  # a noise level has no number of steps


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("grid", (1, 2), "grid: "), ("grid", (1, -1, 1), "grid: "), ("num_steps", 0, "0"), ("num_steps", 2.5, "2.5")],
)  # fmt: skip
def test_an_illegal_grid_or_number_of_steps(field, value, words):
    with pytest.raises((TypeError, ValueError), match=words):
        dataclasses.replace(SAVED, **{field: value})
