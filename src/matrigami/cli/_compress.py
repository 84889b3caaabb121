"""`matrigami quantize`, `prune`, `structure`: a smaller model from a model and a few examples."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from matrigami.cli._model import EXAMPLES, batches_of, located, model_of, new_place, with_options
from matrigami.cli._paths import FILE_OR_SELF
from matrigami.cli._terminal import ProgressLine, command_line, echo_json, say

if TYPE_CHECKING:
    from matrigami.compress import CompressionPlan, Report


OPTIONS = (
    click.argument("model"),
    click.option(
        "--calib",
        required=True,
        type=FILE_OR_SELF,
        help="Text, tensors in safetensors, or self: what a language model writes.",
    ),
    click.option(
        "-o", "--out", type=click.Path(path_type=Path), help="A new folder, with report.html in it."
    ),
    click.option("--into", metavar="MODEL", help="The model that bare tensors belong to."),
    click.option("--targets", multiple=True, metavar="PATTERN", help="Layers, e.g. 're:.*mlp.*'."),
    click.option("--ignore", multiple=True, metavar="PATTERN", help="Layers to leave out."),
    click.option(
        "--two-sided/--one-sided",
        default=True,
        show_default=True,
        help="Whether the gradients of the outputs count; the outputs are logits then.",
    ),
    click.option(
        "--separate", is_flag=True, help="Give fused attention and experts a layer a matrix first."
    ),
    *EXAMPLES,
    click.option(
        "--plan",
        is_flag=True,
        help="Change nothing: show what the choice, or else each, would cost.",
    ),
    click.option("--json", "json_", is_flag=True, help="Print JSON instead of a table."),
)


shared = with_options(*OPTIONS)
"""The options that the three commands share."""


@click.command()
@shared
@click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True)
@click.option(
    "--group",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    help="Inputs that share a scale; 0 for whole rows.",
)
@click.option("--asymmetric", is_flag=True, help="Grids from the least to the greatest weight.")
@click.option("--budget", help="Bits for each layer under a share such as '0.15x bytes'.")
def quantize(bits: int, group: int, asymmetric: bool, budget: str | None, **options: Any) -> int:
    """Round the weights of MODEL onto integer grids where the loss feels it least.

    MODEL is a folder of transformers or of matrigami, a safetensors file (with --into), or a
    function that returns a model: package.module:function or path/to/file.py:function. A call that
    was killed goes on where it was.

    \b
    Examples:
      matrigami quantize stories260k --calib stories.txt --plan
      matrigami quantize stories260k --calib stories.txt -o small --bits 3 --group 32
      matrigami quantize stories260k --calib self -o small
      matrigami quantize my_model.py:trained --calib inputs.safetensors -o small
    """
    from matrigami.compress import Grid

    grids = [Grid(b, group or None, not asymmetric) for b in (2, 3, 4, 8)]
    chosen = Grid(bits, group or None, not asymmetric)
    asked = _asked("bits", "budget")
    if asked == "budget" and options["plan"]:
        raise click.UsageError("Give one of --budget and --plan.")
    choices = [chosen] if asked == "bits" else grids
    return _run(chosen, choices, grids if budget else None, budget, **options)


@click.command()
@shared
@click.option(
    "--sparsity", type=click.FloatRange(0, 1, max_open=True), default=0.5, show_default=True
)
@click.option(
    "--pattern",
    metavar="N:M",
    help="Of every M neighbouring inputs N stay, e.g. 2:4; or rows, columns: whole ones go.",
)
def prune(sparsity: float, pattern: str | None, **options: Any) -> int:
    """Set weights of MODEL to zero where the loss feels it least, and fit the others.

    MODEL is named as in `matrigami quantize`.

    \b
    Examples:
      matrigami prune stories260k --calib stories.txt --plan
      matrigami prune stories260k --calib stories.txt -o sparse --sparsity 0.6
      matrigami prune stories260k --calib stories.txt -o thin --pattern columns --sparsity 0.25
    """
    from matrigami.compress import n_of_m, unstructured, whole_columns, whole_rows

    kinds = {None: unstructured, "rows": whole_rows, "columns": whole_columns}
    kind = kinds.get(pattern)
    asked = _asked("pattern") if kind and pattern else _asked("sparsity", "pattern")
    chosen = kind(sparsity) if kind else n_of_m(*_pattern(pattern or ""))
    choices = [chosen] if asked else [unstructured(share) for share in (0.3, 0.5, 0.7, 0.9)]
    return _run(chosen, choices, None, None, **options)


@click.command()
@shared
@click.option("--structure", help="E.g. 'lowrank(rank=0.25)' or 'monarch(blocks=4)'.")
@click.option("--budget", help="The nearest structure of full rank below e.g. '0.5x macs'.")
def structure(structure: str | None, budget: str | None, **options: Any) -> int:
    """Exchange the linear layers of MODEL for structured ones, nearest where the loss feels it.

    MODEL is named as in `matrigami quantize`.

    \b
    Examples:
      matrigami structure stories260k --calib stories.txt --plan
      matrigami structure stories260k --calib stories.txt -o low --structure 'lowrank(rank=0.25)'
    """
    from matrigami import LowRank, parse

    if not _asked("structure", "budget") and not options["plan"]:
        raise click.UsageError("Give one of --structure and --budget, or --plan.")
    chosen = budget if structure is None else parse(structure)
    several = [LowRank(rank=share) for share in (0.5, 0.25)]
    budgets: list[Any] = ["0.75x macs", "0.5x macs", "0.25x macs"]
    return _run(chosen, [chosen] if chosen else [*several, *budgets], None, None, **options)


def _asked(*names: str) -> str | None:
    """Which of some options that exclude each other was given, if any."""
    source = click.get_current_context().get_parameter_source
    given = [name for name in names if source(name) is ParameterSource.COMMANDLINE]
    if len(given) > 1:
        raise click.UsageError(f"Give one of {' and '.join(f'--{name}' for name in given)}.")
    return given[0] if given else None


def _pattern(text: str) -> tuple[int, int]:
    """`2:4` as two numbers."""
    n, colon, m = text.partition(":")
    if not (colon and n.isdigit() and m.isdigit()):
        raise ValueError(f"--pattern {text}: write two numbers, e.g. 2:4, rows or columns.")
    return int(n), int(m)


def _run(
    method: Any,
    choices: list[Any],
    over: list[Any] | None,
    budget: str | None,
    *,
    model: str,
    calib: Path,
    out: Path | None,
    into: str | None,
    targets: tuple[str, ...],
    ignore: tuple[str, ...],
    two_sided: bool,
    separate: bool,
    length: int,
    sequences: int,
    batch: int,
    plan: bool,
    json_: bool,
) -> int:
    """Plan, or compress and save."""
    from matrigami import compress
    from matrigami.compress._folder import new_folder
    from matrigami.nn import separate_

    if out is None and not plan:
        raise click.UsageError("Give -o OUT, or --plan.")
    if out is not None:
        new_place(out)
    model = str(located(model))
    net = model_of(model, into)
    if separate:
        separate_(net)
    data = _calibration(calib, model, net, length, sequences, batch)
    options = {"targets": targets or None, "ignore": ignore, "progress": _progress(json_)}
    if plan or out is None:
        found = compress.plan(net, data, choices, two_sided=two_sided, timed=True, **options)
        click.echo(found.to_json() if json_ else str(found))
        if out is not None:
            with new_folder(out) as work:
                _page(found, work)
        return 0
    options["two_sided"] = two_sided
    with _alone(out):
        if over is not None and budget is not None:
            made = compress.allocate(net, data, budget, over, **options)
            say(str(made))
            net, report = made.model, made.report
        else:
            if any(_beside(out).glob("*.safetensors")):
                say(f"going on with {_beside(out)}")
            report = compress.compress_(net, data, method, journal=_beside(out), **options)
        _save(net, out, report, model, into)
        shutil.rmtree(_beside(out), ignore_errors=True)
    _page(report, out)
    _told(report, out, json_)
    return 0


def _calibration(
    calib: Path, model: str, net: Any, length: int, sequences: int, batch: int
) -> list[Any]:
    """The examples of a file, or what the model writes."""
    from matrigami.compress import self_calibration

    if str(calib) == "self":
        return self_calibration(net, sequences, length, batch)
    return batches_of(calib, model, length, sequences, batch, net)


def _save(net: Any, out: Path, report: "Report", model: str, into: str | None) -> None:
    """The folder with the compressed model."""
    from matrigami import compress

    source = model if Path(model).is_dir() else None
    compress.save(net, out, report.values, source=source, factory=into or model)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Be the one process that makes `out`; a journal with nothing in it does not stay.

    Raises:
        ValueError: If another process is.
    """
    from matrigami.studies._lock import hold, is_held

    folder = _beside(out)
    folder.mkdir(exist_ok=True)
    try:
        with hold(folder) as mine:
            if not mine:
                raise ValueError(
                    f"-o {out}: another process is making it.\n"
                    "Wait for it, or give the name of another folder."
                )
            yield
    finally:
        if not any(folder.glob("*.safetensors")) and not is_held(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _page(found: "Report | CompressionPlan", out: Path) -> None:
    """`report.json`, and `report.html` where there is matplotlib."""
    (out / "report.json").write_text(found.to_json() + "\n", "utf-8")
    try:
        from matrigami.plots import write_compression
    except ModuleNotFoundError as error:
        say(f"No report.html: {error.name} is not installed: pip install matplotlib.")
        return
    write_compression(out / "report.html", found, command=command_line())


def _beside(out: Path) -> Path:
    """Where the blocks are that are finished."""
    return out.with_name(f"{out.name}.journal")


def _told(report: "Report", out: Path, json_: bool) -> None:
    """What was done."""
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if json_:
        layers = json.loads(report.to_json())
        echo_json({"out": str(out), "bytes": size, "layers": layers})
        return
    click.echo(str(report))
    click.echo(f"\nWritten: {out} ({size} bytes)")


def _progress(quiet: bool) -> Callable[[int, int, str], None]:
    """A line with the layer that is done."""
    line = ProgressLine(seconds=5.0, quiet=quiet)

    def report(done: int, total: int, name: str) -> None:
        """So many layers; the first one has waited for the gradients of all."""
        line.show(f"{done}/{total} layers · {name}", share=done / total, done=done == total)
        if done == total:
            line.end()

    return report
