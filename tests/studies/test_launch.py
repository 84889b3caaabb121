"""Launchers: what is lost with a worker is done again, and the results are those of one machine."""

import threading
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner

from matrigami.cli._main import group
from matrigami.studies import default_workers, parse_spec, plan_study, read_results, run_study
from matrigami.studies._launch import EMPTY_HANDS, Ended, Launcher, Place, supervise
from matrigami.studies._launchers import PACKAGES, launcher_of
from matrigami.studies._lock import hold
from matrigami.studies._run import collect, prepare
from matrigami.studies._worker import (
    STOP,
    Job,
    asked_by_file,
    read_status,
    run_folder,
    work,
    write_status,
)
from tests.studies.test_run import SPEC, instant

TIMES = ("seconds", "cpu_seconds", "machine")


@pytest.fixture
def plan():
    return plan_study(parse_spec(SPEC))


def steps(config, folder, *, task, **options):
    assert task.examples
    record = instant(config, folder, **options)
    yield 0, 0
    return record


class Here:
    """Workers that are calls; some die with their first run under way."""

    def __init__(self, deaths=()):
        self.deaths, self.done, self.started = list(deaths), [], 0

    def parts(self, job, workers):
        return [job] * (workers or 1)

    def start(self, job):
        self.started += 1
        if not self.deaths:
            work(job, lambda: False, steps)
            self.done.append(Ended(job))
            return
        first = next(c for c in job.configs if read_status(job.out, c)["status"] == "queued")
        before = read_status(job.out, first)
        write_status(job.out, first, "running", fraction=0.4, attempts=before.get("attempts", 0))
        self.done.append(Ended(job, "it died", own=self.deaths.pop(0)))

    def ended(self):
        done, self.done = self.done, []
        return done

    def stop(self):
        pass

    def close(self):
        pass


def supervised(plan, out, launcher):
    assert isinstance(launcher, Launcher)
    prepare(plan, out)
    supervise(Job(out, plan.configs), launcher, 1, threading.Event(), lambda: None)
    return collect(plan, out)


def test_a_lost_machine_is_not_the_fault_of_its_run(plan, tmp_path):
    launcher = Here(deaths=[False, False, False, True])
    outcome = supervised(plan, tmp_path, launcher)
    assert (outcome.left, outcome.crashed, launcher.started) == (0, 0, 5)


def test_a_run_that_kills_its_worker_twice_is_given_up(plan, tmp_path):
    outcome = supervised(plan, tmp_path, Here(deaths=[True, True]))
    assert (outcome.left, outcome.crashed) == (0, 1)
    bad = next(r for r in outcome.records if r["status"] == "crashed")
    assert bad["cause"] == "it died"


class Frail(Here):
    """Workers of which the first die before they take a run, or between two."""

    def start(self, job):
        self.started += 1
        if not self.deaths:
            super().start(job)
            return
        left = self.deaths.pop(0)
        configs = [c for c in job.configs if read_status(job.out, c)["status"] == "queued"][:left]
        work(replace(job, configs=tuple(configs)), lambda: False, steps)
        self.done.append(Ended(job, "it died"))


def test_a_worker_that_dies_between_runs_is_replaced(plan, tmp_path):
    launcher = Frail(deaths=[0, 1, 0])
    outcome = supervised(plan, tmp_path, launcher)
    assert (outcome.left, outcome.crashed) == (0, 0)


def test_workers_that_all_die_before_their_first_run_end_the_study(plan, tmp_path):
    launcher = Frail(deaths=[1] + [0] * 50)
    with pytest.raises(ValueError, match="2 runs are left") as caught:
        supervised(plan, tmp_path, launcher)
    assert launcher.started == EMPTY_HANDS + 1
    assert "it died" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_a_run_in_other_hands_is_not_buried(plan, tmp_path):
    prepare(plan, tmp_path)
    with hold(run_folder(tmp_path, plan.configs[0])):
        supervised(plan, tmp_path, Here(deaths=[True]))
        assert read_status(tmp_path, plan.configs[0])["status"] == "running"


def test_workers_elsewhere_look_for_a_file(tmp_path):
    asked = asked_by_file(tmp_path)
    assert not asked()
    (tmp_path / STOP).touch()
    assert not asked()  # not again so soon
    time.sleep(1.1)
    assert asked()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rays", "Did you mean 'ray'"),
        ("processes(5)", "not a name with literal options"),
        ("processes(cores=5)", "does not take these options"),
    ],
)
def test_a_launcher_that_is_none_is_refused_first(plan, tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        run_study(plan, tmp_path / "out", launcher=text)
    assert len(str(caught.value).splitlines()) in (2, 3)
    assert not (tmp_path / "out").exists()


def test_a_folder_named_as_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "an_extra").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGES, "ray", "an_extra")
    with pytest.raises(ValueError, match="'an_extra' is not installed"):
        launcher_of("ray", Place(tmp_path))


def test_more_workers_than_cores_are_capped(tmp_path):
    (tmp_path / "spec.toml").write_text(SPEC.replace("epochs = 2", "epochs = 1"))
    asked = ["study", "run", str(tmp_path / "spec.toml"), "--out", str(tmp_path / "out")]
    many = default_workers() + 5
    result = CliRunner().invoke(group, [*asked, "--only", "dense", "--workers", str(many)])
    assert f"--workers {many} is above the {default_workers()} cores" in result.output
    assert result.exit_code == 0


def same(plan, one, other):
    """Results of two folders, but for times."""
    tables = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in read_results(out / "results.csv")]
        for out in (one, other)
    ]
    assert tables[0] == tables[1]
    assert len(tables[0]) == len(plan.configs)


@pytest.mark.slow
def test_slurm_jobs_give_the_results_of_processes(plan, tmp_path):
    pytest.importorskip("submitit")
    run_study(plan, tmp_path / "here", workers=1, threads=1)
    launcher = "slurm(cluster=local, timeout_min=10)"
    outcome = run_study(plan, tmp_path / "there", workers=2, launcher=launcher)
    assert outcome.left == 0
    same(plan, tmp_path / "here", tmp_path / "there")
    assert not (tmp_path / "there" / STOP).exists()


@pytest.mark.slow
def test_no_command_of_slurm_and_no_cluster_of_ray(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    pytest.importorskip("ray")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no command sbatch"):
        launcher_of("slurm", Place(tmp_path))
    with pytest.raises(ValueError, match="does not take these options"):
        launcher_of("slurm(cluster=local, cpu_per_task=3)", Place(tmp_path))
    for text in ("ray", "ray(address='127.0.0.1:1')"):
        with pytest.raises(ValueError, match="there is no cluster") as caught:
            launcher_of(text, Place(tmp_path))
        assert len(str(caught.value).splitlines()) in (2, 3)


@pytest.mark.slow
def test_a_node_of_ray_that_is_killed_loses_nothing(plan, tmp_path):
    """Two nodes; one is killed while a run is under way on it."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    long = plan_study(parse_spec(SPEC.replace("epochs = 2", "epochs = 40")))
    run_study(long, tmp_path / "here", workers=1, threads=1)
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    killed = []

    def kill_once(_now):
        running = [
            c for c in long.configs if read_status(tmp_path / "there", c)["status"] == "running"
        ]
        if len(running) == 2 and not killed:
            cluster.remove_node(second, allow_graceful=False)
            killed.append(True)

    try:
        outcome = run_study(
            long, tmp_path / "there", launcher=f"ray(address={cluster.address!r})", report=kill_once
        )
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed
    assert (outcome.left, outcome.failed, outcome.crashed) == (0, 0, 0)
    same(long, tmp_path / "here", tmp_path / "there")
