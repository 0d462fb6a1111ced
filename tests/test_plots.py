"""The pictures of the bench, from made-up records."""

from pathlib import Path

import pytest

import common
from records import make_record

plots = pytest.importorskip("plots", reason="matplotlib")

ROOT = Path(__file__).resolve().parent.parent


def synthetic_results():
    records = [
        make_record("36x48x48/dense", common.CUDNN, 140.0, window=None, density=1.0, tflops_total=600.0)
    ]
    for density in (1.0, 0.5, 1 / 6, 0.05):
        attn_ms = 100 * density
        flops = 4 * 128 * density * (36 * 48 * 48) ** 2 * 24
        records.append(
            make_record(
                f"36x48x48/{density:.2f}",
                ms=attn_ms + 1,
                density=density,
                attn_ms=attn_ms,
                quant_ms=1.0,
                tflops=flops / attn_ms / 1e9,
                quant_bytes=2_800_000_000,
                attn_hbm_bytes=10**9,
                attn_l2_bytes=int(flops / 250),
            )
        )
    for r in records:
        r.baseline, r.baseline_ms, r.speedup = common.CUDNN, 140.0, 140.0 / r.ms
    return common.Results({"gpu": "made up"}, records)


def with_lengths(results):
    for tokens, tflops in ((16, 900.0), (4, 700.0)):
        shares = {common.OURS: 0.95, common.CUDNN_FP8: 0.8, common.CUDNN: 0.6, common.FLASH: 0.4}
        for op, share in shares.items():
            fields = dict(window=None, density=1.0, grid=(tokens, 32, 32), tflops_total=tflops * share)
            if op == common.OURS:
                fields |= dict(tflops=tflops, attn_ms=0.9, quant_ms=0.1, speedup=1.6, baseline=common.CUDNN)
            results.records.append(make_record(f"length-{tokens}k-d128/dense", op, 1.0, **fields))
    return results


def test_plot_points():
    results = synthetic_results()
    results.records.append(
        make_record("36x48x48/wrong", ms=0.001, speedup=1e5, baseline=common.CUDNN, error="wrong")
    )
    points = plots.attention_points(results.records)
    assert len(points["FP8 attention, D 128"]) == 4 and not points["FP8 attention, D 64"]
    assert all(x == pytest.approx(250, rel=1e-3) for x, _ in points["same, per byte from L2"])
    ((x, y),) = points["quantisation"]  # one per shape: the windows share it
    elements = 36 * 48 * 48 * 24 * 128
    assert y == pytest.approx(6 * elements / 1e-3 / 1e12) and x == pytest.approx(6 * elements / 2.8e9)
    swept, series, dense = plots.density_series(results.records)
    assert swept == "36x48x48" and dense == pytest.approx(140 / 101)
    assert series[swept] == sorted(series[swept]) and len(series[swept]) == 4


def test_time_over_density_points():
    results = synthetic_results()
    results.records += [
        make_record("other/dense", ms=1.0, density=1.0),
        make_record("36x48x48/0.50", common.FLEX, 90.0, density=0.5),
    ]
    series = plots.time_series(results.records, "36x48x48")
    assert series[plots.WITH_QUANTISATION][-1] == (1.0, 101.0) and len(series[plots.WITH_QUANTISATION]) == 4
    assert series[plots.KERNEL_ALONE][0] == (0.05, 5.0)
    assert series["FlexAttention BF16"] == [(0.5, 90.0)] and series["dense BF16 cuDNN"] == [(1.0, 140.0)]
    assert set(series) <= set(plots.TIME_STYLES)


def test_length_points():
    results = with_lengths(synthetic_results())
    lengths = plots.of_lengths(results.records)
    assert len(lengths) == 8 and len(plots.of_models(results.records)) == 5
    series = plots.length_series(lengths, 128)
    assert series[plots.KERNEL_ALONE] == [(4096, 700.0), (16384, 900.0)]
    assert series[plots.WITH_QUANTISATION] == [(4096, 665.0), (16384, 855.0)]
    assert series[plots.CUDNN_FP8_ALONE] == [(4096, 560.0), (16384, 720.0)]
    assert series["cuDNN BF16"][1] == (16384, 540.0) and series["torch flash BF16"][0] == (4096, 280.0)
    assert set(series) == set(plots.LENGTH_STYLES) and not plots.length_series(lengths, 64)
    assert {peer.name for peer in plots.PEERS} == set(plots.PEER_STYLES)


def test_families_are_in_no_picture():
    results = synthetic_results()
    before = plots.of_models(results.records)
    results.records.append(make_record("36x48x48/6,6,1 sink inputs", ms=None, attn_ms=9.0, family="sink"))
    assert plots.of_models(results.records) == before and not plots.of_lengths(results.records)


def test_no_two_series_look_the_same(monkeypatch, tmp_path):
    """Those of the committed records, in every panel that has a legend of its own."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda fig, path: figures.append(fig))
    results = common.Results.load(ROOT / "bench" / "results" / "h200.json")
    plots.speedup_over_density(results, tmp_path)
    for ax in figures[0].axes:
        looks = [
            (x.get_marker(), x.get_color(), x.get_linestyle(), x.get_markerfacecolor()) for x in ax.lines
        ]
        assert len(looks) > 3 and len(set(looks)) == len(looks)


def test_legends_lie_beside_the_lines(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda fig, path: figures.append(fig))
    plots.speedup_over_density(synthetic_results(), tmp_path)
    figures[0].draw_without_rendering()
    for ax in figures[0].axes:
        assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())


def test_split_bars():
    records = synthetic_results().records
    assert plots.split_bars(records, dense=True) == [("36x48x48/1.00", 1.0, 100.0)]
    windowed = plots.split_bars(records, dense=False)
    assert [case for case, _, _ in windowed] == ["36x48x48/0.05", "36x48x48/0.17", "36x48x48/0.50"]


def test_pictures_are_drawn(tmp_path, capsys):
    with_lengths(synthetic_results()).save(tmp_path / "r.json")
    assert plots.main(["--input", str(tmp_path / "r.json"), "--output", str(tmp_path / "images")]) == 0
    names = {"roofline.png", "speedup_over_density.png", "tflops_over_length.png", "time_split.png"}
    assert names == set(plots.PICTURES)
    for name in names:
        image = plots.plt.imread(tmp_path / "images" / name)
        assert image.shape[0] > 400 and image.std() > 0.02  # not blank
    assert "skipped" not in capsys.readouterr().out


def test_a_picture_without_records_is_skipped(tmp_path, capsys):
    only_lengths = with_lengths(common.Results({"gpu": "made up"}))
    only_models = synthetic_results()
    for results, skipped in (
        (only_models, ["tflops_over_length.png"]),
        (only_lengths, ["roofline.png", "speedup_over_density.png", "time_split.png"]),
        (common.Results({"gpu": "made up"}), list(plots.PICTURES)),
    ):
        results.save(tmp_path / "r.json")
        assert plots.main(["--input", str(tmp_path / "r.json"), "--output", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if "skipped: no record" in line] == skipped
        assert len(lines) == len(plots.PICTURES)
