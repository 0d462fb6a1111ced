"""The JSON files that schedules are saved in: written whole or not at all, and read strictly."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, fields
from pathlib import Path

from ..core.checks import shown
from ..core.config import AttentionConfig
from ..core.selectors import KINDS, Selector


def write_json(path: str | Path, data: dict) -> None:
    """Write `data` and replace the file in one step, so that neither a reader nor an interruption leaves half of it."""
    path = Path(path)
    writer = f"{os.getpid()}-{threading.get_ident()}"  # several may write at a time
    part = path.with_name(f"{path.name}.{writer}.part")
    try:
        part.write_text(json.dumps(data, allow_nan=False) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # exists only after a failure


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises ValueError, with the path, for other content and for a repeated key; OSError
    when the file cannot be read.
    """

    def once(pairs):
        read = {}
        for key, value in pairs:
            if key in read:
                raise ValueError(f"key {shown(key)}: is there twice")
            read[key] = value
        return read

    try:
        data = json.loads(Path(path).read_text(), object_pairs_hook=once)
    # ValueError also for the encoding, RecursionError for deep nesting.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not the JSON it should be: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a JSON object, holds {type(data).__name__}")
    return data


def check_object(where: str, data: dict, expected: set[str], file_format: str | None = None) -> None:
    """Check that `data` is an object with exactly the expected keys and, beside them, the "format" if one is given.

    Raises TypeError or ValueError, which begins with `where`.
    """
    if file_format is not None:
        expected = expected | {"format"}
    if not isinstance(data, dict):
        raise TypeError(f"{where}{shown(data)} must be an object")
    for what, keys in (("unknown", data.keys() - expected), ("missing", expected - data.keys())):
        if keys:
            raise ValueError(
                f"{where}{what} key {shown(min(keys))}; the keys are {', '.join(sorted(expected))}"
            )
    if file_format is not None and data["format"] != file_format:
        raise ValueError(f'{where}"format": {shown(data["format"])} must be {file_format!r}')


def config_to_json(config: AttentionConfig, without: str = "") -> dict:
    """The fields of a config, but for the one that the file keeps elsewhere, and `select` if it is None."""
    data = {name: value for name, value in asdict(config).items() if name != without}
    select = data.pop("select")
    return data if select is None else data | {"select": {"kind": type(config.select).__name__, **select}}


def config_from_json(name: str, data: dict, without: str = "") -> AttentionConfig:
    """The config that `config_to_json` made. Raises ValueError, which begins with the key `name`, for anything else."""
    try:
        expected = {field.name for field in fields(AttentionConfig)} - {without}
        if isinstance(data, dict):
            data = {"select": None} | data
        check_object("", data, expected)
        return AttentionConfig(**data | {"select": _selector_from_json(data["select"])})
    except (TypeError, ValueError) as error:
        raise ValueError(f'"{name}": {error}') from error


def _selector_from_json(data: dict | None) -> Selector | None:
    if data is None:
        return None
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f'"select": {shown(data)} must be an object whose "kind" is {" or ".join(KINDS)}')
    check_object('"select": ', data, {"kind", *(field.name for field in fields(KINDS[kind]))})
    return KINDS[kind](**{name: value for name, value in data.items() if name != "kind"})
