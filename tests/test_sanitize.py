"""tests/sanitize.py reads what compute-sanitizer writes, and judges it. The logs here have the format of version
2026.4."""

from __future__ import annotations

import os
import sys

import pytest

import sanitize
import sanitizer_cases

CLEAN = "========= COMPUTE-SANITIZER\n========= {} SUMMARY: 0 {}\n"
UNINITIALISED = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 128 bytes
=========     at void fps::<unnamed>::attn_bwd_sm90<fps::<unnamed>::BwdConfig<(int)128>, __half>(T2)+0x4110
=========     by thread (352,0,0) in block (0,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= Uninitialized __global__ memory read of size 128 bytes
=========     at void fps::<unnamed>::attn_bwd_sm90<fps::<unnamed>::BwdConfig<(int)128>, __half>(T2)+0x4110
=========     by thread (352,0,0) in block (17,0,0)
=========     Address 0x7f3c7ec040fc
=========
========= ERROR SUMMARY: 2 errors
"""
HAZARDS = """\
========= COMPUTE-SANITIZER
========= Warning: Race reported between Read access at void fps::<unnamed>::attn_bwd_sm90<T1, T2>(T3)+0xe5a0
=========     and Write access at void fps::<unnamed>::attn_bwd_sm90<T1, T2>(T3)+0x5bc0 [528 hazards]
=========     and Write access at void fps::<unnamed>::attn_bwd_sm90<T1, T2>(T3)+0x5310 [528 hazards]
=========
========= Error: Race reported between Write access at void fps::<unnamed>::attn_fwd_sm90<T1, T2>(T3)+0x1230
=========     and Read access at void fps::<unnamed>::attn_fwd_sm90<T1, T2>(T3)+0x2340 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
WAR = sanitize.Known(
    "racecheck", "attn_bwd_sm90", r"between Read access .*\n.*and Write access", "made up for these tests"
)


def test_reports_of_a_log():
    first, second = sanitize.parse(UNINITIALISED)
    assert first.startswith(" Uninitialized __global__ memory read of size 128 bytes\n")
    assert "block (0,0,0)" in first and "block (17,0,0)" not in first
    assert "block (17,0,0)" in second
    bwd, fwd = sanitize.parse(HAZARDS)
    assert bwd.count("Write access") == 2 and "attn_fwd" not in bwd
    assert "attn_fwd_sm90" in fwd
    assert sanitize.parse(CLEAN.format("ERROR", "errors")) == []
    assert sanitize.parse(CLEAN.format("RACECHECK", "hazards displayed (0 errors, 0 warnings)")) == []


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("", "no header or no summary"),
        ("========= COMPUTE-SANITIZER\n", "no header or no summary"),
        (UNINITIALISED.replace("2 errors", "3 errors"), "counts 3 reports, its log shows 2"),
        (UNINITIALISED.replace("========= Uninit", "Uninit", 1), "not the tool's"),
        (
            "========= COMPUTE-SANITIZER\n=========     at f()\n========= ERROR SUMMARY: 0 errors\n",
            "did not begin",
        ),
        # Any other line, such as a warning about the tool itself, counts as a report.
        (
            CLEAN.format("ERROR", "errors") + "========= Target application returned an error\n",
            "counts 0 reports, its log shows 1",
        ),
    ],
)
def test_a_log_that_cannot_be_trusted_is_refused(log, message):
    with pytest.raises(sanitize.BadOutput, match=message):
        sanitize.parse(log)


def test_each_kind_of_unknown_report_is_told_once():
    (wrong,) = sanitize.judge("initcheck", sanitize.parse(UNINITIALISED), [WAR])
    assert wrong.startswith("initcheck: 2 reports such as\n Uninitialized")
    assert "thread (352,0,0) in block (0,0,0)" in wrong


def test_only_known_reports_pass():
    bwd, fwd = sanitize.parse(HAZARDS)
    assert sanitize.judge("racecheck", [bwd], [WAR]) == []
    (wrong,) = sanitize.judge("racecheck", [bwd, fwd], [WAR])
    assert "attn_fwd_sm90" in wrong and "attn_bwd_sm90" not in wrong
    # The kernel matches, the pattern does not.
    write_first = fwd.replace("attn_fwd_sm90", "attn_bwd_sm90")
    (wrong,) = sanitize.judge("racecheck", [bwd, write_first], [WAR])
    assert "between Write access" in wrong


def hazards(first: str, others: str, kernel: str, head_dim: int, other_head_dim: int | None = None) -> str:
    """A report on one access against two others, in the tool's format."""

    def access(kind: str, head_dim: int, offset: str) -> str:
        warpgroups = ", (int)2" if kernel == "attn_fwd_sm90" else ""
        config = f"{kernel[5].upper()}{kernel[6:8]}Config<(int){head_dim}{warpgroups}, fps::TileBox>"
        return f"{kind} access at void fps::<unnamed>::{kernel}<fps::<unnamed>::{config}, __half>(T)+{offset}"

    return (
        f" Error: Race reported between {access(first, head_dim, '0x2430')}\n"
        f"     and {access(others, head_dim, '0x6b60')} [288 hazards]\n"
        f"     and {access(others, other_head_dim or head_dim, '0x96b0')} [1152 hazards]"
    )


@pytest.mark.parametrize("kernel", ["attn_fwd_sm90", "attn_bwd_sm90"])
def test_the_list_holds_refills_and_no_more(kernel):
    def is_known(report: str) -> bool:
        return any(x.matches("racecheck", report) for x in sanitize.KNOWN if x.kernel == kernel)

    for first, others in (("Write", "Read"), ("Read", "Write")):
        for head_dim in (64, 128):
            assert is_known(hazards(first, others, kernel, head_dim))
    of_the_task = hazards("Write", "Read", kernel, 64).replace("Error", "Warning")
    assert is_known(of_the_task) == (kernel == "attn_fwd_sm90")
    for unknown in (
        of_the_task.replace("Read", "Write"),
        hazards("Write", "Read", kernel, 64, other_head_dim=128),
        hazards("Write", "Write", kernel, 64),
        hazards("Read", "Write", kernel, 64).replace("Error", "Warning"),
        hazards("Read", "Write", kernel, 64)
        + "\n     and Read access at void fps::quantize_v()+0x10 [1 hazards]",
    ):
        assert not any(x.matches("racecheck", unknown) for x in sanitize.KNOWN), unknown
    assert not any(x.matches("memcheck", hazards("Read", "Write", kernel, 64)) for x in sanitize.KNOWN)


def test_an_entry_without_a_report_must_leave_the_list():
    (wrong,) = sanitize.judge("racecheck", [], [WAR])
    assert "no longer reported" in wrong and "attn_bwd_sm90" in wrong
    assert sanitize.judge("initcheck", [], [WAR]) == []  # the entry belongs to another tool


def test_the_cases_of_the_tools_exist():
    for names in sanitize.TOOLS.values():
        assert set(names) <= set(sanitizer_cases.CASES)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a compute-sanitizer on PATH that writes this log and ends with this status."""

    def install(log: str, status: int = 0):
        (tmp_path / "written").write_text(log)
        program = tmp_path / "compute-sanitizer"
        program.write_text(
            f"#!{sys.executable}\n"
            "import os, pathlib, sys\n"
            f"folder = pathlib.Path({str(tmp_path)!r})\n"
            "log = pathlib.Path(sys.argv[sys.argv.index('--log-file') + 1])\n"
            "log.write_text((folder / 'written').read_text())\n"
            "caching = os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']\n"
            "(folder / 'called').open('a').write(' '.join([caching, *sys.argv[1:]]) + '\\n')\n"
            f"sys.exit({status})\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "called"

    return install


def test_all_four_tools_run(tool, capsys):
    called = tool(CLEAN.format("ERROR", "errors"))
    assert sanitize.main([], known=()) == 0
    lines = called.read_text().splitlines()
    assert [line.split()[:3] for line in lines] == [["1", "--tool", name] for name in sanitize.TOOLS]
    assert all(f"{sanitize.CASES}" in line for line in lines)
    assert lines[-1].endswith(f"{sanitize.CASES} {' '.join(sanitize.TOOLS['racecheck'])}")
    assert "nothing unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("log", "status", "known", "message"),
    [
        (HAZARDS, 0, (WAR,), "attn_fwd_sm90"),
        (CLEAN.format("RACECHECK", "hazards displayed"), 0, (WAR,), "no longer reported"),
        (CLEAN.format("RACECHECK", "hazards displayed"), 7, (), "the cases ended with status 7"),
        ("========= COMPUTE-SANITIZER\n", 0, (), "did not run to its end"),
    ],
)
def test_the_run_fails(tool, capsys, log, status, known, message):
    tool(log, status)
    assert sanitize.main(["racecheck"], known=known) == 1
    assert message in capsys.readouterr().out


def test_known_reports_pass_with_their_reason(tool, capsys):
    only = HAZARDS[: HAZARDS.index("========= Error")] + "========= RACECHECK SUMMARY: 1 hazard displayed\n"
    tool(only)
    assert sanitize.main(["racecheck"], known=(WAR,)) == 0
    assert "made up for these tests" in capsys.readouterr().out


def test_an_unknown_tool_is_refused(capsys):
    with pytest.raises(SystemExit):
        sanitize.main(["leakcheck"])
    assert (
        "no tool 'leakcheck': choose from memcheck, synccheck, initcheck, racecheck"
        in capsys.readouterr().err
    )
