"""Runs side by side are, each, what they are alone."""

from dataclasses import replace

import pytest
import torch

from matrigami.studies import RunConfig, run_states, run_study
from matrigami.studies._accelerator import _Recorded
from matrigami.studies._run import StudyPlan, collect, prepare
from matrigami.studies._size import run_size
from matrigami.studies._together import SharedTask, data, in_turns
from matrigami.studies._train import CHECKPOINT, load_task, train_run
from matrigami.studies._worker import Job, run_folder, work, write_status
from tests.studies.test_train import digits, stop_after, timeless, weights

RUNS = tuple(
    digits(epochs=2, **changes)
    for changes in (
        {},
        {"structure": "dense"},
        {"lr": 1e-2, "weight_decay": 0.02},
        {"structure": "monarch(blocks=2)", "optimizer": "soap(frequency=2)"},
        {"seed": 8, "input_lr_scale": 0.2},
    )
)
"""Four that see the same batches, and one of another seed."""


def planned(configs):
    return StudyPlan("test", tuple(configs), {c.id: run_size(c) for c in configs})


def work_through(configs, out, together, stop=lambda: False):
    """One worker in this process."""
    plan = planned(configs)
    prepare(plan, out)
    work(Job(out, plan.configs, together=together), stop)
    return {r["id"]: timeless(r) for r in collect(plan, out).records}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Record and weights of each run, trained alone."""
    results = {}
    for config in RUNS:
        folder = tmp_path_factory.mktemp("alone")
        results[config.id] = timeless(train_run(config, folder)), weights(folder)
    return results


def test_each_run_is_bit_by_bit_what_it_is_alone(tmp_path, alone):
    together = work_through(RUNS, tmp_path, 8)
    for config in RUNS:
        record, theirs = alone[config.id]
        assert together[config.id] == record
        ours = weights(run_folder(tmp_path, config))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_batch_is_made_once(tmp_path):
    task = load_task(digits())
    made = []
    original = task.batch
    task.batch = lambda plan, start, size: made.append(start) or original(plan, start, size)
    shared = SharedTask(task)
    generators = [torch.Generator().manual_seed(1) for _ in range(3)]
    plans = [shared.plan(200, g) for g in generators]
    assert plans[0] is plans[1] is plans[2]
    assert len({bytes(g.get_state().numpy()) for g in generators}) == 1
    batches = [shared.batch(plan, start, 200) for start in (0, 200) for plan in plans]
    assert made == [0, 200]
    assert batches[0] is batches[2]


def test_a_run_that_diverges_leaves_the_others_alone(tmp_path):
    plain = digits(augment=False, mixup=0.0)
    wild = replace(plain, lr=1e18, weight_decay=0.02)
    records = work_through([wild, plain], tmp_path, 2)
    assert records[wild.id]["status"] == "failed"
    assert records[wild.id]["cause"].startswith("the loss was")
    assert records[plain.id] == timeless(train_run(plain, tmp_path / "alone"))


def test_an_interruption_keeps_each_run_and_the_next_call_ends_as_if_there_were_none(
    tmp_path, alone
):
    asked = [0]

    def stop():
        asked[0] += 1
        return asked[0] > 20

    assert work_through(RUNS, tmp_path, 8, stop) == {}
    states = run_states(planned(RUNS), tmp_path)
    assert [s["status"] for s in states].count("interrupted") == 5
    whole = {run: record for run, (record, _) in alone.items()}
    assert work_through(RUNS, tmp_path, 8) == whole


def test_those_ahead_wait(tmp_path, alone):
    """A run with a checkpoint, and one without, meet; neither loses a step."""
    first, second = RUNS[0], RUNS[1]
    plan = planned([first, second])
    prepare(plan, tmp_path)
    with pytest.raises(Exception, match="stopped in epoch 2"):
        train_run(first, run_folder(tmp_path, first), stop=stop_after(11))
    records = work_through([first, second], tmp_path, 2)
    for config in (first, second):
        assert records[config.id] == alone[config.id][0]

    order = []

    def steps(name, at):
        for where in at:
            order.append((name, where))
            yield where

    in_turns([steps("a", [(0, 3), (0, 4)]), steps("b", [(0, 1), (0, 2), (0, 3), (0, 4)])])
    assert order[2:4] == [("b", (0, 2)), ("b", (0, 3))]
    assert order[-2:] == [("a", (0, 4)), ("b", (0, 4))]


def test_a_run_that_took_its_worker_down_is_tried_alone(tmp_path):
    plan = planned(RUNS[:3])
    prepare(plan, tmp_path)
    write_status(tmp_path, RUNS[1], "queued", fraction=0.0, attempts=1)
    together = []

    def train(config, folder, **_):
        together.append(config)
        yield 0, 0
        together.append(config)
        return {"status": "done"}

    work(Job(tmp_path, plan.configs, together=3), lambda: False, train)
    a, b, c = RUNS[:3]
    assert together == [a, c, a, c, b, b]


def test_what_is_trained_side_by_side():
    assert len({data(config) for config in RUNS}) == 1
    changes = ({"dataset": "teacher"}, {"epochs": 9}, {"mixup": 0.0})
    others = [replace(RUNS[0], **change) for change in changes]
    assert len({data(config) for config in (RUNS[0], *others)}) == 4


def test_a_count_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="together = 0"):
        run_study(planned(RUNS), tmp_path / "out", together=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_a_step_that_asks_for_a_number_is_not_recorded():
    x, calls = torch.ones((), device="cuda"), []
    stream = torch.cuda.Stream()
    step = _Recorded(lambda: calls.append(float(x.add_(1))), stream, torch.cuda.graph_pool_handle())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        with pytest.warns(UserWarning, match="called plainly"):
            step()
        step()
    assert calls == [2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.gpu
def test_a_gpt_is_recorded(tmp_path):
    """Attention, tables and scores of every kind in graphs, beside the processor."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    for score in ("", "mlr(1, 1)", "btt(rank=1)"):
        options = {"depth": 1, "heads": 2, "context": 16, "base_width": 16, "score": score}
        config = RunConfig(str(text), "gpt", "dense", 16, 0, 1e-2, 2, 16, **options)
        one, other = (
            train_run(config, tmp_path / f"{device}{score}", device=device)
            for device in ("cpu", "cuda")
        )
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-2)


@pytest.mark.gpu
def test_recorded_steps_are_the_plain_ones(tmp_path):
    """Graphs on an accelerator, alone and side by side, with a resume in between."""
    configs = [digits(epochs=9), digits(epochs=9, structure="dense")]
    plan = planned(configs)
    prepare(plan, tmp_path)
    asked = [0]

    def stop():
        asked[0] += 1
        return asked[0] > 90

    work(Job(tmp_path, plan.configs, device="cuda", together=2), stop)
    work(Job(tmp_path, plan.configs, device="cuda", together=2), lambda: False)
    for record in collect(plan, tmp_path).records:
        config = next(c for c in configs if c.id == record["id"])
        on_cpu = train_run(config, tmp_path / config.id)
        alone = train_run(config, tmp_path / f"{config.id}-cuda", device="cuda")
        assert record["seconds"] is None
        assert alone["seconds"] > 0
        for name in ("train_loss", "test_loss"):
            assert record[name] == pytest.approx(on_cpu[name], rel=1e-2)
            assert alone[name] == pytest.approx(on_cpu[name], rel=1e-2)
        assert (tmp_path / config.id / CHECKPOINT).exists()
