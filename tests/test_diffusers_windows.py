"""Pipelines of diffusers under a WindowTable: windows of each step, layer and head, on the CPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import fpsattention as fps
from fpsattention.integrations import windowed
from test_diffusers import (  # skips all without diffusers
    WAYS_TO_COMPILE,
    Recorder,
    compile_transformer,
    diffusers,
    enable,
    inputs,
    processor,
    tiny,
)

HEADS = LAYERS = 2
CONFIG = fps.AttentionConfig(tile=(1, 2, 2), quant="none")  # 3 x 2 x 3 tiles of the grid 3 x 4 x 6
PAIRS = list(product(product((1, 3), (1, 2), (1, 3)), repeat=HEADS))  # windows of the two heads

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's, of float32
    pytest.mark.filterwarnings("ignore:Error detected in:UserWarning"),  # torch's, of a backward that raises
]


def windows_of(steps: int = tiny.STEPS) -> list:
    """[steps][LAYERS][HEADS]. Every layer of every step differs; heads are alike in the first and the last of all."""
    stride = (len(PAIRS) - 1) // (steps * LAYERS - 1)
    pairs = PAIRS[: stride * steps * LAYERS : stride]
    assert len(set(pairs)) == steps * LAYERS and pairs[0][0] == pairs[0][1]
    return [pairs[LAYERS * i : LAYERS * (i + 1)] for i in range(steps)]


def table_of(grid=(3, 4, 6), steps: int = tiny.STEPS, config=CONFIG) -> fps.WindowTable:
    return fps.WindowTable(grid, config, windows_of(steps))


@pytest.fixture
def wan() -> tiny.Tiny:
    x = tiny.wan(vae=None)
    x.kwargs["output_type"] = "latent"
    return x


@pytest.mark.parametrize("name", tiny.MODELS)
def test_each_step_and_layer_runs_its_windows(name, monkeypatch):
    """The oracle takes the windows in the order of the calls, whatever config it is called with."""
    model, dense = tiny.MODELS[name](), 1
    recorder = Recorder(model, monkeypatch)
    table = table_of(model.grid)
    handle = enable(model.pipe, table, dense_steps=[dense])
    ours = model.run(callback_on_step_end=recorder.next_step)
    assert recorder.ran == {
        (
            "transformer" if step < model.switch else "transformer_2",
            step,
            layer,
            None if step == dense else table.at(step=step, layer=layer),
        ): model.passes
        for step in range(tiny.STEPS)
        for layer in range(LAYERS)
    }
    handle.remove()

    queue = [
        layer
        for step, layers in enumerate(windows_of())
        if step != dense
        for _ in range(model.passes)
        for layer in layers
    ]
    attention = processor.attention

    def by_hand(*args, config, **kwargs):
        config = fps.AttentionConfig(tile=CONFIG.tile, window=queue.pop(0), quant="none")
        return attention(*args, config=config, **kwargs)

    monkeypatch.setattr(processor, "attention", by_hand)
    enable(model.pipe, fps.StepSchedule(CONFIG, CONFIG, CONFIG), dense_steps=[dense])
    expected = model.run()
    assert not queue
    assert torch.equal(ours, expected)


def test_heads_have_their_own_windows(wan):
    """Exchanging two heads' windows changes the video."""
    swapped = [[layer[::-1] for layer in layers] for layers in windows_of()]
    videos = []
    for windows in (windows_of(), swapped):
        handle = enable(wan.pipe, fps.WindowTable(wan.grid, CONFIG, windows))
        videos.append(wan.run())
        handle.remove()
    assert (videos[0] - videos[1]).abs().max() > 1e-3 * videos[0].abs().max()


def test_dense_layers_keep_the_hosts_own(wan, monkeypatch):
    recorder = Recorder(wan, monkeypatch)
    table = table_of()
    enable(wan.pipe, table, dense_layers=[0])
    wan.run(callback_on_step_end=recorder.next_step)
    assert {(step, layer, config) for _, step, layer, config in recorder.ran} == {
        (step, layer, table.at(step=step, layer=layer) if layer else None)
        for step in range(tiny.STEPS)
        for layer in range(LAYERS)
    }


def test_report(wan):
    narrow, wide, full = (1, 1, 1), (1, 1, 3), (3, 2, 3)  # densities 1/18, 1/6, 1
    windows = [
        [[narrow, wide], [full, full]],
        [[narrow, wide], [full, full]],
        [[narrow, wide], [narrow, wide]],
        [[wide, wide], [wide, wide]],
        [[wide, narrow], [full, full]],
    ]
    handle = enable(wan.pipe, fps.WindowTable(wan.grid, CONFIG, windows), dense_steps=[4])
    with pytest.raises(ValueError, match="grid: must be given"):
        handle.report()
    with pytest.raises(ValueError, match="num_steps: 6 is not the table's, 5"):
        handle.report(grid=wan.grid, num_steps=6)
    with pytest.raises(
        ValueError, match=r"the table's grid is \(3, 4, 6\), .* that of the report; .* \(3, 4, 5\)"
    ):
        handle.report(grid=(3, 4, 5), num_steps=5)
    wan.run()
    report = handle.report()
    assert str(report).splitlines() == [
        "transformer  steps  layers  attention                  tile       window     density  padding",
        "transformer  0-1    0-1     FPSAttention, not rounded  (1, 2, 2)  per layer  0.556    3100.0%",
        "transformer  2      0-1     FPSAttention, not rounded  (1, 2, 2)  per head   0.111    3100.0%",
        "transformer  3      0-1     FPSAttention, not rounded  (1, 2, 2)  (1, 1, 3)  0.167    3100.0%",
        "transformer  4      0-1     the host's own             -          dense      1.000    -",
        "mean density: 0.478",
    ]
    assert report.density == pytest.approx((2 * 5 / 9 + 1 / 9 + 1 / 6 + 1) / 5)
    assert report.rows[0].configs[1].windows == (full,)


# Steps, layers, heads and grid that are not the pipeline's


@pytest.mark.parametrize(
    "windows, error",
    [
        (
            [[[(1, 1, 1)] * 2] * 3] * 5,
            "schedule: the table's num_layers is 3, .* transformer; nearest legal value 2",
        ),
        (
            [[[(1, 1, 1)] * 4] * 2] * 5,
            "schedule: the table's heads is 4, .* transformer; nearest legal value 2",
        ),
    ],
)
def test_table_of_another_model(wan, windows, error):
    with pytest.raises(ValueError, match=error):
        enable(wan.pipe, fps.WindowTable(wan.grid, CONFIG, windows))
    enable(wan.pipe, table_of())  # nothing was changed


def test_table_of_another_grid(wan):
    enable(wan.pipe, table_of((3, 4, 8)))
    with pytest.raises(ValueError, match=r"grid is \(3, 4, 8\), .* transformer's input; .* \(3, 4, 6\)"):
        wan.run()


def test_table_of_another_number_of_steps(wan):
    enable(wan.pipe, table_of())
    with pytest.raises(ValueError, match="num_steps: 4 is not the table's, 5"):
        wan.run(steps=4)


def test_dense_steps_beyond_the_table(wan):
    enable(wan.pipe, table_of(), dense_steps=6)
    with pytest.raises(ValueError, match="dense_steps: 6 must be at most 5"):
        wan.run()


def test_a_transformer_alone_does_not_know_its_step():
    with pytest.raises(ValueError, match="schedule: a WindowTable is for a pipeline"):
        enable(tiny.wan_transformer(), table_of(), shift=3.0)


@pytest.mark.parametrize("second_order", [False, True])
def test_timestep_rounded_to_that_of_its_neighbour(wan, monkeypatch, second_order):
    """In bfloat16 the first steps with this shift are all 1000: the scheduler's count decides. Heun's counts twice."""
    recorder = Recorder(wan, monkeypatch)
    steps, scheduler = 20, tiny.flow(100.0)
    if second_order:
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=100.0)
    table = table_of(steps=steps)
    wan.pipe.scheduler = scheduler
    enable(wan.pipe, table)
    scheduler.set_timesteps(steps)
    rounded = scheduler.timesteps.bfloat16()
    assert len(set(rounded[:4].tolist())) == 1 and len(set(scheduler.timesteps[:4].tolist())) > 2
    latent = inputs()["hidden_states"]
    for visit, timestep in enumerate(scheduler.timesteps[:4]):
        recorder.ran.clear()
        with torch.no_grad():
            wan.pipe.transformer(**inputs(), timestep=rounded[visit][None])
        step = (visit + 1) // 2 if second_order else visit
        configs = [config for _, _, _, config in recorder.ran]
        assert configs == [table.at(step=step, layer=layer) for layer in range(LAYERS)]
        scheduler.step(latent, timestep, latent)


# torch.compile


@WAYS_TO_COMPILE
def test_one_graph_for_all_windows_under_compile(wan, how):
    """All layers of all steps have different windows and one graph; the dense step has a graph of its own."""
    table = table_of(steps=10)
    handle = enable(wan.pipe, table, dense_steps=1)
    expected = wan.run(steps=10)
    if how != "enable first":
        handle.remove()

    counter = compile_transformer(wan.pipe, how)
    if how != "enable first":
        enable(wan.pipe, table, dense_steps=1)
    for _ in range(2):
        torch.testing.assert_close(wan.run(steps=10), expected, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
def test_one_graph_of_models_with_text(name):
    model = tiny.MODELS[name]()
    enable(model.pipe, table_of())
    expected = model.run()
    counter = compile_transformer(model.pipe, "module.compile")
    torch.testing.assert_close(model.run(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_the_attention(dtype):
    """It passes on text and every field of the config, and its fake result has the shape of the real one."""
    grid = (2, 4, 4)
    q, k, v = torch.randn(3, 1, 32 + 5, HEADS, 16, generator=tiny.noise()).to(dtype).unbind()
    windows = torch.tensor([[[1, 1, 1], [1, 1, 1]], [[1, 1, 3], [1, 3, 1]]])  # of two layers
    layer = torch.tensor(1)
    config = fps.AttentionConfig(tile=(2, 1, 1), border="truncate", quant_tile=(2, 2, 4), smooth_k=True)
    kwargs = {"grid": grid, "backend": "reference", "prefix_len": 2, "suffix_len": 3}
    kwargs["suffix_valid"] = torch.tensor([1], dtype=torch.int32)
    op = torch.compile(windowed.attention_in_windows, backend="aot_eager", fullgraph=True)
    out = op(q, k, v, windows=windows, layer=layer, config=config, **kwargs)
    own = fps.AttentionConfig(
        tile=(2, 1, 1),
        window=((1, 1, 3), (1, 3, 1)),
        border="truncate",
        quant_tile=(2, 2, 4),
        smooth_k=True,
    )
    assert torch.equal(out, fps.attention(q, k, v, config=own, **kwargs))
    of_config = [2, 1, 1], [2, 2, 4], True, True, True  # tile, quant_tile, truncate, fp8, smooth_k
    torch.library.opcheck(
        torch.ops.fpsattention.attention_in_windows,
        (q, k, v, windows, layer, *of_config),
        kwargs | {"grid": list(grid)},
    )


def test_gradient(wan):
    """Without compiling there is one; compiled it is an error."""
    transformer = wan.pipe.transformer
    enable(wan.pipe, table_of())
    wan.pipe.scheduler.set_timesteps(tiny.STEPS)
    timestep = wan.pipe.scheduler.timesteps[2:3]
    transformer(**inputs(), timestep=timestep).sample.square().sum().backward()
    assert transformer.blocks[0].attn1.to_q.weight.grad.abs().max() > 0
    torch.compiler.reset()
    transformer.compile(backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="a WindowTable has no gradient under torch.compile"):
        transformer(**inputs(), timestep=timestep).sample.square().sum().backward()
