"""FPSAttention in the video transformers of diffusers, by their own processors and by those that fuse, on the CPU."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import brute
import fpsattention as fps
import imports

with imports.or_skip():
    import diffusers

    import tiny_diffusers
    import tiny_transformers as tiny
    from fpsattention.integrations.diffusers import descriptions, enable, fused, processor, transformer

EXACT = fps.AttentionConfig(quant="none")
WINDOW = fps.AttentionConfig(tile=(1, 2, 3), window=(3, 1, 1), quant="none")
NARROW = fps.AttentionConfig(tile=(1, 2, 2), window=(1, 1, 1), quant="none")
STAGES = fps.StepSchedule(NARROW, EXACT, WINDOW)
DESCRIPTIONS = descriptions.DESCRIPTIONS
HOSTS = Path(__file__).parent.parent / "docs" / "hosts.md"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's, of float32
]


FUSED_CASES = [
    name for name, make in tiny.CASES.items() if type(make().transformer).__name__ in transformer.FUSED
]


def repeated(inputs: dict, batch: int) -> dict:
    """The inputs of one sample for each of `batch` samples, which differ in their latents."""
    size = len(inputs["hidden_states"])
    out = {
        name: torch.cat([x] * batch) if isinstance(x, torch.Tensor) and len(x) == size else x
        for name, x in inputs.items()
    }
    out["hidden_states"] = out["hidden_states"] * torch.linspace(1, 2, batch * size).view(
        -1, *[1] * (out["hidden_states"].dim() - 1)
    )
    return out


def same(config: fps.AttentionConfig) -> fps.StepSchedule:
    return fps.StepSchedule(config, config, config)


@pytest.fixture(params=tiny.CASES)
def case(request) -> tiny.Case:
    return tiny.CASES[request.param]()


@pytest.fixture
def no_fused(monkeypatch) -> None:
    """As with a version of diffusers that was not compared: all models run their own processors."""
    monkeypatch.setattr(transformer, "FUSED", {})


@pytest.fixture(params=["fused", "general"])
def way(request) -> None:
    if request.param == "general":
        request.getfixturevalue("no_fused")


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


def test_all_descriptions_are_tested():
    tested = {type(make().transformer).__name__ for make in tiny.CASES.values()}
    assert tested == set(DESCRIPTIONS) and len(tested) >= 20


def test_all_video_transformers_of_diffusers_are_described_or_refused():
    hosts = {x for x in dir(diffusers) if x.endswith(("Transformer3DModel", "VideoTransformer3DModel"))}
    assert hosts <= set(DESCRIPTIONS) | set(descriptions.REFUSED)
    assert all(hasattr(diffusers, x) for x in (*DESCRIPTIONS, *descriptions.REFUSED))


def table(header: str, rows: list[tuple[str, ...]]) -> str:
    """Up to the empty line that ends it, so that the page has no row more."""
    lines = [header, "| --- " * (header.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", ""])


def test_the_tables_of_the_documentation():
    """Made from the code: put the text that this expects into docs/hosts.md."""
    described = [
        (f"`{name}`", "fused" if name in transformer.FUSED else "the host's", x.others, x.note)
        for name, x in sorted(DESCRIPTIONS.items())
    ]
    refused = [(f"`{name}`", reason) for name, reason in sorted(descriptions.REFUSED.items())]
    text = HOSTS.read_text()
    assert table("| transformer | processor | other tokens in the sequence | notes |", described) in text
    assert table("| not in | because |", refused) in text


@torch.no_grad()
def test_dense_and_unrounded_equals_the_host(case, way):
    stock = case.run()
    handle = enable(case.transformer, same(EXACT), shift=1.0)
    close(case.run(), stock)
    assert len(handle.report(num_steps=1).rows[0].layers) == case.layers
    handle.remove()
    assert torch.equal(case.run(), stock)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", FUSED_CASES)
def test_norms_and_rotation_are_fused_with_the_rounding(name, batch, monkeypatch):
    """Of every model that has a processor of ours. The result is the same as apart but for a few codes."""
    case = tiny.CASES[name]()
    for parameter, x in case.transformer.named_parameters():
        if ".norm_" in parameter and ".attn" in parameter:
            torch.nn.init.uniform_(x, 0.5, 2.0)
    if batch > 1:
        case = replace(case, inputs=repeated(case.inputs, batch))
    ran, quantize = [], processor.norm_rope_quantize

    def record(*args, **kwargs):
        ran.append(kwargs)
        return quantize(*args, **kwargs)

    monkeypatch.setattr(processor, "norm_rope_quantize", record)
    handle = enable(case.transformer, same(fps.AttentionConfig(tile=(1, 2, 3), window=(3, 3, 3))), shift=1.0)
    together = case.run()
    assert len(ran) == case.layers and all("rope" in x and "q_norm" in x for x in ran)
    monkeypatch.setattr(fused.Fused, "_fuses", lambda *_: False)
    apart = case.run()
    assert len(ran) == case.layers
    handle.remove()
    enable(case.transformer, same(replace(WINDOW, window=(3, 3, 3))), shift=1.0)
    assert (together - apart).norm() < 0.2 * (case.run() - apart).norm()


class OwnNorm(torch.nn.RMSNorm):
    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt() * (1 + self.weight)


@torch.no_grad()
@pytest.mark.parametrize(
    "norm",
    [
        OwnNorm(64, eps=1e-6),
        torch.nn.Identity(),
        torch.nn.RMSNorm(64),
        torch.nn.RMSNorm(64, eps=0.1, elementwise_affine=False),
    ],
    ids=lambda x: f"{type(x).__name__}, eps {getattr(x, 'eps', '')}",
)
def test_other_norms_run_as_they_are(norm):
    """Those that are put in a layer in place of the host's: none is taken for one that the kernels know."""
    case = tiny.CASES["hunyuan"]()
    layers = descriptions.description_of(case.transformer, "transformer").layers(case.transformer)
    layers[0].norm_q = norm
    layers[1].norm_q = layers[1].norm_k = None
    stock = case.run()
    enable(case.transformer, same(EXACT), shift=1.0)
    close(case.run(), stock)
    handles = fps.StepSchedule(*[fps.AttentionConfig(tile=(1, 2, 3))] * 3)
    other = tiny.CASES["hunyuan"]().transformer
    other.load_state_dict(case.transformer.state_dict(), strict=False)
    for ours, theirs in zip(
        descriptions.description_of(other, "transformer").layers(other), layers, strict=True
    ):
        ours.norm_q, ours.norm_k = theirs.norm_q, theirs.norm_k
    enable(other, handles, shift=1.0)
    rounded = replace(case, transformer=other).run()
    assert (rounded - stock).norm() < 0.2 * stock.norm()


@torch.no_grad()
def test_a_window_is_that_window_in_the_hosts_own_attention(case, way, monkeypatch):
    """The oracle is the host with a mask over its video tokens; others see all and are seen by all."""
    handle = enable(case.transformer, same(WINDOW), shift=1.0)
    ours = case.run()
    handle.remove()
    dense = case.run()
    video = brute.token_mask(tiny.GRID, WINDOW.tile, WINDOW.window, WINDOW.border)
    sdpa, masked_calls = F.scaled_dot_product_attention, []

    def masked(query, key, value, attn_mask=None, **kwargs):
        others = query.shape[2] - len(video)
        if query.shape == key.shape and case.before <= others <= case.before + case.after:
            window = F.pad(video, (case.before, others - case.before) * 2, value=True)
            attn_mask = window if attn_mask is None else attn_mask & window
            masked_calls.append(query.shape)
        return sdpa(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    expected = case.run()
    assert len(masked_calls) >= case.layers
    close(ours, expected)
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()


@torch.no_grad()
def test_the_noise_level_picks_the_stage(case):
    handle = enable(case.transformer, STAGES, shift=1.0)
    ours = [case.at(stage).run() for stage in range(3)]
    handle.remove()
    for stage, config in enumerate((NARROW, EXACT, WINDOW)):
        handle = enable(case.transformer, same(config), shift=1.0)
        assert torch.equal(ours[stage], case.at(stage).run())
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("name", ["framepack", "hunyuan", "hunyuan15", "mochi", "motif"])
def test_samples_in_different_stages(name, no_fused):
    """Each runs its own config, with its own padding."""
    case = tiny.CASES[name]()
    noisy, _, clean = case.timesteps
    timestep = torch.tensor([noisy, clean])
    outs = []
    for schedule in (STAGES, same(NARROW), same(WINDOW)):
        handle = enable(case.transformer, schedule, shift=1.0)
        outs.append(case.run(timestep=timestep))
        handle.remove()
    mixed, early, late = outs
    close(mixed, torch.stack([early[0], late[1]]))
    assert (early - late).abs().max() > 1e-3 * early.abs().max()


def gradient(case: tiny.Case) -> list[torch.Tensor]:
    case.transformer.zero_grad()
    case.run().square().sum().backward()
    return [x.grad.clone() for x in case.transformer.parameters() if x.grad is not None]


def test_gradient(case, no_fused):
    """Of all parameters, as the host's; and by checkpoints the same as without."""
    stock = gradient(case)
    noise = 1e-6 * max(
        x.abs().max().item() for x in stock
    )  # a key's bias has no gradient but rounding errors
    handle = enable(case.transformer, same(EXACT), shift=1.0)
    for ours, expected in zip(gradient(case), stock, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item() + noise)
    handle.remove()
    enable(case.transformer, same(NARROW), shift=1.0)
    plain = gradient(case)
    case.transformer.train()
    case.transformer.enable_gradient_checkpointing()
    for ours, expected in zip(gradient(case), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item() + noise)
    assert any((x - y).abs().max() > 1e-3 * y.abs().max() for x, y in zip(plain, stock, strict=True))


@pytest.mark.parametrize("name", ["wan", "easyanimate", "hunyuan", "framepack_alone"])
def test_one_graph_per_stage(name, no_fused):
    """Under gradient checkpointing, in a single graph."""
    case = tiny.CASES[name]()
    enable(case.transformer, STAGES, shift=1.0)
    case.transformer.train()
    case.transformer.enable_gradient_checkpointing()
    expected = [case.at(stage).run() for stage in range(3)]
    torch.compiler.reset()
    counter = CompileCounter()
    case.transformer.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        for stage in range(3):
            close(case.at(stage).run(), expected[stage])
        assert counter.frame_count == 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["cosmos", "motif", "skyreels"])
def test_two_graphs_whatever_the_sizes(name, no_fused):
    case = tiny.CASES[name]()
    batch, channels = case.inputs["hidden_states"].shape[:2]
    latents = [
        tiny.randn(batch, channels, *size) for size in ((3, 8, 12), (2, 8, 12), (2, 12, 8), (3, 8, 16))
    ]
    enable(case.transformer, same(NARROW), shift=1.0)
    expected = [case.run(hidden_states=latent) for latent in latents]
    torch.compiler.reset()
    counter = CompileCounter()
    case.transformer.compile(backend=counter, fullgraph=True)
    for latent, video in zip(latents, expected, strict=True):
        close(case.run(hidden_states=latent), video)
    assert counter.frame_count <= 2


@torch.no_grad()
@pytest.mark.parametrize("name, graphs", [("wan_vace", 2), ("kandinsky6", 2)])
def test_blocks_share_a_graph(name, graphs, no_fused):
    """One for each kind of block; Kandinsky's other kind is of text."""
    case = tiny.CASES[name]()
    enable(case.transformer, same(WINDOW), shift=1.0)
    expected = case.run()
    torch.compiler.reset()
    counter = CompileCounter()
    case.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    close(case.run(), expected)
    assert counter.frame_count == graphs


SIZE = {"height": 64, "width": 96, "num_frames": 9}


def vace() -> tiny_diffusers.Tiny:
    channels = {"in_channels": 16, "out_channels": 16, "vace_in_channels": 96}
    pipe = diffusers.WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_diffusers.wan_vae(),
        transformer=tiny.built("WanVACETransformer3DModel", vace_layers=[0], **tiny.WAN | channels),
        scheduler=tiny_diffusers.flow(),
    )
    return tiny_diffusers.Tiny(pipe, SIZE | tiny_diffusers.text(7), tiny.GRID)


def skyreels() -> tiny_diffusers.Tiny:
    pipe = diffusers.SkyReelsV2Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=tiny.skyreels().transformer,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    return tiny_diffusers.Tiny(pipe, SIZE | tiny_diffusers.text(7), tiny.GRID)


def kandinsky5() -> tiny_diffusers.Tiny:
    parts = dict.fromkeys(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae"))
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=tiny.kandinsky5().transformer, scheduler=tiny_diffusers.flow(), **parts
    )
    prompt = {
        f"{sign}{name}": x
        for seed, sign in enumerate(("", "negative_"))
        for name, x in (
            ("prompt_embeds_qwen", tiny_diffusers.embeds(7, seed)),
            ("prompt_embeds_clip", tiny_diffusers.embeds(1, seed, 12)[0]),
            ("prompt_cu_seqlens", torch.tensor([0, 7])),
        )
    }
    return tiny_diffusers.Tiny(pipe, SIZE | prompt, tiny.GRID)


@pytest.mark.parametrize("make", [vace, skyreels, kandinsky5])
def test_pipeline(make):
    """Every step is found, and dense ones are the host's own."""
    model = make()
    stock = model.run()
    handle = enable(model.pipe, same(EXACT))
    close(model.run(), stock)
    assert handle.report().rows[0].steps == tuple(range(tiny_diffusers.STEPS))
    handle.remove()
    handle = enable(model.pipe, same(WINDOW), dense_steps=tiny_diffusers.STEPS)
    assert torch.equal(model.run(), stock)
    handle.remove()
    enable(model.pipe, same(WINDOW))
    assert (model.run() - stock).abs().max() > 1e-3 * stock.abs().max()


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_windows_of_each_layer_and_head(name, monkeypatch):
    """A table runs the same by the host's processors as by ours, compiled too."""
    config = fps.AttentionConfig(tile=(1, 2, 3), quant="none")
    layers = [[(3, 1, 1), (1, 2, 2)], [(1, 1, 2), (3, 2, 1)]]
    model = tiny_diffusers.MODELS[name]()
    model.kwargs["output_type"] = "latent"
    table = fps.WindowTable(model.grid, config, [layers, layers[::-1]] * 2 + [layers])
    handle = enable(model.pipe, table)
    expected = model.run()
    handle.remove()
    monkeypatch.setattr(transformer, "FUSED", {})
    enable(model.pipe, table)
    close(model.run(), expected)
    torch.compiler.reset()
    counter = CompileCounter()
    model.pipe.transformer.compile(backend=counter, fullgraph=True)
    close(model.run(), expected)
    assert counter.frame_count == 1


@torch.no_grad()
def test_copies(no_fused):
    """A deep copy and a pickled one have forwards of their own."""
    case = tiny.wan()
    enable(case.transformer, STAGES, shift=1.0)
    expected = [case.at(stage).run() for stage in range(3)]
    for copied in (copy.deepcopy(case.transformer), pickle.loads(pickle.dumps(case.transformer))):
        other = replace(case, transformer=copied)
        assert [torch.equal(other.at(i).run(), expected[i]) for i in range(3)] == [True] * 3
        assert copied.blocks[0].attn1.processor.scope is not case.transformer.blocks[0].attn1.processor.scope


@torch.no_grad()
@pytest.mark.parametrize("backend", ["flex", "_native_math"])
def test_the_hosts_choice_of_kernels_is_for_dense_steps(no_fused, backend):
    """It is not asked in others: flex would compile a kernel."""
    case = tiny.wan()
    stock = case.run()
    enable(case.transformer, same(EXACT), shift=1.0)
    case.transformer.set_attention_backend(backend)
    close(case.run(), stock)
    assert case.transformer.blocks[0].attn1.processor.replaced._attention_backend == backend


@torch.no_grad()
def test_ltx2_leaves_attention_out_where_it_is_told_to():
    """Spatio-temporal guidance: the values of a layer are its result."""
    case = tiny.ltx23()
    guidance = {"spatio_temporal_guidance_blocks": [0]}
    stock, dense = case.run(**guidance), case.run()
    enable(case.transformer, same(EXACT), shift=1.0)
    close(case.run(**guidance), stock)
    assert (stock - dense).abs().max() > 1e-3 * dense.abs().max()


@pytest.mark.parametrize("name", descriptions.REFUSED)
def test_classes_that_do_not_fit(name):
    host = torch.nn.Module()
    host.__class__ = type(name, (torch.nn.Module,), {"__module__": "diffusers.models"})
    with pytest.raises(ValueError, match=f"transformer is a {name}, where FPSAttention cannot run: "):
        enable(host, STAGES, shift=1.0)


def test_a_class_of_the_same_name_elsewhere_is_not_taken_for_diffusers():
    host = type("WanTransformer3DModel", (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match="for another one give its description="):
        enable(host, STAGES, shift=1.0)


@torch.no_grad()
def test_causal_frames():
    case = tiny.skyreels(num_frame_per_block=3)
    enable(case.transformer, STAGES, shift=1.0)
    with pytest.raises(RuntimeError, match="SkyReelsV2AttnProcessor: called attention with a mask, which"):
        case.run()


def described(monkeypatch, case: tiny.Case, **changes) -> None:
    """Change the description of a case's class."""
    name = type(case.transformer).__name__
    monkeypatch.setitem(DESCRIPTIONS, name, replace(DESCRIPTIONS[name], **changes))


@torch.no_grad()
@pytest.mark.parametrize(
    "name, valid, error",
    [
        ("hunyuan", [5, 6], "a mask other than that of the padding"),
        ("hunyuan15", [13, 14], "a mask other than that of the padding"),
        ("framepack", [10, 10], "a mask other than that of the padding"),
        ("wan", [0], "no boolean mask, though"),
        ("hunyuan", None, "a mask, which FPSAttention takes only for padding"),
        ("mochi", [5, 4], r"3 tokens after the video's in sample 1, .* samples have \[5, 4\]"),
    ],
)
def test_a_mask_that_says_something_else(name, valid, error, monkeypatch, no_fused):
    case = tiny.CASES[name]()
    counts = None if valid is None else torch.tensor(valid, dtype=torch.int32)
    described(monkeypatch, case, valid=lambda config, inputs: counts)
    enable(case.transformer, STAGES, shift=1.0)
    with pytest.raises(RuntimeError, match=error):
        case.run()


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "easyanimate", "framepack", "helios"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_other_tokens_than_described(name, side, monkeypatch, no_fused):
    case = tiny.CASES[name]()
    known = getattr(DESCRIPTIONS[type(case.transformer).__name__], side)
    described(monkeypatch, case, **{side: lambda config, inputs: known(config, inputs) + 1})
    enable(case.transformer, STAGES, shift=1.0)
    with pytest.raises(RuntimeError, match=r"grid \(3, 4, 6\), but a layer got|a mask other than"):
        case.run()


def test_lengths_that_a_graph_does_not_know(no_fused):
    case = tiny.mochi()
    enable(case.transformer, STAGES, shift=1.0)
    torch.compiler.reset()
    case.transformer.compile(backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="lengths that torch.compile does not know"):
        case.run()
