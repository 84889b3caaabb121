"""Matrices of neural networks for the comparison: initial and trained, three sizes of each.

Networks are trained by the training loop of the studies, on scikit-learn's digits and, where their
folder is given, on the images of CIFAR-100. Everything is made when it is first asked for, and
kept, as several matrices come from one network.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.curvature import fisher
from matrigami.optim import Shampoo
from matrigami.studies._config import RunConfig
from matrigami.studies._load import load_run
from matrigami.studies._size import check_data
from matrigami.studies._train import train_run
from matrigami.studies.analysis._sources import Loaded, Source
from matrigami.studies.models import build_model
from matrigami.studies.tasks import load_task

WIDTHS = (64, 128, 256)
"""Features of the residual stream; the layer that is shown has four times as many outputs."""

EPOCHS = {"digits": 30, "cifar100": 5}
"""Of training: enough for an error of no example of digits; of CIFAR-100 a beginning."""

HIDDEN = (8, 16, 32)
"""Neurons of the networks whose curvature is shown, with 16 inputs."""

UNITS = (64, 128, 256)
"""Neurons of the networks whose Shampoo factors are shown: the size of the factor."""

STEPS = 300
"""Of the optimiser of these two."""

BATCH, EXAMPLES, LR = 128, 400, 3e-3

STAGES = ("initial", "trained")


def network_sources() -> list[Source]:
    """Weights, weights of block tensor trains, Gauss-Newton blocks, factors of Shampoo."""
    found = []
    for structure, label in (("dense", "weights"), ("btt(rank=1)", "weights of a BTT")):
        for stage in STAGES:
            found += [_weights("digits", structure, label, stage, w) for w in WIDTHS]
    for stage in STAGES:
        found += [_curvature(stage, h) for h in HIDDEN]
    for side in ("L", "R"):
        found += [_shampoo(side, h) for h in UNITS]
    return found


def cifar100_sources(data: Path) -> list[Source]:
    """Weights of networks on CIFAR-100.

    Args:
        data: The data folder, with `cifar-100-binary`.

    Raises:
        ValueError: If it is not there.
    """
    check_data([_config("cifar100", "dense", WIDTHS[0])], data)
    return [
        _weights("cifar100", "dense", "CIFAR-100 weights", stage, w, data)
        for stage in STAGES
        for w in WIDTHS
    ]


def _source(name: str, m: int, n: int, load: Callable[[], Tensor]) -> Source:
    """A matrix without points."""
    identity = f"{name} {EPOCHS} {STEPS} {LR}"

    def loaded() -> Loaded:
        return load().detach().double(), None

    return Source(f"{name} · {m}x{n}", (m, n), loaded, identity)


def _weights(
    task: str, structure: str, label: str, stage: str, width: int, data: Path | None = None
) -> Source:
    """The first layer of a residual block of the network of the studies."""

    def load() -> Tensor:
        return getattr(_trained(task, structure, width, data), stage)

    return _source(f"{label}, {stage}", 4 * width, width, load)


class Weights(NamedTuple):
    """A layer before and after training."""

    initial: Float[Tensor, "m n"]
    trained: Float[Tensor, "m n"]


def _config(task: str, structure: str, width: int) -> RunConfig:
    """One run of the studies."""
    shared = {"seed": 0, "lr": LR, "batch_size": BATCH, "depth": 1}
    return RunConfig(task, "mlp", structure, width, epochs=EPOCHS[task], **shared)


@functools.cache
def _trained(task: str, structure: str, width: int, data: Path | None) -> Weights:
    """One network of the studies."""
    config = _config(task, structure, width)
    generator = torch.Generator().manual_seed(2 * config.seed)  # as the run draws it
    initial = build_model(config, load_task(config, data).shape, generator)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.to_json()))
        train_run(config, folder, data_dir=data)
        return Weights(_layer(initial), _layer(load_run(folder, 1, data_dir=data).model))


def _layer(model: nn.Module) -> Float[Tensor, "m n"]:
    """The dense matrix of the layer that is shown."""
    return getattr(model.get_submodule("blocks.0.expand"), "weight").detach().clone()  # noqa: B009


def _digits() -> tuple[Float[Tensor, "e 64"], Tensor]:
    """Training examples as the task of the studies has them."""
    task = load_task(_config("digits", "dense", WIDTHS[0]))
    plan = task.plan(EXAMPLES, torch.Generator().manual_seed(0))
    batch = task.batch(plan, 0, EXAMPLES)
    return batch.inputs.double(), batch.targets


def _perceptron(inputs: int, hidden: int) -> nn.Sequential:
    """Two layers with tanh."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 10)]
        return nn.Sequential(*body).double()


def _fit(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`STEPS` steps on random batches."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def _curvature(stage: str, hidden: int) -> Source:
    """The Gauss-Newton block of the first layer, of images averaged to 4 x 4."""
    size = 16 * hidden

    def load() -> Tensor:
        x, y = _digits()
        x = nn.functional.avg_pool2d(x.reshape(-1, 1, 8, 8), 2).flatten(1)
        model = _perceptron(16, hidden)
        if stage == "trained":
            _fit(model, x, y, torch.optim.Adam(model.parameters(), lr=LR))
        for name, p in model.named_parameters():
            p.requires_grad_(name == "0.weight")
        return fisher(model, nn.CrossEntropyLoss(), (x, y)).dense()

    return _source(f"Gauss-Newton block, {stage}", size, size, load)


def _shampoo(side: str, hidden: int) -> Source:
    """A factor of Shampoo after training: outputs of the first layer, inputs of the last one."""

    def load() -> Tensor:
        x, y = _digits()
        model = _perceptron(64, hidden)
        optimizer = Shampoo(model, lr=1e-2)
        _fit(model, x, y, optimizer)
        parameter = model.get_parameter("0.weight" if side == "L" else "2.weight")
        return optimizer.state[parameter][side][0]

    return _source(f"Shampoo factor {side}", hidden, hidden, load)
