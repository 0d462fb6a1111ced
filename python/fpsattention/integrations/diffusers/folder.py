"""A fine-tuned model in one folder: weights or adapter, and the schedule that it was trained with. `save`, `load`.

    fpsattention.json                               what is in the folder, and which versions wrote it
    schedule.json                                   `StepSchedule.save`
    transformer/pytorch_lora_weights.safetensors    an adapter, as diffusers writes it, or
    transformer/config.json, ...safetensors         a whole transformer, from its `save_pretrained`

Wan2.2 has transformer_2/ beside transformer/.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.utils import is_peft_available
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...core.checks import shown
from ...schedules.files import check_object, read_json, write_json
from ...schedules.schedule import StepSchedule
from ..hosts import host_class
from .handle import Handle, enable, transformers_of

FORMAT = "fpsattention-model-1"
MANIFEST, SCHEDULE = "fpsattention.json", "schedule.json"
ADAPTER = "fpsattention"  # the adapter's name in a transformer
PREFIX = "transformer"  # of an adapter's keys in its file, whatever the transformer's name is
KINDS = ("lora", "weights")


def save(
    folder: str | Path,
    transformer: nn.Module,
    schedule: StepSchedule,
    *,
    shift: float,
    dense_layers: Collection[int] = (),
    name: str = "transformer",
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a fine-tuned transformer and its schedule to a folder that `load` reads.

    Its adapter "fpsattention" is written if it has one (`transformer.add_adapter(config, "fpsattention")`), otherwise
    all its weights. A second transformer of the same pipeline may be added to the folder.

    Args:
        schedule, shift, dense_layers: as given to `enable` in training.
        name: of the transformer in its pipeline.
        weights: its whole state dict, where the transformer holds a part of it (FSDP); None: its own.

    Raises TypeError when schedule is no StepSchedule; ValueError when shift is not legal, when the transformer has
    adapters of other names only, or when the folder has another transformer with another schedule, shift or
    dense_layers.
    """
    if not isinstance(schedule, StepSchedule):
        raise TypeError(f"schedule: {shown(schedule)} must be a StepSchedule")
    schedule.for_sigma(1.0, shift=shift)  # raises if shift is not legal
    folder, layers = Path(folder), [index(layer) for layer in dense_layers]
    adapters = getattr(transformer, "peft_config", {})
    if adapters and ADAPTER not in adapters:
        raise ValueError(f"transformer: has the adapters {sorted(adapters)}, but none is named {ADAPTER!r}")
    data: dict[str, Any] = {"shift": shift, "dense_layers": layers, "transformers": {}}
    data["versions"] = {package: version(package) for package in ("diffusers", "fpsattention", "torch")}
    if (folder / MANIFEST).exists():
        before, its_schedule = _read(folder)
        others = {key: entry for key, entry in before["transformers"].items() if key != name}
        same = (its_schedule, before["shift"], before["dense_layers"]) == (schedule, shift, layers)
        if others and not same:
            raise ValueError(
                f"folder: {folder} holds {', '.join(others)} with another schedule, shift or dense_layers; a pipeline "
                f"has one for all its transformers; give the same, or another folder"
            )
        data["transformers"] = others
    entry = {"class": host_class(transformer).__name__, "kind": "lora" if adapters else "weights"}
    data["transformers"] |= {name: entry | {"config": _sizes(transformer)}}
    (folder / name).mkdir(parents=True, exist_ok=True)
    (_save_adapter if adapters else _save_weights)(folder / name, transformer, weights)
    schedule.save(folder / SCHEDULE)
    write_json(folder / MANIFEST, {"format": FORMAT, **data})


def load(
    model: diffusers.DiffusionPipeline | nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    backend: str = "auto",
) -> Handle:
    """Put what `save` wrote on a pipeline or a transformer: adapter or weights, and FPSAttention with its schedule.

    An adapter is added to those that are active, as "fpsattention"; weights take the place of the model's own. Call
    it before `compile()`.

    Args:
        model: a pipeline, or one of its transformers; of the model that was fine-tuned.
        name: which of the folder's transformers a transformer gets; None: the only one.
        backend: as in `fpsattention.attention`.

    Returns the `Handle` of `enable`. Its `remove()` leaves the weights; `transformer.delete_adapters("fpsattention")`
    takes an adapter out.
    Raises ValueError, with the path, when the folder is incomplete, holds something else, or does not fit the model;
    otherwise as `enable`. FPSAttention and adapters are off again then, as before.
    """
    folder = Path(folder)
    data, schedule = _read(folder)
    is_pipeline = isinstance(model, diffusers.DiffusionPipeline)
    if is_pipeline:
        if name is not None:
            raise ValueError(f"name: {shown(name)} is for a transformer; a pipeline gets all; leave it out")
        targets = transformers_of(model)
        if others := data["transformers"].keys() - targets:
            raise ValueError(f"folder: {folder} has {min(others)}, but the {type(model).__name__} has none")
    else:
        targets = {_only_name(data, name): getattr(model, "_orig_mod", model)}
    for target, transformer in targets.items():
        _check_fits(folder, data["transformers"], target, transformer)
    given: dict[str, Any] = {} if is_pipeline else {"shift": data["shift"]}
    handle = enable(model, schedule, dense_layers=data["dense_layers"], backend=backend, **given)
    added: list[Any] = []
    try:
        for target, transformer in targets.items():
            if data["transformers"][target]["kind"] == "lora":
                _load_adapter(folder / target, transformer)
                added.append(transformer)
            else:
                _load_weights(folder / target, transformer)
    except BaseException:
        handle.remove()
        for transformer in added:
            transformer.delete_adapters(ADAPTER)
        raise
    return handle


def _read(folder: Path) -> tuple[dict[str, Any], StepSchedule]:
    """What the folder's files say. Raises ValueError where one is missing or says something else."""
    for file in (MANIFEST, SCHEDULE):
        if not (folder / file).is_file():
            raise ValueError(
                f"folder: {folder} has no {file}; it must be a folder that fpsattention.integrations.diffusers.save "
                f"has written"
            )
    path = folder / MANIFEST
    data = read_json(path)
    try:
        check_object("", data, {"shift", "dense_layers", "transformers", "versions"}, FORMAT)
        check_object('"transformers": ', data["transformers"], set(data["transformers"]))
        for name, entry in data["transformers"].items():
            check_object(f'"transformers": {shown(name)}: ', entry, {"class", "kind", "config"})
            if entry["kind"] not in KINDS:
                raise ValueError(f'"kind": {shown(entry["kind"])} must be one of {", ".join(KINDS)}')
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return data, StepSchedule.load(folder / SCHEDULE)


def _only_name(data: dict[str, Any], name: str | None) -> str:
    names = list(data["transformers"])
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        raise ValueError(f"name: {shown(name)} must be one of the folder's transformers, {', '.join(names)}")
    return name


def _sizes(transformer: Any) -> dict[str, Any]:
    """The host's configuration of a transformer, as it comes back from JSON."""
    return json.loads(json.dumps({name: x for name, x in transformer.config.items() if name[0] != "_"}))


def _check_fits(folder: Path, entries: dict[str, dict[str, Any]], name: str, transformer: nn.Module) -> None:
    if name not in entries:
        raise ValueError(
            f"folder: {folder} has {', '.join(entries)}, but the pipeline has {name} too; fine-tune it with the same "
            f"schedule, into the same folder"
        )
    own, kind = host_class(transformer).__name__, entries[name]["kind"]
    if entries[name]["class"] != own:
        raise ValueError(f"folder: {folder} is of a {entries[name]['class']}, but {name} is a {own}")
    for key, value in _sizes(transformer).items():
        before = entries[name]["config"].get(key, value)  # another version of diffusers may have another key
        if before != value:
            raise ValueError(f"folder: {folder} is of a {own} with {key} {before}, but {name} has {value}")
    if kind == "lora" and not is_peft_available():
        raise ModuleNotFoundError(f"{folder} holds an adapter, but peft is not installed: pip install peft")
    if kind == "lora" and ADAPTER in getattr(transformer, "peft_config", {}):
        raise ValueError(
            f"model: {name} has an adapter {ADAPTER!r} already; call {name}.delete_adapters({ADAPTER!r}) first"
        )


def _save_adapter(folder: Path, transformer: Any, weights: dict[str, Tensor] | None) -> None:
    from peft import get_peft_model_state_dict  # an extra, needed for adapters alone

    # The class method is the same for the pipelines of all models.
    WanLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, weights, ADAPTER),
        transformer_lora_adapter_metadata=transformer.peft_config[ADAPTER].to_dict(),
    )


def _save_weights(folder: Path, transformer: Any, weights: dict[str, Tensor] | None) -> None:
    if weights is not None:
        with torch.device("meta"):
            host: Any = host_class(transformer)
            transformer = host.from_config(transformer.config)
        transformer.load_state_dict(weights, assign=True)
    transformer.save_pretrained(folder)


def _load_adapter(folder: Path, transformer: Any) -> None:
    from peft import get_peft_model_state_dict

    others = transformer.active_adapters() if getattr(transformer, "peft_config", {}) else []
    try:
        with safe_open(folder / LORA_WEIGHT_NAME_SAFE, framework="pt") as file:
            names = {name.removeprefix(f"{PREFIX}.") for name in file.keys()}  # noqa: SIM118 (not a mapping)
        transformer.load_lora_adapter(
            folder, prefix=PREFIX, adapter_name=ADAPTER, weight_name=LORA_WEIGHT_NAME_SAFE
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"folder: {folder} cannot be put on the {type(transformer).__name__}: {error}"
        ) from error
    # diffusers warns, no more, of weights that have no place in the model, and of places without weights.
    if odd := names ^ set(get_peft_model_state_dict(transformer, adapter_name=ADAPTER)):
        transformer.delete_adapters(ADAPTER)
        raise ValueError(
            f"folder: {folder} does not fit the {type(transformer).__name__}: {min(odd)} is in one of the two only"
        )
    transformer.set_adapter([*others, ADAPTER])  # loading has switched the others off


def _load_weights(folder: Path, transformer: Any) -> None:
    try:
        host: Any = host_class(transformer)
        loaded = host.from_pretrained(folder, dtype=transformer.dtype)
        transformer.load_state_dict(loaded.state_dict())
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"folder: {folder} cannot be put on the {type(transformer).__name__}: {error}"
        ) from error
