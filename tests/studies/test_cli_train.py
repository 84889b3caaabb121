"""`matrigami train`: plan, files, resuming after kill -9 and SIGINT, two processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from matrigami.cli._main import run
from tests.studies.test_cli_study import ROOT, begun, held

SPEC = """
[study]
name = "one"
[task]
dataset = "digits"
[model]
depth = 1
[train]
lr = 3e-3
epochs = {epochs}
batch_size = 128
mixup = 0.8
weight_decay = 0.1
checkpoint_seconds = {seconds}
[[structure]]
name = "dense"
widths = [8, 16]
[[structure]]
name = "btt(rank=1)"
widths = [16]
lr = 1e-2
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text(SPEC.format(epochs=3, seconds=60))
    return path


def weights(folder):
    return load_file(folder / "ckpt" / "state.safetensors")


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_plan_train_and_curvature_of_one_run(spec, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["train", str(spec), "--optimizer", "soap", "--structure", "btt"]
    assert run([*given, "--width", "16", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert re.search(r"embed.cores_0 +structured core +SOAP +8 of 4x8", shown.out)
    assert "learning rate" in shown.out
    assert f"Next: matrigami curvature {out}" in shown.out
    assert "epoch 3/3" in shown.err
    record = json.loads((out / "record.json").read_text())
    assert record["status"] == "done"
    assert record["optimizer"] == "soap"
    assert record["train_loss"] < 2.3
    assert len(metrics(out)) == 3
    assert run(["curvature", str(out), "--examples", "16", "--largest", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["blocks"]) > 3


def test_options_override_the_file_and_choose_among_its_runs(spec, capsys):
    assert run(["train", str(spec), "--dry-run", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["structure"], first["width"], first["lr"]) == ("dense", 8, 3e-3)
    options = ["--structure", "btt(rank=1)", "--seed", "5", "--epochs", "2", "--plan", "--json"]
    assert run(["train", str(spec), *options]) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert (chosen["width"], chosen["lr"], chosen["seed"], chosen["epochs"]) == (16, 1e-2, 5, 2)
    assert len(chosen["plan"]) > 5


def test_what_is_refused(spec, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert run(["train", str(spec), "--optimizer", "sopa", "--out", out]) == 2
    assert "Did you mean 'soap'" in capsys.readouterr().err
    assert run(["train", str(spec)]) == 2
    assert run(["train", str(spec), "--epochs", "1", "--out", out]) == 0
    assert run(["train", str(spec), "--epochs", "2", "--out", out]) == 2
    assert "it holds another run" in capsys.readouterr().err
    assert run(["train", str(spec), "--lr", "1e18", "--out", str(tmp_path / "bad")]) == 1
    assert "failed" in capsys.readouterr().err


def test_a_killed_and_an_interrupted_run_end_in_the_same_bits(tmp_path):
    hold = held(tmp_path / "spec.toml", SPEC.format(epochs=4, seconds=0.2))
    given = ["train", tmp_path / "spec.toml", "--optimizer", "soap", "--width", "16", "--out"]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    for sent, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        process = begun(rough, *given, rough)
        process.send_signal(sent)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == code, errors
    assert "Go on with:\n  matrigami train" in errors
    assert not (rough / "record.json").exists()
    hold.unlink()
    torch.set_default_dtype(torch.float32)  # as in the processes
    assert run([*map(str, given), str(rough)]) == 0
    assert run([*map(str, given), str(calm)]) == 0
    assert metrics(rough) == metrics(calm)
    ours, theirs = weights(rough), weights(calm)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def team(size, *arguments):
    """Processes as torchrun starts them, without its agent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    common |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "matrigami.cli", *map(str, arguments)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def assert_near(ours, theirs):
    for name in theirs:
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("kfac", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains_and_resume(optimizer, spec, tmp_path):
    """Every batch is shared, so only the order of summation differs; K-FAC draws other labels."""
    given = ["train", spec, "--optimizer", optimizer, "--epochs", "2"]
    assert run([*map(str, given), "--out", str(tmp_path / "one")]) == 0
    processes = team(2, *given, "--out", tmp_path / "two")
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "Written" in outputs[0][0]
    assert outputs[1][0] == ""
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["epoch"] for m in two] == [1, 2]
    for key in ("train_loss", "test_loss"):
        assert two[-1][key] == pytest.approx(one[-1][key], rel=1e-3 if optimizer == "muon" else 0.2)
    if optimizer == "muon":
        assert_near(weights(tmp_path / "two"), weights(tmp_path / "one"))


@pytest.mark.slow
def test_torchrun_trains_stops_and_goes_on(tmp_path):
    """Start-up of the launcher alone takes half a minute of a core."""
    (tmp_path / "spec.toml").write_text(SPEC.format(epochs=40, seconds=0.2))
    given = ["train", tmp_path / "spec.toml", "--optimizer", "soap", "--out", tmp_path / "out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", "-m", "matrigami.cli", *map(str, given)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(launch, env=environment, start_new_session=True)
    saved, deadline = tmp_path / "out" / "ckpt" / "state.safetensors", time.monotonic() + 180
    while not saved.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    for pid in (process.pid, *map(int, children.stdout.split())):  # workers have their own sessions
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert subprocess.run(launch, env=environment, timeout=300, check=False).returncode == 0
    assert len(metrics(tmp_path / "out")) == 40
    calm = [*map(str, given[:-1]), str(tmp_path / "calm")]
    assert run(calm) == 0
    final = [metrics(tmp_path / name)[-1]["train_loss"] for name in ("out", "calm")]
    assert final[0] == pytest.approx(final[1], rel=0.05)
