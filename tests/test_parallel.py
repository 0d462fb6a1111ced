"""fpsattention.parallel on 2, 4 and 8 processes with gloo, compared with one process."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh

import fpsattention as fps
import many_gpus
import programs
from fpsattention import parallel
from processes import Processes

GRID = (4, 5, 6)
TILE = (1, 2, 2)
HEADS = 4
WINDOWS = ((1, 1, 3), (3, 3, 1), (1, 3, 3), (4, 1, 1))  # one for each head, all different
TEXT = {"prefix_len": 3, "suffix_len": 4}
HOST_WINDOWS = ((1, 1, 3), (3, 1, 1), (1, 1, 1), (3, 3, 3))
COUNTS = {"prefix_valid": [1, 3], "suffix_valid": [4, 0]}  # of two samples

CONFIGS = {
    "dense": fps.AttentionConfig(TILE),
    "planned": None,
    "window of each head": fps.AttentionConfig(TILE, WINDOWS),
    "smooth, coarse": fps.AttentionConfig(TILE, (1, 3, 3), smooth_k=True, quant_tile=(2, 2, 4)),
    "truncate": fps.AttentionConfig(TILE, (3, 3, 3), border="truncate", quant="none"),
    "top tiles": fps.AttentionConfig(TILE, select=fps.TopTiles(0.3, always=(1, 1, 3))),
    "top mass": fps.AttentionConfig(TILE, select=fps.TopMass(0.3)),
}
RING = {
    "dense": fps.AttentionConfig(TILE),
    "window of each head": fps.AttentionConfig(TILE, ((5, 1, 1), (4, 3, 1), (9, 3, 3), (4, 1, 3))),
    "smooth, coarse": fps.AttentionConfig(TILE, (4, 3, 3), smooth_k=True, quant_tile=(2, 2, 4)),
}

# Wan2.1-1.3B, 81 frames: 12 heads, 21 x 30 x 52 tokens, here 21 x 6 x 10. Tiles as for its real size, cut along h.
WAN_GRID, WAN_HEADS = (21, 6, 10), 12
WAN = fps.AttentionConfig((7, 3, 2), [(3, 2, 1), (1, 2, 3), (3, 2, 3)] * 4)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Returns the pool of 2, 4 or 8 processes; each is started when it is first used."""
    made: dict[int, Processes] = {}

    def get(size: int) -> Processes:
        if size not in made:
            made[size] = Processes(size, tmp_path_factory.mktemp("store"))
        return made[size]

    yield get
    for pool in made.values():
        pool.stop()


@pytest.fixture(params=[2, 4])
def processes(request, pools) -> Processes:
    return pools(request.param)


@pytest.fixture
def two(pools) -> Processes:
    return pools(2)


@pytest.fixture
def four(pools) -> Processes:
    return pools(4)


@pytest.fixture
def eight(pools) -> Processes:
    return pools(8)


def tensors(tokens: int, dtype=torch.float32, heads: int = HEADS) -> list[torch.Tensor]:
    """q, k, v, dout [B, L, H, D] and dlse [B, H, L], the same in every process."""
    g = torch.Generator().manual_seed(0)
    *qkvd, dlse = (torch.randn(2, tokens, heads, n, generator=g) for n in (16, 16, 16, 16, 1))
    return [*(x.to(dtype) for x in qkvd), dlse[..., 0].transpose(1, 2)]


def attended(attend, tensors, tensor_layout: str = "NHD", **options) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k, v under `attend`: all [B, L, ...], whatever the layout."""
    *qkvd, dlse = tensors
    q, k, v, dout = (x if tensor_layout == "NHD" else x.transpose(1, 2) for x in qkvd)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fpsattention runs its reference")
        out, lse = attend(q, k, v, return_lse=True, tensor_layout=tensor_layout, **options)
    assert type(out) is type(lse) is torch.Tensor
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    results = (out.detach(), *gradients)
    out, *gradients = (x if tensor_layout == "NHD" else x.transpose(1, 2) for x in results)
    return [out, lse.detach().transpose(1, 2), *gradients]


def share_of(x: torch.Tensor, group=None, dim: int = 1) -> torch.Tensor:
    return x.tensor_split(dist.get_world_size(group), dim)[dist.get_rank(group)]


def shares_of(tensors, group=None) -> list[torch.Tensor]:
    *nhd, dlse = tensors
    return [*(share_of(x, group) for x in nhd), share_of(dlse, group, 2)]


# Functions that the processes run. They return what the tests assert.


def random_lists(batch: int, heads: int) -> fps.KeyTiles:
    """Lists for the tiles of `CONFIGS`; an empty one is possible."""
    n = math.prod(-(-a // b) for a, b in zip(GRID, TILE, strict=True))
    return fps.KeyTiles.of_mask(
        torch.rand(batch, heads, n, n, generator=torch.Generator().manual_seed(1)) < 0.2
    )


def ulysses_against_one(
    config, layout, dtype, text, counts, groups=1, grid=GRID, heads=HEADS, key_tiles=None
) -> list[tuple[bool, float]]:
    """For out, lse and the gradients of q, k, v: (whether they equal, bit for bit, those of one process that attends
    the same heads at a time; the largest difference from one process with all heads, over the largest value). The
    number of matrices multiplied at once may change the last bit of each.
    """
    size = dist.get_world_size() // groups
    made = [dist.new_group(range(i * size, (i + 1) * size)) for i in range(groups)] if groups > 1 else [None]
    group = made[dist.get_rank() // size]
    everything = tensors(math.prod(grid) + sum(text.values()), dtype, heads)
    counts = {name: torch.tensor(x, dtype=torch.int32) for name, x in counts.items()}
    options = {"grid": grid, "config": config, "tensor_layout": layout, **text, **counts}
    options |= {"key_tiles": key_tiles}
    expected = attended(fps.attention, everything, **options)
    ours = attended(parallel.ulysses_attention, shares_of(everything, group), group=group, **options)

    by_heads = []
    for own in torch.arange(heads).tensor_split(size):
        *nhd, dlse = everything
        if config and config.window and not isinstance(config.window[0], int):
            options["config"] = replace(config, window=[config.window[h] for h in own])
        if key_tiles and key_tiles.indices.shape[1] > 1:
            lists = fps.KeyTiles.of_mask(key_tiles.mask()[:, own])
            assert torch.equal(key_tiles.of_heads(int(own[0]), len(own)).mask(), lists.mask())
            options["key_tiles"] = lists
        by_heads.append(attended(fps.attention, [*(x[:, :, own] for x in nhd), dlse[:, own]], **options))
    exactly = [torch.cat(parts, dim=2) for parts in zip(*by_heads, strict=True)]
    return [
        (
            torch.equal(x, share_of(y, group)),
            ((x - share_of(z, group)).nan_to_num().abs().max() / z[z.isfinite()].abs().max()).item(),
        )
        for x, y, z in zip(ours, exactly, expected, strict=True)
    ]


def ring_errors(config, layout, dtype, alone=False) -> list[tuple[float, float]]:
    """`errors` of the ring; with `alone` each process is a ring of its own."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())] if alone else None
    group = groups[dist.get_rank()] if alone else None
    everything = tensors(math.prod(GRID), dtype)
    options = {"grid": GRID, "config": config, "tensor_layout": layout}
    ours = attended(parallel.ring_attention, shares_of(everything, group), group=group, **options)
    return errors(ours, everything, lambda x: share_of(x, group), options)


def errors(ours, everything, own_tokens, options) -> list[tuple[float, float]]:
    """For out, lse and the gradients: relative RMS errors against exact attention, of `ours` and of one process.

    `own_tokens` takes [B, L, ...] and returns what this process has of it.
    """
    exact_config = replace(options["config"], quant="none", quant_tile=None, smooth_k=False)
    exact = attended(fps.attention, [x.double() for x in everything], **options | {"config": exact_config})
    one = attended(fps.attention, everything, **options)
    found = []
    for x, y, reference in zip(ours, one, exact, strict=True):
        reference = own_tokens(reference)
        found.append(tuple(((z - reference).norm() / reference.norm()).item() for z in (x, own_tokens(y))))
    return found


def usp_errors(
    config, sizes, axis, grid, heads, layout="NHD", dtype=torch.float32
) -> list[tuple[float, float]]:
    """`errors` of `usp_attention` on a mesh of (ring, ulysses) processes."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("ring", "ulysses"))
    places = mesh.get_local_rank("ring"), mesh.get_local_rank("ulysses")

    def own_tokens(x: torch.Tensor) -> torch.Tensor:
        slab = x.unflatten(1, grid).tensor_split(sizes[0], 1 + "thw".index(axis))[places[0]].flatten(1, 3)
        return slab.tensor_split(sizes[1], 1)[places[1]]

    everything = tensors(math.prod(grid), dtype, heads)
    *nhd, dlse = everything
    mine = [*map(own_tokens, nhd), own_tokens(dlse.transpose(1, 2)).transpose(1, 2)]
    options = {"grid": grid, "config": config, "tensor_layout": layout}
    ours = attended(parallel.usp_attention, mine, mesh=mesh, axis=axis, **options)
    return errors(ours, everything, own_tokens, options)


def message_of(name: str, shapes, options) -> str:
    """The error of a call with q, k, v of these shapes."""
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(parallel, name)(*(torch.zeros(2, *shape) for shape in shapes), **{"grid": GRID} | options)
    return str(raised.value)


def usp_message(sizes, shape, options) -> str:
    """The error of `usp_attention` with q, k, v of this shape, on a mesh of (ring, ulysses) processes."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("ring", "ulysses"))
    return message_of("usp_attention", [shape] * 3, {"mesh": mesh} | options)


def nameless_message() -> str:
    return message_of("usp_attention", [SHARE] * 3, {"mesh": init_device_mesh("cpu", (2, 2))})


def outsiders_message() -> str | None:
    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        return None
    with pytest.raises(ValueError) as raised:
        parallel.ulysses_attention(*tensors(60)[:3], grid=GRID, group=group)
    return str(raised.value)


@torch.library.custom_op("fpsattention_test::attention_of_heads", mutates_args=())
def opaque(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: list[int], tile: list[int], windows: list[int]
) -> torch.Tensor:
    """Attention as a single op, as on the sm90 backend: tracing the reference would break the graph."""
    assert type(q) is type(k) is type(v) is torch.Tensor  # the kernels take their pointers
    triples = [windows[i : i + 3] for i in range(0, len(windows), 3)]
    config = fps.AttentionConfig(tile, triples or None, quant="none")
    return fps.attention(q, k, v, grid=grid, config=config).contiguous()  # as the fake promises


opaque.register_fake(lambda q, *_: torch.empty(q.shape))
opaque.register_autograd(lambda ctx, d: (d, 2 * d, 3 * d, None, None, None))


def attend_opaquely(q, k, v, *, grid, config, **_):
    windows = [x for window in config.window for x in window]
    return torch.ops.fpsattention_test.attention_of_heads(q, k, v, list(grid), list(config.tile), windows)


def compiled_ulysses() -> tuple[int, bool, bool]:
    """(graphs, whether the output is that of eager mode, whether the gradients are)"""
    config = replace(CONFIGS["window of each head"], quant="none")
    q, k, v, dout, _ = shares_of(tensors(math.prod(GRID)))
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def call(q, k, v):
        return parallel.ulysses_attention(q, k, v, grid=GRID, config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "attention", attend_opaquely)
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, backend=counter, fullgraph=True)
        results = []
        for function in (call, compiled, compiled):
            out = function(q, k, v)
            results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    eager, _, again = results
    same = [torch.equal(x, y) for x, y in zip(eager, again, strict=True)]
    return counter.frame_count, same[0], all(same[1:])


def share_tokens(transformer, **options) -> None:
    """The host's context parallelism over all processes."""
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(**{"ulysses_degree": dist.get_world_size()} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "device_count", lambda: 1)  # the host divides by it
        transformer.enable_parallelism(config=config)


def gather_unequal(x: torch.Tensor, dim: int, group) -> torch.Tensor:
    """Replaces the host's, which gathers tensors of different sizes: NCCL can, gloo cannot."""
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, x, group)
    return torch.cat(parts, dim)


def pipeline_against_one(first: str, height: int) -> tuple[float, float, int]:
    """(largest difference, largest value, steps in which `ulysses_attention` ran)"""
    import tiny_diffusers as tiny
    from fpsattention.integrations.diffusers import enable, processor

    sparse = fps.AttentionConfig(TILE, HOST_WINDOWS, quant="none")
    schedule = fps.StepSchedule(sparse, fps.AttentionConfig(TILE), sparse)
    on = {"dense_layers": [-1], "dense_steps": [1]}
    one, model = (tiny.wan(transformer=tiny.wan_transformer(num_attention_heads=HEADS)) for _ in range(2))
    enable(one.pipe, schedule, **on)
    if first == "enable":
        enable(model.pipe, schedule, **on)
    share_tokens(model.pipe.transformer, ulysses_anything=height == 48)
    if first != "enable":
        enable(model.pipe, schedule, **on)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fpsattention runs its reference")
        ulysses = Mock(side_effect=parallel.ulysses_attention)
        patch.setattr(processor, "ulysses_attention", ulysses)
        patch.setattr("diffusers.hooks.context_parallel._all_gather_anything", gather_unequal)
        expected, ours = (x.run(output_type="latent", height=height) for x in (one, model))
    difference = (ours - expected).abs().max().item()
    return difference, expected.abs().max().item(), ulysses.call_count // model.passes


def ltx_against_one(in_pairs: bool, fused: bool = True) -> tuple[float, float]:
    """(largest difference, largest value) of a forward whose tokens all processes or each pair of them share. Without
    pipeline and backward: there the host's own parallel cross-attention fails, over the text's mask and length.
    """
    import tiny_diffusers as tiny
    from fpsattention.integrations.diffusers import enable, transformer

    g = tiny.noise(1)
    inputs = {
        "hidden_states": torch.randn(1, 72, 8, generator=g),
        "encoder_hidden_states": torch.randn(1, 8, tiny.TEXT_DIM, generator=g),
        "encoder_attention_mask": None,
        "timestep": torch.tensor([500.0]),
        "rope_interpolation_scale": (1.0, 1.0, 1.0),
    }
    config = fps.AttentionConfig(TILE, HOST_WINDOWS, quant="none")
    options = {}
    if in_pairs:
        names = "pair", "ring", "ulysses"
        options = {"ulysses_degree": 2, "mesh": init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)}
    outs = []
    for shared in (False, True):
        model = tiny.ltx(HEADS).pipe.transformer
        with pytest.MonkeyPatch.context() as patch:
            if not fused:  # the host's own processors, as in a newer version of it
                patch.setattr(transformer, "FUSED", {})
            enable(model, fps.StepSchedule(config, config, config), shift=3.0)
        if shared:
            share_tokens(model, **options)
        with torch.no_grad():
            outs.append(model(**inputs, num_frames=3, height=4, width=6, return_dict=False)[0])
    one, ours = outs
    return (ours - one).abs().max().item(), one.abs().max().item()


def wan_against_one(compiled: str | None) -> tuple[int, float, float]:
    """(graphs, largest difference of a gradient summed over the processes, its largest value)"""
    import tiny_diffusers as tiny
    from fpsattention.integrations.diffusers import enable

    g = tiny.noise(1)
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 8, 12, generator=g),
        "encoder_hidden_states": torch.randn(1, 8, tiny.TEXT_DIM, generator=g),
        "timestep": torch.full((1, 72), 500.0),
    }
    config = fps.AttentionConfig(TILE, HOST_WINDOWS, quant="none")
    counter = CompileCounterWithBackend("aot_eager")

    def gradient(shared: bool) -> torch.Tensor:
        model = tiny.wan_transformer(num_attention_heads=HEADS)
        enable(model, fps.StepSchedule(config, config, config), shift=3.0)
        if shared:
            share_tokens(model)
            if compiled:
                model(**inputs, return_dict=False)  # the host reads signatures first, which breaks the graph
                getattr(model, compiled)(backend=counter, fullgraph=True)
        model(**inputs, return_dict=False)[0].square().sum().backward()
        return model.blocks[0].attn1.to_q.weight.grad

    with pytest.MonkeyPatch.context() as patch:
        if compiled:
            torch.compiler.reset()
            patch.setattr(parallel, "attention", attend_opaquely)
        ours = gradient(shared=True)
        dist.all_reduce(ours)
    expected = gradient(shared=False)
    return counter.frame_count, (ours - expected).abs().max().item(), expected.abs().max().item()


def example_differences() -> list[float]:
    device = torch.device("cpu")
    rows = [*many_gpus.compare_attention(device, **many_gpus.ON_CPU)]
    rows += many_gpus.compare_training(device, **many_gpus.ON_CPU)
    return [difference for *_, difference in rows]


def check_ulysses(results, tolerance: float):
    for process in results:
        for exactly, error in process:
            assert exactly and error < tolerance


@pytest.mark.parametrize("name", CONFIGS)
def test_ulysses_is_one_process(processes, name):
    text = {} if name == "truncate" else TEXT
    check_ulysses(processes.run(ulysses_against_one, CONFIGS[name], "NHD", torch.float32, text, {}), 1e-6)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_ulysses_with_text_of_different_lengths(processes, layout):
    """127 tokens, of which the processes hold unequal shares, in bfloat16."""
    call = CONFIGS["window of each head"], layout, torch.bfloat16, TEXT, COUNTS
    check_ulysses(processes.run(ulysses_against_one, *call), 1e-2)


@pytest.mark.parametrize("batch, heads", [(2, 5), (1, 1), (2, 1)])
def test_ulysses_with_lists_of_tiles(processes, batch, heads):
    """Each process has the lists of its heads, of which it has 1 to 3, or those that all share."""
    call = CONFIGS["dense"], "HND", torch.float32, TEXT, COUNTS, 1, GRID, 5, random_lists(batch, heads)
    check_ulysses(processes.run(ulysses_against_one, *call), 1e-6)


def test_ulysses_in_two_groups(four):
    call = CONFIGS["window of each head"], "NHD", torch.float32, TEXT, {}, 2
    check_ulysses(four.run(ulysses_against_one, *call), 1e-6)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("heads", [5, 7])
def test_heads_that_the_processes_do_not_divide(processes, heads, layout):
    config = replace(CONFIGS["window of each head"], window=[WINDOWS[i % 4] for i in range(heads)])
    call = config, layout, torch.bfloat16, TEXT, COUNTS, 1, GRID, heads
    check_ulysses(processes.run(ulysses_against_one, *call), 1e-2)


def test_ulysses_for_wan_on_eight_processes(eight):
    """12 heads for 8 processes, 1,260 tokens; forward and gradient."""
    call = WAN, "NHD", torch.float32, {}, {}, 1, WAN_GRID, WAN_HEADS
    check_ulysses(eight.run(ulysses_against_one, *call), 1e-6)


def test_usp_for_wan_on_eight_processes(eight):
    """Two slabs of rows, since 21 frames are not two of equal size; four processes with three heads each."""
    config = replace(WAN, quant="none")
    for process in eight.run(usp_errors, config, (2, 4), "h", WAN_GRID, WAN_HEADS):
        assert max(ours for ours, _ in process) < 1e-6


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("axis", "thw")
def test_usp_unrounded_is_one_process(four, axis, sizes, layout):
    """5 heads, and slabs of 45 or 90 tokens: two or four processes divide neither."""
    at = "thw".index(axis)
    grid, window = [9, 5, 4], [3, 1, 1]
    for triple in (grid, window):  # the last one to the axis of the slabs
        triple.insert(at, triple.pop())
    window[at] = 4
    config = fps.AttentionConfig((1, 1, 1), window, quant="none")
    for process in four.run(usp_errors, config, sizes, axis, tuple(grid), 5, layout):
        assert max(ours for ours, _ in process) < 1e-6


def test_rounding_in_usp_is_no_worse_than_in_one_process(four):
    config = fps.AttentionConfig((1, 1, 3), (1, 4, 3), smooth_k=True)
    found = four.run(usp_errors, config, (2, 2), "h", (4, 4, 9), 5, "NHD", torch.bfloat16)
    ours, one = torch.tensor(found).square().mean(0).sqrt().unbind(-1)
    assert (ours < 1.05 * one).all()
    assert one.max() < 0.1


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("name", RING)
def test_ring_unrounded_is_one_process(processes, name, layout):
    config = replace(RING[name], quant="none", quant_tile=None, smooth_k=False)
    for errors in processes.run(ring_errors, config, layout, torch.float32):
        assert max(ours for ours, _ in errors) < 1e-6


def test_a_ring_of_one_process(two):
    """Any tile is legal where there is one slab."""
    config = fps.AttentionConfig((3, 2, 2), (2, 3, 3), quant="none")
    for errors in two.run(ring_errors, config, "NHD", torch.float32, True):
        assert max(ours for ours, _ in errors) < 1e-6


@pytest.mark.parametrize("name", RING)
def test_rounding_in_a_ring_is_no_worse_than_in_one_process(processes, name):
    """Codes may differ: K's mean and the scales of coarse tiles come from a slab. The errors are those of all processes
    together, because in the few tokens of one of them chance alone makes a tenth.
    """
    errors = torch.tensor(processes.run(ring_errors, RING[name], "NHD", torch.bfloat16))
    ours, one = errors.square().mean(0).sqrt().unbind(-1)
    assert (ours < 1.05 * one).all()
    assert errors[..., 1].max() < 0.1


SHARE = (30, 4, 16)  # of one of four processes
ODD = {"config": fps.AttentionConfig((2, 2, 2))}


@pytest.mark.parametrize(
    "shapes, options, error",
    [
        (
            [(30, 2, 16)] * 3,
            {},
            r"q: 2 heads for 4 processes, of which some would have none; nearest legal number of processes: 2 \(usp",
        ),
        ([(29, 4, 16)] * 3, {}, r"q: has 29 tokens .* NHD, must have 30 \(120 tokens, process . of 4\)"),
        (
            [(4, 30, 16)] * 3,
            {"tensor_layout": "HND", "prefix_len": 8},
            r"q: has 30 tokens in layout HND, must have 32 \(128 tokens, ",
        ),
        ([SHARE, SHARE, (30, 8, 16)], {}, r"v: shape \[2, 30, 8, 16\] must be that of q, \[2, 30, 4, 16\]"),
        ([SHARE[1:]] * 3, {}, r"q: must be a tensor with 4 dimensions, got shape \[2, 4, 16\]"),
        (
            [SHARE] * 3,
            {"config": fps.AttentionConfig(TILE, WINDOWS[:3])},
            r"window: 3 windows, one per head, for 4 heads; give one triple, or 4",
        ),
        ([SHARE] * 3, {"config": 0}, r"config: 0 must be an AttentionConfig or None, got int"),
        ([SHARE] * 3, {"suffix_len": -1}, r"suffix_len: -1 must be an integer, at least 0; nearest"),
        ([SHARE] * 3, {"tensor_layout": "LHD"}, r"tensor_layout: 'LHD' must be"),
        (
            [SHARE] * 3,
            {"config": CONFIGS["dense"], "key_tiles": random_lists(1, 3)},
            r"key_tiles: has lists of 3 heads, q has 4; nearest legal values 1 \(the same for all\) and 4",
        ),
    ],
)
def test_bad_arguments_of_ulysses(four, shapes, options, error):
    """Every process raises, before any waits for another."""
    for message in four.run(message_of, "ulysses_attention", shapes, options):
        assert re.match(error, message), message


@pytest.mark.parametrize(
    "shapes, options, error",
    [
        (
            [SHARE] * 3,
            {"config": CONFIGS["window of each head"]},
            r"window: \(1, 1, 3\) has 1 on axis t, which has 4 tiles; a ring needs the whole axis, 4 \(ulysses",
        ),
        (
            [SHARE] * 3,
            ODD,
            r"grid: 4 tokens on axis t are not 4 slabs, .* of 2; nearest legal: 2 processes or a tile of 1$",
        ),
        (
            [(45, 4, 16)] * 3,
            ODD | {"grid": (6, 5, 6)},
            r"grid: 6 tokens on axis t .* of 2; nearest legal: 3 processes$",
        ),
        (
            [(40, 4, 16)] * 3,
            {"grid": (5, 8, 4), "config": fps.AttentionConfig((5, 2, 3))},
            r'grid: 5 tokens on axis t .*; nearest legal: axis="h"$',
        ),
        (
            [(42, 4, 16)] * 3,
            {"grid": (7, 4, 6), "config": fps.AttentionConfig((7, 1, 1)), "axis": "w"},
            r'grid: 6 tokens on axis w are not 4 slabs, .*; nearest legal: 3 processes or axis="h"$',
        ),
        (
            [SHARE] * 3,
            {"config": fps.AttentionConfig(TILE, (4, 1, 3)), "axis": "h"},
            r"window: \(4, 1, 3\) has 1 on axis h, which has 3 tiles",
        ),
        ([SHARE] * 3, {"axis": "x"}, r"axis: 'x' must be one of t, h, w"),
        ([(29, 4, 16)] * 3, {}, r"q: has 29 tokens .*, must have 30 \(grid \(4, 5, 6\), process . of 4\)"),
        (
            [SHARE] * 3,
            {"key_tiles": random_lists(1, 1)},
            r"key_tiles: KeyTiles\(int32 \[1, 1, 36, 36\] on cpu\) must be None: a ring .*; use ulysses_attention",
        ),
        (
            [SHARE] * 3,
            {"config": CONFIGS["top mass"]},
            r"config: select=TopMass\(.*\) must be None: a ring .*; use ulysses_attention",
        ),
    ],
)
def test_bad_arguments_of_a_ring(four, shapes, options, error):
    for message in four.run(message_of, "ring_attention", shapes, options):
        assert re.match(error, message), message


HALF = {"config": fps.AttentionConfig(TILE, [(4, 1, 1), (1, 1, 1)])}  # the second head's is narrow on t


@pytest.mark.parametrize(
    "sizes, shape, options, error",
    [
        ((2, 2), (30, 1, 16), {}, r"q: 1 heads for 2 processes, .*: 1 \(usp_attention"),
        (
            (2, 2),
            (29, 2, 16),
            {},
            r"q: has 29 tokens .* must have 30 \(grid .*, process . of 2 of slab . of 2\)",
        ),
        ((2, 2), (30, 2, 16), HALF, r"window: \(1, 1, 1\) has 1 on axis t, which has 4 tiles"),
        ((2, 2), (30, 2, 16), {"axis": "h"}, r"grid: 5 tokens on axis h are not 2 slabs"),
        ((2, 2), (30, 2, 16), {"key_tiles": random_lists(1, 1)}, r"key_tiles: .* must be None: a ring"),
        ((2, 2), (30, 2, 16), {"config": CONFIGS["top tiles"]}, r"config: select=.* must be None: a ring"),
    ],
)
def test_bad_arguments_of_usp(four, sizes, shape, options, error):
    """Every process raises, also where only another one's heads have the bad window."""
    for message in four.run(usp_message, sizes, shape, options):
        assert re.match(error, message), message


def test_a_mesh_without_ring_or_ulysses(four):
    for message in four.run(nameless_message):
        assert re.match(r'mesh: has dimensions None, must have "ring" and "ulysses"', message)
    with pytest.raises(TypeError, match="mesh: None must be a torch.distributed DeviceMesh"):
        parallel.usp_attention(*tensors(60)[:3], grid=GRID, mesh=None)


def test_a_process_outside_of_the_group(four):
    messages = four.run(outsiders_message)
    assert messages[:2] == [None, None]
    assert [re.match(r"group: process (\d) is not in it", x)[1] for x in messages[2:]] == ["2", "3"]


def attention_of_parts(q, k, v, parts):
    """(outs, lses), HND: the same queries over each part of the keys. A part may be empty."""
    outs, lses = [], []
    for part in parts:
        scores = q @ k[:, :, part].mT
        lses.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v[:, :, part])
    return outs, lses


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_merged_states_are_attention_over_all_keys(layout):
    q, k, v = (x.transpose(1, 2).double() for x in tensors(24)[:3])
    parts = [slice(0, 7), slice(7, 8), slice(8, 8), slice(8, 24)]
    outs, lses = attention_of_parts(10 * q, k, v, parts)
    (expected,), (expected_lse,) = attention_of_parts(10 * q, k, v, [slice(None)])
    in_layout = outs if layout == "HND" else [x.transpose(1, 2) for x in outs]
    out, lse = parallel.merge_states(in_layout, lses, layout)
    torch.testing.assert_close(out if layout == "HND" else out.transpose(1, 2), expected)
    torch.testing.assert_close(lse, expected_lse)


def test_merged_states_of_queries_that_saw_nothing():
    outs = [torch.randn(1, 2, 1, 4, dtype=torch.bfloat16), torch.randn(1, 2, 1, 4, dtype=torch.bfloat16)]
    lses = [torch.tensor([[[1.0, -math.inf]]]), torch.tensor([[[-math.inf, -math.inf]]])]
    for x in (*outs, *lses):
        x.requires_grad_()
    out, lse = parallel.merge_states(outs, lses)
    assert out.dtype == torch.float32
    assert torch.equal(out[0, 0], outs[0][0, 0].float()) and out[0, 1].eq(0).all()
    assert lse.tolist() == [[[1.0, -math.inf]]]
    (out.sum() + lse[..., :1].sum()).backward()
    assert outs[0].grad[0, :, 0, 0].tolist() == [1, 0] and not outs[1].grad.any()
    assert lses[0].grad.tolist() == [[[1.0, 0.0]]] and not lses[1].grad.any()


def test_gradient_of_merged_states():
    g = torch.Generator().manual_seed(0)
    outs = [torch.randn(1, 3, 2, 2, generator=g, dtype=torch.double, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, generator=g, dtype=torch.double, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: parallel.merge_states(x[:3], x[3:]), (*outs, *lses))


OUT, LSE = torch.zeros(1, 5, 2, 4), torch.zeros(1, 2, 5)


@pytest.mark.parametrize(
    "outs, lses, error",
    [
        ([OUT], [], "lses: 0 for 1 outs; there must be one for each, and at least one"),
        (
            [OUT],
            [LSE[:, :1]],
            r"lses\[0\]: shape \[1, 1, 5\], heads first, on cpu, must be \[1, 2, 5\] on cpu",
        ),
        ([OUT, OUT[:, :4]], [LSE, LSE], r"outs\[1\]: shape \[1, 2, 4, 4\], .* must be \[1, 2, 5, 4\]"),
        ([OUT, OUT.to("meta")], [LSE, LSE], r"outs\[1\]: .* on meta, must be .* on cpu"),
        ([OUT[0]], [LSE], r"outs\[0\]: must have 4 dimensions"),
        ([OUT.int()], [LSE], r"outs\[0\]: must be a tensor of .*int32"),
        ([OUT], [0.0], r"lses\[0\]: must be a floating-point tensor, got float"),
    ],
)
def test_states_that_cannot_be_merged(outs, lses, error):
    with pytest.raises((TypeError, ValueError), match=error):
        parallel.merge_states(outs, lses)


def test_one_graph_under_compile(two):
    assert two.run(compiled_ulysses) == [(1, True, True)] * 2


@pytest.mark.parametrize("first, height", [("enable", 64), ("enable_parallelism", 64), ("enable", 48)])
def test_diffusers_pipeline(processes, first, height):
    """Windows for each head, FP8, and the host's own attention in one step and one layer. Height 48 makes 54 tokens,
    which 4 does not divide.
    """
    for error, size, steps in processes.run(pipeline_against_one, first, height):
        assert error < 1e-4 * size
        assert steps == 4  # of 5, in one layer


@pytest.mark.parametrize("fused", [True, False])
def test_ltx_in_diffusers(processes, fused):
    for error, size in processes.run(ltx_against_one, False, fused):
        assert error < 1e-4 * size


def test_mesh_of_the_host(four):
    """Two of four processes share the tokens; the other two do the same work."""
    for error, size in four.run(ltx_against_one, True):
        assert error < 1e-4 * size


def test_training_in_diffusers(processes):
    for _, error, size in processes.run(wan_against_one, None):
        assert error < 1e-4 * size


# The first block has a graph of its own: a hook of the host splits the tokens there.
@pytest.mark.parametrize("how, graphs", [("compile", 1), ("compile_repeated_blocks", 2)])
def test_graphs_of_a_transformer(two, how, graphs):
    if how == "compile" and Version(torch.__version__) < Version("2.12"):
        pytest.skip(
            "torch 2.11 cannot trace all_gather_tensor, which diffusers calls for the transformer's output"
        )
    for counted, *_ in two.run(wan_against_one, how):
        assert counted == graphs


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
def test_example(processes):
    """examples/many_gpus.py: attention, and training under FSDP2."""
    for ulysses, ring, mesh, training in processes.run(example_differences):
        assert ulysses < 1e-5
        assert 0 < ring < 0.1  # FP8 rounds otherwise
        assert 0 < mesh < 0.1
        assert training < 1e-2


def test_example_under_torchrun():
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", many_gpus.__file__]
    done = programs.run_python(*run, env=programs.environment(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    title, header, *rows = done.stdout.splitlines()
    assert title == "2 processes, gloo" and len(rows) == 4


def test_example_wants_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 4 examples/many_gpus.py"):
        many_gpus.main()
