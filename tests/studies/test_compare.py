"""Two studies side by side, a folder that holds another study, and what can be listed."""

import json

import pytest

from matrigami.cli._list import KINDS
from matrigami.cli._main import run
from matrigami.plots import write_comparison
from matrigami.plots._styles import styles
from matrigami.structures import EXAMPLES
from matrigami.studies import (
    MODELS,
    TASKS,
    compare_studies,
    conclusions,
    fit_results,
    load_plan,
    parse_spec,
    plan_study,
    run_study,
    same_structures,
    write_results,
)

SPEC = """
[study]
name = "{name}"
[task]
dataset = "teacher_small"
samples_per_epoch = 100
[train]
lr = {lr}
epochs = 1
batch_size = 50
[[structure]]
name = "dense"
widths = {widths}
"""


def records(factor, structures=("dense", "btt(rank=1)"), dataset="d"):
    """Runs of an exact law, with two seeds a percent apart."""
    return [
        {
            "dataset": dataset,
            "model": "mlp",
            "structure": structure,
            "width": macs,
            "macs": macs,
            "seed": seed,
            "lr": 1e-3,
            "params": macs,
            "train_loss": 1.0,
            "test_loss": 1.0,
            "train_error": factor * (1 + 0.5 * i) * (1 + 0.01 * seed) * 100 * macs**-0.2,
            "test_error": factor * (1 + 0.5 * i) * (1 + 0.01 * seed) * 100 * macs**-0.2,
            "seconds": macs / 1e3,
            "status": "done",
            "examples": 1000,
        }
        for i, structure in enumerate(structures)
        for macs in (100, 1000, 10000)
        for seed in (0, 1)
    ]


def folder(path, rows, name, **settings):
    path.mkdir()
    write_results(path / "results.csv", rows)
    runs = [{"config": {"lr": 1e-3, "epochs": 4} | settings, "size": {}}]
    (path / "study.json").write_text(json.dumps({"name": name, "runs": runs}))
    return path


@pytest.fixture
def two(tmp_path):
    return (
        folder(tmp_path / "a", records(1.0), "first"),
        folder(tmp_path / "b", records(0.8, ("dense", "lowrank")), "second", lr=0.1),
    )


def test_the_ratio_of_a_structure_in_both(two):
    both = compare_studies(*two)
    assert both.names == ("first", "second")
    assert both.settings == {"lr": ("0.001", "0.1")}
    (title, header, rows), test = same_structures(fit_results(both.records), both.names)
    assert title == "d: train error, same structure"
    assert header[1] == "second / first"
    (structure, ratio, interval, apart) = rows[0]
    assert (structure, ratio, apart) == ("dense", "0.800", "yes")
    low, high = map(float, interval.split(" – "))
    assert low < 0.8 < high < 1
    assert test[2][0][1] == "0.800"


def test_all_are_in_one_ranking(two):
    fit = fit_results(compare_studies(*two).records)
    order = [e["structure"] for e in fit["datasets"]["d"]["ranking"]["test_error"]]
    assert order == ["dense · second", "dense · first", "lowrank · second", "btt(rank=1) · first"]


def test_one_colour_for_a_structure_and_hollow_for_the_second_study(two):
    drawn = styles(compare_studies(*two).records)
    first, second = drawn["dense · first"], drawn["dense · second"]
    assert (first.color, first.marker) == (second.color, second.marker)
    assert (first.hollow, second.hollow) == (False, True)
    assert drawn["lowrank · second"].color != drawn["btt(rank=1) · first"].color


def test_one_report_of_both(two, tmp_path):
    page, image = write_comparison(*two, tmp_path / "out")
    text = page.read_text()
    assert "first and second" in text
    assert text.count("<figure") == 3
    assert "setting that differs" in text
    assert image.stat().st_size > 10_000


def test_the_command_prints_the_ratio(two, capsys):
    assert run(["study", "compare", *map(str, two)]) == 0
    assert "second / first" in capsys.readouterr().out
    assert run(["study", "compare", *map(str, two), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["studies"] == ["first", "second"]


def test_studies_of_other_data_are_not_compared(two, tmp_path):
    other = folder(tmp_path / "c", records(1.0, dataset="e"), "third")
    with pytest.raises(
        ValueError, match=r"no dataset in common.\nThe first has d, the second e"
    ) as caught:
        compare_studies(two[0], other)
    assert len(str(caught.value).splitlines()) in (2, 3)


def test_one_name_for_two_files_and_one_folder_twice_are_not_compared(two, tmp_path):
    kinds = [
        folder(tmp_path / h, records(1.0), h, dataset="d", data_hash=h * 16) for h in ("1", "2")
    ]
    with pytest.raises(ValueError, match="d was another file in each"):
        compare_studies(*kinds)
    assert compare_studies(kinds[0], two[1]).names == ("1", "second")
    with pytest.raises(ValueError, match="it is one folder"):
        compare_studies(two[0], two[0])
    (two[1] / "study.json").write_text('{"runs": 3}')
    with pytest.raises(ValueError, match=r"study.json: it is damaged"):
        compare_studies(*two)


# ------------------------------------------------------------------ in words


def test_words_are_those_of_the_ranking():
    rows = records(1.0, ("btt(rank=1)", "dense"))
    words = conclusions(rows, fit_results(rows))
    assert words[0] == (
        "d, train error: at 1.0e+03 MACs btt(rank=1) is the best with 25.2 % against 37.9 % of "
        "dense, which needs 7.6 times the multiply-adds for that."  # 1.5 ** (1 / 0.2)
    )
    assert words[1].endswith("1e+03 microseconds of training an example, btt(rank=1) is the best.")
    assert len(words) == 4


def test_time_may_turn_the_order_round():
    """A structure that takes 100 times as long for its multiply-adds."""
    rows = records(1.0, ("btt(rank=1)", "dense"))
    for r in rows:
        r["seconds"] *= 30 if r["structure"] != "dense" else 1
    words = conclusions(rows, fit_results(rows))
    assert "MACs btt(rank=1) is the best" in words[0]
    assert words[1].endswith("dense is the best.")


def test_words_say_what_is_not_told_apart_and_why_nothing_is_ranked():
    rows = records(1.0)
    for r in rows:
        if r["structure"] != "dense":
            r["train_error"] = r["train_error"] / 1.5 * (1.001 if r["seed"] else 1)
    words = conclusions(rows, fit_results(rows))
    assert "has the lowest error, but is not told apart from" in words[0]
    assert "% against" not in words[0]
    few = [r for r in rows if r["macs"] > 100]
    assert (
        "2 different MACs with a positive error, 3 are needed"
        in conclusions(few, fit_results(few))[0]
    )


def test_words_say_that_dense_does_not_get_there():
    rows = records(1.0, ("btt(rank=1)", "dense"))
    rows = [r for r in rows if r["structure"] != "dense" or r["macs"] < 1e4]
    bad = {"macs": 500, "width": 500, "train_error": 48.0, "test_error": 48.0}
    rows.append(rows[-1] | bad)
    assert "does not get there" in conclusions(rows, fit_results(rows))[0]


# ------------------------------------------------------------------ growing


def plan(name="a", lr=1e-3, widths="[4, 6]"):
    return plan_study(parse_spec(SPEC.format(name=name, lr=lr, widths=widths)))


def trained(out, plan_, **options):
    return run_study(plan_, out, workers=1, threads=1, **options)


def test_a_folder_of_another_study_asks_for_grow(tmp_path, monkeypatch):
    from matrigami.studies import _run

    monkeypatch.setattr(_run, "supervise", lambda *_: None)  # nothing is trained
    trained(tmp_path, plan())
    with pytest.raises(ValueError, match=r"it holds 'a'\.\n2 of its 2 runs") as caught:
        trained(tmp_path, plan("b", lr=1e-2))
    assert "`matrigami study run` has --grow" in str(caught.value)  # a search has none
    assert len(str(caught.value).splitlines()) in (2, 3)
    assert load_plan(tmp_path).name == "a"
    assert trained(tmp_path, plan(widths="[4, 6, 8]")).total == 3  # more of the same is no other
    assert trained(tmp_path, plan("b", lr=1e-2), grow=True).total == 2
    assert len(load_plan(tmp_path).configs) == 5
    assert len({c.id for c in load_plan(tmp_path).configs}) == 5


# ------------------------------------------------------------------ lists


@pytest.mark.parametrize("kind", KINDS)
def test_lists_in_words_and_json(kind, capsys):
    assert run(["list", kind]) == 0
    words = capsys.readouterr().out
    assert run(["list", kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)[kind]
    assert len(words.splitlines()) == len(rows) + 1
    assert all(row["what"] for row in rows)
    known = {"structures": EXAMPLES, "tasks": TASKS, "models": MODELS}.get(kind)
    if known is not None:
        assert [row["name"] for row in rows] == list(known)


def test_an_unknown_list_is_a_wrong_use(capsys):
    assert run(["list", "colours"]) == 2
    assert "structures" in capsys.readouterr().err
