"""`matrigami curvature`: tables and JSON of a run and of a function, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from matrigami.cli._main import run
from matrigami.studies import RunConfig, train_run

MODEL = """
import torch
from torch import nn

def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(20, 5, dtype=torch.float64)
    return model, nn.CrossEntropyLoss(), (x, torch.arange(20) % 3)

def half():
    return made()[:2]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def test_a_function_as_json(file, capsys):
    assert run(["curvature", f"{file}:made", "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 39
    assert [b["parameters"] for b in found["blocks"]] == [24, 15]
    assert found["trace"] == pytest.approx(sum(b["trace"] for b in found["blocks"]))
    for block in found["blocks"]:
        errors = {name: e["frobenius"] for name, e in block["errors"].items()}
        assert errors["kfoc"] <= errors["kfac"]
        assert errors["ekfac"] <= errors["kfac"]
        assert len(block["top_eigenvalues"]) == 2
    assert found["top_eigenvalues"][0] >= max(b["top_eigenvalues"][0] for b in found["blocks"]) / 2


def test_a_function_as_table_with_a_figure(file, tmp_path, capsys):
    figure = tmp_path / "errors.png"
    assert run(["curvature", f"{file}:made", "--largest", "20", "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "0.weight+0.bias" in out
    assert "more parameters than --largest" in out
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("labels", ["3", "empirical"])
def test_other_labels(file, labels, capsys):
    assert run(["curvature", f"{file}:made", "--labels", labels, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == labels


def test_a_run_of_a_study(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    config = RunConfig(
        "digits", "mlp", "monarch(blocks=4)", 16, seed=0, lr=3e-3, epochs=1, batch_size=256, depth=1
    )
    train_run(config, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    command = ["curvature", str(tmp_path), "--examples", "32", "--largest", "100", "--json"]
    assert run(command) == 0
    blocks = {"+".join(b["block"]): b for b in json.loads(capsys.readouterr().out)["blocks"]}
    assert blocks["blocks.0.expand.left"]["matrices"] == 4
    assert blocks["blocks.0.norm.weight+blocks.0.norm.bias"]["matrices"] == 16


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "no such folder"),
        ("{file}:missing", "was not found"),
        ("no_such_module:made", "was not found"),
        ("{file}:half", "should return a model, a loss and data"),
        ("{folder}", "no config.json"),
    ],
)
def test_what_it_refuses(file, model, message, capsys):
    assert run(["curvature", model.format(file=file, folder=file.parent)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) in (2, 3)


@pytest.mark.parametrize("figure", ["errors.xyz", "nowhere/errors.png"])
def test_a_figure_that_cannot_be_written_is_refused_before_the_work(figure, capsys):
    assert run(["curvature", "never_imported:made", "--figure", figure]) == 2
    assert f"--figure {figure}: " in capsys.readouterr().err


def test_an_unknown_kind_of_labels(file, capsys):
    assert run(["curvature", f"{file}:made", "--labels", "type2"]) == 2
    assert "labels is 'exact', 'empirical', 'examples' or a number" in capsys.readouterr().err
