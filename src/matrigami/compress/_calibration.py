"""What the layers of a model see, block by block, behind a prefix that is compressed already.

A model whose blocks are a `ModuleList` or `Sequential`, each fed by the one before, is run through
once: the inputs of a block are kept, its layers are observed and compressed, and it is run again
for the inputs of the next. Beside it runs what the model did as it was given, so that a layer can
make up for what the prefix has changed. That it is such a chain is seen on the first batch, or
where arguments are made anew for each block, on all. Of any other model each layer is a block of
its own, and everything is run again for it.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.compress._layers import rows
from matrigami.compress._moments import Seen, Sums, paired
from matrigami.compress._running import (
    Once,
    at_rest,
    called,
    explained,
    first,
    hooked,
    input_of,
)

HELD_OUT = 4
"""One batch of so many is held out; of fewer batches, one vector of so many."""


Compress = Callable[[Mapping[str, Seen | None]], None]
"""Compresses the layers that were just seen, in place; None for one that was not observed."""


@torch.no_grad()
def block_by_block(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: list[Any],
    compress: Compress,
    done: Collection[str] = (),
) -> None:
    """Observe and compress all layers, in the order in which the model runs them.

    Layers that the batches never reach are handed over without moments in the end, those that are
    `done` when it is their turn.
    """
    with at_rest(model):
        order = _order(model, layers, data[0])
        blocks = chain(model, order, data)
        along = {name: layers[name] for name in order if inside(name, blocks)}
        start = order.index(next(iter(along))) if along else len(order)
        given = _all_caught(model, blocks[0], data) if along else []

        def alone(names: list[str]) -> None:
            """Each layer by itself, everything run again."""
            for name in names:
                own = {} if name in done else {name: layers[name]}
                seen = _observed(own, data, lambda batch: called(model, batch)) if own else {}
                compress(seen or {name: None})

        alone(order[:start])
        if along:
            calls = _all_caught(model, blocks[0], data) if start else given
            _along(model, blocks, along, given, calls, compress, done)
        alone([name for name in order[start:] if name not in along])
        compress(_unreached(layers, order))


def _unreached(layers: Mapping[str, nn.Module], order: list[str]) -> dict[str, None]:
    """The layers that no batch reaches, without moments."""
    return {name: None for name in layers if name not in order}


@torch.no_grad()
def observed(
    model: nn.Module, layers: Mapping[str, nn.Module], data: list[Any]
) -> dict[str, Seen | None]:
    """What the layers of a model as it is see, all in one run over the batches."""
    with at_rest(model):
        return _observed(layers, data, lambda batch: called(model, batch))


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a block."""


def _along(
    model: nn.Module,
    blocks: list[str],
    layers: Mapping[str, nn.Module],
    given: list[Call],
    calls: list[Call],
    compress: Compress,
    done: Collection[str],
) -> None:
    """The layers of a chain of blocks: each block is run as it was given, before and after.

    In front of the first of them both are the same run, and what is behind the last is not run.
    """
    owned = {block: own for block in blocks if (own := _owned(layers, block))}
    for block in blocks[: blocks.index([*owned][-1]) + 1]:
        own = owned.get(block, {})
        module = model.get_submodule(block)
        passed: list[Call] = []
        beside = partial(_pass_on, module, given, passed)
        if own.keys() - set(done):
            compress(_observed(own, calls, partial(_run, module), beside))
        else:
            passed += _all_advanced(module, given)
            compress(dict.fromkeys(own))
        same = calls is given and not own
        given, calls = passed, passed if same else _all_advanced(model.get_submodule(block), calls)


def _owned(layers: Mapping[str, nn.Module], block: str) -> dict[str, nn.Module]:
    """Those that are a block, or in it."""
    return {name: layer for name, layer in layers.items() if inside(name, [block])}


def _run(module: nn.Module, call: Call) -> Any:
    """A block on its arguments; it may work in place, and they are needed again."""
    x, *rest = call[0]
    with explained(module, call):
        return module(x.clone() if isinstance(x, Tensor) else x, *rest, **call[1])


def _pass_on(module: nn.Module, calls: list[Call], passed: list[Call], i: int) -> None:
    """One of the calls through a block."""
    passed.append(_advanced(module, calls[i]))


def _observed(
    layers: Mapping[str, nn.Module],
    data: list[Any],
    run: Callable[[Any], Any],
    beside: Callable[[int], None] | None = None,
) -> dict[str, Seen | None]:
    """The moments of some layers while something is run on all batches.

    What runs `beside` each of them is the model as it was given.
    """
    seen: dict[str, Seen | None] = dict.fromkeys(layers)
    given: dict[str, list[Tensor]] = {}  # call by call, of a layer that is called several times
    batch_held = aside = False
    few = len(data) < HELD_OUT
    sums = Once(lambda x, z: _counted(x, z, None if few else batch_held))
    copied, matched = Once(Tensor.clone), Once(paired)
    batch: Any = None

    def hook(name: str) -> Any:
        """The hook of a layer, before it runs."""

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            """Count its inputs."""
            x = rows(module, input_of(args, kwargs).detach())
            if aside:
                given[name].append(copied(x))  # the block may write into it before the other run
                return
            z = given[name].pop(0) if given[name] else None
            z = z if z is not None and z.shape == x.shape else None
            if z is not None and _is_gathered(batch, input_of(args, kwargs)):
                z = matched(z, x)
            known = seen[name] = seen[name] or Seen.empty(x)
            for found, held in sums(x, z):
                known.add(found, held)

        return note

    with hooked({name: (layer, hook(name)) for name, layer in layers.items()}, before=True):
        for i, batch in enumerate(data):
            batch_held = i % HELD_OUT == HELD_OUT - 1
            given |= {name: [] for name in layers}
            sums.clear()
            if beside is not None:
                aside = True
                beside(i)
                aside = False
            run(batch)
    return seen


def _is_gathered(call: Any, x: Tensor) -> bool:
    """Whether a layer sees some vectors of its block: one for no example, and for no position."""
    given = call[0][0] if isinstance(call, tuple) and isinstance(call[0], tuple) else None
    if not isinstance(given, Tensor) or given.ndim < 2 or x.ndim != 2:
        return False
    return len(x) not in (len(given), given[..., 0].numel())


def _counted(x: Tensor, z: Tensor | None, held: bool | None) -> list[tuple[Sums, bool]]:
    """Sums over vectors, and whether they are held out: all or none; with None one of so many."""
    if held is not None:
        return [(Sums.of(x, None if held else z), held)]
    out = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    return [(Sums.of(x[~out], None if z is None else z[~out]), False), (Sums.of(x[out]), True)]


def _order(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> list[str]:
    """The names in the order of the first calls, without those that are not called."""
    seen: dict[str, None] = {}
    hooks = {
        name: (layer, lambda _m, _args, _kwargs, name=name: seen.update({name: None}))
        for name, layer in layers.items()
    }
    with hooked(hooks, before=True):
        called(model, batch)
    return list(seen)


def chain(model: nn.Module, layers: list[str], data: list[Any]) -> list[str]:
    """The blocks of the longest container of which each is fed by the one before; or none."""
    best: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        names = [f"{name}.{key}" if name else key for key, _ in module.named_children()]
        holds = any(inside(layer, names) for layer in layers)
        if len(names) > len(best) and holds and _chained(model, list(module), data):
            best = names
    return best


def _chained(model: nn.Module, blocks: list[nn.Module], data: list[Any]) -> bool:
    """Whether every block is called once, on what the one before has returned and all else alike.

    What else a block is given may come from the block before (T5's biases of positions) or differ
    from layer to layer (masks of local attention): then it is no chain. A mask that is made anew
    for each block may be the same as the others in short texts only, so all batches are looked at.
    """
    return _feeds(model, blocks, data[0], _is_same) or all(
        _feeds(model, blocks, batch, _is_equal) for batch in data
    )


def _feeds(
    model: nn.Module,
    blocks: list[nn.Module],
    batch: Any,
    same: Callable[[Tensor, Tensor], bool],
) -> bool:
    """Whether it is so on one batch; tensors are compared by a function."""
    outputs: list[Any] = []
    others: list[Any] = []
    good = True

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Compare the input with the last output, and the rest with that of the first block."""
        nonlocal good
        good &= bool(args) and (not outputs or args[0] is outputs[-1])
        others.append((args[1:], kwargs))
        good = good and _same(others[0], others[-1], same)
        outputs.append(first(output))

    with hooked({str(i): (block, note) for i, block in enumerate(blocks)}):
        called(model, batch)
    return good and len(outputs) == len(blocks)


def _same(a: Any, b: Any, same: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether arguments are the same tensors and the same plain values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key], same) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y, same) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same(a, b)
    plain = int | float | str
    return a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether they are one tensor."""
    return a is b


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether they have the same numbers, of one type."""
    return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


class Stop(Exception):  # noqa: N818 - not an error
    """The rest of a forward pass is not needed."""


def _all_caught(model: nn.Module, block: str, data: list[Any]) -> list[Call]:
    """The arguments with which a block is called, for each batch."""
    return [_caught(model, block, batch) for batch in data]


def _caught(model: nn.Module, block: str, batch: Any) -> Call:
    """The arguments with which a block is called."""
    found: list[Call] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep them and leave."""
        found.append((args, kwargs))
        raise Stop

    handle = model.get_submodule(block).register_forward_pre_hook(note, with_kwargs=True)
    try:
        called(model, batch)
    except Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def _advanced(module: nn.Module, call: Call) -> Call:
    """The call of the next block."""
    return (first(_run(module, call)), *call[0][1:]), call[1]


def _all_advanced(module: nn.Module, calls: list[Call]) -> list[Call]:
    """The calls of the next block, for each batch."""
    return [_advanced(module, call) for call in calls]


def inside(name: str, blocks: list[str]) -> bool:
    """Whether a layer is one of some blocks, or in one."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)
