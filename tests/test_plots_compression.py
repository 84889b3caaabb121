"""Figures of compression whose numbers are known."""

import pytest

from matrigami.compress import CompressionPlan, Option

pytest.importorskip("matplotlib", reason="needs the extra plots")

from matrigami.plots import SizePoint, plot_plan, plot_sizes
from matrigami.plots._compression import _apart, frontier


def plan():
    """Two layers, of which the first is four times as sensitive; 2 and 4 bits."""
    options = {
        name: [
            Option(name, "2", 0.4 * weight, 0.1, 25.0, 100, 0),
            Option(name, "4", 0.01 * weight, 0.1, 50.0, 100, 1),
        ]
        for name, weight in (("model.a", 4.0), ("model.b", 1.0))
    }
    return CompressionPlan(["2", "4"], options, {"model.a": (400, 100), "model.b": (400, 100)})


def test_the_best_mixture_spends_bits_where_they_count(tmp_path):
    line = list(frontier(plan()))
    assert line[0] == pytest.approx((50 / 800, 2.0))
    assert line[-1] == pytest.approx((100 / 800, 0.05))
    mixed = {round(size, 4): loss for size, loss in line}
    assert mixed[round(75 / 800, 4)] == pytest.approx(0.04 + 0.4)  # 4 bits for the first
    assert plot_plan(plan(), tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    unknown = plan()
    unknown.options["model.a"] = [Option("model.a", "2", float("nan"), 0.1, 25.0, 100, 0)]
    assert list(frontier(unknown)) == []


def test_sizes_and_names(tmp_path):
    points = [
        SizePoint("bits", "both", size, loss, 0.9 * loss, 1.1 * loss)
        for size, loss in ((0.1, 1.0), (0.2, 0.1))
    ]
    points.append(SizePoint("structure", "low rank", 0.5, 3.0, 3.0, 3.0))
    path = plot_sizes(points, tmp_path / "sizes.svg", title="sizes")
    text = path.read_text()
    assert text.startswith("<?xml")
    assert all(f"<!-- {word} -->" in text for word in ("bits", "structure", "both", "low rank"))
    assert _apart(["model.a.q", "model.a.k", "model.b.q"]) == ["a.q", "a.k", "b.q"]
    assert _apart(["0"]) == ["0"]
