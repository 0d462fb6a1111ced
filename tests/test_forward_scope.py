"""Layers run as their own forward says: recomputed, interleaved, nested, in threads, sharded and compiled."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import fpsattention as fps
import imports
import stub_fastvideo
from fpsattention.integrations.scope import Scope

with imports.or_skip():
    import tiny_diffusers as tiny
    from fpsattention.integrations.diffusers import enable, transformer

NARROW = fps.AttentionConfig(tile=(1, 2, 2), window=(1, 1, 1))
WIDE = fps.AttentionConfig(tile=(1, 2, 2), window=(1, 3, 3))
EXACT = fps.AttentionConfig(quant="none")
STAGES = fps.StepSchedule(NARROW, WIDE, EXACT, alpha=(0.4, 0.8))
EARLY, MID, LATE = 990.0, 600.0, 20.0  # timesteps, with a shift of 1

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]


def diffusers_step(model: nn.Module, timestep: float, hidden: torch.Tensor) -> torch.Tensor:
    text = torch.randn(1, 8, tiny.TEXT_DIM, generator=tiny.noise(6))
    return model(hidden_states=hidden, timestep=torch.tensor([timestep]), encoder_hidden_states=text).sample


def fastvideo_step(model: nn.Module, timestep: float, hidden: torch.Tensor) -> torch.Tensor:
    return model(hidden[:, :4], None, torch.tensor([timestep]))


@pytest.fixture(params=["diffusers", "diffusers, general", "fastvideo"])
def host(request, monkeypatch):
    """(a new transformer, its `enable` with the stages, a forward of it at a timestep)."""
    if request.param == "diffusers, general":
        monkeypatch.setattr(
            transformer, "FUSED", {}
        )  # the host's own processors, as in a newer version of it
    if request.param != "fastvideo":
        return tiny.wan_transformer, partial(enable, schedule=STAGES, shift=1.0), diffusers_step
    stub_fastvideo.install(monkeypatch)
    fastvideo = importlib.import_module("fpsattention.integrations.fastvideo")

    def new():
        torch.manual_seed(0)
        return stub_fastvideo.WanTransformer3DModel()

    return new, partial(fastvideo.enable, schedule=STAGES, shift=1.0), fastvideo_step


def latents() -> torch.Tensor:
    return torch.randn(1, 16, 3, 8, 12, generator=tiny.noise(5))


def wrap(model: nn.Module, **kwargs) -> None:
    """torch.distributed's checkpointing of every block."""
    blocks = set(model.blocks)
    apply_activation_checkpointing(
        model, partial(checkpoint_wrapper, **kwargs), check_fn=lambda module: module in blocks
    )


def own(model: nn.Module, **kwargs) -> None:
    """The host's own checkpointing: the method of diffusers, or the attributes that FastVideo sets."""

    def checkpoint_func(function, *args):
        return checkpoint(function, *args, **kwargs)

    if isinstance(model, stub_fastvideo.WanTransformer3DModel):
        model.gradient_checkpointing, model._gradient_checkpointing_func = True, checkpoint_func
    else:
        model.enable_gradient_checkpointing(checkpoint_func)


WAYS_TO_CHECKPOINT = {
    "own": partial(own, use_reentrant=False),
    "own, reentrant": partial(own, use_reentrant=True),
    "wrapper": wrap,
    "wrapper, reentrant": partial(wrap, checkpoint_impl=CheckpointImpl.REENTRANT),
}


def gradient(step, model: nn.Module, timesteps=(EARLY, MID), between=lambda: None) -> torch.Tensor:
    """The gradient in the input of the summed losses of forwards at these timesteps, all before the backward."""
    hidden = latents().requires_grad_()
    loss = sum(step(model, t, hidden).square().sum() for t in timesteps)
    between()
    loss.backward()
    return hidden.grad


def assert_same(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 * y.abs().max().item())


@pytest.mark.parametrize("enabled", ["first", "last"])
@pytest.mark.parametrize("how", WAYS_TO_CHECKPOINT)
def test_recomputed_as_it_ran(host, how, enabled):
    """Two forwards in different stages and one without gradients in a third; then the backward of both."""
    new, put_in, step = host
    plain = new().train()
    put_in(plain)
    expected = gradient(step, plain)
    assert (gradient(step, plain, (EARLY, EARLY)) - expected).norm() > 1e-3 * expected.norm()

    model = new().train()
    if enabled == "first":
        put_in(model)
    WAYS_TO_CHECKPOINT[how](model)
    if enabled == "last":
        put_in(model)

    def teacher():
        with torch.no_grad():
            step(model, LATE, latents())

    assert_same(gradient(step, model, between=teacher), expected)


@pytest.mark.parametrize("name", ["ltx", "hunyuan", "cogvideox", "mochi"])
def test_recomputed_as_it_ran_in_the_other_models(name):
    """Text counts belong to their forward too: HunyuanVideo's and Mochi's two forwards have different prompts."""
    model = tiny.MODELS[name]()
    transformer, calls = model.pipe.transformer, []
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    model.run(2)
    if name in ("hunyuan", "mochi"):
        model.kwargs |= tiny.masks(11, 3) if name == "hunyuan" else tiny.masks(9, 2, 3)
        model.run(2)
    hook.remove()
    calls = [calls[0], calls[-1]]
    enable(transformer, STAGES, shift=1.0)
    parameters = list(transformer.parameters())

    def gradients():
        loss = sum(transformer(*args, **kwargs)[0].square().sum() for args, kwargs in calls)
        return [x for x in torch.autograd.grad(loss, parameters, allow_unused=True) if x is not None]

    expected = gradients()
    transformer.train()
    transformer.enable_gradient_checkpointing()
    for ours, x in zip(gradients(), expected, strict=True):
        assert_same(ours, x)


def test_backward_inside_another_forward(host):
    """A recomputation neither takes the stage of the forward that it interrupts nor changes it."""
    new, put_in, step = host
    model = new().train()
    put_in(model)
    expected, alone = gradient(step, model, (EARLY,)), step(model, LATE, latents())
    wrap(model)
    hidden = latents().requires_grad_()
    loss = step(model, EARLY, hidden).square().sum()

    def interrupt(*_):
        hook.remove()
        loss.backward()

    hook = model.blocks[0].register_forward_pre_hook(interrupt)
    with torch.no_grad():
        interrupted = step(model, LATE, latents())
    assert_same(hidden.grad, expected)
    assert_same(interrupted, alone)


def test_forward_inside_another_forward(host):
    new, put_in, step = host
    model = new()
    put_in(model)
    with torch.no_grad():
        expected = [step(model, t, latents()) for t in (EARLY, LATE)]
        inner = []

        def nested(*_):
            hook.remove()
            inner.append(step(model, LATE, latents()))

        hook = model.blocks[1].register_forward_pre_hook(nested)
        outer = step(model, EARLY, latents())
    assert torch.equal(outer, expected[0]) and torch.equal(inner[0], expected[1])


def test_two_threads(host):
    """Both are in one transformer at the same time: each waits for the other before its second block."""
    new, put_in, step = host
    model = new()
    put_in(model)
    with torch.no_grad():
        expected = [step(model, t, latents()) for t in (EARLY, LATE)]
    barrier = threading.Barrier(2, timeout=60)
    model.blocks[1].register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1])
    outs = {}

    def run(timestep):
        with torch.no_grad():
            outs[timestep] = step(model, timestep, latents())

    threads = [threading.Thread(target=run, args=(t,)) for t in (EARLY, LATE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(outs[EARLY], expected[0]) and torch.equal(outs[LATE], expected[1])


@pytest.mark.parametrize("under_way", [False, True])
def test_a_checkpoint_that_is_not_known_is_an_error(host, under_way):
    """It never takes the stage of another forward, even if one of the same transformer is under way."""
    new, put_in, step = host
    model = new().train()
    put_in(model)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    loss = step(model, EARLY, latents().requires_grad_()).square().sum()
    with pytest.raises(RuntimeError, match=r"outside of its transformer's forward.*checkpoint_wrapper"):
        if under_way:
            model.blocks[0].register_forward_pre_hook(lambda *_: loss.backward())
            step(model, LATE, latents())
        else:
            loss.backward()


def test_a_forward_that_fails_leaves_nothing_behind(host):
    new, put_in, step = host
    model = new()
    put_in(model)
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model, EARLY, latents())
    hook.remove()
    with pytest.raises(RuntimeError, match="outside of its transformer's forward"):
        step(lambda *args, **kwargs: model.forward(*args, **kwargs), EARLY, latents())


def test_removed(host):
    """Checkpoint functions are the original ones again; copies made in between keep ours."""
    new, put_in, step = host
    model = new().train()
    stock = gradient(step, model)
    wrap(model)
    before = [block.checkpoint_fn for block in model.blocks]
    handle = put_in(model)
    ours = gradient(step, model)
    copied = copy.deepcopy(model)
    handle.remove()
    assert [block.checkpoint_fn for block in model.blocks] == before
    assert_same(gradient(step, model), stock)
    if step is diffusers_step:  # FastVideo's layers are those of the handle
        assert_same(gradient(step, copied), ours)


def test_sharded(host, tmp_path):
    """FSDP2 over the blocks and the whole, with checkpointing by wrappers."""
    from torch.distributed.fsdp import fully_shard

    new, put_in, step = host
    plain = new().train()
    put_in(plain)
    expected = gradient(step, plain)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, mesh = new().train(), init_device_mesh("cpu", (1,))
        put_in(model)
        wrap(model)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert_same(gradient(step, model), expected)
    finally:
        torch.distributed.destroy_process_group()


COMPILED = {
    "whole": lambda model, **kwargs: model.compile(**kwargs),
    "blocks": lambda model, **kwargs: model.compile_repeated_blocks(**kwargs),
}


@pytest.mark.parametrize("how", ["own", "wrapper"])
@pytest.mark.parametrize("what", COMPILED)
def test_compiled(what, how):
    """A graph recomputes by itself; a checkpoint around compiled blocks is bound to its forward."""
    plain = tiny.wan_transformer().train()
    enable(plain, STAGES, shift=1.0)
    expected = gradient(diffusers_step, plain)
    torch.compiler.reset()
    model = tiny.wan_transformer().train()
    enable(model, STAGES, shift=1.0)
    COMPILED[what](model, backend="aot_eager", fullgraph=True)
    WAYS_TO_CHECKPOINT[how](model)
    torch.testing.assert_close(gradient(diffusers_step, model), expected, rtol=1e-4, atol=1e-4)


def test_scope_of_a_thread():
    """A function bound in one thread runs in another; a copy of the scope is in no forward."""
    scope = Scope()
    scope.enter("outer")
    scope.enter("inner")
    bound = scope.bind(lambda: scope.current())
    seen = []

    def other():
        assert scope.forward is None
        seen.append(bound())
        assert scope.forward is None

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == ["inner"] and scope.current() == "inner"
    assert copy.deepcopy(scope).forward is None and pickle.loads(pickle.dumps(scope)).forward is None
    scope.leave()
    assert scope.current() == "outer" and bound() == "inner" and scope.current() == "outer"
    scope.leave()
    scope.leave()  # once too often is no error: a forward can fail before it is entered
    with pytest.raises(RuntimeError, match="outside of its transformer's forward"):
        scope.current()


# Handle.dense


def test_dense_forwards_are_the_hosts():
    """At any timestep, in this thread alone, nested or not; afterwards FPSAttention runs again."""
    model = tiny.wan_transformer()
    stock = diffusers_step(model, EARLY, latents())
    handle = enable(model, STAGES, shift=1.0)
    ours = diffusers_step(model, EARLY, latents())
    assert not torch.allclose(ours, stock, atol=1e-3)
    in_a_thread = []
    with handle.dense():
        with handle.dense():
            assert torch.equal(diffusers_step(model, EARLY, latents()), stock)
        assert torch.equal(diffusers_step(model, EARLY, latents()), stock)
        copied = copy.deepcopy(model)
        assert torch.equal(diffusers_step(copied, EARLY, latents()), ours)
        thread = threading.Thread(target=lambda: in_a_thread.append(diffusers_step(model, EARLY, latents())))
        thread.start()
        thread.join()
    assert torch.equal(in_a_thread[0], ours)
    assert torch.equal(diffusers_step(model, EARLY, latents()), ours)
    with pytest.raises(ZeroDivisionError), handle.dense():
        1 / 0  # noqa: B018
    assert torch.equal(diffusers_step(model, EARLY, latents()), ours)


def test_dense_steps_of_a_pipeline():
    """No timestep is looked up: a teacher may run at one that the scheduler does not have."""
    model = tiny.wan(vae=None)
    handle = enable(model.pipe, STAGES)
    with handle.dense():
        diffusers_step(model.pipe.transformer, 123.0, latents())
    with pytest.raises(RuntimeError, match="none of the .* timesteps"):
        diffusers_step(model.pipe.transformer, 123.0, latents())


@pytest.mark.parametrize("how", WAYS_TO_CHECKPOINT)
def test_dense_forwards_are_recomputed_dense(how):
    """Their backward may run outside of `dense`, and that of others inside of it."""
    model = tiny.wan_transformer().train()
    stock = gradient(diffusers_step, model, (EARLY,))
    handle = enable(model, STAGES, shift=1.0)
    ours = gradient(diffusers_step, model, (EARLY,))
    WAYS_TO_CHECKPOINT[how](model)

    def gradient_of(forward, backward):
        hidden = latents().requires_grad_()
        with forward:
            loss = diffusers_step(model, EARLY, hidden).square().sum()
        with backward:
            loss.backward()
        return hidden.grad

    assert (stock - ours).norm() > 1e-3 * stock.norm()
    assert_same(gradient_of(handle.dense(), nullcontext()), stock)
    assert_same(gradient_of(nullcontext(), handle.dense()), ours)


@pytest.mark.parametrize("what", COMPILED)
def test_dense_forwards_compiled(what):
    plain = tiny.wan_transformer().train()
    stock = gradient(diffusers_step, plain, (EARLY,))
    enable(plain, STAGES, shift=1.0)
    ours = gradient(diffusers_step, plain, (EARLY,))
    torch.compiler.reset()
    model = tiny.wan_transformer().train()
    handle = enable(model, STAGES, shift=1.0)
    COMPILED[what](model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(gradient(diffusers_step, model, (EARLY,)), ours, rtol=1e-4, atol=1e-4)
        with handle.dense():
            compiled = gradient(diffusers_step, model, (EARLY,))
        torch.testing.assert_close(compiled, stock, rtol=1e-4, atol=1e-4)
    assert (stock - ours).abs().max() > 1e-2
