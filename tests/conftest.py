"""Which tests run on this machine, and the receipt of those that ran on a GPU.

Tests marked `gpu` need a device of compute capability 9.0. Elsewhere they are deselected, which the summary
says, and `tests/gpu_receipt.json` stands for them (see receipt.py).
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from packaging.version import Version

import receipt
import stub_lightx2v
from fpsattention.core.support import hopper_obstacle

# GPU examples are slow at first and run in a fixed order, so that a receipt can be reproduced.
settings.register_profile(
    "fpsattention", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fpsattention")

HUNG_AFTER_S = 120  # one GPU test takes seconds: beyond this a kernel is stuck


def has_hopper() -> bool:
    return hopper_obstacle() is None


def pytest_addoption(parser):
    parser.addoption("--gpu-receipt", metavar="PATH", type=Path, help="write the GPU receipt here")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU of compute capability 9.0")
    config.addinivalue_line("markers", "receipt: holds the GPU receipt against the sources")
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist, one per core
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the programs that tests start
    config.gpu_deselected = 0
    config.deselected = {"deselected": 0, "gpu_deselected": 0}  # but for the check of the receipt
    config.stderr_fd = os.dup(sys.__stderr__.fileno())  # capturing is suspended here: this is the real one
    path = config.getoption("--gpu-receipt")
    if path and not hasattr(
        config, "workerinput"
    ):  # all reports of workers reach the one process that writes
        if not has_hopper():
            raise pytest.UsageError("--gpu-receipt: there is no GPU of compute capability 9.0 here")
        config.pluginmanager.register(ReceiptWriter(path), "receipt")


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # the longest tests first: no worker waits for one at the end
        items.sort(key=lambda item: "emulated" not in item.fixturenames)
    marker = "receipt" if has_hopper() else "gpu"
    dropped = [item for item in items if item.get_closest_marker(marker)]
    if not dropped:
        return
    items[:] = [item for item in items if not item.get_closest_marker(marker)]
    if marker == "gpu":
        config.gpu_deselected = len(dropped)
    config.hook.pytest_deselected(items=dropped)


def pytest_deselected(items):
    items = [item for item in items if not item.get_closest_marker("receipt")]
    if items:
        counts = items[0].config.deselected
        counts["deselected"] += len(items)
        counts["gpu_deselected"] += sum(item.get_closest_marker("gpu") is not None for item in items)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: the summary is written elsewhere
        session.config.workeroutput["gpu_deselected"] = session.config.gpu_deselected
        session.config.workeroutput["deselected"] = session.config.deselected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    output = getattr(node, "workeroutput", {})  # every worker collects the same tests
    node.config.gpu_deselected = output.get("gpu_deselected", 0)
    node.config.deselected = output.get("deselected", node.config.deselected)


def pytest_terminal_summary(terminalreporter, config):
    if config.gpu_deselected:
        terminalreporter.write_line(
            f"{config.gpu_deselected} GPU tests were deselected: no device of compute capability 9.0 here. "
            f"tests/gpu_receipt.json stands for them.",
            yellow=True,
        )
        for name, why in receipt.skipped_tests(receipt.PATH).items():
            terminalreporter.write_line(
                f"Nothing stands for {name}: the receipt's run skipped it ({why}).", yellow=True
            )


@pytest.fixture(autouse=True)
def _gpu_guard(request):
    """Around each GPU test: a hang ends the run with a traceback, and a lost CUDA context ends it at once
    instead of failing every later test.
    """
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    faulthandler.dump_traceback_later(HUNG_AFTER_S, exit=True, file=request.config.stderr_fd)
    try:
        yield
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            request.session.shouldstop = f"the CUDA context is lost: {error}"
            raise
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def one_thread():
    """The tensors are tiny, and on a busy machine threads wait for each other far longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fp8_on_cpu(monkeypatch):
    """torchao asks for a GPU with FP8 tensor cores; torch multiplies E4M3 on the CPU as well, with a scale for each row
    after 2.11.
    """
    import torchao.quantization.quant_api as api

    if Version(torch.__version__) < Version("2.12"):
        pytest.skip("torch 2.11 multiplies E4M3 with scales of rows on a GPU only")

    monkeypatch.setattr("torchao.float8.inference._check_hardware_support", lambda granularities: None)
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularities: None, raising=False)


@pytest.fixture
def registry(monkeypatch) -> stub_lightx2v.Register:
    """LightX2V's attention types."""
    return stub_lightx2v.install(monkeypatch)


@pytest.fixture
def seed(request) -> int:
    """A seed of the test's own, the same in every run."""
    return zlib.crc32(f"{request.module.__name__}::{request.node.name}".encode())


class ReceiptWriter:
    """Counts outcomes and writes the receipt when the session ends."""

    def __init__(self, path: Path):
        self.path = path
        self.start = time.monotonic()
        self.sources = receipt.sources_hash(receipt.ROOT)
        self.machine = receipt.environment()
        self.counts = dict.fromkeys(
            ("passed", "failed", "skipped", "deselected", "gpu_passed", "gpu_deselected"), 0
        )
        self.gpu_files: set[str] = set()
        self.failures: list[str] = []
        self.skipped: dict[str, str] = {}

    def pytest_collectreport(self, report):
        if report.failed:
            self._fail(report.nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._fail(report.nodeid)
        elif report.skipped:
            self.counts["skipped"] += 1
            if "gpu" in report.keywords:
                self.skipped[report.nodeid] = _why_skipped(report)
        elif report.when == "call":
            self.counts["passed"] += 1
            if "gpu" in report.keywords:
                self.counts["gpu_passed"] += 1
                self.gpu_files.add(Path(report.location[0]).name)

    def _fail(self, nodeid):
        if nodeid not in self.failures:
            self.counts["failed"] += 1
            self.failures.append(nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.INTERRUPTED:
            self._fail("the run was interrupted")
        if self.sources != receipt.sources_hash(receipt.ROOT):
            self._fail("the sources changed during the run")
        self.counts |= session.config.deselected
        receipt.write(
            self.path,
            sources=self.sources,
            machine=self.machine,
            counts=self.counts,
            gpu_files=self.gpu_files,
            failures=self.failures,
            skipped=self.skipped,
            duration_s=time.monotonic() - self.start,
        )
        if not self.counts["gpu_passed"] or self.failures:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _why_skipped(report) -> str:
    """The reason given to skip, skipif or xfail."""
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    _, _, message = report.longrepr
    return message.removeprefix("Skipped: ")
