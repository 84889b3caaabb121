"""The comparison of a study with the published points."""

import pytest

from benchmarks import study_page
from benchmarks.published import NAMES, agreement, at, page, published_curves
from matrigami.studies import fit_results


def test_published_points_are_read_and_interpolated():
    curves = published_curves()
    assert set(curves) == set(NAMES.values())
    assert at(curves["Dense"], 301312) == pytest.approx(74.96)
    assert 58.7 < at(curves["BTT"], 4e5) < 67.1  # between the widths 256 and 512
    assert at(curves["Dense"], 1e3) is None


def test_pairs_in_the_same_order_are_counted():
    assert agreement(["a", "b", "c"], ["a", "b", "c"]) == (3, 3)
    assert agreement(["b", "a", "c"], ["a", "b", "c"]) == (2, 3)
    assert agreement(["a", "x"], ["a", "b"]) == (0, 0)


def test_a_page_says_what_was_found_and_how():
    texts = ("btt(rank=1)", "monarch(blocks=4)", "dense", "lowrank", "tt(rank=16)", "kronecker")
    records = [
        {
            "dataset": "cifar100",
            "structure": text,
            "width": int(macs**0.5),
            "seed": seed,
            "macs": macs,
            "status": "done",
            "epochs": 20,
            "cpu_seconds": 200.0,
            "train_error": (50 + 5 * rank + 0.1 * seed) * (macs / 5e5) ** -0.1,
            "test_error": (60 + 3 * rank + 0.1 * seed) * (macs / 5e5) ** -0.05,
        }
        for rank, text in enumerate(texts)
        for macs in (3e5, 6e5, 2e6)
        for seed in (0, 1)
    ]
    env = {
        "command": "matrigami study run --preset cifar100_small --out runs/c",
        "cpu": "a processor",
        "cores": 2,
        "device": "cpu",
        "workers": 2,
        "versions": {"torch": "2.13.0"},
    }
    text = page(fit_results(records, resamples=50), env, records)
    assert "Ours: BTT < Monarch < Dense < LowRank < TT < Kron." in text
    assert "15 of 15 pairs" in text
    assert [f"| {i} {x} | `" in text for i, x in enumerate("abcdef", 1)] == [True] * 6
    assert "36 runs, 120 minutes" in text
    assert "# CIFAR-100, MLP, 20 epochs" in text
    assert "matrigami study run --preset cifar100_small --out runs/c" in text
    assert "0.100" in text  # the exponent that the errors were made with
    assert text.count("| 3 | 2 |") == 6  # sizes and seeds


def test_the_page_of_a_study_has_its_seconds_and_what_is_missing():
    records = [
        {
            "dataset": "text",
            "structure": structure,
            "width": int(macs),
            "seed": 0,
            "macs": macs,
            "status": "done",
            "examples": 1000,
            "cpu_seconds": 3.0,
            "seconds": 3.0,
            "train_error": error * macs**-0.1,
            "test_error": error * macs**-0.1,
            "test_loss": 1.5,
        }
        for structure, error in (("dense", 90.0), ("lowrank", 80.0))
        for macs in (1000, 2000, 4000)
    ]
    env = {"command": "matrigami study run", "cores": 2, "versions": {"torch": "2"}}
    text = study_page.page("small", 8, fit_results(records), env, records)
    assert "2 of the 8 runs of the preset were not trained" in text
    assert "```sh\nmatrigami study run\n" in text
    assert "| `lowrank` | 2000 | 0 | 2.00e+03 | 3000 |" in text
    assert "text, test error: at 2.0e+03 MACs lowrank is the best" in text
