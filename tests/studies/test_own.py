"""Data and models of your own: what is taken, counted, and refused in three lines."""

import numpy as np
import pytest
import torch

from matrigami.nn import StructuredLinear
from matrigami.studies import (
    ArrayTask,
    ImageTask,
    RunConfig,
    TextTask,
    build_model,
    build_optimizer,
    counted_macs,
    load_run,
    load_task,
    parse_spec,
    plan_study,
    train_run,
)
from matrigami.studies._own import refuse_changed, source_hash
from matrigami.studies._run import collect, prepare
from matrigami.studies._worker import Job, work
from matrigami.studies.tasks import Shape
from matrigami.testing import check_task

NETS = '''
import torch
from torch import nn

class Scaled(nn.Module):
    """A layer that the library does not know."""
    def __init__(self, n):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n))
    def forward(self, x):
        return x * self.scale

def mlp(features, outputs, width=32):
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Dropout(0.3), Scaled(width),
                         nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))

def convs(channels, outputs, width):
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, outputs))

def tied(outputs, width):
    table = nn.Embedding(outputs, width)
    head = nn.Linear(width, outputs, bias=False)
    head.weight = table.weight
    return nn.Sequential(table, nn.Linear(width, width), nn.GELU(), head)

def needs(features, colour):
    return nn.Linear(features, 2)

def wrong(features):
    return nn.Linear(features, 77)

def number():
    return 3

class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x

class Checks(nn.Linear):
    def forward(self, x):
        assert x.ndim == 4
        return x

def pair(features, outputs):
    return Pair(features, outputs)

def checks(features, outputs):
    return Checks(features, outputs)

def breaks(features=0):
    return {}["key"]

def arrays():
    x = torch.arange(80.0).reshape(20, 4).sin()
    return x, x[:, :1] ** 2, x[:8], x[:8, :1] ** 2

def story():
    return "once upon a time there was a matrix. " * 30
'''
SPEC = """
[study]
name = "own"
[task]
dataset = "{dataset}"
[model]
name = "{model}"
[train]
lr = 3e-3
epochs = 2
batch_size = 16
[[structure]]
name = "dense"
widths = [16]
[[structure]]
name = "lowrank(rank=4)"
widths = [16]
"""


def run(folder, dataset="two.npz", model="mlp", **changes):
    options = {"structure": "dense", "width": 16, "seed": 0, "lr": 3e-3, "epochs": 2}
    options |= {"batch_size": 16, "depth": 1, "folder": str(folder)} | changes
    return RunConfig(dataset=dataset, model=model, **options)


def arrays(n=40, features=6, classes=2, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, features)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64) % classes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    x, y = arrays()
    np.savez(tmp_path / "two.npz", x_train=x, y_train=y, x_test=x[:10] + 0.01, y_test=y[:10])
    (tmp_path / "story.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 20)
    return tmp_path


def refused(call, match):
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert len(str(caught.value).splitlines()) in (2, 3)
    return str(caught.value)


# ------------------------------------------------------------------ data


def test_arrays_of_classes_are_normalised_by_feature(folder):
    task = load_task(run(folder))
    assert isinstance(task, ArrayTask)
    assert (task.shape, task.examples, task.tests) == (Shape(6, 1, 2), 40, 10)
    batch = task.batch(task.plan(40, torch.Generator().manual_seed(0)), 0, 40)
    torch.testing.assert_close(batch.inputs.mean(0), torch.zeros(6).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(batch.inputs.std(0, correction=0), torch.ones(6).float())
    check_task(task)


def test_planes_of_numbers_are_normalised_plane_by_plane(folder):
    x = np.random.default_rng(0).normal(3, 2, (12, 2, 4, 4))
    np.savez(
        folder / "p.npz", x_train=x, y_train=np.arange(12) % 3, x_test=x, y_test=np.zeros(12, int)
    )
    task = load_task(run(folder, "p.npz"))
    assert task.shape == Shape(2, 4, 3)
    planes = next(task.test_batches()).inputs.unflatten(1, (2, 16))
    torch.testing.assert_close(planes.mean((0, 2)), torch.zeros(2).float(), atol=1e-6, rtol=0)
    wanted = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    torch.testing.assert_close(
        planes.flatten(1).double(), torch.from_numpy(wanted).flatten(1), atol=1e-5, rtol=0
    )


def test_the_error_of_numbers_is_that_of_their_mean_in_percent(folder):
    task = load_task(run(folder, "nets.py:arrays"))
    check_task(task)
    batch = task.batch(task.plan(20, torch.Generator()), 0, 20)
    score = task.score(torch.zeros(20, 1).float(), batch)
    assert float(score.error_sum) / 20 == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("layout", ["grey", "last", "first"])
def test_images_of_bytes_keep_their_pixels(folder, layout):
    x = np.random.default_rng(0).integers(0, 256, (8, 3, 4, 4), np.uint8)
    given = {"grey": x[:, 0], "last": x.transpose(0, 2, 3, 1), "first": x}[layout]
    y = np.arange(8) % 2
    np.savez(folder / "i.npz", x_train=given, y_train=y, x_test=given, y_test=y)
    task = load_task(run(folder, "i.npz", augment=True, mixup=0.2))
    assert isinstance(task, ImageTask)
    check_task(task)
    channels = 1 if layout == "grey" else 3
    planes = next(task.test_batches()).inputs.unflatten(1, (channels, 4, 4)).double()
    kept = torch.from_numpy(x[:, :channels]).double()
    wanted = (kept - kept.mean((0, 2, 3), True)) / kept.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(planes, wanted, atol=1e-5, rtol=0)


def test_a_folder_of_images(folder):
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / "pets" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
                image.fromarray(pixels).save(folder / "pets" / part / name / f"{i}.png")
    task = load_task(run(folder, "pets"))
    assert (task.shape, task.examples, task.tests) == (Shape(3, 8, 2), 10, 4)
    first = np.asarray(image.open(folder / "pets" / "train" / "cat" / "0.png"))
    assert np.array_equal(task._train.pixels[0].numpy(), first.transpose(0, 2, 1))
    assert load_task(run(folder, "pets", side=4)).shape == Shape(3, 4, 2)
    noted = source_hash("pets", str(folder), ())
    for hidden in ("train/.cache/0.png", "train/cat/._0.png"):
        (folder / "pets" / hidden).parent.mkdir(exist_ok=True)
        (folder / "pets" / hidden).write_bytes(b"of a system or an editor")
    assert load_task(run(folder, "pets")).shape == Shape(3, 8, 2)
    assert source_hash("pets", str(folder), ()) == noted
    (folder / "pets" / "test" / "cow").mkdir()
    refused(lambda: load_task(run(folder, "pets")), "cow, which train lacks")
    refused(lambda: load_task(run(folder, "nets.py")), "Name its function .* nets.py:function")


def test_a_text_and_a_function_that_gives_one(folder):
    for name in ("story.txt", "nets.py:story"):
        task = load_task(run(folder, name, context=8))
        assert isinstance(task, TextTask)
        check_task(task)


def changed(folder, **arrays_):
    with np.load(folder / "two.npz") as file:
        np.savez(folder / "two.npz", **(dict(file) | arrays_))
    return lambda: load_task(run(folder))


def test_files_without_the_arrays_are_refused(folder):
    np.savez(folder / "two.npz", x_train=np.zeros((9, 6)), labels=np.zeros(9))
    refused(lambda: load_task(run(folder)), "lacks y_train, x_test, y_test; it has x_train, labels")
    np.savez(folder / "two.npz", x_train=np.array([object()]))
    refused(lambda: load_task(run(folder)), "cannot be read as arrays")
    (folder / "two.npz").write_bytes(b"no archive")
    refused(lambda: load_task(run(folder)), "cannot be read as arrays")


def test_settings_that_mean_nothing_are_refused(folder):
    refused(lambda: load_task(run(folder, context=64)), "means nothing for arrays")
    refused(lambda: load_task(run(folder, "story.txt", side=8)), "means nothing for a text")
    refused(lambda: load_task(run(folder, augment=True)), "means nothing for arrays")
    refused(lambda: load_task(run(folder, "story.txt", mixup=0.5)), "means nothing for a text")
    refused(lambda: load_task(run(folder, "nets.py:arrays", label_smoothing=0.1)), "no classes")


def test_missing_sources_are_refused(folder):
    assert "Did you mean 'digits'" in refused(lambda: load_task(run(folder, "digit")), "digit")
    refused(lambda: load_task(run(folder, "gone.py:f")), "gone.py cannot be read")
    assert "Nearest: arrays" in refused(
        lambda: load_task(run(folder, "nets.py:array")), "no function"
    )
    refused(lambda: load_task(run(folder, "nets.py:number")), "it gave a int")
    refused(
        lambda: load_task(run(folder, "nets.py:breaks")), r"failed in line \d+: KeyError: 'key'"
    )
    refused(lambda: load_task(run(folder, "nets.py:needs")), "failed: TypeError: .* missing 2")
    (folder / "bad.py").write_text("raise SystemExit(0)")
    refused(lambda: load_task(run(folder, "bad.py:f")), "SystemExit: 0")
    (folder / "bad.py").write_text("import beside")
    (folder / "beside.py").write_text("")
    advice = refused(lambda: load_task(run(folder, "bad.py:f")), "No module named 'beside'")
    assert f"PYTHONPATH={folder}" in advice
    (folder / "bad.py").write_text("1 / 0")
    refused(lambda: load_task(run(folder, "bad.py:f")), "ZeroDivisionError")
    (folder / "latin.txt").write_bytes("é".encode("latin-1") * 400)
    refused(lambda: load_task(run(folder, "latin.txt")), "UTF-8")


# ------------------------------------------------------------------ models


def test_a_model_counts_its_own_and_structured_layers(folder):
    shape = Shape(6, 1, 2)
    dense = build_model(run(folder, model="nets.py:mlp"), shape)
    assert dense.macs() == 6 * 16 + 16 * 16 + 16 * 2
    low = build_model(run(folder, model="nets.py:mlp", structure="lowrank(rank=4)"), shape)
    assert low.macs() == 4 * (6 + 16) + 4 * (16 + 16) + 16 * 2
    kinds = [type(m) is StructuredLinear for m in low.net if hasattr(m, "in_features")]
    assert kinds == [True, True, False]
    hidden = run(folder, model="nets.py:mlp", structure="lowrank(rank=4)", targets="re:4")
    assert build_model(hidden, shape).macs() == 6 * 16 + 4 * (16 + 16) + 16 * 2


def test_a_structured_layer_counts_each_of_its_vectors():
    layer = StructuredLinear(8, 8, torch_recipe())
    model = torch.nn.Sequential(layer, torch.nn.Linear(8, 2))
    assert counted_macs(model, torch.zeros(3, 5, 8))[0] == 15 * (layer.cost().macs + 16)


def torch_recipe():
    from matrigami import Monarch

    return Monarch(blocks=2)


def test_a_model_has_a_rate_for_each_parameter_even_where_a_layer_is_unknown(folder):
    config = run(folder, model="nets.py:mlp", width=128)
    model = build_model(config, Shape(6, 1, 2))
    rates = {
        p: g["lr"] / config.lr
        for g in build_optimizer(model, config).param_groups
        for p in g["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    assert rates[model.net[3].scale] == 1
    assert rates[model.net[4].weight] == rates[model.net[6].weight] == 0.5  # base_width / width
    assert rates[model.net[0].weight] == pytest.approx(config.input_lr_scale)
    build_optimizer(model, run(folder, model="nets.py:mlp", optimizer="soap"))


@pytest.mark.parametrize(
    ("model", "dataset", "changes"),
    [
        ("nets.py:mlp", "two.npz", {"structure": "btt(rank=1)"}),
        (
            "nets.py:tied",
            "story.txt",
            {"context": 8, "targets": "1", "structure": "monarch(blocks=4)"},
        ),
    ],
)
def test_a_model_goes_on_as_if_it_had_not_been_interrupted(folder, model, dataset, changes):
    """Also with dropout, tied weights and buffers."""
    config = run(folder, dataset, f"{model}", checkpoint_seconds=0.0, **changes)
    whole = train_run(config, folder / "whole")
    calls = iter([False, False, True])
    with pytest.raises(Exception, match="stopped"):
        train_run(config, folder / "part", stop=lambda: next(calls))
    again = train_run(config, folder / "part")
    for name in ("train_loss", "test_loss", "train_error", "test_error"):
        assert again[name] == whole[name]
    loaded = load_run(folder / "whole", 8) if (folder / "whole" / "config.json").exists() else None
    assert loaded is None


def test_images_come_as_planes(folder):
    shape = Shape(3, 8, 4)
    model = build_model(run(folder, model="nets.py:convs", structure="lowrank(rank=2)"), shape)
    assert model.eval()(torch.zeros(2, 192).float()).shape == (2, 4)
    assert model.macs() == 64 * 2 * (27 + 16) + 64 * 4


def test_models_that_do_not_fit_are_refused(folder):
    def built(name, **changes):
        return lambda: build_model(run(folder, model=name, **changes), Shape(6, 1, 2))

    refused(built("nets.py:needs"), "'colour' is not known")
    refused(built("nets.py:wrong"), r"answers 1 with a tensor of \(1, 77\)")
    refused(built("nets.py:convs"), "it fails on 1: ")
    refused(built("nets.py:pair"), "fails on 1: TypeError: it answers with a tuple")
    refused(built("nets.py:checks"), "it fails on 1: AssertionError")
    refused(built("nets.py:number"), "gave a int")
    refused(built("nets.py:breaks"), r"failed in line \d+: KeyError")
    refused(built("nets.py:mlp", structured_layers="hidden"), "Say by `targets`")
    refused(built("mlp", targets="0"), "puts the structure in place itself")
    with pytest.raises(ValueError, match="matches no layer of the Sequential") as caught:
        built("nets.py:mlp", targets="net.9")()
    assert "Nearest:" in str(caught.value)


# ------------------------------------------------------------------ studies


def test_a_study_of_own_data_and_model(folder):
    (folder / "s.toml").write_text("")
    study = parse_spec(SPEC.format(dataset="two.npz", model="nets.py:mlp"), folder=folder)
    plan = plan_study(study)
    prepare(plan, folder / "out")
    work(Job(folder / "out", plan.configs), lambda: False)
    outcome = collect(plan, folder / "out")
    assert [r["status"] for r in outcome.records] == ["done", "done"]
    assert {r["dataset"] for r in outcome.records} == {"two.npz"}
    loaded = load_run(folder / "out" / "runs" / study.configs[0].id, 8)
    assert loaded.model(loaded.inputs).shape == (8, 2)


def test_a_run_knows_its_sources_and_not_where_they_are(folder, tmp_path_factory):
    spec = SPEC.format(dataset="two.npz", model="nets.py:mlp")
    here = parse_spec(spec, folder=folder).configs[0]
    moved = tmp_path_factory.mktemp("moved")
    for name in ("two.npz", "nets.py"):
        (moved / name).write_bytes((folder / name).read_bytes())
    assert parse_spec(spec, folder=moved).configs[0].id == here.id
    (folder / "nets.py").write_text(f"{NETS}\n# changed")
    assert parse_spec(spec, folder=folder).configs[0].id != here.id
    refused(lambda: build_model(here, Shape(6, 1, 2)), "has changed since")
    changed(folder, x_test=np.ones((10, 6)))
    refused(lambda: load_task(here), "has changed since")


def test_a_spec_names_what_is_missing(folder):
    refused(
        lambda: parse_spec(SPEC.format(dataset="cifar", model="mlp"), folder=folder),
        "is none of digits",
    )
    refused(
        lambda: parse_spec(SPEC.format(dataset="two.npz", model="mpl"), folder=folder),
        "known are mlp",
    )


def test_a_source_that_was_moved_away_is_told(tmp_path):
    refused(lambda: refuse_changed(str(tmp_path), "data.npz", "0" * 16), "Put it back where it was")
