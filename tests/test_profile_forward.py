"""The program that a profiler watches, without a profiler and without a GPU."""

import contextlib

import pytest
import torch

import profile_forward
import shapes


def test_profile_forward_takes_one_case():
    shape, window = profile_forward.one_case(shapes.WAN_480P_WINDOW)
    assert (shape.name, window) == ("wan1.3b-480p", (1, 5, 3))
    assert profile_forward.one_case("36x48x48/3,3,1")[1] == (3, 3, 1)  # of the sweep
    for name in ("wan1.3b-480p", "18x48x80", "length"):
        with pytest.raises(ValueError, match="more than one case"):
            profile_forward.one_case(name)


def test_profile_forward_calls_in_ranges(monkeypatch):
    log = []

    @contextlib.contextmanager
    def ranged(name):
        log.append(name)
        yield
        log.append("end")

    monkeypatch.setattr(torch.cuda.nvtx, "range", ranged)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    profile_forward.run("a/dense", lambda: log.append("called"), 2)
    assert log == ["a/dense, call 0", "called", "end", "a/dense, call 1", "called", "end", "synchronize"]


def test_profile_forward_without_gpu_profiles_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile_forward.main([]) == 2 and profile_forward.main(["--case", "nothing"]) == 2
    said = capsys.readouterr().err
    assert "torch finds no GPU" in said and "nothing" in said
