"""`matrigami curvature`: traces, eigenvalues and approximation errors of a model's curvature."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from matrigami.cli._data import data_dir_option
from matrigami.cli._model import function_of, made_by
from matrigami.cli._terminal import ProgressLine, echo_json, echo_table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from matrigami.curvature import BlockErrors, CurvatureMatrix

FORMATS = (".png", ".svg", ".pdf")
"""Of figures."""

SECONDS = 2.0
"""Time between two lines of progress."""


@click.command()
@click.argument("model")
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Training examples of a run; a function brings its own.",
)
@click.option(
    "--labels",
    default="exact",
    show_default=True,
    metavar="exact|empirical|examples|NUMBER",
    help="Labels of the model in expectation, of the data, or so many drawn from the model.",
)
@click.option(
    "--top", type=click.IntRange(min=1), default=3, show_default=True, help="Eigenvalues shown."
)
@click.option(
    "--largest",
    type=click.IntRange(min=0),
    default=1500,
    show_default=True,
    help="Errors are measured on blocks of up to so many parameters; 0 for none.",
)
@click.option("--reduce", is_flag=True, help="Average inputs over shared positions first.")
@click.option(
    "--figure", type=click.Path(dir_okay=False, path_type=Path), help="Draw the errors to a file."
)
@data_dir_option
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of a table.")
def curvature(
    model: str,
    examples: int,
    labels: str,
    top: int,
    largest: int,
    reduce: bool,
    figure: Path | None,
    data_dir: Path | None,
    json_: bool,
) -> int:
    """Show the Fisher matrix of MODEL, layer by layer.

    MODEL is the folder of a run (OUT/runs/ID of a study), or a function that returns a model, a
    loss and data: package.module:function or path/to/file.py:function. Columns: parameters, trace,
    largest eigenvalues, and the relative Frobenius error of each approximation: K-FAC, EKFAC, KFOC
    and KFOC with corrected eigenvalues.

    \b
    Examples:
      matrigami curvature runs/demo/runs/0a1b2c3d4e5f
      matrigami curvature my_model.py:trained --labels 1 --json
    """
    kind, draw = _labels(labels), None if figure is None else _drawing(figure)
    net, loss, data = _load(model, examples, data_dir)
    found = _measure(net, loss, data, kind, reduce, largest, top)
    if draw is not None:
        draw({"Fisher matrix": found["errors"]}, figure, title=model)
    del found["errors"]
    if json_:
        echo_json({"model": model, "labels": labels, **found})
        return 0
    _echo(found)
    if figure is not None:
        click.echo(f"\nWritten: {figure}")
    return 0


def _labels(text: str) -> Any:
    """Labels as the library takes them."""
    if text in ("exact", "empirical", "examples"):
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise ValueError(
        f"--labels {text}: "
        "labels is 'exact', 'empirical', 'examples' or a number of samples of at least 1."
    )


def _load(name: str, examples: int, data_dir: Path | None) -> "tuple[nn.Module, Any, Any]":
    """Model, loss and data."""
    if Path(name).is_dir():
        from matrigami.studies import load_run

        run = load_run(name, examples, data_dir=data_dir)
        return run.model, run.loss, (run.inputs, run.targets)
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise ValueError(
            f"curvature of {name!r}: there is no such folder.\n"
            "Give the folder of a run, or package.module:function, or file.py:function."
        )
    made = made_by(name, function_of(source, function))
    if not isinstance(made, tuple) or len(made) != 3:
        raise ValueError(
            f"curvature of {name!r}: it returned a {type(made).__name__}.\n"
            "It should return a model, a loss and data: (inputs, targets) or a list of them."
        )
    return made


def _measure(
    model: "nn.Module", loss: Any, data: Any, labels: Any, reduce: bool, largest: int, top: int
) -> dict[str, Any]:
    """Everything that is shown."""
    from matrigami import trace
    from matrigami.curvature import APPROXIMATIONS, compare, fisher
    from matrigami.krylov import largest_eigenpairs

    task, options = (model, loss, data), {"labels": labels, "reduce": reduce}
    found = {name: known.make(*task, **options) for name, known in APPROXIMATIONS.items()}
    exact = fisher(model, loss, data, labels=labels)
    errors = compare(exact, found, largest=largest, progress=_progress())
    values, _ = largest_eigenpairs(exact, min(top, exact.shape[-1]))
    return {
        "parameters": exact.shape[-1],
        "trace": float(trace(found["ekfac"])),
        "top_eigenvalues": values.clamp_min(0).sort(descending=True).values.tolist(),  # rounding
        "blocks": [_block(found["ekfac"], names, errors, top) for names in found["ekfac"].names],
        "errors": errors,
    }


def _block(
    F: "CurvatureMatrix", names: tuple[str, ...], errors: "list[BlockErrors]", top: int
) -> dict[str, Any]:
    """One row: sizes and eigenvalues from EKFAC, whose trace is that of the exact block."""
    from matrigami import eigh, trace

    block = F[names[0]]
    values: Tensor = eigh(block).values.flatten()
    order = values.sort(descending=True).values[:top]
    return {
        "block": list(names),
        "parameters": values.numel(),
        "matrices": math.prod(block.shape[:-2]),
        "trace": float(trace(block).sum()),
        "top_eigenvalues": [float(v) for v in order],
        "errors": {
            e.approximation: {"frobenius": e.frobenius, "spectral": e.spectral, "solve": e.solve}
            for e in errors
            if e.block == names
        },
    }


def _echo(found: dict[str, Any]) -> None:
    """The table."""
    from matrigami.curvature import APPROXIMATIONS

    header = ["block", "parameters", "of", "trace", "largest eigenvalues", *APPROXIMATIONS]
    rows = []
    for block in found["blocks"]:
        errors = [block["errors"].get(name, {}).get("frobenius") for name in APPROXIMATIONS]
        size = block["parameters"] // block["matrices"]
        rows.append(
            [
                "+".join(block["block"]),
                block["parameters"],
                f"{block['matrices']} x {size}",
                f"{block['trace']:.3g}",
                " ".join(f"{v:.2g}" for v in block["top_eigenvalues"]),
                *["-" if e is None else f"{e:.3f}" for e in errors],
            ]
        )
    echo_table(header, rows)
    values = " ".join(f"{v:.3g}" for v in found["top_eigenvalues"])
    click.echo(
        f"all: {found['parameters']} parameters, trace {found['trace']:.4g}, "
        f"largest eigenvalues of the whole matrix {values}"
    )
    if any(not block["errors"] for block in found["blocks"]):
        click.echo("A block with - has more parameters than --largest.")


def _drawing(figure: Path) -> Callable[..., Any]:
    """What draws the figure of the errors; what would be in its way is said before the work."""
    if figure.suffix not in FORMATS or not figure.parent.is_dir():
        fault = "there is no such folder" if figure.suffix in FORMATS else "what is its format?"
        raise ValueError(
            f"--figure {figure}: {fault}\n"
            f"Give a file in a folder that is there, whose name ends in {' or '.join(FORMATS)}."
        )
    try:
        from matrigami.plots import plot_errors
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--figure {figure}: {error.name} is not installed.\n"
            "Install it: pip install matplotlib."
        ) from error
    return plot_errors


def _progress() -> Callable[[int, int], None]:
    """A line with the columns that are done, and the time left."""
    line = ProgressLine(SECONDS)

    def report(done: int, total: int) -> None:
        """So many columns of exact blocks."""
        text = f"exact blocks: {done} of {total} columns"
        line.show(text, share=done / total, done=done == total)
        if done == total:
            line.end()

    return report
