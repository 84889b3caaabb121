"""Runs that are one batch are, each, what they are alone to rounding."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map

from matrigami.studies import RunConfig, _stacked, run_states
from matrigami.studies._run import collect, prepare
from matrigami.studies._stacked import LARGEST, Stack, alike
from matrigami.studies._stacked_graph import Tape, recorded, simplify
from matrigami.studies._train import Run, train_run
from matrigami.studies._worker import Job, run_folder, work
from matrigami.studies.tasks import load_task
from tests.studies.test_together import planned
from tests.studies.test_train import digits, stop_after, weights

LOSSES = ("train_loss", "test_loss")


def work_through(configs, out, stop=lambda: False):
    """All runs in one process, side by side."""
    plan = planned(configs)
    prepare(plan, out)
    work(Job(out, plan.configs, together=len(configs)), stop)
    return {r["id"]: r for r in collect(plan, out).records}


def is_what_it_is_alone(config, record, tmp_path):
    own = train_run(config, tmp_path / f"alone-{config.id}")
    assert [record[name] for name in LOSSES] == pytest.approx([own[n] for n in LOSSES], rel=1e-5)
    ours, theirs = (
        weights(folder)
        for folder in (run_folder(tmp_path, config), tmp_path / f"alone-{config.id}")
    )
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"structure": "dense", "optimizer": "sgd", "mixup": 0.0},
        {"structure": "lowrank", "label_smoothing": 0.0},
    ],
    ids=str,
)
def test_seeds_and_rates_are_one_batch(tmp_path, changes):
    """Four runs of two seeds and two rates."""
    base = digits(epochs=2, **changes)
    configs = [replace(base, seed=seed, lr=lr) for seed in (3, 8) for lr in (1e-3, 3e-3)]
    records = work_through(configs, tmp_path)
    assert all(record["stacked"] and record["seconds"] is None for record in records.values())
    assert all(record["cpu_seconds"] > 0 for record in records.values())
    for config in configs:
        is_what_it_is_alone(config, records[config.id], tmp_path)


def test_runs_of_one_seed_share_their_batches(tmp_path):
    configs = [digits(epochs=1, lr=lr) for lr in (1e-3, 3e-3)]
    records = work_through(configs, tmp_path)
    for config in configs:
        is_what_it_is_alone(config, records[config.id], tmp_path)


def test_one_that_diverges_leaves_the_others_alone(tmp_path):
    calm = digits(epochs=2)
    wild, other = replace(calm, lr=1e18), replace(calm, seed=8)
    records = work_through([wild, calm, other], tmp_path)
    assert records[wild.id]["status"] == "failed"
    assert records[wild.id]["cause"].startswith("the loss was")
    for config in (calm, other):
        assert records[config.id]["status"] == "done"
        is_what_it_is_alone(config, records[config.id], tmp_path)


def test_each_has_its_checkpoint_and_goes_on_from_it(tmp_path):
    """One is ahead when they meet, and all are interrupted once more on the way."""
    configs = [digits(epochs=2, seed=seed) for seed in (3, 8, 9)]
    prepare(planned(configs), tmp_path)
    with pytest.raises(Exception, match="stopped in epoch 1"):
        train_run(configs[0], run_folder(tmp_path, configs[0]), stop=stop_after(3))
    asked = [0]

    def stop():
        asked[0] += 1
        return asked[0] > 20

    assert work_through(configs, tmp_path, stop) == {}
    states = run_states(planned(configs), tmp_path)
    assert [s["status"] for s in states] == ["interrupted"] * 3
    records = work_through(configs, tmp_path)
    for config in configs:
        is_what_it_is_alone(config, records[config.id], tmp_path)


def steps(configs, stack, folder):
    """The weights of each run after five steps; with a stack, of one optimiser."""
    task = load_task(configs[0])
    runs = [Run(config, folder, task, torch.device("cpu"), stack=stack) for config in configs]
    trainings = [run.train(lambda *_: None, lambda: False) for run in runs]
    for _ in range(5):
        for training in trainings:
            next(training)
    assert stack is None or stack.optimizer is not None
    return [list(run.model.parameters()) for run in runs]


@pytest.mark.parametrize(
    "optimizer", ["adamw", "sgd", "soap(frequency=2)", "shampoo(frequency=2)", "muon"]
)
def test_one_optimiser_takes_the_steps_of_all(tmp_path, monkeypatch, optimizer):
    """Given the gradients that they have alone; those of a stack differ in rounding."""

    def backward(stack, batches):
        tables = [dict(run.model.named_parameters()) for run in stack.runs]
        for run, batch in zip(stack.runs, batches, strict=True):
            run.optimizer.zero_grad()
            run._score(run.model, batch, run.sums).loss.backward()
        return {name: torch.stack([table[name].grad for table in tables]) for name in tables[0]}

    monkeypatch.setattr(Stack, "_backward", backward)
    configs = [digits(seed=seed, lr=lr, optimizer=optimizer) for seed, lr in ((3, 1e-3), (8, 3e-3))]
    ours, theirs = steps(configs, Stack(), tmp_path), steps(configs, None, tmp_path)
    for mine, own in zip(ours, theirs, strict=True):
        for p, q in zip(mine, own, strict=True):  # Shampoo's roots depend on their stack by an ulp
            torch.testing.assert_close(p, q, atol=1e-4 if "shampoo" in optimizer else 0, rtol=0)


def test_recorded_steps_are_the_plain_ones(tmp_path, monkeypatch):
    """Several sizes of batch, mixtures of another weight at each step."""
    configs = [digits(seed=seed, epochs=4) for seed in (3, 8)]
    plain = work_through(configs, tmp_path / "plain")
    monkeypatch.setattr(_stacked, "RECORD_FROM", 1)
    recorded = work_through(configs, tmp_path / "recorded")
    for config in configs:
        ours, theirs = (recorded[config.id], plain[config.id])
        assert [ours[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES])


@pytest.mark.parametrize("structure", ["dense", "btt(rank=2)", "lowrank"])
def test_a_recording_is_the_step_with_fewer_calls(tmp_path, structure):
    """Of weights as they are when it is called, and with no change of shape after another."""
    configs = [digits(seed=seed, structure=structure) for seed in (3, 8)]
    task = load_task(configs[0])
    runs = [Run(config, tmp_path, task, torch.device("cpu")) for config in configs]
    tables = [dict(run.model.named_parameters()) for run in runs]
    weights = {n: torch.stack([t[n].detach() for t in tables]) for n in tables[0]}
    plan = task.plan(8, torch.Generator().manual_seed(0))
    first, second = (
        _stacked._stacked([task.batch(plan, start, 8) for start in starts])
        for starts in ((0, 8), (16, 24))
    )
    passes = _stacked._passes(runs[0], weights, batched=True)
    short = recorded(passes, first)
    for W in weights.values():
        W.add_(torch.randn(W.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    torch.testing.assert_close(short(second), passes(second))
    tape = Tape([part for part in first if isinstance(part, torch.Tensor)])
    with tape:
        results = passes(first)
    tape.graph.output(tree_map(tape.node, results))
    calls = len(tape.graph.nodes)
    simplify(tape.graph)
    assert len(tape.graph.nodes) < 0.85 * calls
    views = tape.graph.find_nodes(op="call_function", target=torch.Tensor.view)
    assert views
    assert not any(view.args[0] in views for view in views)


def test_what_is_one_batch(tmp_path):
    base = digits()
    assert alike(base) == alike(replace(base, seed=8, lr=1.0))
    assert alike(base) != alike(replace(base, weight_decay=0.5))
    task = load_task(base)

    def pays(config):
        return Stack().pays(Run(config, tmp_path, task, torch.device("cpu")))

    assert pays(base)
    assert not pays(replace(base, optimizer="kfac"))
    wide = RunConfig("digits", "mlp", "dense", 256, seed=0, lr=1e-3, epochs=1, batch_size=64)
    assert Run(wide, tmp_path, task, torch.device("cpu")).model.macs() * 64 > LARGEST
    assert not pays(wide)
