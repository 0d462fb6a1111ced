"""A fine-tuned model in a folder: what `save` writes, `load` puts on, and neither takes anything else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fpsattention as fps
import imports

with imports.or_skip():
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    import tiny_diffusers as tiny
    from fpsattention.integrations.diffusers import enable, load, save

SCHEDULE = fps.StepSchedule(
    fps.AttentionConfig((1, 2, 2), (1, 1, 1)),
    fps.AttentionConfig((1, 2, 2), ((1, 3, 3), (1, 1, 3)), quant_tile=(1, 4, 2)),
    fps.AttentionConfig((1, 2, 2), quant="none"),
    alpha=(0.3, 0.7),
)
ENTRY = {"class": "LTXVideoTransformer3DModel", "kind": "lora", "config": {}}
LORA = "transformer/pytorch_lora_weights.safetensors"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]


def with_adapter(seed: int = 0, name: str = "fpsattention", **kwargs):
    transformer = tiny.wan_transformer(seed, **kwargs)
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_out.0"]), name)
    for key, parameter in transformer.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer


@torch.no_grad()
def output(transformer) -> torch.Tensor:
    hidden = torch.randn(1, 16, 3, 8, 12, generator=tiny.noise(5))
    text = tiny.embeds(8, 6)
    return transformer(hidden, torch.tensor([900.0]), text).sample


@pytest.fixture
def saved(tmp_path) -> Path:
    save(tmp_path / "model", with_adapter(), SCHEDULE, shift=3.0, dense_layers=(1,))
    return tmp_path / "model"


@pytest.mark.parametrize("make", [with_adapter, lambda: tiny.wan_transformer(7)], ids=["lora", "weights"])
def test_what_is_saved_is_loaded(tmp_path, make):
    trained = make()
    save(tmp_path, trained, SCHEDULE, shift=3.0, dense_layers=(-1,))
    enable(trained, SCHEDULE, shift=3.0, dense_layers=(-1,))
    expected = output(trained)

    transformer = tiny.wan_transformer()
    handle = load(transformer, tmp_path)
    assert torch.equal(output(transformer), expected)
    rows = handle.report(num_steps=10).rows
    assert [(row.layers, row.steps[-1] + 1) for row in rows if row.configs] == [
        ((0,), 3),
        ((0,), 7),
        ((0,), 10),
    ]
    assert [row.layers for row in rows if not row.configs] == [(1,)]

    model = tiny.wan(vae=None)
    model.kwargs["output_type"] = "latent"
    handle = load(model.pipe, tmp_path)
    model.run(10)
    handle.remove()
    with torch.no_grad():
        stock = make()
        assert torch.equal(output(model.pipe.transformer), output(stock))  # the weights stay


def test_the_folder_says_what_it_is(saved):
    data = json.loads((saved / "fpsattention.json").read_text())
    entry = data["transformers"]["transformer"]
    assert (entry["class"], entry["kind"]) == ("WanTransformer3DModel", "lora")
    assert entry["config"]["num_layers"] == 2 and entry["config"]["patch_size"] == [1, 2, 2]
    assert data["versions"]["fpsattention"] == metadata.version("fpsattention")
    assert set(data["versions"]) == {"diffusers", "fpsattention", "torch"}
    assert fps.StepSchedule.load(saved / "schedule.json") == SCHEDULE


def test_both_transformers_of_wan22(tmp_path):
    save(tmp_path, with_adapter(0), SCHEDULE, shift=3.0)
    model = tiny.wan22()
    with pytest.raises(ValueError, match="the pipeline has transformer_2 too"):
        load(model.pipe, tmp_path)
    with pytest.raises(ValueError, match="folder: .* holds transformer with another schedule"):
        save(tmp_path, with_adapter(1), SCHEDULE, shift=5.0, name="transformer_2")
    save(tmp_path, with_adapter(1), SCHEDULE, shift=3.0, name="transformer_2")
    load(model.pipe, tmp_path)
    model.run()
    for seed, name in enumerate(("transformer", "transformer_2")):
        alone = tiny.wan_transformer(seed)
        load(alone, tmp_path, name=name)
        trained = with_adapter(seed)
        enable(trained, SCHEDULE, shift=3.0)
        assert torch.equal(output(alone), output(trained))
    with pytest.raises(ValueError, match="name: None must be one of .* transformer, transformer_2"):
        load(tiny.wan_transformer(), tmp_path)
    with pytest.raises(ValueError, match="folder: .* has transformer_2, but the WanPipeline has none"):
        load(tiny.wan(vae=None).pipe, tmp_path)
    (tmp_path / "transformer_2" / Path(LORA).name).write_bytes(b"no")
    model = tiny.wan22()
    with pytest.raises(ValueError, match="transformer_2 cannot be put on"):
        load(model.pipe, tmp_path)
    assert not getattr(model.pipe.transformer, "peft_config", {})
    enable(model.pipe, SCHEDULE)
    # The only one may be replaced under another schedule.
    save(tmp_path / "one", with_adapter(0), SCHEDULE, shift=3.0)
    save(tmp_path / "one", with_adapter(0), replace(SCHEDULE, alpha=(0, 1)), shift=5.0)
    assert fps.StepSchedule.load(tmp_path / "one" / "schedule.json").alpha == (0, 1)


def change_manifest(**changes):
    def change(folder: Path) -> None:
        path = folder / "fpsattention.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(function):
    def change(folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / LORA, "pt") as file:
            metadata = file.metadata()
        save_file(function(load_file(folder / LORA)), folder / LORA, metadata)

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "fpsattention.json").unlink(), "has no fpsattention.json; it must be a folder"),
        (lambda folder: (folder / "schedule.json").unlink(), "has no schedule.json"),
        (lambda folder: (folder / "fpsattention.json").write_text("{"), "is not the JSON it should be"),
        (change_manifest(format="other"), "\"format\": 'other' must be 'fpsattention-model-1'"),
        (change_manifest(extra=1), "unknown key 'extra'"),
        (change_manifest(transformers={"transformer": {"kind": "lora"}}), "missing key 'class'"),
        (change_manifest(transformers=[1]), "\"transformers\": [1] must be an object"),
        (change_manifest(transformers={"transformer": ENTRY | {"kind": "x"}}), "'x' must be one of lora, weights"),
        (
            change_manifest(transformers={"transformer": ENTRY}),
            "is of a LTXVideoTransformer3DModel, but transformer is a WanTransformer3DModel",
        ),
        (change_manifest(shift=-1), "shift: -1 must be a positive"),
        (change_manifest(dense_layers=[5]), "dense_layers: 5 must be from -2 to 1"),
        (lambda folder: (folder / LORA).unlink(), "cannot be put on the WanTransformer3DModel"),
        (lambda folder: (folder / LORA).write_bytes(b"no"), "cannot be put on the WanTransformer3DModel"),
        (
            change_tensors(lambda x: {name.replace("blocks.1", "blocks.7"): t for name, t in x.items()}),
            "does not fit the WanTransformer3DModel: blocks.7.attn",
        ),
        (
            change_tensors(lambda x: {name: t[:, :3].contiguous() for name, t in x.items()}),
            "cannot be put on the WanTransformer3DModel",
        ),
    ],
)  # fmt: skip
def test_another_folder_is_refused_and_changes_nothing(saved, spoil, words):
    spoil(saved)
    transformer = tiny.wan_transformer()
    before = output(transformer)
    with pytest.raises(ValueError, match=re.escape(words)):
        load(transformer, saved)
    assert torch.equal(output(transformer), before)
    enable(transformer, SCHEDULE, shift=3.0)  # FPSAttention is off


@pytest.mark.parametrize("make", [with_adapter, tiny.wan_transformer], ids=["lora", "weights"])
def test_another_model_is_refused(tmp_path, make):
    save(tmp_path, make(num_layers=3), SCHEDULE, shift=3.0)
    transformer = tiny.wan_transformer()
    with pytest.raises(
        ValueError, match="is of a WanTransformer3DModel with num_layers 3, but transformer has 2"
    ):
        load(transformer, tmp_path)
    assert not getattr(transformer, "peft_config", {})


def test_other_adapters_stay_active(saved):
    """As if the loaded adapter were part of the model's own weights."""
    fused = with_adapter()
    fused.fuse_lora()
    fused.unload_lora()
    transformer = tiny.wan_transformer()
    for x in (fused, transformer):
        torch.manual_seed(3)
        x.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_out.0"], init_lora_weights=False), "style")
        x.set_adapters("style", 0.5)
    handle = load(transformer, saved)
    assert transformer.active_adapters() == ["style", "fpsattention"]
    with handle.dense():
        torch.testing.assert_close(output(transformer), output(fused))
    fused.disable_adapters()
    with handle.dense():
        assert not torch.allclose(output(transformer), output(fused), atol=1e-3)


def test_an_adapter_is_loaded_once(saved):
    transformer = tiny.wan_transformer()
    handle = load(transformer, saved)
    handle.remove()
    with pytest.raises(ValueError, match="has an adapter 'fpsattention' already"):
        load(transformer, saved)
    transformer.delete_adapters("fpsattention")
    load(transformer, saved)


def test_what_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="schedule: .* must be a StepSchedule"):
        save(tmp_path, with_adapter(), fps.AttentionConfig(), shift=3.0)
    with pytest.raises(ValueError, match="shift: 0 must be a positive"):
        save(tmp_path, with_adapter(), SCHEDULE, shift=0)
    with pytest.raises(ValueError, match="has the adapters .*'mine'.*, but none is named 'fpsattention'"):
        save(tmp_path, with_adapter(name="mine"), SCHEDULE, shift=3.0)
    assert not any(tmp_path.iterdir())


def test_a_name_is_for_a_transformer(saved):
    with pytest.raises(ValueError, match="name: 'transformer' is for a transformer"):
        load(tiny.wan(vae=None).pipe, saved, name="transformer")


def test_another_grid_or_number_of_steps_is_refused(tmp_path):
    """In the forward, which tells them; the schedule can be told to fit any."""
    save(tmp_path, with_adapter(), replace(SCHEDULE, grid=(3, 8, 6), num_steps=10), shift=3.0)
    transformer = tiny.wan_transformer()
    handle = load(transformer, tmp_path)
    with pytest.raises(ValueError, match=r"schedule: is for the grid \(3, 8, 6\), but .* has \(3, 4, 6\)"):
        output(transformer)
    with pytest.raises(ValueError, match=r"is for the grid"):
        handle.report(grid=(3, 4, 6), num_steps=10)
    model = tiny.wan(vae=None)
    model.kwargs |= {"output_type": "latent", "height": 128}
    load(model.pipe, tmp_path)
    with pytest.raises(ValueError, match="num_steps: 5 is not the schedule's, 10"):
        model.run()
    model.run(10)
