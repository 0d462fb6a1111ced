"""FPSAttention in a transformer that diffusers does not have, by its description; and which attention it refuses."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brute
import fpsattention as fps
import imports

with imports.or_skip():
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    import tiny_diffusers as tiny
    from fpsattention.integrations.diffusers import Description, enable

GRID, TEXT, HEADS, CHANNELS = (2, 3, 4), 5, 2, 64
EXACT = fps.AttentionConfig(quant="none")
WINDOW = fps.AttentionConfig(tile=(1, 1, 2), window=(1, 3, 1), quant="none")
HOSTS = Path(__file__).parent.parent / "docs" / "hosts.md"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]


class Processor:
    """In diffusers' style, on torch's own function."""

    def __call__(self, attn: Attention, x: Tensor, *, bias: float = 0.25) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in attn.qkv(x))
        return F.scaled_dot_product_attention(q, k, v + bias).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, processor: object):
        super().__init__()
        self.num_heads = HEADS
        self.to_qkv = nn.Linear(HEADS * CHANNELS, 3 * HEADS * CHANNELS)
        self.processor = processor

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.to_qkv(x).unflatten(2, (3, HEADS, -1)).unbind(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


class Block(nn.Module):
    def __init__(self, processor: object):
        super().__init__()
        self.attn = Attention(processor)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Transformer(nn.Module):
    """Of latents [B, C, T, H, W] without patches, and text before them in the same sequence."""

    def __init__(self, processor: type = Processor):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(processor()) for _ in range(2))

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = torch.cat([encoder_hidden_states, hidden_states.flatten(2).transpose(1, 2)], dim=1)
        x = x + timestep[:, None, None] / 1000
        for block in self.blocks:
            x = block(x)
        return x[:, encoder_hidden_states.shape[1] :].transpose(1, 2).reshape(hidden_states.shape)


def run(transformer: nn.Module) -> Tensor:
    g = tiny.noise(1)
    latent = torch.randn(1, HEADS * CHANNELS, *GRID, generator=g)
    text = torch.randn(1, TEXT, HEADS * CHANNELS, generator=g)
    return transformer(latent, torch.tensor([500.0]), encoder_hidden_states=text)


def same(config: fps.AttentionConfig) -> fps.StepSchedule:
    return fps.StepSchedule(config, config, config)


DESCRIPTION = Description(
    layers=lambda transformer: [block.attn for block in transformer.blocks],
    grid=lambda config, inputs: tuple(inputs["hidden_states"].shape[2:]),
    before=lambda config, inputs: inputs["encoder_hidden_states"].shape[1],
)


def put_in(transformer: nn.Module, config: fps.AttentionConfig = EXACT):
    return enable(transformer, same(config), shift=1.0, description=DESCRIPTION)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_recipe_of_the_documentation(monkeypatch):
    """Ten lines, run as they stand there, against the model's own attention under a mask."""
    (recipe,) = re.findall(r"```python\n([^`]*Description\([^`]*)```", HOSTS.read_text())
    assert len(recipe.splitlines()) <= 10
    transformer, stock = Transformer(), run(Transformer())
    names = {"transformer": transformer, "schedule": same(WINDOW)}
    exec(recipe, names)
    ours = run(transformer)
    names["handle"].remove()
    assert torch.equal(run(transformer), stock)
    mask = F.pad(brute.token_mask(GRID, WINDOW.tile, WINDOW.window, WINDOW.border), (TEXT, 0) * 2, value=True)
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", functools.partial(sdpa, attn_mask=mask))
    expected = run(transformer)
    close(ours, expected)
    assert (expected - stock).abs().max() > 1e-3 * stock.abs().max()


def test_compiled():
    transformer = Transformer()
    put_in(transformer, WINDOW)
    expected = run(transformer)
    torch.compiler.reset()
    transformer.compile(backend="eager", fullgraph=True)
    close(run(transformer), expected)


def test_a_description_goes_before_that_of_the_class():
    """One layer of a class that FPSAttention knows."""
    transformer = tiny.wan_transformer()
    description = Description(
        layers=lambda transformer: [transformer.blocks[1].attn1], grid=lambda config, inputs: (3, 4, 6)
    )
    handle = enable(transformer, same(EXACT), shift=1.0, description=description)
    assert handle.report(grid=(3, 4, 6), num_steps=1).rows[0].layers == (0,)
    assert type(transformer.blocks[1].attn1.processor).__name__ == "GeneralWanAttnProcessor"


class Scaled:
    def __call__(self, attn, x):
        return dispatch_attention_fn(*attn.qkv(x), scale=0.5).flatten(2)


def test_scale():
    transformer = Transformer(Scaled)
    stock = run(transformer)
    put_in(transformer)
    close(run(transformer), stock)


class Numbered:
    """Has state and defaults of its own, and a local name that hides torch's module."""

    count = 0

    def __call__(self, attn, x, torch=torch.nn, factor=2.0):
        self.count += 1
        q, k, v = (y.transpose(1, 2) for y in attn.qkv(x))
        return torch.functional.silu(
            factor * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


def test_what_else_a_processor_does_stays():
    transformer = Transformer(Numbered)
    stock = run(transformer)
    processors = [block.attn.processor for block in transformer.blocks]
    put_in(transformer)
    close(run(transformer), stock)
    assert [x.count for x in processors] == [2, 2]


@pytest.mark.parametrize(
    "change, error",
    [
        (
            {"layers": lambda transformer: []},
            r"description: its layers\(transformer\) finds none in transformer",
        ),
        (
            {"layers": lambda transformer: transformer.blocks},
            "description: layer 0 of transformer, a Block, must have a processor, and heads or num_heads",
        ),
    ],
)
def test_descriptions_that_do_not_fit(change, error):
    with pytest.raises(ValueError, match=error):
        enable(Transformer(), same(EXACT), shift=1.0, description=replace(DESCRIPTION, **change))


@pytest.mark.parametrize(
    "change, error",
    [
        ({"grid": lambda config, inputs: (2, 12)}, r"grid: \(2, 12\) must"),
        ({"before": lambda config, inputs: -1}, "before: -1 must be"),
        ({"after": lambda config, inputs: 0.5}, "after: 0.5 must be"),
    ],
)
def test_descriptions_that_say_what_cannot_be(change, error):
    transformer = Transformer()
    enable(transformer, same(EXACT), shift=1.0, description=replace(DESCRIPTION, **change))
    with pytest.raises((TypeError, ValueError), match=error):
        run(transformer)


class Nameless(Transformer):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x


def test_a_forward_without_the_arguments_that_are_read():
    with pytest.raises(ValueError, match="the forward of transformer must have the argument hidden_states"):
        put_in(Nameless())


# Attention calls that are refused


class Causal:
    def __call__(self, attn, x):
        return dispatch_attention_fn(*attn.qkv(x), is_causal=True).flatten(2)


class Dropout:
    def __call__(self, attn, x):
        return dispatch_attention_fn(*attn.qkv(x), dropout_p=0.1).flatten(2)


class Masked:
    def __call__(self, attn, x):
        mask = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool)
        return dispatch_attention_fn(*attn.qkv(x), attn_mask=mask).flatten(2)


class Grouped:
    def __call__(self, attn, x):
        q, k, v = attn.qkv(x)
        return dispatch_attention_fn(q, k[:, :, :1], v[:, :, :1], enable_gqa=True).flatten(2)


class Narrow:
    def __call__(self, attn, x):
        q, k, v = (y.unflatten(3, (2, 32)).flatten(2, 3) for y in attn.qkv(x))
        return dispatch_attention_fn(q, k, v).flatten(2)


class Cross:
    def __call__(self, attn, x):
        q, k, v = attn.qkv(x)
        return dispatch_attention_fn(q, k[:, 1:], v[:, 1:]).flatten(2)


class Flat:
    def __call__(self, attn, x):
        return F.scaled_dot_product_attention(*(y.flatten(2) for y in attn.qkv(x)))


class Twice:
    def __call__(self, attn, x):
        q, k, v = attn.qkv(x)
        return dispatch_attention_fn(q, k, dispatch_attention_fn(q, k, v)).flatten(2)


class Never:
    def __call__(self, attn, x):
        q, k, v = attn.qkv(x)
        return v.flatten(2) if x is not None else dispatch_attention_fn(q, k, v)


class Option:
    def __call__(self, attn, x):
        return dispatch_attention_fn(*attn.qkv(x), attention_kwargs={"window_size": 3}).flatten(2)


@pytest.mark.parametrize(
    "processor, error",
    [
        (Causal, "called attention with is_causal=True, but FPSAttention is bidirectional"),
        (Dropout, "called attention with dropout_p=0.1, but FPSAttention has no dropout"),
        (Masked, "called attention with a mask, which FPSAttention takes only for padding"),
        (
            Grouped,
            r"called attention with q, k and v .* \[1, 29, 2, 64\], \[1, 29, 1, 64\].* without grouped heads",
        ),
        (Narrow, r"called attention with heads of 32 channels; .* take \(64, 128\)"),
        (Cross, r"called attention with q, k and v .* \[1, 29, 2, 64\], \[1, 28, 2, 64\]"),
        (Flat, r"called attention with queries \[1, 29, 128\], which are not \[B, H, L, D\]"),
        (Twice, "a layer called attention 2 times, but by its model's description it is 1"),
        (Never, "a layer called attention 0 times, but by its model's description it is 1"),
        (Option, r"called attention with attention_kwargs \['window_size'\]"),
    ],
)
def test_calls_that_are_refused(processor, error):
    transformer = Transformer(processor)
    put_in(transformer)
    with pytest.raises(RuntimeError, match=f"^{processor.__name__}: {error}"):
        run(transformer)


# Processors that cannot be rewritten


class Own:
    def __call__(self, attn, x):
        q, k, v = attn.qkv(x)
        return (q @ k.mT).softmax(-1) @ v


class Shadowed:
    def __call__(self, attn, x):
        dispatch_attention_fn = attn.qkv
        return dispatch_attention_fn(x)[2].flatten(2)


class Wrapped:
    @torch.no_grad()
    def __call__(self, attn, x):
        return dispatch_attention_fn(*attn.qkv(x))


class Child(Processor):
    def __call__(self, attn, x):
        F.scaled_dot_product_attention(*attn.qkv(x))
        return super().__call__(attn, x)


class Module(nn.Module):
    def __call__(self, attn, x):
        return dispatch_attention_fn(*attn.qkv(x))


class Lambda:
    __call__ = lambda self, attn, x: dispatch_attention_fn(*attn.qkv(x))  # noqa: E731


class Compiled:
    __call__ = len


exec("class Unseen:\n    def __call__(self, attn, x):\n        return dispatch_attention_fn(*attn.qkv(x))")


@pytest.mark.parametrize(
    "processor, error",
    [
        (
            Own,
            "its code calls neither dispatch_attention_fn of diffusers nor scaled_dot_product_attention of torch",
        ),
        (Shadowed, "its code calls neither dispatch_attention_fn of diffusers nor"),
        (Wrapped, "it is no plain Python function"),
        (Child, "its code uses __class__ of the code around it"),
        (Module, "it is a module"),
        (Lambda, "it is not defined by def"),
        (Compiled, "it is no plain Python function"),
        (globals()["Unseen"], "its source is not at hand"),
    ],
)
def test_processors_that_are_refused(processor, error):
    transformer = Transformer(processor)
    name = processor.__name__
    with pytest.raises(
        RuntimeError, match=f"layer 0 of transformer has a {name}, where .* cannot run: {error}"
    ):
        put_in(transformer)
    assert type(transformer.blocks[0].attn.processor) is processor
