"""The runner: what is trained, what is skipped, and what is left when something goes wrong."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from matrigami.studies import (
    Interrupted,
    Outcome,
    Snapshot,
    StudyPlan,
    load_plan,
    parse_spec,
    plan_study,
    read_results,
    run_states,
    run_study,
    update_results,
    write_results,
)
from matrigami.studies._environment import machine
from matrigami.studies._lock import hold, is_held
from matrigami.studies._progress import Clock, best_of
from matrigami.studies._run import collect, prepare, snapshot
from matrigami.studies._worker import Job, read_status, run_folder, work, write_status

SPEC = """
[study]
name = "tiny"
[task]
dataset = "digits"
[model]
depth = 1
[train]
lr = 3e-3
epochs = 2
batch_size = 256
[[structure]]
name = "dense"
widths = [8, 16]
[[structure]]
name = "btt(rank=1)"
widths = [16]
"""


@pytest.fixture
def plan():
    return plan_study(parse_spec(SPEC))


def never():
    return False


def instant(config, folder, *, progress, **_):
    """A training that ends at once; its result is a function of the configuration."""
    progress(0.5, {"epoch": 1})
    names = ("dataset", "model", "structure", "width", "seed", "lr")
    known = {name: getattr(config, name) for name in names}
    error = 100.0 / config.width
    losses = {"train_loss": 1.0, "test_loss": 1.0, "train_error": error, "test_error": error}
    return (
        known
        | losses
        | {"macs": 10, "seconds": 1.0, "examples": 10, "status": "done", "cause": None}
    )


def in_process(plan, out, train, stop=never):
    """What a worker does, without the process."""
    prepare(plan, out)

    def steps(config, folder, *, task, **options):
        assert task.examples
        record = train(config, folder, **options)
        yield 0, 0
        return record

    work(Job(out, plan.configs), stop, steps)
    return collect(plan, out)


def test_every_run_is_trained_once(plan, tmp_path):
    trained = []

    def count(config, folder, **options):
        trained.append(config.id)
        return instant(config, folder, **options)

    first = in_process(plan, tmp_path, count)
    second = in_process(plan, tmp_path, count)
    assert trained == [config.id for config in plan.configs]
    assert first == second == Outcome(first.records, 3, 0, 0, 0, interrupted=False)
    assert first.left == 0
    stored = json.loads((run_folder(tmp_path, plan.configs[0]) / "config.json").read_text())
    assert stored == plan.configs[0].to_json()


def test_a_study_goes_on_from_its_table_alone(plan, tmp_path):
    whole = in_process(plan, tmp_path / "first", instant)
    (tmp_path / "second").mkdir()
    table = tmp_path / "second" / "results.csv"
    rows = [{**r, "device": "cpu"} for r in whole.records[:2]]
    write_results(table, rows)
    (tmp_path / "second" / "env.json").write_text('{"cpu": "a processor"}')
    outcome = run_study(plan, tmp_path / "second", workers=1)
    kept = {r["id"]: r for r in read_results(table)}
    assert (outcome.total, outcome.left, len(kept)) == (3, 0, 3)
    for row in rows:  # trained by `instant`, and not again
        assert kept[row["id"]]["train_error"] == row["train_error"]
        assert kept[row["id"]]["machine"] == "a processor"
    new = next(r for key, r in kept.items() if key not in {row["id"] for row in rows})
    assert new["machine"] == machine(torch.device("cpu"))
    write_results(tmp_path / "results.csv", [{**rows[0], "id": "another"}, rows[1]])
    with pytest.raises(ValueError, match="1 of 2 runs that are no part"):
        run_study(plan, tmp_path)
    assert len(read_results(tmp_path / "results.csv")) == 2


def test_a_run_that_crashes_is_recorded_with_its_cause_and_tried_again_next_time(plan, tmp_path):
    broken = plan.configs[1]

    def crash(config, folder, **options):
        if config == broken:
            raise RuntimeError("no memory\nfor this")
        return instant(config, folder, **options)

    outcome = in_process(plan, tmp_path, crash)
    assert (outcome.crashed, outcome.failed, outcome.left) == (1, 0, 0)
    bad = next(r for r in outcome.records if r["status"] == "crashed")
    assert bad["cause"] == "RuntimeError: no memory for this"
    assert (bad["structure"], bad["macs"]) == (broken.structure, plan.sizes[broken.id].macs)
    assert "Traceback" in (run_folder(tmp_path, broken) / "error.txt").read_text()
    assert in_process(plan, tmp_path, instant).crashed == 0


def test_a_loss_that_is_not_finite_fails_one_run_for_good(plan, tmp_path):
    def diverge(config, folder, **options):
        record = instant(config, folder, **options)
        if config != plan.configs[0]:
            return record
        nothing = {"train_loss": float("nan"), "train_error": None, "test_error": None}
        return record | nothing | {"status": "failed", "cause": "the loss was nan in epoch 1"}

    outcome = in_process(plan, tmp_path, diverge)
    assert (outcome.failed, outcome.crashed) == (1, 0)
    again = in_process(plan, tmp_path, instant)
    assert again.failed == 1
    write_results(tmp_path / "results.csv", again.records)
    rows = read_results(tmp_path / "results.csv")
    bad = next(r for r in rows if r["status"] == "failed")
    assert bad["cause"] == "the loss was nan in epoch 1"
    assert bad["train_error"] is None


def test_an_interrupted_run_keeps_its_state(plan, tmp_path):
    def interrupted(config, folder, *, progress, **_):
        progress(0.25, {})
        raise Interrupted

    outcome = in_process(plan, tmp_path, interrupted)
    states = run_states(plan, tmp_path)
    assert {s["status"] for s in states} == {"interrupted"}
    assert {s["fraction"] for s in states} == {0.25}
    assert outcome.left == 3
    assert in_process(plan, tmp_path, instant).left == 0


def test_nothing_is_begun_after_a_stop(plan, tmp_path):
    outcome = in_process(plan, tmp_path, instant, stop=lambda: True)
    assert outcome.left == 3


def test_a_run_in_other_hands_is_left_alone(plan, tmp_path):
    prepare(plan, tmp_path)
    taken = run_folder(tmp_path, plan.configs[0])
    with hold(taken) as held:
        assert held
        assert is_held(taken)
        outcome = in_process(plan, tmp_path, instant)
    assert outcome.left == 1
    assert not is_held(taken)


def _hold_forever(folder, ready):
    with hold(folder):
        ready.set()
        time.sleep(60)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold_forever, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    assert is_held(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with hold(tmp_path) as held:
        assert held


def test_a_run_that_was_cut_off_is_queued_again_and_keeps_its_place(plan, tmp_path):
    prepare(plan, tmp_path)
    write_status(tmp_path, plan.configs[0], "running", fraction=0.5)
    assert run_states(plan, tmp_path)[0]["status"] == "interrupted"
    prepare(plan, tmp_path)
    state = read_status(tmp_path, plan.configs[0])
    assert (state["status"], state["fraction"]) == ("queued", 0.5)


def test_a_folder_that_cannot_be_written_is_refused_first(plan, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="cannot be written") as caught:
        run_study(plan, blocked)
    assert len(str(caught.value).splitlines()) in (2, 3)
    with pytest.raises(ValueError, match="workers = 0"):
        run_study(plan, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_plan_is_read_back(plan, tmp_path):
    prepare(plan, tmp_path)
    assert load_plan(tmp_path) == plan
    with pytest.raises(ValueError, match=r"no study.json"):
        load_plan(tmp_path / "runs")


def test_worker_processes_train_and_survive_a_kill(plan, tmp_path):
    """Real training in a real process, killed once on its first run; the study still ends."""
    killed = []

    def kill_once(state: Snapshot) -> None:
        pids = [read_status(tmp_path, c).get("pid") for c in plan.configs]
        running = [c for c in plan.configs if read_status(tmp_path, c)["status"] == "running"]
        if running and not killed:
            killed.append(next(pid for pid in pids if pid))
            os.kill(killed[0], signal.SIGKILL)

    outcome = run_study(plan, tmp_path, workers=1, threads=1, together=2, report=kill_once)
    assert (outcome.left, outcome.failed, outcome.crashed) == (0, 0, 0)
    rows = read_results(tmp_path / "results.csv")
    assert [(r["structure"], r["width"]) for r in rows] == [
        ("btt(rank=1)", 16),
        ("dense", 8),
        ("dense", 16),
    ]
    assert all(r["macs"] == plan.sizes[r["id"]].macs for r in rows)
    assert all(0 < r["test_error"] < 95 for r in rows)
    assert all(r["seconds"] > 0 for r in rows)
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["workers"] == 1
    assert environment["versions"]["torch"]


def test_a_part_can_be_trained_and_results_hold_the_whole(plan, tmp_path):
    in_process(plan, tmp_path, instant)
    write_status(tmp_path, plan.configs[0], "queued", fraction=0.0)
    done = StudyPlan(
        plan.name, plan.configs[1:], {c.id: plan.sizes[c.id] for c in plan.configs[1:]}
    )
    outcome = run_study(plan, tmp_path, part=done, workers=1)
    assert (outcome.total, outcome.left, len(outcome.records)) == (2, 0, 2)
    assert len(load_plan(tmp_path).configs) == 3
    (tmp_path / "results.csv").unlink()
    update_results(tmp_path)
    assert len(read_results(tmp_path / "results.csv")) == 2
    update_results(tmp_path / "runs")
    assert not (tmp_path / "runs" / "results.csv").exists()


def test_missing_data_are_known_before_anything_is_written(tmp_path):
    plan = plan_study(parse_spec(SPEC.replace("digits", "cifar100")))
    with pytest.raises(ValueError, match="data get cifar100"):
        run_study(plan, tmp_path / "out", data_dir=tmp_path)
    assert not (tmp_path / "out").exists()


def test_progress_weighs_runs_by_their_work(plan, tmp_path):
    in_process(plan, tmp_path, instant)
    write_status(tmp_path, plan.configs[0], "running", fraction=0.5)
    clock = Clock(plan.work, dict.fromkeys(plan.work, 0.0), time.monotonic() - 10)
    state = snapshot(plan, tmp_path, clock)
    assert (state.total, state.finished, state.running) == (3, 2, 1)
    half = 0.5 * plan.work[plan.configs[0].id]
    assert state.eta == pytest.approx(10 * half / (sum(plan.work.values()) - half), rel=0.05)
    assert state.line().startswith("2/3 runs · eta ")
    assert (
        Clock(plan.work, dict.fromkeys(plan.work, 0.0), 0.0).remaining(
            dict.fromkeys(plan.work, 0.0), 5.0
        )
        is None
    )


def test_the_best_run_of_each_data_set_is_named():
    good = {"structure": "dense", "macs": 6e5, "train_error": 30.0}
    runs = [good | {"dataset": "a"}, good | {"dataset": "a", "train_error": 40.0}]
    assert best_of(runs) == "dense 30.0 %@6.0e5 MACs"
    assert best_of([*runs, good | {"dataset": "b"}]).count("30.0") == 2
    assert best_of([good | {"dataset": "a", "train_error": None}]) == ""


def test_results_survive_a_round_trip(tmp_path):
    record = {"dataset": "d", "model": "mlp", "structure": "tt(rank=2)", "width": 8, "seed": 1}
    record |= {"lr": 1e-3, "params": 10, "macs": 12, "train_loss": 0.1 + 0.2, "test_loss": 1.0}
    record |= {"train_error": 1 / 3, "test_error": None, "seconds": 2.5, "status": "done"}
    write_results(tmp_path / "results.csv", [record])
    (row,) = read_results(tmp_path / "results.csv")
    assert {key: row[key] for key in record} == record
    with pytest.raises(ValueError, match="cannot be read"):
        read_results(tmp_path / "absent.csv")


def test_runs_outside_the_main_thread_leave_signals_alone(plan, tmp_path):
    in_process(plan, tmp_path, instant)
    found = []
    thread = threading.Thread(target=lambda: found.append(run_study(plan, tmp_path, workers=1)))
    thread.start()
    thread.join()
    assert found[0].left == 0
