"""Letters, sizes and seeds, zeros: what a ranking may say and what it may not."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from matrigami.studies import fit_results, fit_tables
from matrigami.studies._fit_rank import compare, curve, letters
from tests.studies.test_fit import law, record

SIZES = (1e4, 1e5, 1e6)


def steps(levels, *, noise=0.01, seeds=(0, 1, 2)):
    """Structures whose log errors differ by given amounts."""
    return [
        r
        for i, (name, level) in enumerate(levels.items())
        for r in law(name, 100 * np.exp(level), 0.2, noise=noise, seeds=seeds, rng=i)
    ]


@pytest.mark.parametrize(
    ("order", "differ", "expected"),
    [
        ("xyz", [], ["a", "a", "a"]),
        ("xyz", ["xz"], ["a", "ab", "b"]),
        ("xyz", ["xy", "xz", "yz"], ["a", "b", "c"]),
        ("xyz", ["xy"], ["a", "b", "ab"]),
        ("wxyz", ["wy", "wz", "xz"], ["a", "ab", "bc", "c"]),
        ("wxyz", ["wx", "yz"], ["ab", "cd", "ac", "bd"]),
        ("x", [], ["a"]),
    ],
)
def test_letters_are_compact(order, differ, expected):
    assert list(letters(order, [tuple(pair) for pair in differ]).values()) == expected


def test_letters_are_shared_exactly_where_nothing_differs():
    names = [f"s{i}" for i in range(7)]
    for trial in range(50):
        rng = np.random.default_rng(trial)
        differ = [p for p in combinations(names, 2) if rng.random() < 0.5]
        marks = letters(names, differ)
        for a, b in combinations(names, 2):
            assert bool(set(marks[a]) & set(marks[b])) == ((a, b) not in differ)


def test_ties_are_not_chained():
    """Each step is within the noise; the first and the last are far apart."""
    runs = steps({name: 0.008 * i for i, name in enumerate("abcdef")})
    fit = fit_results(runs)["datasets"]["d"]
    ranking = fit["ranking"]["train_error"]
    assert [e["rank"] for e in ranking] == [1, 2, 3, 4, 5, 6]
    first, last = set(ranking[0]["letters"]), set(ranking[-1]["letters"])
    assert not first & last
    neighbours = [bool(set(p["letters"]) & set(q["letters"])) for p, q in pairwise(ranking)]
    assert all(neighbours)
    assert any(len(e["letters"]) > 1 for e in ranking)


def test_two_share_no_letter_if_and_only_if_their_interval_excludes_one():
    runs = steps({"a": 0.0, "b": 0.015, "c": 0.03, "d": 0.3})
    fit = fit_results(runs)["datasets"]["d"]
    marks = {e["structure"]: e["letters"] for e in fit["ranking"]["train_error"]}
    errors = {e["structure"]: e["error"] for e in fit["ranking"]["train_error"]}
    pairs = fit["comparisons"]["train_error"]
    assert len(pairs) == 6
    for p in pairs:
        low, high = p["interval"]
        assert p["ratio"] == pytest.approx(errors[p["worse"]] / errors[p["better"]])
        assert low < p["ratio"] < high
        assert p["differ"] == (low > 1)
        assert p["differ"] == (not set(marks[p["better"]]) & set(marks[p["worse"]]))
    assert "d" not in [p["worse"] for p in pairs if not p["differ"]]


def test_intervals_of_pairs_are_those_of_the_largest_normal_difference():
    """Tukey's studentised range of 3 at infinite degrees of freedom: 3.3145."""
    rng = np.random.default_rng(0)
    shifts = {name: rng.normal(size=200_000) for name in "abc"}
    pairs = compare("abc", {"a": 0.0, "b": 1.0, "c": 5.0}, shifts)
    half = [np.log(p["interval"][1] / p["interval"][0]) / 2 for p in pairs]
    assert half == pytest.approx([3.3145] * 3, rel=0.01)
    assert [p["differ"] for p in pairs] == [False, True, True]
    assert compare("a", {"a": 0.0}, {"a": shifts["a"]}) == []


def test_equal_structures_are_rarely_told_apart():
    wrong = 0
    for trial in range(60):
        runs = [
            r
            for i, name in enumerate("abcde")
            for r in law(name, 100.0, 0.2, noise=0.03, seeds=(0, 1), rng=100 * trial + i)
        ]
        pairs = fit_results(runs, resamples=300)["datasets"]["d"]["comparisons"]["test_error"]
        wrong += any(p["differ"] for p in pairs)
    assert wrong <= 8  # 3 are expected; 8 or fewer in 99.6 % of cases


def test_sizes_of_equal_macs_are_no_seeds():
    """A wide and a narrow network of equal cost differ by 20 %; seeds differ by 1 %."""
    runs = [
        record("a", m, 100 * m**-0.2 * f * (1 + 0.01 * s), seed=s, width=w)
        for m in SIZES
        for w, f in ((64, 1.0), (128, 1.2))
        for s in (0, 1)
    ]
    sizes = curve(runs, "train_error")
    assert sizes.seeds.tolist() == [2] * 6
    assert sizes.widths == [64, 128] * 3
    fit = fit_results(runs, resamples=300)["datasets"]["d"]
    noise = fit["noise"]["train_error"]
    assert (noise["source"], noise["degrees"]) == ("seeds", 6)
    assert noise["between_seeds"] == pytest.approx(np.log(1.01) / 2**0.5)
    assert noise["around_laws"] == pytest.approx(np.log(1.2) / 2 * (12 / 10) ** 0.5, rel=0.01)
    found = fit["structures"]["a"]["train_error"]
    assert (found["points"], found["sizes"], found["seeds"]) == (12, 6, [2, 2])
    (entry,) = fit["ranking"]["train_error"]
    assert entry["error"] == pytest.approx(10 * (1.2 * 1.01) ** 0.5)  # sizes at 1e5 count alike


def test_a_seed_that_comes_twice_is_another_setting():
    runs = [record("a", 1e4, 10.0), record("a", 1e4, 20.0)]
    assert curve(runs, "train_error").seeds.tolist() == [1, 1]
    runs = [record("a", 1e4, 10.0), record("a", 1e4, 20.0) | {"lr": 0.1, "seed": 1}]
    assert curve(runs, "train_error").seeds.tolist() == [1, 1]
    runs[1] = record("a", 1e4, 20.0, seed=1)
    assert curve(runs, "train_error").seeds.tolist() == [2]


def test_zeros_are_left_out_of_law_and_rank_and_said():
    runs = law("a", 100.0, 0.2, sizes=(1e4, 1e5, 1e6, 1e7)) + law("b", 90.0, 0.2)
    runs += [record("a", 1e8, 0.0), record("a", 1e8, 0.0, seed=1)]
    result = fit_results(runs, resamples=50)
    fit = result["datasets"]["d"]
    found = fit["structures"]["a"]["train_error"]
    assert (found["points"], found["zeros"], found["zero_macs"]) == (4, 2, [1e8, 1e8])
    assert found["exponent"] == pytest.approx(0.2)
    assert fit["compute"]["train_error"]["range"] == pytest.approx([1e4, 1e6])
    _, header, rows, notes = fit_tables(result)[0]
    assert [row[header.index("zeros")] for row in rows] == [0, 2]
    assert (
        "a: 2 of 6 runs have an error of 0 and are left out of law and rank, at 1e+08 MACs."
        in notes
    )


def test_fewer_than_three_sizes_have_no_rank():
    runs = law("a", 100.0, 0.2) + law("b", 90.0, 0.2) + law("c", 1.0, 0.2, sizes=(1e2, 1e3))
    result = fit_results(runs, resamples=50)
    fit = result["datasets"]["d"]
    assert [e["structure"] for e in fit["ranking"]["train_error"]] == ["b", "a"]
    assert fit["compute"]["train_error"]["range"] == pytest.approx([1e4, 1e6])
    assert fit["unranked"]["train_error"]["c"].startswith("not enough sizes: 2 different MACs")
    assert fit["structures"]["c"]["train_error"]["interval"] is None
    rows = fit_tables(result)[0][2]
    assert [row[:3] for row in rows][2] == ["–", "c", "–"]


def test_a_structure_without_a_law_does_not_stop_the_others():
    runs = law("a", 100.0, 0.2, noise=0.01) + law("flat", 50.0, 0.0)
    runs += [record("once", 1e5, 10.0), record("a", 1e7, float("nan"))]
    result = fit_results(runs, resamples=50)
    fit = result["datasets"]["d"]
    laws = {name: both["train_error"] for name, both in fit["structures"].items()}
    assert (laws["flat"]["exponent"], laws["flat"]["reason"]) == (None, "all are 50")
    assert laws["once"]["reason"] == "not enough sizes, 1 run, all of 100000 MACs"
    assert laws["a"]["broken"] == 1
    assert [e["structure"] for e in fit["ranking"]["train_error"]] == ["a", "flat"]
    notes = fit_tables(result)[0][3]
    assert "flat has no law: all are 50." in notes
    assert "a: runs without a finite error are left out, 1 in all." in notes


def test_tables_show_ranks_with_letters_laws_and_counts():
    sizes = np.logspace(5, 8, 7)
    runs = [record("bends", m, 20 + 2000 * m**-0.3) for m in sizes]
    runs += law("plain", 400.0, 0.1, sizes=sizes)
    title, header, rows, notes = fit_tables(fit_results(runs, resamples=20))[0]
    assert title == "d: train error at 3.16e+06 MACs"
    table = {row[1]: dict(zip(header, row, strict=True)) for row in rows}
    assert [row[0] for row in rows] == ["1 a", "2 b"]
    assert table["bends"]["law"] == "E + c·x^-a"
    assert table["bends"]["E %"] == "20.00"
    assert table["bends"]["exponent"] == "0.300 [0.300, 0.300]"
    assert float(table["bends"]["ΔAICc"]) > 100
    assert (table["plain"]["law"], table["plain"]["E %"]) == ("c·x^-a", "–")
    assert (table["plain"]["sizes"], table["plain"]["seeds"], table["plain"]["zeros"]) == (
        7,
        "1",
        0,
    )
    assert notes[0].startswith("Structures that share a letter are not told apart")


def test_halves_of_the_sizes_are_shown_where_an_offset_cannot_be_judged():
    runs = [record("a", m, y) for m, y in zip(SIZES, (40.0, 20.0, 16.0), strict=True)]
    notes = fit_tables(fit_results(runs, resamples=20))[0][3]
    assert any("upper half of the sizes: a 0.301 → 0.097." in note for note in notes)
