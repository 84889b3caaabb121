"""A mixture of experts: only the active ones computed, against all of them.

    python -m benchmarks.experts [--widths 256 512 1024] [--vectors 4096] [--write]

Eight experts, two active, block tensor trains of rank 1, float32. The form with all experts is the
usual one: one train of rank 8 whose intermediate is multiplied by the gates between its two batched
products. Both route; "f" is without autograd, "f+b" with all gradients, given the gradient of the
output in the layout of the output.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import matrigami as mg
from benchmarks._report import table, write
from benchmarks._timing import Progress, interleaved, machine, one_thread
from matrigami.nn import StructuredMoE

EXPERTS, ACTIVE = 8, 2


def all_experts(layer: StructuredMoE, x: Tensor) -> Tensor:
    """One train whose rank is the expert; gates between its products, zero for most."""
    logits, experts, weights = layer.route(x)
    gates = torch.zeros_like(logits).scatter(1, experts, weights)
    A, B = (getattr(layer, name) for name in layer.factor_names)
    E, q, _, _, m1, n1, _ = A.shape
    p, m2, n2 = B.shape[2], B.shape[4], B.shape[5]
    first = A[:, :, 0, 0, :, :, 0].movedim(0, 1).flatten(1, 2)  # q (E m1) n1
    Z = first @ x.mT.unflatten(0, (q, n1))
    Z = Z.unflatten(1, (E, m1)) * gates.mT[None, :, None, :]  # q E m1 c
    second = B[:, 0, :, 0, :, :, 0].permute(1, 2, 3, 0).reshape(p, m2, n2 * E)
    y = second @ Z.movedim(2, 0).flatten(1, 2)
    return y.flatten(0, 1).mT


def backward(call: Callable[[], Tensor], parameters: list[Tensor], g: Tensor) -> None:
    """The product and all its gradients."""
    torch.autograd.grad(call(), parameters, g)


def measured(width: int, vectors: int, rounds: int, progress: Progress) -> list[object]:
    """One row: milliseconds and ratios of one width."""
    torch.manual_seed(0)
    recipe = mg.BlockTensorTrain(rank=1)
    layer = StructuredMoE(width, width, recipe, EXPERTS, ACTIVE, bias=False)
    x = torch.randn(vectors, width, requires_grad=True)
    forms = {"active": partial(layer, x), "all": partial(all_experts, layer, x)}
    outputs = [form().detach() for form in forms.values()]
    error = float((outputs[0] - outputs[1]).norm() / outputs[1].norm())
    calls = {f"{name} f": torch.no_grad()(form) for name, form in forms.items()}
    parameters = [x, *layer.parameters()]
    grads = [torch.empty_like(output).normal_() for output in outputs]  # in its layout
    calls |= {
        f"{name} f+b": partial(backward, form, parameters, g)
        for (name, form), g in zip(forms.items(), grads, strict=True)
    }
    seconds = interleaved(calls, rounds, lambda: progress.advance(1, f"width {width}"))
    row: list[object] = [width, vectors]
    for kind in ("f", "f+b"):
        one, every = seconds[f"active {kind}"], seconds[f"all {kind}"]
        share = one / every * EXPERTS / ACTIVE
        row += [f"{1e3 * one:.1f}", f"{1e3 * every:.1f}", f"{every / one:.1f}x", f"{share:.2f}"]
    return [*row, f"{error:.0e}"]


def main() -> None:
    """Measure and print, or write into the README."""
    parser = argparse.ArgumentParser(description="A mixture of experts against all of them.")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--vectors", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md")
    options = parser.parse_args()
    how = one_thread()
    progress = Progress(len(options.widths) * options.rounds)
    rows = [measured(w, options.vectors, options.rounds, progress) for w in options.widths]
    head = ["width", "vectors"]
    for kind in ("f", "f+b"):
        head += [f"{kind} active ms", "all ms", "faster", "time / (active / all)"]
    told = f"{EXPERTS} experts, {ACTIVE} active; {how}; " + ", ".join(machine().values())
    report = f"{told}\n\n{table([*head, 'difference'], rows)}"
    print(report)
    if options.write:
        write(report, "experts")


if __name__ == "__main__":
    main()
