"""FPSAttention in other projects' pipelines. Each module needs its host, so it is imported when it is first used."""

from importlib import import_module

HOSTS = ("diffusers", "fastvideo", "lightx2v")

__all__ = list(HOSTS)


def __getattr__(name: str):
    if name in HOSTS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
