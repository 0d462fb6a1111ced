"""Processes that run functions together, on gloo: started once for many tests, since importing torch takes seconds."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE_S = 60  # where one process fails, the others wait for it


class Processes:
    def __init__(self, size: int, folder: Path):
        # Forked from a process that has imported these already.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "fpsattention.integrations.diffusers"])
        self.size = size
        self.pipes, ends = zip(*(context.Pipe() for _ in range(size)), strict=True)
        self.processes = [
            context.Process(target=_serve, args=(rank, size, folder / "store", end), daemon=True)
            for rank, end in enumerate(ends)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, *args) -> list:
        """What `function(*args)` returns in each process. Raises AssertionError with the traceback where one raises."""
        for pipe in self.pipes:
            pipe.send((function, args))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(PATIENCE_S), f"process {rank} does not answer"
            result, failure = pipe.recv()
            results.append(result)
            if failure:
                failures.append(f"process {rank}:\n{failure}")
        assert not failures, "\n".join(failures)
        return results

    def stop(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def _serve(rank: int, size: int, store: Path, pipe) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=PATIENCE_S / 2)
    # Name the CPU. Diffusers asks torch for an accelerator where a group names none, and a CUDA build of torch has one
    # even where there is no GPU.
    dist.init_process_group("cpu:gloo", f"file://{store}", timeout, size, rank)
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            answer = function(*args), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send(answer)
    dist.destroy_process_group()
