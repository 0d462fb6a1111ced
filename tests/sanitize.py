"""Runs the four tools of compute-sanitizer over tests/sanitizer_cases.py. Fails on a report that no entry of KNOWN
matches, and on an entry that no report matches any more.

    python tests/sanitize.py                 # memcheck, synccheck, initcheck, racecheck
    python tests/sanitize.py racecheck       # one of them

Needs a Hopper GPU, and compute-sanitizer: that of a CUDA toolkit on PATH, or of the wheel nvidia-cuda-sanitizer-api.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CASES = Path(__file__).with_name("sanitizer_cases.py")
# The cases that each tool runs; empty: all. Racecheck, by far the slowest, runs three. They have more key blocks than
# the rings have stages, and tiles of one block and of several. Every case runs both head dims, both dtypes, with and
# without text, and a deterministic backward.
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": (),
    "synccheck": (),
    "initcheck": (),
    "racecheck": ("window", "slots of 384", "lists"),
}


ENVIRONMENT = {
    # Every tensor is an allocation of its own, so that the tools see its end and its unwritten bytes.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "NV_COMPUTE_SANITIZER_MAX_RACECHECK_HAZARDS": "100000",  # at its limit racecheck leaves some out, and warns
}


@dataclass(frozen=True)
class Known:
    """A finding that is no fault.

    Attributes:
        tool: which tool reports it.
        kernel: the kernel's name.
        pattern: regular expression that matches somewhere in the report, across its lines.
        why: the reason that it is no fault.
    """

    tool: str
    kernel: str
    pattern: str
    why: str

    def matches(self, tool: str, report: str) -> bool:
        named = re.search(rf"\b{self.kernel}\b", report) is not None
        return tool == self.tool and named and re.search(self.pattern, report) is not None


def race(config: str, severity: str, first: str, others: str) -> str:
    """Pattern of racecheck's report on one access and others, none of them in a kernel of another configuration."""
    access = rf"access at [^\n]*\b{config}<"
    one, more = rf"{first} {access}(?P<{first}>[^>]*)>[^\n]*", rf"{others} {access}(?P={first})>[^\n]*"
    return rf"\A {severity}: Race reported between {one}(?:\n +and {more})+\Z"


def reads_and_writes(config: str) -> str:
    """Pattern of an error on reads against writes. The order of the two in a report says nothing about their order in
    time.
    """
    return f"{race(config, 'Error', 'Write', 'Read')}|{race(config, 'Error', 'Read', 'Write')}"


# Racecheck (2025.3 and 2026.4, on an H200) does not see that __syncwarp orders the reads of a warp's lanes before lane
# 0's arrival, or after lane 0's writes: ptxas emits no instruction for it where the warp is converged. The reports on
# arrivals vanish when every lane arrives for itself and nothing else changes. A report names no object of shared memory
# (SASS offsets change with every compilation), so an entry also hides other reads against writes of its kernel. At
# head_dim 128 the tool reports these in some runs only; it missed a race put there on purpose in the one run that had
# it.
KNOWN: tuple[Known, ...] = (
    Known(
        "racecheck",
        "attn_fwd_sm90",
        reads_and_writes("FwdConfig"),
        "what refills a stage, or a task, against the reads of its BlockMeta, or of the task: lane 0 arrives on "
        "empty[s], or q_empty[i], for its warp after __syncwarp; the load warps wait for that before they refill",
    ),
    Known(
        "racecheck",
        "attn_fwd_sm90",
        race("FwdConfig", "Warning", "Write", "Read"),
        "lane 0 of the queries warp writes a task's item, and its warp reads it after __syncwarp",
    ),
    Known(
        "racecheck",
        "attn_bwd_sm90",
        reads_and_writes("BwdConfig"),
        "the copy that refills rows[s] against the reads of these QueryRows: lane 0 arrives on empty[s] for its warp "
        "after __syncwarp, and load waits for empty[s] before it issues the copy",
    ),
)


class BadOutput(ValueError):
    """This file cannot read the tool's output, so nothing follows from it."""


def parse(log: str) -> list[str]:
    """The reports in a tool's log, without the prefix of its lines. A report begins at a line indented by one space
    and includes the deeper lines that follow.
    """
    reports: list[str] = []
    announced = None
    seen_header = False
    for line in log.splitlines():
        if not line.startswith("========="):
            raise BadOutput(f"a line of the log is not the tool's: {line[:200]!r}")
        text = line.removeprefix("=========")
        if not text.strip():
            continue
        if text.startswith("  "):
            if not reports:
                raise BadOutput(f"the log goes on with a report that did not begin: {line[:200]!r}")
            reports[-1] += f"\n{text}"
        elif text.strip() == "COMPUTE-SANITIZER":
            seen_header = True
        elif summary := re.match(r" (?:ERROR|RACECHECK) SUMMARY: (\d+) ", text):
            announced = int(summary[1])
        else:
            reports.append(text)
    if not seen_header or announced is None:
        raise BadOutput("the log has no header or no summary: the tool did not run to its end")
    if announced != len(reports):
        raise BadOutput(f"the tool's summary counts {announced} reports, its log shows {len(reports)}")
    return reports


def judge(tool: str, reports: Sequence[str], known: Sequence[Known]) -> list[str]:
    """The faults in a tool's reports: unknown reports, and known ones that are missing. Empty if all is well."""
    unknown: Counter[str] = Counter()
    example: dict[str, str] = {}
    found: set[Known] = set()
    for report in reports:
        match = next((x for x in known if x.matches(tool, report)), None)
        if match is not None:
            found.add(match)
            continue
        kind = re.sub(r"0x[0-9a-f]+|\d+", "#", report)  # equal for all threads, blocks and addresses
        unknown[kind] += 1
        example.setdefault(kind, report)
    wrong = [f"{tool}: {count} reports such as\n{example[kind]}" for kind, count in unknown.most_common()]
    wrong += [
        f"{tool}: no longer reported, take it off the list: {x.kernel}, {x.pattern!r}"
        for x in known
        if x.tool == tool and x not in found
    ]
    return wrong


def find_sanitizer() -> str:
    if on_path := shutil.which("compute-sanitizer"):
        return on_path
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations if wheels else ():
        for path in Path(folder).glob("cu*/compute-sanitizer/compute-sanitizer"):
            return str(path)
    sys.exit("no compute-sanitizer: put a CUDA toolkit's on PATH, or `pip install nvidia-cuda-sanitizer-api`")


def run(sanitizer: str, tool: str, known: Sequence[Known]) -> list[str]:
    """Run one tool and return the faults it found."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [
            *(sanitizer, "--tool", tool, "--log-file", str(log), "--print-limit", "0"),
            *("--show-backtrace", "device", sys.executable, str(CASES), *TOOLS[tool]),
        ]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT)
        text = log.read_text() if log.exists() else ""
    try:
        wrong = judge(tool, parse(text), known)
    except BadOutput as error:
        wrong = [f"{tool}: {error}\n{text[-4000:]}"]
    if done.returncode:
        wrong.append(f"{tool}: the cases ended with status {done.returncode}")
    return wrong


def main(arguments: Sequence[str] | None = None, known: Sequence[Known] = KNOWN) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}; none named: all")
    tools = parser.parse_args(arguments).tools or list(TOOLS)
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"no tool {min(unknown)[:50]!r}: choose from {', '.join(TOOLS)}")
    sanitizer = find_sanitizer()
    wrong = []
    for tool in tools:
        print(f"{tool}: {', '.join(TOOLS[tool]) or 'all cases'}", flush=True)
        wrong += run(sanitizer, tool, known)
    for x in known:
        if x.tool in tools:
            print(f"{x.tool}, {x.kernel}, known: {x.why}")
    print("\n\n".join(wrong) or f"{', '.join(tools)}: nothing unknown")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
