"""The command line, except demo and calibrate: JSON on stdout, exit statuses, refused requests."""

import json
import shlex
import shutil
import subprocess
import sys
import types
from dataclasses import asdict
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

import compare
import fpsattention as fps
import programs
from fpsattention import AttentionConfig, WindowTable
from fpsattention.cli import bench, catalog, doctor, estimate, options, plan, profile, schedule, timing, video
from fpsattention.cli import main as cli
from fpsattention.core import explain, support
from fpsattention.schedules import models

ROOT = Path(__file__).resolve().parent.parent
WAN = "wan2.1-14b-720p"

pytestmark = pytest.mark.usefixtures("one_thread")


def run(capsys, *argv, status=0):
    """(JSON on stdout, text on stderr) of `fpsattention ARGV --json`."""
    assert cli.main([*map(str, argv), "--json"]) == status
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def fails(capsys, *argv, status=2):
    assert cli.main([*map(str, argv)]) == status
    printed = capsys.readouterr()
    assert f"fpsattention {argv[0]}: error: " in printed.err and "Traceback" not in printed.err
    return printed.err


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# The command itself


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["plan", "--grid", "1", "2"],
        ["plan", "--grid", "0", "2", "3"],
        ["plan", WAN, "--border", "cut"],
        ["schedule", WAN, "--alpha", "0.2", "1.5"],
        ["profile", WAN, "--tool", "perf"],
        ["compare", "one.mp4"],
        ["compare", "one.mp4", "two.mp4", "--output", "nowhere/picture.png"],
        ["schedule", WAN, "--output", "nowhere/picture.png"],
        ["calibrate", "folder"],
        ["demo", "--seed", str(2**64)],
        ["demo", "--heads", str(2**31)],
        ["plan", "--grid", "1", "2", "9" * 5000],
        ["demo", "--seed", "1.5"],
    ],
)
def test_wrong_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["schedule", "compare"])
@pytest.mark.parametrize(
    ("output", "said"),
    [
        (".", "'.': is a folder"),
        ("/", "'/': is a folder"),
        ("folder", "'folder': is a folder"),
        ("taken", "'taken.png': is a folder"),
        ("picture.foo", "suffix .foo must be one of .png, .jpg"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_first(
    command, output, said, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "taken.png"):
        Path(name).mkdir()
    operands = {"schedule": [WAN], "compare": ["a.pt", "b.pt"]}[command]
    with pytest.raises(SystemExit) as error:
        cli.main([command, *operands, "--output", output])
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_default_output_is_checked_too(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("comparison.png").mkdir()
    with pytest.raises(SystemExit):
        cli.main(["compare", "a.pt", "b.pt"])
    assert "'comparison.png': is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", options.PICTURES)
def test_matplotlib_draws_every_format_that_is_let_through(suffix, tmp_path):
    resolved = AttentionConfig(tile=(1, 1, 1)).resolve((1, 2, 2), 1)
    schedule._draw(tmp_path / f"picture{suffix}", [("early", resolved)])


PLAN = ["plan", "--grid", "4", "6", "8"]


def said_by(command: list[str], redirection: str, **env: str) -> tuple[int, str]:
    """(status, stderr) of `fpsattention COMMAND REDIRECTION`; a shell makes kinds of stdout that Python cannot."""
    script = (
        f"set -o pipefail; {shlex.join([sys.executable, '-m', 'fpsattention.cli', *command])} {redirection}"
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120, env=programs.environment(**env)
    )
    return done.returncode, done.stderr


# Through json, rich, print and argparse.
@pytest.mark.parametrize("command", [[*PLAN, "--json"], PLAN, ["doctor"], ["--help"]], ids=" ".join)
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [("> /dev/full", "[Errno 28] No space left on device"), ("| exec true", "[Errno 32] Broken pipe")],
)
def test_a_stdout_that_cannot_be_written_is_status_1(command, redirection, reason):
    status, said = said_by(command, redirection)
    program = "fpsattention" if command == ["--help"] else f"fpsattention {command[0]}"
    assert status == 1 and "Traceback" not in said and "Exception" not in said
    assert said.endswith(f"{program}: error: stdout: {reason}\n")


@pytest.mark.parametrize("command", [[*PLAN, "--json"], ["--help"]], ids=" ".join)
def test_a_full_disk_is_status_1_without_a_buffer(command):
    """The write itself fails, and no flush fails again."""
    status, said = said_by(command, "> /dev/full", PYTHONUNBUFFERED="1")
    assert status == 1 and said.endswith("error: [Errno 28] No space left on device\n")


def test_a_closed_stdout_is_status_1():
    advice = "redirect it to a file, or to /dev/null"
    assert said_by(PLAN, ">&-") == (1, f"fpsattention: error: stdout is closed; {advice}\n")


def test_a_stderr_that_cannot_be_written_leaves_stdout_and_the_status_alone():
    json_goes_on = f"| {sys.executable} -c 'import json, sys; json.load(sys.stdin)'"
    assert said_by(["doctor", "--json"], f"2>&- {json_goes_on}") == (0, "")
    assert said_by([*PLAN, "--json"], "2> /dev/full") == (1, "")  # the text for people is lost
    assert said_by(["plan"], "2> /dev/full") == (2, "")


@pytest.mark.parametrize("ask", [lambda: torch.empty(2**61, dtype=torch.uint8), lambda: bytearray(2**62)])
def test_out_of_cpu_memory_is_status_1(ask, capsys, monkeypatch):
    monkeypatch.setattr(plan, "run", lambda **_: ask())
    message = fails(capsys, "plan", "--grid", 1, 2, 3, status=1)
    assert "memory" in message and message.endswith("Try fewer --heads, or a smaller grid.\n")


@pytest.mark.parametrize(
    ("package", "extra", "argv"),
    [
        ("rich", "cli", PLAN),
        ("rich", "cli", ["bench", WAN]),
        ("rich", "cli", ["profile", WAN]),
        ("matplotlib", "cli", ["schedule", WAN, "--mid", 1, 3, 9, "--output", "picture.png"]),
        ("safetensors", "cli", ["calibrate", ".", "--grid", 1, 2, 3, "--budget", 1, "--num-steps", 1]),
        ("torchmetrics", "cli", ["compare", "a.pt", "b.pt"]),
        ("rich", "demo", ["demo"]),
    ],
)
def test_a_missing_package_is_named(package, extra, argv, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = fails(capsys, *argv)
    assert f"{package} is not installed: pip install 'fpsattention[{extra}]'" in message


def test_help_and_wrong_options_need_no_extra():
    """In a process that has torch, and no package of an extra."""
    code = f"import sys; sys.modules |= dict.fromkeys({doctor.EXTRAS + ('torchao', 'skvideo')})\n"
    code += "from fpsattention.cli.main import COMMANDS, main\n"
    code += "for argv in (['--help'], *([name, '--help'] for name in COMMANDS), ['demo', '--seed', 'x']):\n"
    code += "    try: main(argv)\n"
    code += "    except SystemExit as end: print('ended with', end.code)\n"
    done = programs.run_python("-c", code)
    assert done.stdout.count("print the results as JSON") == 8
    ends = [line for line in done.stdout.splitlines() if line.startswith("ended with")]
    assert ends == ["ended with 0"] * 9 + ["ended with 2"], done.stderr
    assert "'x' must be a whole number" in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (None, "", "there is no such file"),
        ("_C.cpython-27-x86_64-linux-gnu.so", "", "there is _C.cpython-27-x86_64-linux-gnu.so"),
        (f"_C{EXTENSION_SUFFIXES[0]}", "no library", f"there is _C{EXTENSION_SUFFIXES[0]}"),
    ],
    ids=["none", "of another Python", "damaged"],
)
def test_a_broken_install_says_what_is_wrong(tmp_path, name, text, reason):
    """A copy of the package without its compiled module, with that of another Python, with one that does not load."""
    source = Path(fps.__file__).parent
    shutil.copytree(source, tmp_path / "fpsattention", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    if name:
        (tmp_path / "fpsattention" / name).write_text(text)
    done = programs.run_python("-m", "fpsattention.cli", "doctor", env={}, cwd=tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert f"needs the compiled module _C{EXTENSION_SUFFIXES[0]} in {tmp_path / 'fpsattention'}; " in said
    assert f"{reason}. A wheel is for one version of Python" in said


# Models


def test_models_are_what_their_sizes_say():
    for model in models.MODELS.values():
        assert model.tokens > 5000 and model.head_dim in (64, 128) and model.layers >= 28 and model.source
        assert (model.text_tokens > 0) == (model.text_place in ("first", "last"))
    # The grid follows from frames and pixels, for the models whose tokens have 4 frames of 16 x 16 pixels.
    of_that_size = ("wan2.1-1.3b-480p", "wan2.1-14b-720p", "wan2.2-a14b-480p")
    for name in (*of_that_size, "hunyuanvideo-540p", "hunyuanvideo1.5-720p"):
        frames, width, height = (int(x) for x in models.MODELS[name].setting.split() if x.isdigit())
        assert models.MODELS[name].grid == ((frames - 1) // 4 + 1, height // 16, width // 16)
    assert models.MODELS[WAN].tokens == 75_600


def test_a_model_can_be_given_other_heads():
    assert catalog.choose(WAN, None, heads=20).heads == 20 and catalog.choose(WAN, None).heads == 40
    assert catalog.choose(None, (1, 2, 3), head_dim=64) == models.VideoModel("", "", (1, 2, 3), 1, 64, 1, "")


# plan


def test_plan_of_a_model(capsys):
    result, text = run(capsys, "plan", WAN, "--window", 3, 3, 9)
    config = AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9)).resolve((21, 45, 80), 40)
    assert result["tile"] == [7, 9, 2] and result["tiles"] == [3, 5, 40] and result["tokens"] == 75_600
    assert result["density"] == config.density == pytest.approx(0.135)
    assert result["waste"] == pytest.approx(600 * 128 / 75_600 - 1)
    assert result["flops"] == pytest.approx(4 * 128 * 40 * 0.135 * 75_600**2)
    assert result["candidates"][0]["tile"] == [7, 9, 2] and result["runs"]
    assert result["expected"]["ms"] < result["expected_dense"]["ms"] / 5
    assert "An estimate from rates" in text and "density 0.135" in text and "40 layers" in text


def test_plan_ranks_under_the_window(capsys):
    result, text = run(capsys, "plan", WAN, "--window", 3, 3, 9)
    ranked = explain.plan((21, 45, 80), reach=(21, 27, 18), heads=40)
    assert result["candidates"] == json.loads(json.dumps([asdict(choice) for choice in ranked.candidates]))
    assert result["candidates"][0]["window"] and "density wanted" in text
    assert run(capsys, "plan", WAN)[0]["candidates"][0]["window"] is None


def test_plan_finds_tile_and_window_of_a_density(capsys):
    result, text = run(capsys, "plan", "wan2.1-1.3b-480p", "--density", 0.06, "--border", "truncate")
    best = explain.plan((21, 30, 52), density=0.06, border="truncate", heads=12).best
    assert (result["tile"], result["window"]) == (list(best.tile), list(best.window))
    assert result["density"] == pytest.approx(best.density)
    assert f"{best.window} tiles, border 'truncate'" in text and "density wanted" in text


def test_plan_of_a_grid_prints_for_people(capsys):
    assert cli.main(["plan", "--grid", "33", "45", "80", "--tile", "3", "8", "16", "--heads", "24"]) == 0
    printed = capsys.readouterr()
    assert (
        "118,800 tokens" in printed.out
        and "3 x 8 x 16" not in printed.err
        and "tiles, best first" in printed.out
    )


def test_plan_says_where_text_is_and_where_nothing_was_measured(capsys):
    result, text = run(capsys, "plan", "hunyuanvideo-720p")
    assert "up to 256 text tokens" in text and "prefix 0 and suffix 256 tokens" in text
    assert text.count("\ntext ") == 1
    assert (result["tokens"], result["prefix_len"], result["suffix_len"]) == (118_800 + 256, 0, 256)
    alone, _ = run(capsys, "plan", "--grid", 33, 45, 80, "--heads", 24)
    assert 1 < result["expected"]["ms"] / alone["expected"]["ms"] < 1.01 and result["flops"] > alone["flops"]
    assert run(capsys, "plan", "cogvideox-5b")[0]["prefix_len"] == 226
    result, text = run(capsys, "plan", "--grid", 4, 6, 8)
    assert result["expected"] is None and "no estimate" in text


def test_plan_refuses(capsys):
    assert "model 'wan2.1-14b': is unknown; nearest: wan2.1-14b-" in fails(capsys, "plan", "wan2.1-14b")
    assert "both are given" in fails(capsys, "plan", WAN, "--grid", 1, 2, 3)
    assert "neither is given. Models: wan2.1-1.3b-480p" in fails(capsys, "plan")
    assert "nearest legal values 1 and 3" in fails(capsys, "plan", WAN, "--window", 2, 3, 9)
    assert "nearest legal tile" in fails(capsys, "plan", WAN, "--tile", 9, 9, 9)
    assert "leave --tile and --window out" in fails(capsys, "plan", WAN, "--density", 0.1, "--tile", 7, 9, 2)
    assert "leave --tile and --window out" in fails(
        capsys, "plan", WAN, "--density", 0.1, "--window", 3, 3, 9
    )
    assert "density: 0.0 must be a number above 0" in fails(capsys, "plan", WAN, "--density", 0)


# The expected time


def test_the_estimate_is_near_what_was_measured():
    """Every forward of at least 16,000 tokens in the results from which the rates come."""
    records = json.loads((ROOT / "bench" / "results" / "h200.json").read_text())["records"]
    ours = [
        r
        for r in records
        if r["op"] == "fpsattention" and not r["case"].endswith(("backward", "training", "step"))
    ]
    checked = 0
    for r in ours:
        config = AttentionConfig(tile=tuple(r["tile"]), window=r["window"] and tuple(r["window"]))
        resolved = config.resolve(r["grid"], r["heads"])
        if resolved.geometry.n_tokens >= 16_000:
            expected = estimate.forward(resolved, r["heads"], r["head_dim"])
            assert expected.ms == pytest.approx(r["ms"], rel=0.25), r["case"]
            checked += 1
    assert checked > 20


def test_no_estimate_where_nothing_was_measured():
    def of(grid, head_dim=128, **config):
        return estimate.forward(AttentionConfig(**config).resolve(grid, 4), 4, head_dim)

    assert of((16, 32, 32)) is not None
    assert of((16, 32, 32), head_dim=96) is None
    assert of((16, 32, 32), quant="none") is None
    assert of((4, 32, 32)) is None
    assert of((16, 32, 32)).ms < of((16, 32, 64)).ms / 3


# schedule


def test_schedule_has_a_row_for_each_step(capsys, tmp_path):
    picture = tmp_path / "picture.png"  # asked for without its suffix
    result, text = run(
        capsys,
        *(
            "schedule",
            WAN,
            "--num-steps",
            10,
            "--early",
            1,
            3,
            9,
            "--late",
            3,
            3,
            9,
            "--early-scales",
            21,
            18,
            8,
        ),
        *("--output", tmp_path / "picture"),
    )
    stages = [row["stage"] for row in result["steps"]]
    assert stages == ["early"] * 2 + ["mid"] * 6 + ["late"] * 2
    early, *_, late = result["steps"]
    assert (early["window"], late["window"]) == ([1, 3, 9], [3, 3, 9])
    assert (early["scales"], late["scales"]) == ([21, 18, 8], [7, 9, 2])
    assert late["density"] == pytest.approx(0.135) and result["steps"][5]["density"] == 1
    assert result["mean_density"] == pytest.approx((2 * 0.045 + 6 + 2 * 0.135) / 10)
    assert early["expected_ms"] < late["expected_ms"] < result["steps"][5]["expected_ms"]
    assert result["picture"] == str(picture) and f"Picture: {picture}\n" in text
    assert "####Q####" in text and "early, window 1 x 3 x 9" in text
    pixels = torch.from_numpy(imread(picture))[..., :3]
    for colour in schedule.COLOURS:
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (pixels - rgb).abs().amax(-1).lt(0.02).sum() > 50


@pytest.mark.parametrize("steps", [4, 50])
def test_schedule_of_a_preset(capsys, steps):
    result, text = run(capsys, "schedule", WAN, "--preset", "--num-steps", steps)
    preset = fps.preset(WAN, num_steps=steps)
    for row in result["steps"]:
        config = preset.schedule.at(step=row["step"], num_steps=steps).resolve((21, 45, 80), 40)
        assert (tuple(row["tile"]), tuple(row["window"])) == (config.tile, config.windows[0])
    assert result["dense_layers"] == [0] and tuple(result["alpha"]) == preset.schedule.alpha
    assert "Layers with the host's own attention: 0. The model was not trained with this preset." in text


def test_schedule_counts_text(capsys):
    result, text = run(capsys, "schedule", "cogvideox-5b", "--early", 1, 3, 3)
    dense = result["steps"][20]
    assert (result["prefix_len"], result["suffix_len"], dense["density"]) == (226, 0, 1)
    alone, _ = run(
        capsys, "schedule", "--grid", 13, 30, 45, "--heads", 48, "--head-dim", 64, "--early", 1, 3, 3
    )
    assert result["steps"][0]["density"] > alone["steps"][0]["density"]
    assert 1.02 < dense["expected_ms"] / alone["steps"][20]["expected_ms"] < 1.04
    assert "226 text tokens come first in the same sequence; all are counted" in text


def test_the_picture_is_the_rule():
    """The window of the middle tile of 3 x 4 x 5 tiles, clamped and cut, by hand."""
    for border in ("clamp", "truncate"):
        seen = schedule._seen(
            AttentionConfig(tile=(1, 1, 1), window=(1, 3, 9), border=border).resolve((3, 4, 5), 1)
        )
        assert seen.shape == (3, 4, 5) and (seen[[0, 2]] == schedule.UNSEEN).all()
        assert (seen[1, 0] == schedule.UNSEEN).all() and (seen[1, 1:] != schedule.UNSEEN).all()
        assert (seen == schedule.QUERY).nonzero().tolist() == [[1, 2, 2]]


def test_schedule_of_a_table(capsys, tmp_path):
    windows = [[[(5, 6, 10)] * 2] * 3, [[(3, 3, 5), (5, 6, 1)]] * 3]
    WindowTable((30, 48, 80), AttentionConfig(tile=(6, 8, 8)), windows).save(tmp_path / "table.json")
    result, text = run(capsys, "schedule", "--windows", tmp_path / "table.json")
    assert [row["density"] for row in result["steps"]] == [1, pytest.approx(75 / 600)]
    assert [row["distinct_windows"] for row in result["steps"]] == [1, 2]
    assert (result["num_steps"], result["layers"], result["heads"]) == (2, 3, 2)
    assert "50% of all have window 5 x 6 x 10" in text


def test_schedule_refuses(capsys, tmp_path):
    assert "no window" in fails(capsys, "schedule", WAN)
    assert "nearest legal values 1 and 3" in fails(capsys, "schedule", WAN, "--mid", 2, 3, 9)
    assert "0 <= a <= b <= 1" in fails(capsys, "schedule", WAN, "--mid", 1, 3, 9, "--alpha", 0.8, 0.2)
    assert "quant_tile" in fails(capsys, "schedule", WAN, "--late", 3, 3, 9, "--late-scales", 5, 5, 5)
    assert "No such file" in fails(capsys, "schedule", "--windows", tmp_path / "none.json")
    assert "leave MODEL out" in fails(capsys, "schedule", WAN, "--windows", tmp_path / "none.json")
    for option in (
        ["--num-steps", 50],
        ["--border", "clamp"],
        ["--late-scales", 7, 9, 2],
        ["--alpha", 0.2, 0.8],
    ):
        message = fails(capsys, "schedule", "--windows", tmp_path / "none.json", *option)
        assert f"leave {option[0]} out" in message
    assert "leave --preset out" in fails(capsys, "schedule", "--preset", "--windows", tmp_path / "none.json")
    for option in (["--grid", 1, 2, 3], ["--tile", 1, 2, 3], ["--late", 1, 3, 9], ["--border", "clamp"]):
        assert f"leave {option[0]} out" in fails(capsys, "schedule", WAN, "--preset", *option)
    assert "neither is given" in fails(capsys, "schedule", "--preset")


# doctor


def test_doctor_finds_this_machine_in_order(capsys):
    result, text = run(capsys, "doctor")
    assert result["ok"] and result["installed"]["torch"].startswith(torch.__version__)
    assert result["installed"]["compiled module"].startswith(f"loaded from {fps._C.__file__}")
    assert len(result["self_test"]) >= 4 and all(check["ok"] for check in result["self_test"])
    assert "All is well" in text
    if not torch.cuda.is_available():
        assert result["backend"] == "reference" and result["gpus"] == []


@pytest.mark.gpu
def test_doctor_on_a_hopper_gpu(capsys):
    result, _ = run(capsys, "doctor")
    assert result["backend"] == "sm90" and len(result["self_test"]) == 5 and result["ok"]
    assert doctor.KERNEL_TO_EMULATION == compare.EMULATION_RMS


@pytest.mark.parametrize(
    ("attention", "failed"),
    [
        (lambda q, k, v, **_: 0 * q * k * v, 4),
        (
            lambda q, k, v, **_: fps.reference.exact_attention(
                q, k, v, grid=doctor.GRID, config=doctor.CONFIG
            )[0],
            4,
        ),
        (
            lambda q, k, v, **_: fps.reference.emulated_attention(
                q, k, v, grid=doctor.GRID, config=AttentionConfig(tile=(2, 6, 6))
            )[0],
            4,
        ),
    ],
    ids=["zeros", "nothing rounded", "no window"],
)
def test_doctor_finds_a_wrong_answer(capsys, monkeypatch, no_gpu, attention, failed):
    monkeypatch.setattr(doctor, "attention", attention)
    result, text = run(capsys, "doctor", status=1)
    assert not result["ok"] and "Something is broken" in text
    assert sum(not check["ok"] for check in result["self_test"]) == failed


def test_doctor_reports_what_raises(capsys, monkeypatch, no_gpu):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(doctor, "attention", broken)
    result, _ = run(capsys, "doctor", status=1)
    assert result["self_test"][0]["detail"] == "RuntimeError: no kernel image is available"


# bench and profile


def test_bench_needs_a_hopper_gpu(capsys, monkeypatch, no_gpu):
    assert "torch finds no GPU" in fails(capsys, "bench", WAN, status=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(support, "_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    assert "compute capability 9.0), NVIDIA A100 has 8.0" in fails(capsys, "bench", WAN, status=1)
    assert "--head-dim 96: the Hopper kernel takes 64 and 128" in fails(
        capsys, "bench", WAN, "--head-dim", 96
    )
    assert "nearest legal values" in fails(capsys, "bench", WAN, "--window", 2, 1, 1)


@pytest.fixture
def hopper(monkeypatch):
    """A machine that seems to have a Hopper GPU; nothing can be computed on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(support, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")


def test_bench_reports_what_the_clock_says(capsys, monkeypatch, hopper):
    times = {bench.OURS: 2.0, bench.QUANTISATION: 0.5, "torch SDPA, cuDNN": 20.0}

    def clock(entries, clock, rounds, burst_ms):
        assert rounds == 3
        return {n: timing.Timing(times[n], 0.01) if n in times else "RuntimeError: no" for n in entries}

    monkeypatch.setattr(
        bench, "_contenders", lambda *_: dict.fromkeys([*times, "torch SDPA, FlashAttention"])
    )
    monkeypatch.setattr(bench, "CudaClock", lambda: None)
    monkeypatch.setattr(bench, "time_interleaved", clock)
    result, text = run(capsys, "bench", WAN, "--window", 3, 3, 9, "--rounds", 3)
    ours, quantisation, cudnn, flash = result["rows"]
    dense = 4 * 128 * 40 * 75_600**2
    assert ours["tflops"] == pytest.approx(0.135 * dense / 2e-3 / 1e12)
    assert cudnn["tflops"] == pytest.approx(dense / 20e-3 / 1e12) and cudnn["speedup"] == 10
    assert quantisation["ms"] == 0.5 and quantisation["tflops"] is None
    assert flash == {"name": "torch SDPA, FlashAttention", "error": "RuntimeError: no"}
    assert "10.00x" in text and "20.00 ms" in text
    times.pop(bench.OURS)
    monkeypatch.setattr(bench, "_contenders", lambda *_: dict.fromkeys([bench.OURS, *times]))
    assert "RuntimeError: no" in fails(capsys, "bench", WAN, "--rounds", 3, status=1)


def test_the_contenders_of_the_bench_compute_attention(monkeypatch):
    """Their real calls, with tensors on the CPU and the backend that runs there."""
    shape, resolved = bench.resolve(None, (4, 4, 4), 2, 64, (2, 2, 2), (1, 1, 2), "clamp")
    randn = torch.randn
    monkeypatch.setattr(bench.torch, "randn", lambda size, device, dtype: randn(size, dtype=torch.float32))
    random_call = bench.random_call

    def on_cpu(*args):
        qkv, keywords = random_call(*args)
        assert keywords["backend"] == "sm90"
        return qkv, keywords | {"backend": "reference"}

    monkeypatch.setattr(bench, "random_call", on_cpu)
    calls = bench._contenders(shape, resolved)
    q, k, v = calls[bench.OURS].args
    assert q.shape == (1, 64, 2, 64)
    config = calls[bench.OURS].keywords["config"]
    assert config == AttentionConfig(tile=(2, 2, 2), window=(1, 1, 2))
    exact, _ = fps.reference.exact_attention(q, k, v, grid=(4, 4, 4), config=config)
    assert 0.01 < (calls[bench.OURS]() - exact).norm() / exact.norm() < 0.1
    assert calls[bench.QUANTISATION]().config == config


def test_profile_prints_the_command_and_needs_a_gpu(capsys, no_gpu, tmp_path):
    argv = ["profile", WAN, "--window", 3, 3, 9, "--output", tmp_path / "report"]
    result, text = run(capsys, *argv, status=1)
    command = result["command"]
    assert shlex.split(text.splitlines()[0]) == command and not result["ran"]
    assert command[0] == "ncu" and "regex:attn_fwd" in command and str(tmp_path / "report") in command
    # The command within is legal and has the same shape.
    calls = command[command.index(sys.executable) + 1 :]
    assert calls[:2] == ["-m", "fpsattention.cli"]
    inner = calls[2:]
    assert inner[inner.index("--grid") + 1 :][:3] == ["21", "45", "80"]
    assert inner[inner.index("--window") + 1 :][:3] == ["3", "3", "9"]
    assert "torch finds no GPU" in fails(capsys, *inner, status=1)
    assert run(capsys, *argv, "--tool", "nsys", status=1)[0]["command"][:2] == ["nsys", "profile"]


def test_profile_runs_the_tool(capsys, hopper, monkeypatch, tmp_path):
    ran = []

    def tool(command, stdout):
        ran.append((command, stdout))
        return types.SimpleNamespace(returncode=len(ran) - 1)

    monkeypatch.setattr(profile.subprocess, "run", tool)
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert "nsys is not on PATH" in fails(capsys, "profile", WAN, "--tool", "nsys", status=1)
    assert not ran
    monkeypatch.setattr(profile.shutil, "which", lambda name: f"/usr/bin/{name}")
    result, _ = run(capsys, "profile", WAN)
    assert result["ran"] and ran == [(result["command"], sys.stderr)]
    assert "ncu ended with status 1" in fails(capsys, "profile", WAN, status=1)


@pytest.mark.gpu
def test_bench_and_profile_on_a_hopper_gpu(capsys):
    shape = ["--grid", 8, 32, 32, "--heads", 4, "--window", 1, 3, 3]
    result, _ = run(capsys, "bench", *shape, "--rounds", 2)
    ours, quantisation, cudnn, _ = result["rows"]
    assert 0 < quantisation["ms"] < ours["ms"] and cudnn["speedup"] > 0
    result, _ = run(capsys, "profile", *shape, "--tool", "none")
    assert result["ran"]


# compare


@pytest.fixture(scope="module")
def clip(one_thread):
    return video.load_clip(video.default_clip(), 5, 64, 112)


def save(clip, path):
    torch.save(clip, path)
    return path


def test_compare_measures_what_was_changed(capsys, tmp_path, clip):
    other = clip.clone()
    other[3] = torch.where(other[3] < 128, other[3] + 16, other[3] - 16)
    other[1] = torch.where(other[1] < 128, other[1] + 4, other[1] - 4)
    a, b = save(clip, tmp_path / "a.pt"), save(other, tmp_path / "b.pt")
    result, text = run(capsys, "compare", a, b, "--output", tmp_path / "picture")
    psnr = [frame["psnr"] for frame in result["per_frame"]]
    assert psnr[0] is psnr[2] is psnr[4] is None  # identical
    error = torch.tensor([(16 / 255) ** 2, (4 / 255) ** 2], dtype=torch.float64)
    assert torch.tensor([psnr[3], psnr[1]]) == pytest.approx((-10 * error.log10()).tolist(), abs=1e-3)
    assert result["psnr"] == pytest.approx((-10 * (error.sum() / 5).log10()).item(), abs=1e-3)
    assert result["worst_frame"]["frame"] == 3 and not result["identical"]
    ssim = [frame["ssim"] for frame in result["per_frame"]]
    assert ssim[0] == pytest.approx(1) and ssim[3] < ssim[1] < 0.9999
    assert result["ssim"] == pytest.approx(sum(ssim) / 5)
    assert "worst, frame 3" in text and result["picture"] == str(tmp_path / "picture.png")
    height, width = imread(tmp_path / "picture.png").shape[:2]
    assert width == 1440 and height > 600


def test_compare_decodes_videos(capsys, tmp_path):
    result, text = run(
        capsys, "compare", *[tiny_video(tmp_path / name) for name in ("a.mp4", "b.mp4")],
        "--output", tmp_path / "picture.png",
    )  # fmt: skip
    assert result["identical"] and result["psnr"] is None and result["frames"] == 3
    assert "identical" in text


def tiny_video(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(3):
            picture = torch.full((32, 32, 3), 40 * i, dtype=torch.uint8)
            picture[8:16] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return path


def test_compare_refuses(capsys, tmp_path, clip):
    a = save(clip, tmp_path / "a.pt")

    def message(other):
        return fails(
            capsys, "compare", a, save(other, tmp_path / "b.pt"), "--output", tmp_path / "picture.png"
        )

    assert "b.pt: has 4 frames" in message(clip[:4])
    assert "a.pt: has 5 frames" in message(torch.cat([clip, clip]))
    assert "frames of 56 x 64, those of" in message(clip[:, :, :56])
    assert "b.pt: must hold a dense tensor with values, holds a torch.sparse_coo one" in message(
        clip.to_sparse()
    )
    assert "b.pt: must hold a dense tensor with values, holds a meta one" in message(clip.to("meta"))
    assert "no such file" in fails(capsys, "compare", a, tmp_path / "none.mp4")
    small = save(clip[:, :8], tmp_path / "small.pt")
    assert "SSIM needs 11 each way" in fails(capsys, "compare", small, small)
    empty = save(clip[:0], tmp_path / "empty.pt")
    assert "holds no frames" in fails(capsys, "compare", empty, empty)
    assert not (tmp_path / "picture.png").exists()
