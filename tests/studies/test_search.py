"""Search of the einsum family: what is drawn, who goes on, what the taxonomy tells."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from matrigami.cli._main import group
from matrigami.structures import Einsum, parse
from matrigami.studies import (
    load_search,
    plan_study,
    read_results,
    run_search,
    sampled,
    search_page,
    taxonomy,
)
from matrigami.studies._run import prepare
from matrigami.studies._size import run_size
from matrigami.studies.search._rungs import _study, predicted, survivors, untrained
from matrigami.studies.search._taxonomy import TERMS

BASE = """
[study]
name = "tiny"
[task]
dataset = "digits"
epochs = 1
batch_size = 256
[train]
lr = 3e-3
"""

SEARCH = """
[search]
structures = ["einsum(0, 0, 1, 0, 0, 1, 0)", "einsum(0.5, 0, 0.5, 0, 0.5, 0.5, 0)"]
samples = 3
macs = [3e3, 1e4, 2e4]
keep = [1.0, 0.5]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "search.toml"
    path.write_text(text)
    return path


def test_draws_different_members_with_ranks_up_to_full():
    drawn = sampled(40, seed=3)
    recipes = [parse(text) for text in drawn]
    assert len(set(drawn)) == 40
    for recipe in recipes:
        assert isinstance(recipe, Einsum)
        alpha, beta, _, delta, eps, _, rho = recipe.exponents
        assert max(rho, min(beta, delta)) <= min(alpha, eps)
        assert 0 <= recipe.nu <= 1
        assert 0 <= recipe.omega <= 1
    assert drawn != sampled(40, seed=4)
    assert not set(drawn) & set(sampled(40, seed=3, without=drawn))


def test_every_candidate_gets_the_width_of_about_the_same_compute(tmp_path: Path):
    search = load_search(written(tmp_path, BASE + SEARCH))
    study = _study(search, search.structures[:2], 1e4, None)
    sizes = [run_size(config).macs for config in study.configs]
    assert [config.structure for config in study.configs] == list(search.structures[:2])
    assert all(abs(math.log(size / 1e4)) < 0.4 for size in sizes)
    assert len({config.width for config in study.configs}) > 1


def record(structure: str, macs: float, error: float) -> dict[str, object]:
    return {"structure": structure, "macs": int(macs), "status": "done", "test_error": error}


def test_laws_decide_who_goes_on():
    runs = [record("falls", 10, 8.0), record("falls", 100, 4.0)]
    runs += [record("flat", 10, 5.0), record("flat", 100, 5.0), record("late", 100, 4.5)]
    assert predicted("falls", runs, 1000) == pytest.approx(2.0)
    assert predicted("late", runs, 1000) == 4.5
    assert predicted("absent", runs, 10) == math.inf
    assert survivors(["flat", "falls", "late"], runs, 1000, 0.1) == ["falls", "late"]


def test_taxonomy_finds_the_law_that_made_the_errors(tmp_path: Path):
    search = load_search(written(tmp_path, BASE + SEARCH.replace("samples = 3", "samples = 60")))
    rng, runs = np.random.default_rng(0), []
    for name in search.structures:
        recipe = parse(name)
        for macs in search.macs:
            level = math.exp(0.8 * recipe.omega + 0.5 * (1 - recipe.psi))
            runs.append(
                record(name, macs, 100 * level * macs**-0.2 * math.exp(rng.normal(0, 0.01)))
            )
    result = taxonomy(search, runs)
    terms = result["terms"]["log_error"]
    assert result["macs"] == 1e4
    assert terms["omega"]["value"] == pytest.approx(0.8, abs=0.03)
    assert terms["1 - psi"]["value"] == pytest.approx(0.5, abs=0.05)
    assert terms["nu"]["interval"][0] < 0.02
    assert terms["nu"]["interval"][1] > -0.02
    assert result["terms"]["exponent"]["constant"]["value"] == pytest.approx(0.2, abs=0.02)
    assert [claim.split("'")[2].split(":")[0].strip() for claim in result["claims"][:2]] == [
        "holds",
        "holds",
    ]
    assert result["full"]["ratio"] == pytest.approx(1.0, abs=0.05)
    page = search_page(search, result, {"command": "matrigami study search x", "expected": "Much."})
    assert "Much." in page
    assert page.count("`einsum") == len(search.structures)


def test_a_width_that_is_nearest_to_two_sizes_is_trained_once(tmp_path: Path):
    search = load_search(written(tmp_path, BASE + SEARCH))
    names = search.structures[:2]
    least, second, larger = (_study(search, names, macs, None) for macs in (1.0, 2.0, 2e4))
    assert least.configs == second.configs
    records = [{"id": config.id} for config in least.configs[1:]]
    assert untrained(second, records).configs == second.configs[:1]
    assert untrained(larger, records) == larger


def test_figure_has_all_candidates(tmp_path: Path):
    plots = pytest.importorskip("matrigami.plots")
    search = load_search(written(tmp_path, BASE + SEARCH))
    runs = [
        record(name, macs, 50 * macs**-0.1 + i)
        for i, name in enumerate(search.structures)
        for macs in search.macs
    ]
    path = plots.plot_taxonomy(taxonomy(search, runs), tmp_path / "fig" / "taxonomy.png")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("[search]", "[other]", "no table"),
        ("samples = 3", "sample = 3", "Did you mean 'samples'"),
        ("samples = 3", "samples = -1", "not below 0"),
        ("samples = 3", "samples = 1.5", "wrong type"),
        ("keep = [1.0, 0.5]", "keep = [1.0]", "keep = "),
        ("keep = [1.0, 0.5]", "keep = 1.0", "wrong type"),
        ("[3e3, 1e4, 2e4]", "[3e3, 1e4]", "These do not make a search"),
        ("[3e3, 1e4, 2e4]", "[3e3, 3e3, 3e3]", "These do not make a search"),
        ("[3e3, 1e4, 2e4]", "[-3e3, 1e4, 2e4]", "from 1 on"),
        ("[3e3, 1e4, 2e4]", "[nan, 1e4, 2e4]", "from 1 on"),
        ("[3e3, 1e4, 2e4]", '["3e3", 1e4, 2e4]', "wrong type"),
        ('"einsum(0, 0, 1, 0, 0, 1, 0)"', '"monarch(blocks=4)"', "monarch"),
    ],
)
def test_refuses_what_cannot_be_searched(tmp_path: Path, old: str, new: str, fault: str):
    with pytest.raises(ValueError, match=fault) as error:
        load_search(written(tmp_path, BASE + SEARCH.replace(old, new)))
    assert len(str(error.value).splitlines()) in (2, 3)


@pytest.mark.parametrize("name", ["study.json", "results.csv", "README.md"])
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path, name: str):
    search, out = load_search(written(tmp_path, BASE + SEARCH)), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ValueError, match=f"it has a {name} that is not of a search") as error:
        run_search(search, out)
    assert len(str(error.value).splitlines()) == 2
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]


def test_the_folder_of_another_search_is_refused(tmp_path: Path):
    text, out = BASE + SEARCH.replace("samples = 3", ""), tmp_path / "out"
    search = load_search(written(tmp_path, text))
    other = load_search(written(tmp_path, text.replace("3e-3", "1e-2")))
    prepare(plan_study(_study(other, other.structures, other.macs[0], None)), out / "size_1")
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match="it holds another search") as error:
        run_search(search, out)
    assert len(str(error.value).splitlines()) == 3
    assert "--grow" not in str(error.value)
    assert sorted(out.rglob("*")) == before


def test_what_the_candidates_do_not_tell_is_not_claimed(tmp_path: Path):
    """All share nothing and have full rank, and each ran at one size."""
    named = '"einsum(0, 0.5, 0.5, 0, 0, 1, 0)"'
    text = SEARCH.replace("samples = 3", "samples = 0").replace(
        '"einsum(0, 0, 1, 0, 0, 1, 0)"', named
    )
    search = load_search(written(tmp_path, BASE + text))
    result = taxonomy(search, [record(name, 10, 5.0) for name in search.structures])
    levels, slopes = result["terms"].values()
    for term in (levels["omega"], levels["1 - psi"], *(slopes[key] for key in TERMS)):
        assert all(map(math.isnan, (term["value"], *term["interval"])))
    assert [claim.count("cannot be judged") for claim in result["claims"]] == [1, 1, 0]
    page = search_page(search, result, {"command": "matrigami study search x"})
    assert "| – [–, –] |" in page
    assert "nan" not in page
    with pytest.raises(ValueError, match="none of its 1 runs has an error"):
        taxonomy(search, [record(search.structures[0], 10, 5.0) | {"status": "failed"}])


@pytest.mark.slow
def test_command_trains_halves_reports_and_goes_on(tmp_path: Path):
    spec, out = written(tmp_path, BASE + SEARCH), tmp_path / "out"
    call = ["study", "search", str(spec), "--out", str(out), "--workers", "1", "--json"]
    first = CliRunner().invoke(group, call, catch_exceptions=False)
    result = json.loads(first.stdout, parse_constant=pytest.fail)
    records = read_results(out / "results.csv")
    assert len({record["id"] for record in records}) == len(records)  # also of the least width
    runs = Counter(record["structure"] for record in records)
    assert len(records) > 5
    assert {row["structure"]: len(row["sizes"]) for row in result["candidates"]} == runs
    assert (out / "README.md").read_text().count("`einsum") == 5
    stamps = {path: path.stat().st_mtime for path in out.glob("size_*/runs/*/ckpt/*")}
    assert len(stamps) == len(records)
    again = CliRunner().invoke(group, call, catch_exceptions=False)
    assert json.loads(again.stdout) == result
    assert stamps == {path: path.stat().st_mtime for path in stamps}
