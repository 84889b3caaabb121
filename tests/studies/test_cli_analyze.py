"""`matrigami analyze`: sources, resumption, report, and what it refuses."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from scipy.io import mmwrite
from scipy.sparse import diags_array

from matrigami.cli._main import run
from matrigami.studies import file_sources, preset_sources
from matrigami.studies.analysis import _folder

FAST = ["--draws", "2"]


@pytest.fixture(autouse=True)
def few_structures(monkeypatch):
    """What is compared has tests of its own."""
    whole = _folder.analyze
    names = ["low_rank", "hodlr", "monarch"]
    monkeypatch.setattr(_folder, "analyze", lambda A, **k: whole(A, structures=names, **k))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of matrices of all kinds, small ones."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "points.npy", rng.random((32, 1)))
    np.savetxt(tmp_path / "points.csv", rng.random((20, 2)), delimiter=",")
    np.save(tmp_path / "nan.npy", np.full((20, 20), math.nan))
    np.save(tmp_path / "stack.npy", rng.random((2, 20, 20)))
    np.save(tmp_path / "wide.npy", rng.random((1, 20)))
    np.save(tmp_path / "complex.npy", 1j * rng.random((20, 20)))
    np.save(tmp_path / "zero.npy", np.zeros((20, 20)))
    np.save(tmp_path / "words.npy", np.full((20, 20), "x"))
    np.save(tmp_path / "far.npy", np.array([[0.0, math.nan]]))
    np.save(tmp_path / "four.npy", rng.random((20, 4)))
    np.save(tmp_path / "twins.npy", np.zeros((20, 2)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "nan.npy").read_bytes()[:200])
    (tmp_path / "nonsense.npy").write_bytes(b"nonsense")
    (tmp_path / "torn.mtx").write_text(
        "%%MatrixMarket matrix coordinate real general\n3 3 9\n1 1 2\n"
    )
    (tmp_path / "none.csv").write_text("")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    T = diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(24, 24))
    mmwrite(tmp_path / "chain.mtx", T)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    model = tmp_path / "model"
    model.mkdir()
    weights = {
        "layer.weight": torch.randn(20, 24, dtype=torch.float32),
        "layer.bias": torch.zeros(20),
        "conv.weight": torch.randn(16, 3, 3, 3, dtype=torch.float32),
    }
    save_file(weights, model / "model.safetensors")
    return tmp_path


def test_a_kernel_of_points_as_json_then_again(folder, capsys, monkeypatch):
    out = folder / "out"
    command = ["analyze", "--kernel", "matern12", "--points", str(folder / "points.npy"), *FAST]
    assert run([*command, "-o", str(out), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["refused"] == {}
    orders = first["matrices"][0]["findings"][1]["errors"]
    assert set(orders) == {"given", "random", "geometric", "pca", "gram", "rcm"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (out / "gains.csv").read_text().startswith("matrix,rows,columns,structure,order")
    monkeypatch.setattr(_folder, "analyze", lambda *a, **k: pytest.fail("analysed again"))
    assert run([*command, "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_an_interrupted_model_goes_on_and_other_options_begin_anew(folder, capsys, monkeypatch):
    out, whole = folder / "out", _folder.analyze
    monkeypatch.setattr("matrigami.plots._analysis._analysis_figure", lambda found: Figure())
    command = ["analyze", str(folder / "model"), "-o", str(out), *FAST]
    names = []

    def until(A, **options):
        names.append(options["name"])
        if len(names) == 2:
            raise KeyboardInterrupt
        return whole(A, **options)

    monkeypatch.setattr(_folder, "analyze", until)
    assert run(command) == 130
    assert "Go on with" in capsys.readouterr().err
    assert run(command) == 0
    assert names == ["conv.weight", "layer.weight", "layer.weight"]
    text = capsys.readouterr().out
    assert "16x27" in text
    assert "reshaped from (16, 3, 3, 3)" in (out / "report.html").read_text()
    assert run([*command, "--largest", "16"]) == 0
    assert names[3:] == ["conv.weight", "layer.weight"]
    assert "leading 16x16 corner of 20x24" in (out / "report.html").read_text()


def test_what_files_hold(folder):
    (chain,) = file_sources(folder / "chain.mtx")
    A, _ = chain.read()
    assert chain.shape == (24, 24)
    assert torch.equal(A.diagonal(), torch.full((24,), 2.0))
    assert [s.name for s in file_sources(folder / "model")] == ["conv.weight", "layer.weight"]


def test_of_what_is_huge_the_corner_is_filled_alone(folder, capsys):
    n = 100_000
    T = diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    mmwrite(folder / "long.mtx", T)
    np.save(folder / "cloud.npy", np.random.default_rng(0).random((5000, 2)))
    out = ["-o", str(folder / "out"), "--largest", "24", "--json", *FAST]
    assert run(["analyze", str(folder / "long.mtx"), *out]) == 0
    (found,) = json.loads(capsys.readouterr().out)["matrices"]
    assert found["notes"] == [f"leading 24x24 corner of {n}x{n}"]
    cloud = ["--kernel", "gaussian", "--points", str(folder / "cloud.npy")]
    assert run(["analyze", *cloud, *out]) == 0
    (found,) = json.loads(capsys.readouterr().out)["matrices"]
    said = re.search(r"H2Matrix of \d+ numbers, a product has the error (.*)", found["notes"][-1])
    assert said
    assert float(said[1]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nan.npy"], "400 of 400 entries"),
        (["stack.npy"], "array of shape (2, 20, 20)"),
        (["objects.npy"], "nothing is unpickled"),
        (["wide.npy"], "shape (1, 20)"),
        (["complex.npy"], "complex array"),
        (["zero.npy"], "All are zero"),
        (["words.npy"], "no numbers"),
        (["cut.npy"], "cannot be read"),
        (["nonsense.npy"], "nothing is unpickled"),
        (["torn.mtx"], "cannot be read"),
        (["--kernel", "laplace", "--points", "far.npy"], "are NaN, infinite"),
        (["--kernel", "laplace", "--points", "four.npy"], "1, 2 or 3 coordinates"),
        (["--kernel", "laplace", "--points", "twins.npy"], "20 points coincide"),
        (["--kernel", "laplace", "--points", "complex.npy"], "cannot be read"),
        (["--kernel", "laplace", "--points", "none.csv"], "cannot be read"),
        (["--kernel", "rbf", "--points", "points.npy", "--scale", "0"], "Give a positive number"),
        (["none.npy"], "no such file"),
        (["notes.txt"], "'.txt' are not read"),
        (["empty"], "no .safetensors file"),
        (["--kernel", "laplce", "--points", "points.npy"], "Did you mean 'laplace'?"),
        (["--kernel", "laplace", "--points", "none.npy"], "cannot be read"),
        (["--preset", "hpc"], "Did you mean 'hpc_vs_ai'?"),
        (["--preset", "hpc_vs_ai", "--data-dir", "empty"], "matrigami data get cifar100"),
        (["--preset", "hpc_vs_ai", "--model", "empty"], "config.json cannot be read"),
    ],
)
def test_what_it_refuses(folder, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(folder)
    assert run(["analyze", *arguments, "-o", "out", *FAST]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len([line for line in error.splitlines() if " · " not in line]) in {2, 3}


def test_a_matrix_that_would_not_fit_is_named_and_the_others_go_on(folder, capsys, monkeypatch):
    def small(m: int, n: int) -> None:
        if m == 16:
            raise ValueError(f"{m}x{n} does not fit.\nNothing is free.\nUse a corner.")

    monkeypatch.setattr(_folder, "check_memory", small)
    command = ["analyze", str(folder / "model"), "-o", str(folder / "out"), *FAST]
    assert run([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found["refused"]) == ["conv.weight"]
    assert [m["matrix"] for m in found["matrices"]] == ["layer.weight"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["a.npy", "--preset", "hpc_vs_ai"], ["--kernel", "rbf"], ["a.npy", "--data-dir", "."]],
)
def test_one_source_is_needed(arguments, tmp_path, capsys):
    assert run(["analyze", *arguments, "-o", str(tmp_path)]) == 2
    assert "--p" in capsys.readouterr().err


@pytest.mark.parametrize("source", [["a.npy"], ["--preset", "hpc_vs_ai"]])
def test_a_scale_without_a_kernel_is_refused(source, tmp_path, capsys):
    assert run(["analyze", *source, "--scale", "2", "-o", str(tmp_path / "out")]) == 2
    assert "--scale divides the distances" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_preset_has_three_sizes_of_each_and_what_it_says():
    sources = preset_sources("hpc_vs_ai")
    kinds = [s.name.rsplit(" · ", 1)[0] for s in sources]
    assert {kinds.count(kind) for kind in kinds} == {3}
    chosen = {s.name: s for s in sources}
    for name in ("Schur complement 3-D · 64", "Green's function 2-D · 64", "laplace sphere · 128"):
        A, points = chosen[name].read()
        assert tuple(A.shape) == chosen[name].shape
        assert len(points) == len(A)
        torch.testing.assert_close(A, A.T)
    L, _ = chosen["Laplacian 2-D · 64"].read()
    G, _ = chosen["Green's function 2-D · 64"].read()
    torch.testing.assert_close(L @ G, torch.eye(64, dtype=torch.float64))
