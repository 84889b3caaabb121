"""Arrays and models of your own that could not be trained are refused in words."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from matrigami.studies import RunConfig, build_model
from matrigami.studies.tasks import Shape
from matrigami.studies.tasks._arrays import task_of_arrays

CONFIG = RunConfig("two.npz", "mlp", "dense", 16, seed=0, lr=0.01, epochs=1, batch_size=8)
Y = np.arange(40) % 2
X = np.random.default_rng(0).normal(size=(40, 6))


NETS = """
from torch import nn

class Total(nn.Linear):
    def forward(self, x):
        return super().forward(x).sum(0, keepdim=True)

class Cut(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()

def total(features, outputs):
    return Total(features, outputs)

def cut(features, outputs):
    return Cut(features, outputs)

def frozen(features, outputs):
    return nn.Linear(features, outputs).requires_grad_(False)

def lazy(outputs):
    return nn.LazyLinear(outputs)

def leaves(features):
    raise SystemExit(0)
"""


def task(**changes):
    arrays = {"x_train": X, "y_train": Y, "x_test": X[:10], "y_test": Y[:10]}
    return task_of_arrays(arrays | changes, CONFIG, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": X[:, :5]}, r"of x_train are \(5,\), of x_test \(6,\)"),
        ({"x_train": X[:, :0], "x_test": X[:10, :0]}, r"of x_train are \(0,\)"),
        ({"x_train": np.where(X > 2, np.nan, X)}, "x_train has NaN"),
        ({"x_train": X * 1e200}, "beyond single precision"),
        ({"x_train": X.astype(str)}, "x_train is no array of numbers: its type is <U"),
        ({"x_train": (X > 0).astype(np.uint8)}, "x_train is of torch.uint8, x_test of"),
        ({"x_train": torch.tensor(X).to_sparse()}, "x_train is sparse"),
        ({"y_train": Y[:30]}, "x_train has 40 examples, y_train has 30"),
        ({"y_train": Y - 1}, "labels run from -1 to"),
        ({"y_test": np.full(10, 5)}, "labels run from 0 to 5; those of y_train to 1"),
        ({"y_train": np.array(["cat", "dog"] * 20)}, "its type is <U3"),
        ({"y_train": Y * 1j}, "y_train is complex"),
        ({"y_train": np.array(3)}, "y_train is a single number"),
        ({"y_train": Y * 1.0}, "y_train is of torch.float64, y_test of torch.int64"),
        ({"y_train": X[:, :2]}, r"of y_train are \(2,\), of y_test \(1,\)"),
        ({"y_train": np.ones(40, int)}, r"all 40 targets of y_train are the same, \[1\]"),
        ({"y_train": np.eye(3, dtype=int)[Y], "y_test": np.eye(3, dtype=int)[Y[:10]]}, "shapes"),
        ({"y_train": np.r_[Y[1:], 10**7]}, "run to 10000000, .* only 3 different ones occur"),
    ],
)
def test_arrays_that_make_no_task_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        task(**changes)
    assert len(str(caught.value).splitlines()) in (2, 3)


def test_the_order_of_bytes_of_another_machine_is_taken():
    x = X.astype(X.dtype.newbyteorder(">"))
    for swapped, plain in zip(task(x_train=x).test_batches(), task().test_batches(), strict=True):
        torch.testing.assert_close(swapped, plain)


def test_labels_may_have_gaps_and_a_column():
    assert task(y_train=900 * Y[:, None], y_test=900 * Y[:10, None]).shape.outputs == 901


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("total", r"answers 2 with a tensor of \(1, 2\)"),
        ("cut", "has no derivative"),
        ("frozen", "no parameter that is trained"),
        ("lazy", "get their sizes later"),
        ("leaves", r"failed in line \d+: SystemExit: 0"),
    ],
)
def test_models_that_could_not_be_trained_are_refused(name, message, tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    config = replace(CONFIG, model=f"nets.py:{name}", folder=str(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        build_model(config, Shape(6, 1, 2))
    assert len(str(caught.value).splitlines()) in (2, 3)
