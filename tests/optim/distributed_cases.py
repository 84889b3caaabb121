"""What each rank does in the tests of distribution; every function raises if a number is wrong."""

import copy
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from matrigami import BlockTensorTrain, Monarch
from matrigami.nn import StructuredLinear
from matrigami.optim import KFAC, SOAP, MatrixOptimizer, Muon, Shampoo, plan

METHODS = {
    "soap": partial(SOAP, lr=0.02, frequency=2),
    "shampoo": partial(Shampoo, lr=0.02, frequency=2, weight_decay=0.1),
    "muon": partial(Muon, lr=0.02),
    "muon_bound": partial(Muon, lr=0.02, bound=True),
}
"""Refreshes are frequent, so that they fall before and after a checkpoint."""


def dense() -> nn.Module:
    """Rows that four ranks cannot share evenly; of the last layer one has none; a frozen bias."""
    layers = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7), nn.LayerNorm(7))
    layers[3].bias.requires_grad_(False)
    return nn.Sequential(layers, nn.Tanh(), nn.Linear(7, 3))


def cores() -> nn.Module:
    """Stacks of matrices, whose first axis is not that of rows, and no bias."""
    return nn.Sequential(
        StructuredLinear(6, 10, Monarch(blocks=2), bias=False),
        nn.Tanh(),
        StructuredLinear(10, 9, BlockTensorTrain(rank=2), bias=False),
        nn.Tanh(),
        nn.Linear(9, 3, bias=False),
    )


def half() -> nn.Module:
    """Parameters of half precision, whose state is in single."""
    return dense().bfloat16()


MODELS = {"dense": dense, "cores": cores, "half": half}


def model_of(name: str) -> nn.Module:
    """The same on all ranks."""
    torch.manual_seed(1)
    return MODELS[name]()


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    """A model that all ranks train together."""
    count = dist.get_world_size()
    if kind == "plain":
        return model
    if kind in {"ddp", "redundant"}:
        return DistributedDataParallel(model)
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("shard",))
    for module in model:
        if list(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def backward(model: nn.Module, step: int, divide: bool = False) -> None:
    """The gradient of one step; of a rank's part of the batch, or of all of it on every rank."""
    generator = torch.Generator().manual_seed(step)
    X, Y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    if divide:
        size = 8 // dist.get_world_size()
        part = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
        X, Y = X[part], Y[part]
    dtype = next(model.parameters()).dtype
    (model(X.to(dtype)) - Y.to(dtype)).square().mean().backward()


def natural(kind: str) -> None:
    """K-FAC, whose watch averages over ranks and whose trust region spans them."""
    ours, alone = wrapped(model_of("dense"), kind), model_of("dense")
    loss, options = nn.MSELoss(), {"lr": 0.3, "frequency": 2, "kl_clip": 1e-3, "momentum": 0.5}
    optimizers = [KFAC(model, loss, **options) for model in (ours, alone)]
    for step in range(5):
        for model, optimizer in zip((ours, alone), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    for p, q in zip(ours.parameters(), alone.parameters(), strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole.detach(), q.detach(), rtol=1e-8, atol=1e-9)
    if kind == "fsdp":
        with pytest.raises(ValueError, match="are sharded"):
            KFAC(wrapped(model_of("cores"), kind), loss)


def sees_inputs(kind: str) -> None:
    """Muon with the moments of inputs, which are averaged over ranks, of sharded cores, too."""
    for name in ("dense", "cores"):
        ours, alone = wrapped(model_of(name), kind), model_of(name)
        options = {"lr": 0.02, "inputs": True, "statistics_every": 2, "bound": True}
        optimizers = [Muon(model, **options) for model in (ours, alone)]
        for step in range(5):
            for model, optimizer in zip((ours, alone), optimizers, strict=True):
                optimizer.zero_grad()
                backward(model, step)
                optimizer.step()
        check_equal(ours, alone, 1e-5)
        assert any(entry["watched"].any() for entry in optimizers[1].state.values() if "A" in entry)


def train(model: nn.Module, optimizer: MatrixOptimizer, steps: range, divide: bool = False) -> None:
    """Some steps."""
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, divide)
        optimizer.step()


def whole(t: Tensor) -> Tensor:
    """All of a tensor."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters by their names in the bare model."""
    return {
        name.removeprefix("module."): whole(p.detach()).clone()
        for name, p in model.named_parameters()
    }


def check_equal(model: nn.Module, other: nn.Module, tolerance: float = 1e-10) -> None:
    """Raise unless two models have the same parameters, up to rounding that preconditioners grow.

    The order of sums differs between processors: 1e-12 on some, 1.4e-11 on others.
    """
    found, expected = parameters(model), parameters(other)
    assert found.keys() == expected.keys()
    for name, p in found.items():
        error = (p - expected[name]).abs().max()
        assert error <= tolerance, f"{name} differs by {float(error)}"


def agrees(kind: str, cases: list[tuple[str, str]]) -> None:
    """Every method trains every model as one process does."""
    for method, name in cases:
        alone = model_of(name)
        train(alone, METHODS[method](alone), range(5))
        together = wrapped(model_of(name), kind)
        # null spaces of the first gradient turn with its rounding: SOAP is given equal gradients
        source = together.module if kind == "redundant" else together
        train(together, METHODS[method](source), range(5), divide=method != "soap")
        check_equal(together, alone)


def state(model: nn.Module, optimizer: MatrixOptimizer) -> dict[str, Any]:
    """What a checkpoint holds."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def saves(kind: str, cases: list[tuple[str, str]], folder: Path) -> None:
    """Three steps and a checkpoint; loading it at once and two more steps are bitwise the same."""
    for method, name in cases:
        model = wrapped(model_of(name), kind)
        optimizer = METHODS[method](model)
        train(model, optimizer, range(3))
        optimizer.zero_grad()
        place = folder / f"{method}-{name}"
        dcp.save(state(model, optimizer), checkpoint_id=place)
        train(model, optimizer, range(3, 5))
        again = resumed(kind, method, name, place)
        check_equal(again, model, tolerance=0.0)


def resumed(kind: str, method: str, name: str, folder: Path) -> nn.Module:
    """Another model and optimiser, from the checkpoint, after two more steps."""
    model = wrapped(model_of(name), kind)
    for p in model.parameters():
        p.data.mul_(0.5)
    optimizer = METHODS[method](model)
    found = state(model, optimizer)
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
    )
    train(model, optimizer, range(3, 5))
    return model


def resumes(kind: str, cases: list[tuple[str, str]], folder: Path) -> None:
    """From the checkpoint of other ranks to where one process arrives without interruption."""
    for method, name in cases:
        alone = model_of(name)
        train(alone, METHODS[method](alone), range(5))
        check_equal(resumed(kind, method, name, folder / f"{method}-{name}"), alone, 1e-9)


def keeps_single_precision(kind: str) -> None:
    """The state of half-precision parameters is in single precision, before and after a file."""
    model = wrapped(model_of("half"), kind)
    first = METHODS["soap"](model)
    train(model, first, range(3))
    model.zero_grad()
    full, file = StateDictOptions(full_state_dict=True), BytesIO()
    torch.save(get_optimizer_state_dict(model, first, options=full), file)
    file.seek(0)
    second = METHODS["soap"](model)
    loaded = torch.load(file, weights_only=True)
    set_optimizer_state_dict(model, second, optim_state_dict=loaded, options=full)
    expected = first.state_dict()["state"]
    for i, entry in second.state_dict()["state"].items():
        assert all(torch.equal(whole(S), whole(expected[i][n])) for n, S in entry.items())
        assert {S.dtype for S in entry.values() if S.is_floating_point()} == {torch.float32}


def resumes_from_whole_tensors(kind: str, method: str = "soap", name: str = "dense") -> None:
    """The state of one process, as it is, on many; and theirs, put together, on one."""
    alone, model = model_of(name), wrapped(model_of(name), kind)
    first, optimizer = METHODS[method](alone), METHODS[method](model)
    train(alone, first, range(3))
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    full = StateDictOptions(full_state_dict=True)
    found = get_optimizer_state_dict(model, optimizer, options=full)
    named = get_optimizer_state_dict(alone, first)
    for (key, entry), (other, expected) in zip(
        sorted(found["state"].items()), sorted(named["state"].items()), strict=True
    ):
        assert key == other
        assert {n: S.shape for n, S in entry.items()} == {n: S.shape for n, S in expected.items()}
    other = METHODS[method](model)
    other.load_state_dict(first.state_dict())  # in the order of the parameters, without names
    train(model, other, range(3, 5))
    train(alone, first, range(3, 5))
    check_equal(model, alone, tolerance=1e-9)
    model.zero_grad()
    third = METHODS[method](model)
    set_optimizer_state_dict(model, third, optim_state_dict=found, options=full)
    again = get_optimizer_state_dict(model, third, options=full)
    for key, entry in found["state"].items():
        assert all(torch.equal(again["state"][key][n], S) for n, S in entry.items())


def asks_for_shapes(kind: str) -> None:
    """To ask for the state before the first step changes nothing that comes later."""
    for method in METHODS.values():
        alone, model = model_of("dense"), wrapped(model_of("dense"), kind)
        optimizer = method(model, weight_decay=0.5)
        before = get_optimizer_state_dict(model, optimizer)
        counters = {whole(entry["step"]).item() for entry in before["state"].values()}
        assert counters == {0.0}
        assert {group["clock"] for group in before["param_groups"]} == {0}
        train(alone, method(alone, weight_decay=0.5), range(3))
        train(model, optimizer, range(3))
        check_equal(model, alone)


def skips(kind: str) -> None:
    """One number that is not finite, on one rank, stops its parameter everywhere, and no other."""
    for method, broken in (("soap", "0.0.weight"), ("soap", "0.2.bias"), ("muon", "2.weight")):
        model, alone = wrapped(model_of("dense"), kind), model_of("dense")
        ours, theirs = METHODS[method](model), METHODS[method](alone)
        for step in range(3):
            for m, optimizer in ((model, ours), (alone, theirs)):
                optimizer.zero_grad()
                backward(m, step)
                name = f"module.{broken}" if kind == "ddp" else broken
                G = dict(m.named_parameters())[broken if m is alone else name].grad
                flat = G.to_local() if isinstance(G, DTensor) else G
                shared = isinstance(G, DTensor) and dist.get_rank() > 0
                if step == 1 and flat.numel() and not shared:
                    flat.view(-1)[0] = torch.inf
                optimizer.step()
        check_equal(model, alone)
        moments = get_optimizer_state_dict(model, ours)["state"]
        counts = {name: float(whole(entry["skipped"])) for name, entry in moments.items()}
        assert counts == {name: float(name == broken) for name in counts}
        assert float(whole(moments[broken]["step"])) == 2.0


def accumulates_and_clips(kind: str) -> None:
    """Two halves of a batch, one exchange; clipped; with a schedule of the learning rate."""
    alone, model = model_of("cores"), wrapped(model_of("cores"), kind)
    for m in (alone, model):
        optimizer = METHODS["shampoo"](m)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        for step in range(4):
            optimizer.zero_grad()
            if m is alone:
                backward(m, 2 * step)
            elif isinstance(m, DistributedDataParallel):
                with m.no_sync():
                    backward(m, 2 * step, divide=True)
            else:
                m.set_requires_gradient_sync(False)
                backward(m, 2 * step, divide=True)
                m.set_requires_gradient_sync(True)
            backward(m, 2 * step + 1, divide=m is model)
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            optimizer.step()
            schedule.step()
    check_equal(model, alone)


def takes_two_cuts() -> None:
    """Tensor parallelism inside FSDP: both axes of the mesh cut, one even the axis of the other."""
    alone, model = model_of("dense")[0], model_of("dense")[0]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], styles)
    fully_shard(model, mesh=mesh["data"])
    for method in ("shampoo", "muon"):
        for m in (alone, model):
            optimizer = METHODS[method](m)
            for step in range(3):
                optimizer.zero_grad()
                X = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
                (m(X) - X[:, :1]).square().mean().backward()
                optimizer.step()
    check_equal(model, alone)


def plans(kind: str) -> None:
    """The plan names the owner of each matrix, and the optimiser keeps to it."""
    model = wrapped(model_of("dense"), kind)
    table = plan(model, partial(SOAP, max_dim=100))
    owned = {row.name: row.owner for row in table.rows if row.owner is not None}
    assert owned == {"0.0.weight": 1, "0.2.weight": 0, "2.weight": 2}
    assert "owner" in repr(table).splitlines()[0]
    optimizer = SOAP(table)
    backward(model, 0)
    optimizer.step()
    rank = dist.get_rank()
    for row in table.rows:
        if row.owner is not None:
            assert bool(optimizer.state[row.parameter]) is (row.owner == rank), row.name
    assert all(p in optimizer.state for p in model.parameters() if p.requires_grad)


def exchanges_states(kind: str) -> None:
    """Whatever the state is given as or asked for."""
    resumes_from_whole_tensors(kind)
    keeps_single_precision(kind)
    asks_for_shapes(kind)


def refuses_a_copy() -> None:
    """A copy of a replica's optimiser would lack the state of the matrices of others."""
    model = wrapped(model_of("cores"), "ddp")
    optimizer = SOAP(model)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="have owners"):
        copy.deepcopy(optimizer)


def checks_annotations() -> None:
    """The ranks run with the checks that the tests have."""
    with pytest.raises(TypeError, match="parameter m="):
        SOAP.flops("3", 4, {})
