"""fpsattention.integrations.diffusers on the real classes of diffusers, with small random weights, on the CPU."""

from __future__ import annotations

import copy
import importlib
import pickle
import textwrap
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh

import brute
import fpsattention as fps
import imports
from programs import run_python

with imports.or_skip():
    import diffusers

    import tiny_diffusers as tiny
    from fpsattention.integrations.diffusers import descriptions, enable, fused, models, processor

EXACT = fps.AttentionConfig(quant="none")
NARROW = fps.AttentionConfig(tile=(1, 2, 2), window=(1, 1, 1), quant="none")
WIDE = fps.AttentionConfig(tile=(1, 2, 2), window=(1, 3, 3), quant="none")
FP8 = fps.AttentionConfig(tile=(2, 2, 2))
SAME = fps.StepSchedule(EXACT, EXACT, EXACT)
STAGES = fps.StepSchedule(NARROW, FP8, WIDE, alpha=(0.4, 0.8))  # of 5 steps: two, two, one

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's, of float32
]


@pytest.fixture(params=tiny.MODELS)
def model(request) -> tiny.Tiny:
    return tiny.MODELS[request.param]()


@pytest.fixture
def wan() -> tiny.Tiny:
    """A pipeline without a VAE, to save time."""
    x = tiny.wan(vae=None)
    x.kwargs["output_type"] = "latent"
    return x


def layers_of(transformer):
    return descriptions.description_of(transformer, "transformer").layers(transformer)


class Recorder:
    """Counts how often each (transformer, step, layer, config) ran. A config of None is the host's own attention."""

    def __init__(self, model: tiny.Tiny, monkeypatch):
        self.ran: Counter = Counter()
        self.grids = set()
        self.step = 0
        attention = processor.attention

        def record(*args, grid, config, **kwargs):
            self.grids.add(grid)
            self.layer_config = config
            return attention(*args, grid=grid, config=config, **kwargs)

        def before(*_):
            self.layer_config = None

        monkeypatch.setattr(processor, "attention", record)
        for name in model.names:
            transformer = getattr(model.pipe, name)
            for i, layer in enumerate(layers_of(transformer)):

                def after(*_, where=(name, i)):
                    name, i = where
                    self.ran[name, self.step, i, self.layer_config] += 1

                layer.register_forward_pre_hook(before)
                layer.register_forward_hook(after)

    def next_step(self, pipe, step, timestep, kwargs) -> dict:
        self.step = step + 1
        return {}


def inputs(batch: int = 1) -> dict:
    g = tiny.noise(5)
    return {
        "hidden_states": torch.randn(batch, 16, 3, 8, 12, generator=g),
        "encoder_hidden_states": torch.randn(batch, 8, tiny.TEXT_DIM, generator=g),
    }


def test_dense_and_unrounded_equals_the_host(model, monkeypatch):
    stock = model.run()
    recorder = Recorder(model, monkeypatch)
    handle = enable(model.pipe, SAME)
    ours = model.run()
    assert {config for *_, config in recorder.ran} == {EXACT} and recorder.grids == {model.grid}
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5 * stock.abs().max().item())
    handle.remove()
    assert torch.equal(model.run(), stock)


def test_a_window_is_that_window_in_the_hosts_own_attention(model, monkeypatch):
    """The oracle is the host with a mask over its video tokens; text sees all and is seen by all."""
    config = fps.AttentionConfig(tile=(1, 2, 3), window=(3, 1, 1), quant="none")
    handle = enable(model.pipe, fps.StepSchedule(config, config, config))
    ours = model.run()
    handle.remove()

    video = brute.token_mask(model.grid, config.tile, config.window, config.border)
    text_first = isinstance(model.pipe, diffusers.CogVideoXPipeline)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **kwargs):
        n_text = query.shape[2] - len(video)
        if query.shape == key.shape and query.shape[1] == 2 and n_text >= 0:  # the VAE has one head
            window = torch.nn.functional.pad(
                video, (n_text, 0) * 2 if text_first else (0, n_text) * 2, value=True
            )
            attn_mask = window if attn_mask is None else attn_mask & window
        return sdpa(query, key, value, attn_mask=attn_mask, **kwargs)

    dense = model.run()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
    expected = model.run()
    size = expected.abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * size)
    assert (expected - dense).abs().max() > 2e-3 * size


def test_each_step_and_layer_runs_what_the_report_says(model, monkeypatch):
    stock = model.run()
    recorder = Recorder(model, monkeypatch)
    handle = enable(model.pipe, STAGES, dense_layers=[-1], dense_steps=[1])
    ours = model.run(callback_on_step_end=recorder.next_step)

    configs = [NARROW, None, FP8, FP8, WIDE]
    expected = {
        (
            "transformer" if step < model.switch else "transformer_2",
            step,
            layer,
            config if layer == 0 else None,
        )
        for step, config in enumerate(configs)
        for layer in range(model.layers)
    }
    assert set(recorder.ran) == expected
    assert set(recorder.ran.values()) == {model.passes}

    reported = {
        (row.transformer, step, layer): row.configs and row.configs[i]
        for row in handle.report().rows
        for step in row.steps
        for i, layer in enumerate(row.layers)
    }
    assert set(reported) == {ran[:3] for ran in recorder.ran}
    for name, step, layer, config in recorder.ran:
        assert reported[name, step, layer] == (config and config.resolve(model.grid, 2))
    assert (ours - stock).abs().max() > 1e-3 * stock.abs().max()  # not the host's own attention everywhere


def test_report(wan):
    handle = enable(wan.pipe, STAGES, dense_layers=(0,), dense_steps=1)
    with pytest.raises(ValueError, match="grid: must be given"):
        handle.report()
    with pytest.raises(ValueError, match="num_steps: must be given"):
        handle.report(grid=(3, 4, 6))
    with pytest.raises(ValueError, match="num_steps: 0 must be an integer, at least 1"):
        handle.report(grid=(3, 4, 6), num_steps=0)
    report = handle.report(grid=(3, 4, 6), num_steps=10)
    assert str(report).splitlines() == [
        "transformer  steps  layers  attention                  tile       window     density  padding",
        "transformer  0      1       the host's own             -          dense      1.000    -",
        "transformer  1-3    1       FPSAttention, not rounded  (1, 2, 2)  (1, 1, 1)  0.056    3100.0%",
        "transformer  4-7    1       FPSAttention, FP8          (2, 2, 2)  dense      1.000    2033.3%",
        "transformer  8-9    1       FPSAttention, not rounded  (1, 2, 2)  (1, 2, 3)  0.333    3100.0%",
        "transformer  0-9    0       the host's own             -          dense      1.000    -",
        "mean density: 0.792",
    ]
    assert report.density == pytest.approx((10 + 1 + 3 / 18 + 4 + 2 / 3) / 20)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        tiny.flow(12.0),
    ],
    ids=["unipc", "heun", "euler"],
)
def test_step_of_any_scheduler(wan, monkeypatch, scheduler):
    """Heun's visits every noise level but the first twice: at the end of a step and at the start of the next."""
    wan.pipe.scheduler = scheduler
    recorder = Recorder(wan, monkeypatch)
    enable(wan.pipe, STAGES)
    wan.run(steps=10)
    counts = Counter()
    for (*_, config), n in recorder.ran.items():
        counts[config] += n
    visits = {NARROW: 7, FP8: 8, WIDE: 4} if scheduler.order == 2 else {NARROW: 4, FP8: 4, WIDE: 2}
    assert counts == {config: n * wan.passes * wan.layers for config, n in visits.items()}


def test_step_by_the_noisiest_token(monkeypatch):
    """Tokens of a given image have timestep 0 at every step."""
    model = tiny.wan_ti2v()
    recorder = Recorder(model, monkeypatch)
    enable(model.pipe, STAGES)
    model.pipe.scheduler.set_timesteps(5)
    timestep = model.pipe.scheduler.timesteps[2].repeat(1, 72)
    timestep[:, :24] = 0
    with torch.no_grad():
        model.pipe.transformer(**inputs(), timestep=timestep)
    assert {config for *_, config in recorder.ran} == {FP8}


def test_step_of_a_sampler_that_enters_late(wan, monkeypatch):
    """Video to video: 3 of 5 steps, from the third on."""
    pipe = diffusers.WanVideoToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny.wan_vae(),
        scheduler=tiny.flow(),
        transformer=wan.pipe.transformer,
    )
    video = tiny.Tiny(pipe, tiny.text(8) | {"height": 64, "width": 96, "strength": 0.6}, wan.grid)
    recorder = Recorder(video, monkeypatch)
    enable(pipe, STAGES)
    video.run(video=[torch.rand(9, 3, 64, 96, generator=tiny.noise())])
    assert {config for *_, config in recorder.ran} == {FP8, WIDE}


def test_timestep_rounded_to_that_of_its_neighbour(wan, monkeypatch):
    """In bfloat16 the first two of 50 steps with shift 12 are both 1000: the scheduler's own count decides."""
    recorder = Recorder(wan, monkeypatch)
    enable(wan.pipe, fps.StepSchedule(NARROW, WIDE, WIDE, alpha=(0.02, 1)))
    scheduler = wan.pipe.scheduler = tiny.flow(12.0)
    scheduler.set_timesteps(50)
    timestep, neighbour = scheduler.timesteps[:2].bfloat16()
    assert timestep == neighbour and scheduler.timesteps[0] != scheduler.timesteps[1]

    def forward():
        recorder.ran.clear()
        with torch.no_grad():
            wan.pipe.transformer(**inputs(), timestep=timestep[None])
        return {config for *_, config in recorder.ran}

    assert forward() == {NARROW}
    latent = inputs()["hidden_states"]
    scheduler.step(latent, scheduler.timesteps[0], latent)
    assert forward() == {WIDE}


def test_transformer_alone_goes_by_noise_level():
    """Samples of a batch are in different stages, out of order. Each gets what it gets alone; gradients too."""
    transformer = tiny.wan_transformer()
    enable(transformer, STAGES, shift=3.0)
    x = inputs(5)
    timesteps = torch.tensor([20.0, 990.0, 700.0, 650.0, 980.0])
    stages = [STAGES.stage_for_sigma(t.item() / 1000, shift=3.0) for t in timesteps]
    assert stages == ["late", "early", "mid", "mid", "early"]

    def loss_of(rows):
        transformer.zero_grad()
        out = transformer(**{k: v[rows] for k, v in x.items()}, timestep=timesteps[rows]).sample
        out.square().sum().backward()
        return out.detach(), transformer.blocks[0].attn1.to_q.weight.grad.clone()

    mixed, mixed_grad = loss_of(slice(None))
    alone, grads = zip(*(loss_of(slice(i, i + 1)) for i in range(5)), strict=True)
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed_grad, sum(grads), rtol=1e-3, atol=1e-4)
    swapped = loss_of([1, 0, 2, 3, 4])[0][[1, 0, 2, 3, 4]]
    torch.testing.assert_close(swapped, mixed, rtol=1e-4, atol=1e-5)


def test_noise_level_of_mochi_runs_backwards():
    sigma = descriptions.DESCRIPTIONS["MochiTransformer3DModel"].sigma
    assert sigma(None, torch.tensor([0.0, 250.0, 1000.0])).tolist() == [1.0, 0.75, 0.0]


def test_norm_and_rotation_are_fused_where_nobody_else_needs_them(monkeypatch):
    """FP8 layers of a Wan forward without gradients go through `norm_rope_quantize`; the result is the same but for a
    few codes. They do not go through it with a gradient (even of a norm's weight alone), under autocast, unrounded, or
    when a norm has hooks (which may have to fetch its weight first).
    """
    transformer = tiny.wan_transformer()
    for layer in layers_of(transformer):
        for norm in (layer.norm_q, layer.norm_k):
            torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    ran = []

    def record(*args, **kwargs):
        ran.append(kwargs["config"])
        return norm_rope_quantize(*args, **kwargs)

    norm_rope_quantize = processor.norm_rope_quantize
    monkeypatch.setattr(processor, "norm_rope_quantize", record)

    def forward():
        return transformer(**inputs(), timestep=torch.tensor([500.0])).sample

    handle = enable(transformer, fps.StepSchedule(FP8, FP8, FP8), shift=1.0)
    with torch.no_grad():
        fused = forward()
        assert ran == [FP8, FP8]
        with torch.autocast("cpu", torch.bfloat16):
            forward()
        hook = layers_of(transformer)[0].norm_q.register_forward_hook(lambda *_: None)
        forward()
        assert ran == [FP8, FP8, FP8], "the other layer"
        hook.remove()
        ran.pop()
        with monkeypatch.context() as patch:
            patch.setattr(models.Wan, "_fuses", lambda *_: False)
            apart = forward()
    forward()
    transformer.requires_grad_(False)
    norm = layers_of(transformer)[0].norm_q.weight.requires_grad_()
    forward().square().sum().backward()
    assert norm.grad.abs().sum() > 0
    handle.remove()
    enable(transformer, SAME, shift=1.0)
    with torch.no_grad():
        unrounded = forward()
    assert ran == [FP8, FP8]
    distance = (fused - apart).norm() / apart.norm()
    assert distance < 0.1 * (unrounded - apart).norm() / apart.norm()


def test_tiles_chosen_by_content(model, monkeypatch):
    """Chosen from normalised and rotated Q and K, so nothing is fused with the rounding. The oracle is the same layers
    with the lists given. The report counts the chosen tiles.
    """
    chosen = replace(FP8, select=fps.TopTiles(0.3, always=(1, 1, 1)))
    handle = enable(model.pipe, fps.StepSchedule(chosen, chosen, chosen))
    ours = model.run()
    resolved = chosen.resolve(model.grid, 1)
    report = handle.report(grid=model.grid, num_steps=5)
    assert report.density == pytest.approx(resolved.capacity / resolved.geometry.n_video_tiles)
    assert " top 0.3 " in str(report)
    handle.remove()
    attention, calls = processor.attention, []

    def with_lists(q, k, v, *, config, **kwargs):
        about = {
            name: kwargs[name] for name in ("grid", "scale", "prefix_len", "suffix_len") if name in kwargs
        }
        lists = fps.select_tiles(q, k, config=chosen, **about)
        calls.append(lists.indices.shape[3])
        return attention(q, k, v, config=config, key_tiles=lists, **kwargs)

    monkeypatch.setattr(processor, "attention", with_lists)
    monkeypatch.setattr(fused.Fused, "_fuses", lambda *_: False)
    enable(model.pipe, fps.StepSchedule(FP8, FP8, FP8))
    assert torch.equal(model.run(), ours)
    assert set(calls) == {resolved.capacity} and resolved.capacity < resolved.geometry.n_video_tiles


def test_autocast():
    """float32 weights and bfloat16 arithmetic, as in training. The difference is within bfloat16's rounding."""
    transformer = tiny.wan_transformer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = transformer(**inputs(), timestep=torch.tensor([500.0])).sample
        enable(transformer, SAME, shift=3.0)
        ours = transformer(**inputs(), timestep=torch.tensor([500.0])).sample
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2 * stock.std().item())
    ours.float().square().sum().backward()
    assert transformer.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


def test_gradient_checkpointing_gives_the_same_gradient():
    transformer = tiny.wan_transformer()
    enable(transformer, STAGES, shift=3.0)

    def gradient():
        transformer.zero_grad()
        transformer(**inputs(), timestep=torch.tensor([990.0])).sample.square().sum().backward()
        return transformer.blocks[0].attn1.to_q.weight.grad.clone()

    plain = gradient()
    transformer.train()
    transformer.enable_gradient_checkpointing()
    assert plain.abs().max() > 0
    assert torch.equal(gradient(), plain)


WAYS_TO_COMPILE = pytest.mark.parametrize(
    "how", ["module.compile", "torch.compile", "compile_repeated_blocks", "enable first"]
)


def compile_transformer(pipe, how: str, fullgraph: bool = True) -> CompileCounter:
    """Compile; returns the counter of graphs."""
    torch.compiler.reset()
    counter = CompileCounter()
    options = {"backend": counter, "fullgraph": fullgraph}
    if how == "torch.compile":
        pipe.transformer = torch.compile(pipe.transformer, **options)
    elif how == "compile_repeated_blocks":
        pipe.transformer.compile_repeated_blocks(**options)
    else:
        pipe.transformer.compile(**options)
    return counter


@WAYS_TO_COMPILE
def test_one_graph_per_stage_under_compile(wan, how):
    schedule = fps.StepSchedule(NARROW, EXACT, WIDE, alpha=(0.4, 0.8))
    eager = enable(wan.pipe, schedule, dense_steps=1)
    expected = wan.run(steps=10)
    if how != "enable first":
        eager.remove()

    counter = compile_transformer(wan.pipe, how)
    if how != "enable first":
        enable(wan.pipe, schedule, dense_steps=1)
    for _ in range(2):
        torch.testing.assert_close(wan.run(steps=10), expected, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 4  # early, mid, late, and the host's own in the dense step


@pytest.mark.parametrize("name", ["ltx", "hunyuan", "cogvideox", "mochi"])
def test_one_graph_per_stage_of_the_other_models(name):
    model = tiny.MODELS[name]()
    enable(model.pipe, fps.StepSchedule(NARROW, EXACT, WIDE, alpha=(0.4, 0.8)))
    expected = model.run()
    counter = compile_transformer(model.pipe, "module.compile")
    torch.testing.assert_close(model.run(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert counter.frame_count == 3


@pytest.mark.parametrize(
    "name, how",
    [
        ("wan", "module.compile"),
        ("wan", "compile_repeated_blocks"),
        ("hunyuan", "module.compile"),
        ("cogvideox", "module.compile"),
    ],
)
def test_two_graphs_per_stage_whatever_the_sizes(name, how):
    """Sizes that differ on one axis after another, three stages and dense steps take eight graphs, which torch keeps by
    default. One more would be an error with fullgraph, and run eagerly without.
    """
    sizes = [(9, 64, 96), (17, 64, 96), (17, 96, 64), (9, 64, 128)]
    model = tiny.MODELS[name]()
    model.kwargs["output_type"] = "latent"
    enable(model.pipe, fps.StepSchedule(NARROW, EXACT, WIDE, alpha=(0.4, 0.8)), dense_steps=1)

    def run(frames, height, width):
        return model.run(num_frames=frames, height=height, width=width)

    expected = [run(*size) for size in sizes]
    counter = compile_transformer(model.pipe, how)
    for size, video in zip(sizes, expected, strict=True):
        torch.testing.assert_close(run(*size), video, rtol=1e-4, atol=1e-5 * video.abs().max().item())
    assert counter.frame_count <= 8, "and 4 if torch remembers from before that these sizes change"


def test_two_graphs_of_a_choice_whatever_the_sizes(wan):
    """Lists of another length are no other graph either."""
    chosen = replace(EXACT, tile=(1, 2, 2), select=fps.TopTiles(0.3, always=(1, 1, 3)))
    sizes = [(9, 64, 96), (17, 64, 96), (17, 96, 64), (9, 64, 128)]
    enable(wan.pipe, fps.StepSchedule(chosen, chosen, chosen))

    def run(frames, height, width):
        return wan.run(num_frames=frames, height=height, width=width)

    expected = [run(*size) for size in sizes]
    counter = compile_transformer(wan.pipe, "module.compile")
    for size, video in zip(sizes, expected, strict=True):
        torch.testing.assert_close(run(*size), video, rtol=1e-4, atol=1e-5 * video.abs().max().item())
    assert counter.frame_count <= 2, "and 1 if torch remembers from before that these sizes change"


@pytest.mark.parametrize("how", ["module.compile", "torch.compile", "compile_repeated_blocks"])
def test_more_graphs_than_torch_keeps(wan, how):
    """There is one warning, besides torch's log."""
    compile_transformer(wan.pipe, how, fullgraph=False)
    enable(wan.pipe, fps.StepSchedule(NARROW, EXACT, WIDE, alpha=(0.4, 0.8)))
    message = r"needs graph 3 .* keeps 2; .* set torch\._dynamo\.config\.recompile_limit = 8"
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.warns(UserWarning, match=message) as caught,
    ):
        wan.run()
        wan.run()
    assert len([x for x in caught if "needs graph" in str(x.message)]) == 1


@pytest.mark.parametrize(
    "kwargs, error",
    [
        ({"schedule": EXACT}, "schedule: .* must be a StepSchedule"),
        ({"dense_layers": [2]}, r"dense_layers: 2 must be from -2 to 1.*nearest legal value 1"),
        ({"dense_layers": [-3]}, r"dense_layers: -3 .*nearest legal value -2"),
        ({"dense_layers": 1}, "dense_layers: 1 must be a collection"),
        ({"dense_layers": [0.5]}, r"dense_layers: \[0.5\] must be integers"),
        ({"dense_steps": -1}, "dense_steps: -1 must be at least 0"),
        ({"dense_steps": True}, "dense_steps: .* must be integers"),
        ({"shift": 3.0}, "shift: 3.0 is for a transformer"),
    ],
)
def test_bad_arguments(wan, kwargs, error):
    with pytest.raises((TypeError, ValueError), match=error):
        enable(wan.pipe, **{"schedule": STAGES} | kwargs)
    enable(wan.pipe, STAGES)  # nothing was changed


@pytest.mark.parametrize(
    "kwargs, error",
    [
        ({}, "shift: must be given"),
        ({"shift": 0}, "shift: 0 must be a positive"),
        ({"shift": 3.0, "dense_steps": 2}, "dense_steps: .* is for a pipeline"),
    ],
)
def test_bad_arguments_of_a_transformer_alone(kwargs, error):
    with pytest.raises(ValueError, match=error):
        enable(tiny.wan_transformer(), STAGES, **kwargs)


def test_unknown_model():
    with pytest.raises(
        ValueError,
        match="transformer is a Linear; it must be one of AnyFlow.*WanVACETransformer3DModel; for another",
    ):
        enable(torch.nn.Linear(1, 1), STAGES, shift=1.0)


def test_unknown_backend(wan):
    with pytest.raises(ValueError, match="backend: 'flash' must be one of"):
        enable(wan.pipe, STAGES, backend="flash")


def test_deep_copy_is_enabled_too(wan):
    """The copy has forwards of its own, even after one with gradients."""
    transformer = wan.pipe.transformer
    handle = enable(transformer, STAGES, shift=1.0)
    transformer(**inputs(), timestep=torch.tensor([990.0]))
    copied = copy.deepcopy(transformer)
    with torch.no_grad():
        ours, theirs = (x(**inputs(), timestep=torch.tensor([500.0])).sample for x in (copied, transformer))
        early = copied(**inputs(), timestep=torch.tensor([990.0])).sample
    assert torch.equal(ours, theirs)
    assert (early - ours).abs().max() > 1e-3
    handle.remove()
    assert isinstance(copied.blocks[0].attn1.processor, models.Wan)


def test_deep_copies_of_a_pipeline(wan, monkeypatch):
    enable(wan.pipe, STAGES)
    copied = replace(wan, pipe=copy.deepcopy(wan.pipe))
    assert torch.equal(copied.run(), wan.run())
    assert torch.equal(copied.run(3), wan.run(3)), "by its own scheduler"

    def refuse(*_):
        raise AssertionError("text encoders and all")

    monkeypatch.setattr(type(wan.pipe), "__deepcopy__", refuse, raising=False)
    with pytest.raises(pickle.PicklingError, match="would take the pipeline along; save its state_dict"):
        pickle.dumps(wan.pipe.transformer)
    expected = wan.run()
    wan.pipe.transformer = copy.deepcopy(wan.pipe.transformer)
    assert torch.equal(wan.run(), expected)


def test_sharded_first(wan, tmp_path):
    """FSDP2 gives the transformer a class of its own."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        transformer = wan.pipe.transformer
        call = inputs() | {"timestep": torch.tensor([500.0])}
        enable(transformer, STAGES, shift=1.0).remove()
        handle = enable(transformer, STAGES, shift=1.0)
        expected = transformer(**call).sample
        handle.remove()
        fully_shard(transformer, mesh=init_device_mesh("cpu", (1,)))
        enable(transformer, STAGES, shift=1.0)
        torch.testing.assert_close(transformer(**call).sample, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_report_of_two_transformers():
    """Each runs its side of the boundary, which is known after a run."""
    model = tiny.wan22()
    handle = enable(model.pipe, STAGES, dense_layers=[0])
    before = handle.report(grid=model.grid, num_steps=5)
    model.run()
    after = handle.report()

    def steps(report, name):
        return {i for row in report.rows if row.transformer == name for i in row.steps}

    assert all(steps(before, name) == set(range(5)) for name in model.names)
    assert steps(after, "transformer") == set(range(model.switch))
    assert steps(after, "transformer_2") == set(range(model.switch, 5))
    assert all(len(row.steps) in (3, 2, 1) for row in after.rows)


def test_enabled_twice(wan):
    handle = enable(wan.pipe, STAGES)
    with pytest.raises(
        RuntimeError, match="layer 0 of transformer has a Wan of FPSAttention already; .*remove"
    ):
        enable(wan.pipe, STAGES)
    handle.remove()
    handle.remove()
    enable(wan.pipe, STAGES)


def test_neither_of_two_transformers_is_changed_when_one_cannot_be():
    model = tiny.wan22()
    model.pipe.transformer_2.blocks[1].attn1.processor = lambda *_: None
    with pytest.raises(RuntimeError, match="layer 1 of transformer_2 has a function"):
        enable(model.pipe, STAGES)
    assert type(model.pipe.transformer.blocks[0].attn1.processor) is models.Wan.stock


def test_a_processor_replaced_by_the_host_is_no_silent_fallback():
    model = tiny.cogvideox()
    handle = enable(model.pipe, SAME)
    model.pipe.transformer.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="layer 0 has become a FusedCogVideoXAttnProcessor2_0"):
        model.run()
    handle.remove()
    model.run()


@pytest.mark.parametrize(
    "name, config, error",
    [
        (
            "wan",
            {"tensor_parallel_config": diffusers.TensorParallelConfig(tp_degree=2)},
            "transformer: tensor parallelism is switched on",
        ),
        (
            "wan",
            {"context_parallel_config": diffusers.ContextParallelConfig(ring_degree=2, ulysses_degree=2)},
            r"ring_degree=2, .* nearest legal: ContextParallelConfig\(ulysses_degree=4\)",
        ),
        (
            "hunyuan",
            {"context_parallel_config": diffusers.ContextParallelConfig(ulysses_degree=2)},
            "the text of a HunyuanVideoTransformer3DModel is unknown .* in LTXVideoTransformer3DModel, WanTransformer",
        ),
    ],
)
def test_parallelism_is_no_silent_fallback(name, config, error):
    model = tiny.MODELS[name]()
    enable(model.pipe, STAGES)
    model.pipe.transformer._parallel_config = diffusers.ParallelConfig(**config)
    with pytest.raises(RuntimeError, match=error):
        model.run()


@pytest.mark.parametrize(
    "dense_steps, error",
    [
        (99, "dense_steps: 99 must be at most 5, as the sampler has 5 steps; nearest legal value 5"),
        ([0, 5], "dense_steps: 5 must be at most 4, as the sampler has 5 steps; nearest legal value 4"),
    ],
)
def test_dense_steps_beyond_the_sampler(wan, dense_steps, error):
    enable(wan.pipe, STAGES, dense_steps=dense_steps)
    with pytest.raises(ValueError, match=error):
        wan.run()


def test_timestep_that_is_none_of_the_schedulers(wan):
    enable(wan.pipe, STAGES)
    wan.run()
    message = r"timestep: 500.0 is none of the 5 timesteps, 1000.0 to .* of the WanPipeline .*enable that one"
    with pytest.raises(RuntimeError, match=message):
        wan.pipe.transformer(**inputs(), timestep=torch.tensor([500.0]))


def test_another_pipeline_runs_the_transformer(wan):
    """The scheduler of a pipeline that has not run has a thousand timesteps; the message does not list them."""
    enable(wan.pipe, STAGES)
    wan.pipe.scheduler = tiny.flow(1.0)
    other = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=tiny.flow(7.3),
        transformer=wan.pipe.transformer,
    )
    with pytest.raises(RuntimeError, match="is none of the 1000 timesteps.*enable that one") as raised:
        replace(wan, pipe=other).run(7)
    assert len(str(raised.value)) <= 400


def test_modular_pipeline():
    blocks = diffusers.modular_pipelines.WanBlocks()
    with pytest.raises(ValueError, match="is a Wan.*ModularPipeline, .*enable its transformer instead"):
        enable(blocks.init_pipeline(), STAGES)


def test_call_that_skips_the_hooks(wan):
    """Also after a forward has left its step behind."""
    enable(wan.pipe, STAGES)
    wan.run()
    with torch.no_grad(), pytest.raises(RuntimeError, match="outside of its transformer's forward"):
        wan.pipe.transformer.forward(**inputs(), timestep=torch.tensor([1000.0]))


def test_tokens_that_are_no_grid(wan, monkeypatch):
    """As if the host cut its patches in another way."""
    known = descriptions.DESCRIPTIONS["WanTransformer3DModel"]
    other = replace(known, grid=lambda config, inputs: (3, 4, 5))
    monkeypatch.setitem(descriptions.DESCRIPTIONS, "WanTransformer3DModel", other)
    enable(wan.pipe, STAGES)
    with pytest.raises(RuntimeError, match=r"grid \(3, 4, 5\), but a layer got 72 tokens"):
        wan.run()


def test_ltx_without_its_grid():
    model = tiny.ltx()
    enable(model.pipe, STAGES)
    model.pipe.scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="num_frames, height, width"):
        model.pipe.transformer(
            torch.randn(1, 72, 8),
            torch.randn(1, 8, 32),
            model.pipe.scheduler.timesteps[:1],
            torch.ones(1, 8),
            video_coords=torch.zeros(1, 3, 72),
        )


def test_mochi_with_a_hole_in_its_text():
    model = tiny.mochi()
    enable(model.pipe, STAGES)
    model.kwargs["prompt_attention_mask"][0, 1] = False
    with pytest.raises(ValueError, match="encoder_attention_mask: has a real token after padding"):
        model.run()


def test_prompt_of_another_length():
    """Valid text tokens are those of this call, not of the previous one: HunyuanVideo's are 7 of 11, then 3."""
    model = tiny.hunyuan()
    stocks = []
    for valid in (7, 3):
        model.kwargs |= tiny.masks(11, valid)
        stocks.append(model.run())
    enable(model.pipe, SAME)
    for valid, stock in zip((7, 3), stocks, strict=True):
        model.kwargs |= tiny.masks(11, valid)
        torch.testing.assert_close(model.run(), stock, rtol=1e-4, atol=1e-5)
    assert (stocks[0] - stocks[1]).abs().max() > 1e-3


def test_several_videos_of_a_prompt():
    """HunyuanVideo's pipeline repeats the latents, not the text's mask."""
    model = tiny.hunyuan()
    stock = model.run(2, num_videos_per_prompt=2)
    enable(model.pipe, SAME)
    ours = model.run(2, num_videos_per_prompt=2)
    assert len(ours) == 2
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5 * stock.abs().max().item())


def test_masks_of_another_number_of_samples():
    model = tiny.hunyuan()
    transformer, calls = model.pipe.transformer, []
    hook = transformer.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    model.run(1)
    hook.remove()
    enable(transformer, SAME, shift=1.0)
    call = {
        name: torch.cat([x] * 3) if isinstance(x, torch.Tensor) and name != "guidance" else x
        for name, x in calls[0].items()
    }
    call["encoder_attention_mask"] = call["encoder_attention_mask"][:2]
    with pytest.raises(ValueError, match="encoder_attention_mask: has 2 samples, .* must have 3, or 1$"):
        transformer(**call)


def test_attention_backend_of_the_host_holds_for_dense_steps(wan):
    enable(wan.pipe, STAGES, dense_steps=1)
    wan.pipe.transformer.set_attention_backend("native")
    processor = wan.pipe.transformer.blocks[0].attn1.processor
    assert isinstance(processor, models.Wan) and processor.replaced._attention_backend == "native"
    wan.pipe.transformer.reset_attention_backend()
    assert processor.replaced._attention_backend is None


def test_version_of_the_host_that_is_too_old(monkeypatch):
    module = importlib.import_module("fpsattention.integrations.diffusers.compared")
    monkeypatch.setattr(diffusers, "__version__", "0.40.1")
    with pytest.raises(ImportError, match=r"diffusers 0.40.1: .*install a version from 0\.41 to below"):
        importlib.reload(module)
    monkeypatch.undo()
    importlib.reload(module)


def test_version_of_the_host_that_is_newer():
    """The models run their own processors; ours, which repeat those of other versions, are not even imported."""
    done = run_python(
        "-c",
        textwrap.dedent(
            """
            import sys, warnings
            import diffusers
            diffusers.__version__ = "0.99.0"
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                import fpsattention as fps
                enable = fps.integrations.diffusers.enable
            assert [str(x.message) for x in caught if "diffusers 0.99.0: FPSAttention has been comp" in str(x.message)]
            assert "fpsattention.integrations.diffusers.models" not in sys.modules
            config = fps.AttentionConfig()
            import tiny_diffusers as tiny
            transformer = tiny.wan_transformer()
            enable(transformer, fps.StepSchedule(config, config, config), shift=1.0)
            assert type(transformer.blocks[0].attn1.processor).__name__ == "GeneralWanAttnProcessor"
            try:
                fps.integrations.diffusers.use_fp8_linears(transformer)
            except ValueError as error:
                assert "one of those of diffusers below 0.43" in str(error)
            else:
                raise AssertionError
            """
        ),
    )
    assert done.returncode == 0, done.stderr
