"""The command line: in process where that is enough, as a process where signals count."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from matrigami.cli._main import VERBS, run
from matrigami.studies import load_spec, plan_study, read_results
from matrigami.studies._run import collect, prepare
from matrigami.studies._worker import Job, work

ROOT = Path(__file__).parent.parent.parent
SPEC = """
[study]
name = "small"
[task]
dataset = "digits"
[model]
depth = 1
[train]
lr = 3e-3
epochs = {epochs}
batch_size = 128
[[structure]]
name = "dense"
widths = [8, 16, 24]
[[structure]]
name = "btt(rank=1)"
widths = [16, 36, 64]
repeat_widths = [16]
"""


def command(*arguments):
    """A process of its own, without the run-time checks."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    environment.pop("NO_COLOR", None)
    return subprocess.Popen(
        [sys.executable, "-m", "matrigami.cli", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(SPEC.format(epochs=2))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study, from one real command."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(SPEC.format(epochs=4))
    process = command("study", "run", folder / "study.toml", "--out", folder / "out")
    output, errors = process.communicate(timeout=300)
    return folder / "out", process.returncode, output, errors


def test_a_study_ends_with_its_ranking_its_files_and_the_next_command(finished):
    out, code, output, errors = finished
    assert code == 0, errors
    assert re.search(r"digits: train error at \d\.\d\de\+\d+ MACs", output)
    assert re.search(r"1 a  (dense|btt\(rank=1\)) +\d+\.\d\d +\d+\.\d\d – \d+\.\d\d", output)
    assert "Structures that share a letter are not told apart" in output
    assert f"matrigami study plot {out}" in output
    for name in ("results.csv", "fit.json", "report.html", "fig/scaling.png", "fig/scaling.svg"):
        assert str(out / name) in output
        assert (out / name).stat().st_size > 0
    assert "7/7 runs" in errors
    assert len(read_results(out / "results.csv")) == 7
    assert "study run" in json.loads((out / "env.json").read_text())["command"]


def test_a_second_call_trains_nothing_and_says_the_same(finished, capsys):
    out, *_ = finished
    before = (out / "results.csv").read_bytes()
    stamps = {p: p.stat().st_mtime_ns for p in (out / "runs").glob("*/metrics.jsonl")}
    assert run(["study", "run", str(out.parent / "study.toml"), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["runs"] == {"total": 7, "failed": 0, "crashed": 0, "left": 0}
    ranking = result["datasets"]["digits"]["ranking"]["test_error"]
    assert [r["rank"] for r in ranking] == [1, 2]
    assert ranking[0]["letters"] == "a"
    assert (out / "results.csv").read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_status_fit_plot_and_report_do_their_part_again(finished, capsys):
    out, *_ = finished
    assert run(["study", "status", str(out)]) == 0
    assert "small: 7 done" in capsys.readouterr().out
    assert run(["study", "status", str(out), "--json"]) == 0
    assert {r["status"] for r in json.loads(capsys.readouterr().out)["runs"]} == {"done"}
    first = (out / "fit.json").read_text()
    (out / "fit.json").unlink()
    assert run(["study", "fit", str(out)]) == 0
    assert "exponent" in capsys.readouterr().out
    assert (out / "fit.json").read_text() == first
    assert run(["study", "plot", str(out)]) == 0
    assert len(capsys.readouterr().out.split()) == 4
    assert run(["study", "report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")


HELD = """
import time
from pathlib import Path
from torch import nn

class Held(nn.Module):
    def forward(self, x):
        if self.training and Path(__file__).with_name("hold").exists():
            time.sleep(1.0)
        return x

def net(features, outputs, width):
    return nn.Sequential(
        nn.Flatten(), Held(), nn.Linear(features, width), nn.ReLU(), nn.Linear(width, outputs)
    )
"""
"""A model whose steps take a second while a file is there: minutes to interrupt it, and no work."""


def held(path, spec):
    """A study file of that model, which is held; and the file that holds it."""
    (path.parent / "net.py").write_text(HELD)
    path.write_text(
        spec.replace("[model]", '[model]\nname = "net.py:net"').replace("depth = 1\n", "")
    )
    hold = path.parent / "hold"
    hold.touch()
    return hold


def checkpoints(out):
    """When each was written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def begun(out, *arguments):
    """A process that has written a checkpoint of its own, and is in the middle of its work."""
    before = checkpoints(out)
    process = command(*arguments)
    while checkpoints(out) == before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def test_interrupted_studies_resume_to_the_same_bits(tmp_path):
    """Neither SIGINT nor `kill -9` loses anything: the results are those of a calm study."""
    path, out = tmp_path / "study.toml", tmp_path / "rough"
    two = SPEC.format(epochs=6).split("[[structure]]")[:2]
    hold = held(
        path,
        "[[structure]]".join(two)
        .replace("[8, 16, 24]", "[8, 16]")
        .replace("[train]", "[train]\ncheckpoint_seconds = 0.1"),
    )
    rough = ("study", "run", path, "--workers", 1, "--threads", 1, "--out", out)
    process = begun(out, *rough)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert f"--out {out}" in errors
    process = begun(out, *rough)
    process.kill()
    process.communicate(timeout=300)  # ends when its worker has seen that it is alone
    hold.unlink()
    process = command(*rough)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors

    torch.set_default_dtype(torch.float32)
    plan = plan_study(load_spec(path))
    prepare(plan, tmp_path / "calm")
    work(Job(tmp_path / "calm", plan.configs), lambda: False)
    calm = {r["id"]: r for r in collect(plan, tmp_path / "calm").records}
    rows = read_results(out / "results.csv")
    assert len(rows) == 2
    for row in rows:
        for key in ("train_loss", "test_loss", "train_error", "test_error", "examples"):
            assert row[key] == calm[row["id"]][key]


def test_dry_run_writes_nothing(spec, tmp_path, capsys):
    assert (
        run(["study", "run", str(spec), "--dry-run", "--json", "--out", str(tmp_path / "o")]) == 0
    )
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert len(runs) == 7
    assert {r["structure"]: r["macs"] for r in runs if r["width"] == 16}["dense"] == 3232
    assert not (tmp_path / "o").exists()
    assert run(["study", "run", str(spec), "--dry-run", "--only", "dense"]) == 0
    assert "3 runs" in capsys.readouterr().out


@pytest.mark.parametrize("end", [["--dry-run"], ["--out", "o"]])
def test_a_run_that_does_not_fit_into_the_memory_is_refused(
    end, spec, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    spec.write_text(spec.read_text().replace("widths = [", "widths = [2000000, ", 1))
    assert run(["study", "run", str(spec), *end]) == 2
    captured = capsys.readouterr()
    assert "Use a smaller width" in captured.err
    assert captured.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["study.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "run", "--out", "o"], "Give a study"),
        (["study", "run", "--preset", "demmo", "--out", "o"], "Did you mean 'demo'"),
        (["study", "run", "dmo", "--out", "o"], "--preset demo"),
        (["study", "run", "stady.toml", "--out", "o"], "Nearest in .: study.toml"),
        (["study", "status", "{folder}/no"], "there is no folder"),
        (["study", "run", "{spec}"], "--out is missing"),
        (["study", "run", "{spec}", "--out", "{spec}/o"], "cannot be written"),
        (["study", "run", "{spec}", "--out", "o", "--only", "btt"], "Did you mean 'btt(rank=1)'"),
        (["study", "run", "{spec}", "--out", "o", "--device", "cuda:99"], "it is not there"),
        (
            ["study", "run", "--preset", "cifar100_quick", "--out", "o", "--data-dir", "no"],
            "data get",
        ),
        (["study", "run", "{spec}", "--out", "o", "--workers", "0"], "not in the range"),
        (["study", "status", "{folder}"], "no study.json"),
        (["study", "fit", "{folder}"], "cannot be read"),
        (["study", "plot", "{folder}"], "cannot be read"),
        (["study", "walk"], "No such command"),
        (["studdy"], "Did you mean 'study'"),
        (["list", "structure"], "Did you mean 'structures'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    arguments, message, spec, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(spec=spec, folder=tmp_path) for a in arguments]
    assert run(filled) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) in (2, 3)
    assert captured.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.toml"]


def test_presets_and_version_are_listed(capsys):
    assert run(["study", "presets"]) == 0
    listed = capsys.readouterr().out
    assert "demo" in listed
    assert "cifar100_small" in listed
    assert run(["version"]) == 0
    assert run(["--version"]) == 0
    assert re.fullmatch(r"(matrigami \d+\.\d+\.\d+\n){2}", capsys.readouterr().out)


@pytest.mark.parametrize(
    "verb", ["", *VERBS, "study run", "study status", "study fit", "study plot"]
)
def test_every_help_has_an_example(verb, capsys):
    assert run([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert "  matrigami " in text
