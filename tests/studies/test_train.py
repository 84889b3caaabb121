"""The training loop: it learns, resumes bit by bit, survives kill -9, reports what failed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from matrigami.studies import Interrupted, RunConfig, _train as training, train_run

SOURCE = Path(training.__file__).parents[2]


def digits(**changes):
    """A run with every source of randomness, that takes a second."""
    options = {
        "seed": 3,
        "lr": 3e-3,
        "epochs": 3,
        "batch_size": 200,
        "depth": 1,
        "mixup": 0.8,
        "label_smoothing": 0.1,
        "augment": True,
        "shuffle_pixels": True,
        "weight_decay": 0.01,
    } | changes
    return RunConfig("digits", "mlp", options.pop("structure", "btt(rank=1)"), 16, **options)


def weights(folder):
    return load_file(folder / training.CHECKPOINT)


def timeless(record):
    return {k: v for k, v in record.items() if k not in ("seconds", "cpu_seconds")}


def metrics(folder):
    lines = (folder / training.METRICS).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def stop_after(steps):
    """Says stop at one step, once."""
    left = [steps]

    def stop():
        left[0] -= 1
        return left[0] == 0

    return stop


def test_digits_are_learned(tmp_path):
    config = RunConfig(
        "digits", "mlp", "btt(rank=1)", 64, seed=0, lr=3e-3, epochs=10, batch_size=100
    )
    record = train_run(config, tmp_path)
    assert record["status"] == "done"
    assert record["cause"] is None
    assert record["test_error"] < 8
    assert record["train_error"] < 2
    assert record["examples"] == 10 * 1442
    assert record["macs"] == 20096
    assert 0 < record["cpu_seconds"] < record["seconds"] * 4
    assert len(metrics(tmp_path)) == 10


def test_train_error_is_the_mean_of_the_last_tenth_of_the_epochs(tmp_path):
    record = train_run(digits(epochs=20, batch_size=1442), tmp_path)
    last = [entry["train_error"] for entry in metrics(tmp_path)[-2:]]
    assert record["train_error"] == pytest.approx(sum(last) / 2)


@pytest.mark.parametrize("steps", [1, 5, 8, 16, 23])
def test_interrupted_run_resumes_bit_by_bit(tmp_path, steps):
    """In the first step, in the middle and at the end of an epoch; there are 8 steps in each."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train_run(digits(), whole)
    with pytest.raises(Interrupted, match="epoch"):
        train_run(digits(), parts, stop=stop_after(steps))
    record = train_run(digits(), parts)
    assert timeless(record) == timeless(expected)
    assert metrics(parts) == metrics(whole)
    ours, theirs = weights(parts), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_same_run_twice_is_the_same_and_another_seed_is_not(tmp_path):
    one, two = train_run(digits(), tmp_path / "1"), train_run(digits(), tmp_path / "2")
    assert timeless(one) == timeless(two)
    other = train_run(digits(seed=4), tmp_path / "3")
    assert other["train_loss"] != one["train_loss"]


def test_finished_run_returns_its_record_and_keeps_no_moments(tmp_path):
    first = train_run(digits(), tmp_path)
    assert not [name for name in weights(tmp_path) if name.startswith("optimizer")]
    assert train_run(digits(), tmp_path, stop=lambda: pytest.fail("trained again")) == first


def test_killed_run_loses_at_most_a_checkpoint_interval(tmp_path):
    """kill -9 in the middle; the next call goes on and ends where an uninterrupted run ends."""
    config = digits(epochs=400, checkpoint_seconds=0.05)
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from matrigami.studies import RunConfig, train_run\n"
        f"train_run({config!r}, {str(tmp_path / 'killed')!r})"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    saved, deadline = tmp_path / "killed" / training.CHECKPOINT, time.monotonic() + 60
    while not saved.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = training.Run(
        config, tmp_path / "killed", training.load_task(config), torch.device("cpu")
    )
    state.resume()
    steps = math.ceil(state.position.start / 200)
    assert 8 * state.position.epoch + steps >= 1
    config = replace(config, checkpoint_seconds=60.0)
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "whole", stop=stop_after(8 * state.position.epoch + 9))
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "killed", stop=stop_after(9 - steps))
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_diverging_run_is_recorded_as_failed(tmp_path):
    record = train_run(digits(lr=1e18, epochs=3, augment=False, mixup=0.0), tmp_path)
    assert record["status"] == "failed"
    assert record["cause"].startswith("the loss was")
    assert record["seconds"] > 0
    assert json.dumps(record)


def test_progress_is_told(tmp_path):
    told = []
    train_run(digits(), tmp_path, progress=lambda fraction, info: told.append((fraction, info)))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert told[0][1]["epochs"] == 3


def test_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    train_run(digits(), tmp_path)
    with pytest.raises(ValueError, match="belongs to run"):
        train_run(digits(seed=9), tmp_path)
    (tmp_path / training.CHECKPOINT).write_bytes(b"\x10")
    with pytest.raises(ValueError, match="damaged"):
        train_run(digits(), tmp_path)


@pytest.mark.gpu
def test_accelerator_sees_the_same_examples(tmp_path):
    ours, theirs = (
        train_run(digits(), tmp_path / device, device=device) for device in ("cpu", "cuda")
    )
    assert theirs["device"] == "cuda"
    assert theirs["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-3)
