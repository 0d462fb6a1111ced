"""fpsattention.integrations.diffusers on the Hopper kernels: the hosts' own classes with small random BF16 weights."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import fpsattention as fps
from test_diffusers import enable, tiny  # skips all without diffusers

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # the hosts' and torch's own

TILE = (1, 2, 2)
ROUNDED_ON_ENTRY = (
    "hidden_states",
    "encoder_hidden_states",
    "encoder_hidden_states_image",
    "pooled_projections",
)


def assert_near(out: torch.Tensor, expected: torch.Tensor, other: torch.Tensor, limit: float):
    """As near to what is expected as rounding to BF16 in every layer allows, and far nearer than other windows are."""
    off, far = ((x.float() - expected.float()).norm() / expected.float().norm() for x in (out, other))
    assert out.isfinite().all()
    assert off < min(limit, far / 3), (off.item(), far.item())


def to_gpu(x):
    return x.cuda() if isinstance(x, torch.Tensor) else x


def inputs_of_a_step(model: tiny.Tiny) -> dict:
    """What the pipeline hands to its transformer in the middle of a run, on the GPU."""
    calls = []
    hook = model.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    model.run()
    hook.remove()
    inputs = calls[len(calls) // 2]
    return {
        name: tree_map(to_gpu, x.bfloat16() if name in ROUNDED_ON_ENTRY else x) for name, x in inputs.items()
    }


@pytest.mark.parametrize("name", tiny.MODELS)
def test_kernels_in_every_model(name):
    model = tiny.MODELS[name]()
    inputs = inputs_of_a_step(model)
    transformer = model.pipe.transformer.to("cuda", torch.bfloat16)

    def run(window, backend):
        config = fps.AttentionConfig(TILE, window)
        handle = enable(transformer, fps.StepSchedule(config, config, config), shift=3.0, backend=backend)
        with torch.no_grad():
            out = transformer(**inputs)[0]
        handle.remove()
        return out

    ours, other = run((3, 1, 3), "sm90"), run((1, 1, 1), "sm90")
    # An attention 5e-3 off, the contract's limit, moves these models by at most 4.5e-3.
    assert_near(ours, run((3, 1, 3), "reference"), other, limit=0.015)


@pytest.fixture
def wan() -> tiny.Tiny:
    model = tiny.wan(vae=None)
    for (
        block
    ) in model.pipe.transformer.blocks:  # so that attention counts for more than rounding over all steps
        block.attn1.to_out[0].weight.data *= 8
    model.pipe.to("cuda", torch.bfloat16)
    model.kwargs = model.kwargs | tree_map(to_gpu, tiny.text(8)) | {"output_type": "latent"}
    return model


SCHEDULE = fps.StepSchedule(
    fps.AttentionConfig(TILE, (1, 1, 1)),
    fps.AttentionConfig(TILE, (3, 2, 3)),
    fps.AttentionConfig(TILE, (3, 1, 3)),
    alpha=(0.4, 0.8),
)
NARROW = fps.StepSchedule(SCHEDULE.early, SCHEDULE.early, SCHEDULE.early)
TABLE = fps.WindowTable(
    (3, 4, 6),
    fps.AttentionConfig(TILE),
    [[[(1, 1, 3), (3, 2, 1)], [(3, 1, 1), (1, 2, 3 if step % 2 else 1)]] for step in range(tiny.STEPS)],
)


def expected_and_far(wan: tiny.Tiny, schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline gives with the schedule, which stays enabled, and with narrow windows in all steps."""
    other = enable(wan.pipe, NARROW, dense_steps=1, backend="sm90")
    far = wan.run()
    other.remove()
    enable(wan.pipe, schedule, dense_steps=1, backend="sm90")
    return wan.run(), far


@pytest.mark.parametrize(
    "schedule, graphs", [(SCHEDULE, 4), (TABLE, 2)], ids=["stages", "windows of each step, layer and head"]
)
def test_compiled_pipeline(wan, schedule, graphs):
    """As many graphs as stages, or one for all windows of a table; and one for the step that stays dense."""
    expected, far = expected_and_far(wan, schedule)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    wan.pipe.transformer.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        assert_near(wan.run(), expected, far, limit=0.04)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_as_it_ran(wan, use_reentrant):
    """Two forwards in different stages before the backward of both, whose own thread recomputes the layers."""
    inputs, transformer = inputs_of_a_step(wan), wan.pipe.transformer.train()
    enable(transformer, SCHEDULE, shift=1.0, backend="sm90")

    def gradient(timesteps):
        hidden = inputs["hidden_states"].detach().requires_grad_()
        call = inputs | {"hidden_states": hidden, "return_dict": False}
        outs = [transformer(**call | {"timestep": torch.tensor([t], device="cuda")})[0] for t in timesteps]
        sum(out.float().square().sum() for out in outs).backward()
        return hidden.grad

    expected, far = gradient((950.0, 500.0)), gradient((500.0, 500.0))
    transformer.enable_gradient_checkpointing(
        lambda f, *args: checkpoint(f, *args, use_reentrant=use_reentrant)
    )
    assert_near(gradient((950.0, 500.0)), expected, far, limit=0.04)  # BF16 adds up in another order


@torch.compiler.disable
def copied(module, args, output):
    return (output[0].clone(),)


def test_cuda_graphs(wan):
    """mode="reduce-overhead": the whole transformer is a CUDA graph for each stage, recorded once and replayed."""
    expected, far = expected_and_far(wan, SCHEDULE)
    torch.compiler.reset()
    counters.clear()
    wan.pipe.transformer.register_forward_hook(copied)  # docs/hosts.md
    wan.pipe.transformer.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # warm up, record, replay
        assert_near(wan.run(), expected, far, limit=0.04)
    assert counters["stats"]["unique_graphs"] == 4
    assert counters["inductor"]["cudagraph_skips"] == 0
    with torch.profiler.profile() as profile:
        wan.run()
    launches = [event.name for event in profile.events() if "GraphLaunch" in event.name]
    assert len(launches) == tiny.STEPS * wan.passes


def test_windows_of_a_table_are_not_recorded(wan):
    """mode="reduce-overhead": they are read in each forward, so their attention runs outside of CUDA graphs."""
    inputs, transformer = inputs_of_a_step(wan), wan.pipe.transformer
    wide, narrow = [[(3, 2, 3), (3, 2, 1)], [(3, 1, 3), (1, 2, 3)]], [[(1, 1, 1)] * 2] * 2

    def forwards():
        with torch.no_grad():
            timesteps = wan.pipe.scheduler.timesteps.cuda()
            return [transformer(**inputs | {"timestep": t[None]})[0].clone() for t in timesteps]

    outs = []
    for windows in ([narrow, wide], [wide, narrow]):
        windows = [windows[step % 2] for step in range(tiny.STEPS)]
        table = fps.WindowTable((3, 4, 6), fps.AttentionConfig(TILE), windows)
        handle = enable(wan.pipe, table, backend="sm90")
        outs.append(forwards())
        handle.remove()
    far, expected = outs
    enable(wan.pipe, table, backend="sm90")
    torch.compiler.reset()
    transformer.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        for out, *others in zip(forwards(), expected, far, strict=True):
            assert_near(out, *others, limit=0.04)
