"""Figures and report of a study whose numbers are known."""

import base64
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from matrigami.plots import plot_study, write_report
from matrigami.plots._reference import read_reference
from matrigami.plots._scaling import _compact, exponents_figure, scaling_figure, time_figure
from matrigami.plots._styles import styles
from matrigami.studies import file_hash, fit_results, read_results, write_fit, write_results

EXPONENTS = {"dense": 0.1, "btt(rank=1)": 0.2, "<b>": 0.15}


@pytest.fixture
def folder(tmp_path):
    """Two data sets, three structures (one that HTML would swallow), one run that failed."""
    records = [
        {
            "dataset": dataset,
            "model": "mlp",
            "structure": name,
            "width": width,
            "seed": 0,
            "lr": 1e-3,
            "params": width,
            "macs": 100 * width**2,
            "train_loss": 1.0,
            "test_loss": 1.1,
            "train_error": 300 * (100 * width**2) ** -exponent,
            "test_error": 330 * (100 * width**2) ** -exponent,
            "seconds": 1e-6 * width**2,
            "status": "done",
            "examples": 1000,
        }
        for dataset in ("digits", "cifar100")
        for name, exponent in EXPONENTS.items()
        for width in (16, 32, 64, 128)
    ]
    bad = records[0] | {"width": 512, "status": "failed", "cause": "the loss was nan"}
    bad |= {"train_error": None, "test_error": None}
    write_results(tmp_path / "results.csv", [*records, bad])
    write_fit(tmp_path / "fit.json", fit_results(records, resamples=50))
    return tmp_path


def test_figures_are_written_and_say_where_they_come_from(folder):
    paths = plot_study(folder, command="matrigami study run mine.toml")
    names = ["scaling.png", "scaling.svg", "time.png", "exponents.png"]
    assert [p.name for p in paths] == names
    assert sorted(p.name for p in (folder / "fig").iterdir()) == sorted(names)
    for path in paths:
        content = path.read_bytes()
        start = b"\x89PNG" if path.suffix == ".png" else b"<?xml"
        assert content.startswith(start)
        assert file_hash(folder / "results.csv").encode() in content
        assert b"matrigami study run mine.toml" in content
    assert ET.fromstring((folder / "fig" / "scaling.svg").read_bytes()).tag.endswith("svg")


def test_train_and_test_share_their_scale_and_show_every_run(folder):
    records = done(folder)
    figure = scaling_figure(records, fit_results(records, resamples=5))
    train, test = figure.axes[:2]
    assert [ax.get_title() for ax in figure.axes[:2]] == ["cifar100: train", "cifar100: test"]
    assert train.get_ylim() == test.get_ylim()
    assert train.get_xlim() == test.get_xlim()
    assert (train.get_xscale(), train.get_yscale()) == ("log", "log")
    lines = {line.get_label(): line.get_xydata() for line in train.get_lines()}
    x, y = lines["btt(rank=1)"].T
    assert len(x) == 4
    slope = np.polyfit(np.log(x), np.log(y), 1)[0]
    assert slope == pytest.approx(-EXPONENTS["btt(rank=1)"])


def done(folder):
    """The finished runs of the study."""
    return [r for r in read_results(folder / "results.csv") if r["status"] == "done"]


def test_legends_have_the_letters_of_their_row_and_a_line_where_they_hold(folder):
    records = [r | {"train_error": 50.0 + r["width"] % 3} for r in done(folder)]
    fit = fit_results(records, resamples=50)
    figure = scaling_figure(records, fit)
    legends = [part.legends[0] for part in figure.subfigs]
    assert len(legends) == 2
    texts = [t.get_text() for t in legends[0].get_texts()]
    assert texts == ["<b> (a, b)", "btt(rank=1) (a, a)", "dense (a, c)"]
    assert "a shared one means not told apart" in legends[0].get_title().get_text()
    macs = fit["datasets"]["cifar100"]["compute"]["test_error"]["macs"]
    dotted = [line for line in figure.axes[1].get_lines() if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [macs]


def test_an_error_of_zero_stands_on_the_floor_and_says_0(folder):
    records = done(folder)
    for r in records:
        if r["dataset"] == "digits" and r["structure"] == "dense" and r["width"] == 128:
            r["train_error"] = 0.0
    figure = scaling_figure(records, fit_results(records, resamples=5))
    figure.canvas.draw()
    axes = {ax.get_title(): ax for ax in figure.axes}
    ax = axes["digits: train"]
    zeros = [
        line for line in ax.get_lines() if line.get_linestyle() == "None" and 0 in line.get_ydata()
    ]
    assert [line.get_xydata().tolist() for line in zeros] == [[[100.0 * 128**2, 0.0]]]
    height = zeros[0].get_transform().transform((1e6, 0))[1]
    assert height == pytest.approx(ax.get_window_extent().y0)
    assert "0" in [text.get_text() for text in ax.texts]
    assert not axes["digits: test"].texts
    assert not axes["cifar100: train"].texts
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert len(lines["dense"]) == 3
    assert min(lines["dense"]) > 0


def test_a_law_with_an_offset_is_dashed_and_its_offset_named(folder):
    base = done(folder)[0]
    records = [
        base | {"macs": m, "width": int(m), "train_error": e, "test_error": e}
        for m in np.logspace(5, 8, 7)
        for e in [20 + 2000 * m**-0.3]
    ]
    records += [base | {"structure": "two", "macs": m, "train_error": m**-0.1} for m in (1e4, 1e5)]
    fit = fit_results(records, resamples=5)
    figure = scaling_figure(records, fit)
    dashed = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
    x, y = dashed[0].get_xydata().T
    assert y == pytest.approx(20 + 2000 * x**-0.3)
    assert "dashed: with offset E" in figure.subfigs[0].legends[0].get_title().get_text()
    words = [text.get_text() for text in exponents_figure(fit).axes[0].texts]
    assert words.count("E = 20 %") == 2
    assert "not enough sizes" in words


def test_ticks_of_a_short_axis_have_labels_of_their_own():
    assert [_compact(v) for v in (600, 650, 700, 2e5)] == ["6e2", "6.5e2", "7e2", "2e5"]


def test_structures_differ_in_colour_and_marker():
    names = [{"structure": f"tt(rank={i})"} for i in range(9)] + [{"structure": "dense"}]
    drawn = styles(names)
    assert drawn["dense"].color == "#000000"
    assert len({s.color for s in drawn.values()}) == len({s.marker for s in drawn.values()}) == 10


def test_a_legend_of_six_structures_stays_inside_a_narrow_figure():
    names = ("btt(rank=1)", "monarch(blocks=4)", "dense", "lowrank", "tt(rank=16)", "kronecker")
    records = [
        {"dataset": "a", "structure": n, "macs": m, "seconds": m, "examples": 1}
        for n in names
        for m in (10, 100)
    ]
    figure = time_figure(records)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_published_points_are_drawn_hollow(folder):
    path = folder / "published.csv"
    path.write_text(
        "dataset,model,structure,width,macs_per_example_fwd,train_error_pct,test_error_pct\n"
        "cifar100,MLP,BTT,512,591872,58.66,59.48\ncifar100,MLP,Unknown,1,5,6,7\n"
    )
    published = read_reference(path)
    assert published[0]["structure"] == "btt(rank=1)"
    records = [r for r in read_results(folder / "results.csv") if r["status"] == "done"]
    figure = scaling_figure(records, fit_results(records, resamples=5), published)
    hollow = [
        tuple(line.get_xydata()[0])
        for ax in figure.axes
        for line in ax.get_lines()
        if line.get_markerfacecolor() == "none"
    ]
    assert hollow == [(591872.0, 58.66), (591872.0, 59.48)]
    assert len(plot_study(folder, reference=path)) == 4
    path.write_text("dataset,structure\ncifar100,BTT\n")
    with pytest.raises(ValueError, match="a row has macs = None"):
        read_reference(path)
    path.write_text("")
    with pytest.raises(ValueError, match="it has no row"):
        read_reference(path)
    path.write_text("dataset,structure,macs,train_error,test_error\nd,dense,5,two,6\n")
    with pytest.raises(ValueError, match="could not convert"):
        read_reference(path)


def test_a_table_of_results_with_a_failed_run_is_a_reference(folder):
    rows = read_results(folder / "results.csv")
    good = [row for row in rows if row["status"] == "done"]
    assert len(read_reference(folder / "results.csv")) == len(good) < len(rows)


def test_the_report_is_one_file_that_needs_no_other(folder):
    (folder / "env.json").write_text(json.dumps({"command": "matrigami study run", "cores": 2}))
    page = write_report(folder).read_text()
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == 3
    assert all(ET.fromstring(base64.b64decode(i)).tag.endswith("svg") for i in images)
    outside = re.sub(r'src="data:[^"]+"', "", page)
    assert not re.search(r"https?://|<link|@import|src=", outside)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<tr>") > 25
    assert "the loss was nan" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "24 done, 1 failed" in page
    assert "Structures that share a letter are not told apart" in page
    assert re.findall(r"<td class=number>(\d [a-z]+)</td>", page) == ["1 a", "2 b", "3 c"] * 4
    assert "$" not in re.sub(r"\$\{", "", outside)


def test_a_study_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        plot_study(tmp_path)
    write_results(tmp_path / "results.csv", [])
    with pytest.raises(ValueError, match="no finished run"):
        plot_study(tmp_path)
    assert not (tmp_path / "fig").exists()
