"""What is read back from disk is checked: damage is named, and the rest of a study goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from matrigami.structures import parse
from matrigami.studies import (
    Interrupted,
    RunConfig,
    load_plan,
    load_spec,
    parse_spec,
    plan_run,
    plan_study,
    read_results,
    run_states,
    run_study,
    train_run,
    write_results,
)
from matrigami.studies._run import collect, prepare
from matrigami.studies._signals import stop_signals
from matrigami.studies._size import run_size
from matrigami.studies._train import CHECKPOINT
from matrigami.studies._worker import Job, read_status, run_folder, work
from matrigami.studies.tasks._download import download
from tests.studies.test_run import SPEC
from tests.studies.test_train import SOURCE, digits, stop_after


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A checkpoint in the middle of a run, as bytes."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Interrupted):
        train_run(digits(), folder, stop=stop_after(5))
    return (folder / CHECKPOINT).read_bytes()


def changed(content, path, edit):
    """The checkpoint with its header and tensors edited, and a hash that is no longer true."""
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(header, tensors)
    save_file(tensors, path, header)


@pytest.mark.parametrize("at", range(1, 10))
def test_a_flipped_bit_is_found(interrupted, tmp_path, at):
    raw = bytearray(interrupted)
    raw[8 + (len(raw) - 9) * at // 10] ^= 1 << 3
    path = tmp_path / CHECKPOINT
    path.parent.mkdir(parents=True)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"damaged|belongs to run"):
        train_run(digits(), tmp_path)
    assert path.read_bytes() == bytes(raw)


@pytest.mark.parametrize(
    "edit",
    [
        lambda h, t: h.pop("position"),
        lambda h, t: h.pop("sha256"),
        lambda h, t: h.update(position='{"epoch": 99}'),
        lambda h, t: t.pop("model.embed.bias"),
        lambda h, t: [t.pop(k) for k in list(t) if k.startswith("optimizer")],
        lambda h, t: t.update(more=torch.ones(1)),
    ],
    ids=["position", "hash", "epoch", "weight", "moments", "more"],
)
def test_an_edited_checkpoint_is_refused(interrupted, tmp_path, edit):
    changed(interrupted, tmp_path / CHECKPOINT, edit)
    with pytest.raises(ValueError, match="it is damaged") as caught:
        train_run(digits(), tmp_path)
    assert len(str(caught.value).splitlines()) in (2, 3)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study."""
    out, plan = tmp_path_factory.mktemp("study"), plan_study(parse_spec(SPEC))
    prepare(plan, out)
    work(Job(out, plan.configs), lambda: False)
    write_results(out / "results.csv", collect(plan, out).records)
    return plan, out


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"status": "done", "fraction": 1.0}', '{"status": "won"}'],
    ids=["empty", "torn", "list", "null", "no record", "unknown"],
)
def test_a_damaged_status_costs_one_run_a_look_at_its_checkpoint(study, content):
    plan, out = study
    before = collect(plan, out)
    path = run_folder(out, plan.configs[0]) / "status.json"
    path.write_text(content)
    assert read_status(out, plan.configs[0])["status"] == "queued"
    states = run_states(plan, out)
    assert [s["status"] for s in states] == ["queued", "done", "done"]
    assert "status.json is damaged" in states[0]["cause"]
    assert len(collect(plan, out).records) == 2
    work(Job(out, plan.configs), lambda: False)
    assert collect(plan, out) == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "x", "runs": [{}]}', '{"runs": 3}'])
def test_a_damaged_list_of_runs_is_named(tmp_path, content):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match=r"study\.json: it is damaged"):
        load_plan(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [("done,", "done,1,2,3,"), ("digits,", ""), ("digits,mlp,", "digits,mlp,\x00,")],
    ids=["more", "fewer", "more and odd"],
)
def test_a_damaged_table_is_named_with_its_line(study, tmp_path, old, new):
    text = (study[1] / "results.csv").read_text()
    path = tmp_path / "results.csv"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"results\.csv: it is damaged.*line 2"):
        read_results(path)


def test_a_table_that_a_spreadsheet_saved_is_the_same(study, tmp_path):
    """With a mark of its bytes in front, and other ends of lines."""
    whole, path = study[1] / "results.csv", tmp_path / "results.csv"
    path.write_bytes(b"\xef\xbb\xbf" + whole.read_bytes().replace(b"\n", b"\r\n"))
    assert read_results(path) == read_results(whole)


def test_a_run_that_is_there_twice_is_refused(study, tmp_path):
    """It would count as two seeds, and narrow the intervals."""
    text = (study[1] / "results.csv").read_text()
    path = tmp_path / "results.csv"
    path.write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match="is there twice"):
        read_results(path)


@pytest.mark.parametrize("cell", ["inf", "", "many"])
def test_a_number_must_be_one(study, tmp_path, cell):
    head, row, *rest = (study[1] / "results.csv").read_text().splitlines()
    cells = row.split(",")
    cells[head.split(",").index("macs")] = cell
    path = tmp_path / "results.csv"
    path.write_text("\n".join([head, ",".join(cells), *rest]) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_results(path)


@pytest.mark.parametrize(
    "text", ["a=" + "[" * 2000 + "]" * 2000, SPEC.replace("[8, 16]", "[]").replace("[16]", "[]")]
)
def test_odd_specs_are_refused(text):
    with pytest.raises(ValueError, match="the spec: "):
        parse_spec(text)


@pytest.mark.parametrize(
    "text", ["lowrank({[]:1})", "btt(rank=" + "-" * 5000 + "1)", "btt(rank=1, rank=2)", "a" * 9999]
)
def test_odd_recipes_are_refused(text):
    with pytest.raises(ValueError, match=r"^structure ") as caught:
        parse(text)
    assert len(str(caught.value)) < 1000


def test_a_mark_of_byte_order_is_skipped(tmp_path):
    (tmp_path / "s.toml").write_bytes(b"\xef\xbb\xbf" + SPEC.encode())
    assert load_spec(tmp_path / "s.toml") == parse_spec(SPEC)


@pytest.mark.parametrize("change", [{"seed": 2**62}, {"lr": float("inf")}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="out of range"):
        digits(**change)


def test_a_run_larger_than_memory_is_planned_and_refused():
    config = RunConfig(
        "digits", "mlp", "dense", 10_000_000, seed=0, lr=1e-3, epochs=1, batch_size=1
    )
    assert run_size(config).params > 1e15
    with pytest.raises(ValueError, match="GiB are free"):
        plan_run(config)


def test_a_large_study_writes_nothing(tmp_path):
    plan = plan_study(parse_spec(SPEC.replace("[16]", "[10000000]")))
    with pytest.raises(ValueError, match="GiB are free"):
        run_study(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_need_no_memory_and_are_those_of_the_model():
    config = digits(structure="monarch(blocks=2)")
    size = run_size(config)
    from matrigami.studies.models import build_model
    from matrigami.studies.tasks import Shape

    model = build_model(config, Shape(1, 8, 10))
    assert size.params == sum(p.numel() for p in model.parameters())
    assert size.macs == model.macs()


@pytest.fixture
def hang_up():
    """SIGHUP as a terminal leaves it: these tests may run under `nohup` themselves."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no terminals that hang up")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield signal.SIGHUP
    signal.signal(signal.SIGHUP, before)


def test_who_was_started_by_nohup_does_not_hear_a_terminal_hang_up(hang_up):
    with stop_signals() as asked:
        os.kill(os.getpid(), hang_up)
        assert asked.is_set()
    signal.signal(hang_up, signal.SIG_IGN)
    with stop_signals() as asked:
        os.kill(os.getpid(), hang_up)
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_set()
    assert signal.getsignal(hang_up) == signal.SIG_IGN


def test_a_closed_terminal_keeps_the_state(tmp_path, hang_up):
    spec = tmp_path / "s.toml"
    spec.write_text(SPEC.replace("epochs = 2", "epochs = 5000"))
    arguments = ["-m", "matrigami.cli", "train", str(spec), "--out", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "TYPECHECK": "0"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(hang_up)
    assert process.wait(60) == 130
    with safe_open(tmp_path / "run" / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["position"])["history"]


def test_an_odd_length_is_named(tmp_path, monkeypatch):
    """A header that is no number ends in the message of every failed download."""
    from matrigami.studies.tasks import _download

    class Response:
        status, headers = 200, {"Content-Length": "abc"}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(_download.urllib.request, "urlopen", lambda *_, **__: Response())
    monkeypatch.setattr(_download, "PAUSE", 0.0)
    with pytest.raises(OSError, match="Content-Length 'abc'"):
        download("http://localhost/f", tmp_path / "f", lambda *_: None)
