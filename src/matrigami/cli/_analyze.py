"""`matrigami analyze`: which structure the matrices of a file, a model or a kernel have."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from matrigami.cli._paths import FOLDER
from matrigami.cli._terminal import (
    ProgressLine,
    command_line,
    echo_json,
    echo_table,
    echo_written,
    say,
)

if TYPE_CHECKING:
    from matrigami.studies import Analysis, Settings, Source


@click.command()
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the results; a second call goes on where the first ended.",
)
@click.option("--kernel", metavar="NAME", help="A kernel, such as laplace, of the --points.")
@click.option(
    "--points",
    type=click.Path(path_type=Path),
    help="File of the points: .npy, or text with one in each line.",
)
@click.option("--scale", type=float, help="Divides distances of the --points. [default: 1]")
@click.option("--preset", metavar="NAME", help="A set of matrices: hpc_vs_ai.")
@click.option("--model", type=FOLDER, help="Folder of a small Llama that the preset adds.")
@click.option(
    "--data-dir", type=FOLDER, help="Folder with CIFAR-100, of which the preset adds networks."
)
@click.option(
    "--budget",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    help="Storage at which structures are compared, of the dense matrix.",
)
@click.option(
    "--draws",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Draws of each null model with the singular values of the matrix.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of orders and null models.")
@click.option(
    "--largest",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="Of larger matrices the leading corner of this size; 0 for no limit.",
)
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of a table.")
def analyze(
    source: Path | None,
    out: Path,
    kernel: str | None,
    points: Path | None,
    scale: float | None,
    preset: str | None,
    model: Path | None,
    data_dir: Path | None,
    budget: float,
    draws: int,
    seed: int,
    largest: int,
    json_: bool,
) -> int:
    """Say which structure matrices have: error against storage, orders, null models, a verdict.

    SOURCE is a .npy, .safetensors or Matrix-Market file, or a folder with a model (every weight).

    \b
    Examples:
      matrigami analyze weights.safetensors -o runs/weights
      matrigami analyze --kernel laplace --points cloud.npy -o runs/cloud
    """
    from matrigami.studies import Settings

    sources = _sources(source, kernel, points, scale, preset, model, data_dir)
    settings = Settings(budget=budget, draws=draws, seed=seed, largest=largest)
    return _run(sources, out, settings, json_)


def _sources(
    source: Path | None,
    kernel: str | None,
    points: Path | None,
    scale: float | None,
    preset: str | None,
    model: Path | None,
    data_dir: Path | None,
) -> "list[Source]":
    """The matrices that were asked for."""
    from matrigami.studies import file_sources, kernel_source, preset_sources

    if sum(given is not None for given in (source, kernel, preset)) != 1:
        raise click.UsageError("Give one of SOURCE, --kernel with --points, and --preset.")
    if (kernel is None) != (points is None):
        raise click.UsageError("--kernel NAME and --points FILE belong together.")
    if kernel is None:
        _refuse({"--scale": scale}, "divides the distances of the points of --kernel")
    if preset is None:
        _refuse({"--model": model, "--data-dir": data_dir}, "adds matrices to those of --preset")
    if preset is not None:
        return preset_sources(preset, model, data_dir)
    if source is not None:
        return file_sources(source)
    return [kernel_source(str(kernel), Path(str(points)), 1.0 if scale is None else scale)]


def _refuse(options: dict[str, object], what: str) -> None:
    """Refuse options that nothing would read.

    Raises:
        UsageError: If one is given.
    """
    for name, value in options.items():
        if value is not None:
            raise click.UsageError(f"{name} {what}: give both, or leave it out.")


def _run(sources: "list[Source]", out: Path, settings: "Settings", json_: bool) -> int:
    """The analyses, their figures and report."""
    from matrigami.studies import analyze_all, write_gains

    line = ProgressLine(quiet=json_)
    try:
        found, refused = analyze_all(sources, out, settings, report=line.show)
    except KeyboardInterrupt:
        line.end()
        say(f"Interrupted; what is finished is kept. Go on with:\n  {command_line()}")
        return 130
    line.end()
    for name, reason in refused.items():
        say(f"matrigami: {name}: {reason}")
    if found:
        files = [write_gains(out / "gains.csv", found), *_figures(out, found)]
        _tell(found, refused, files, json_)
        return 1 if refused else 0
    return 2


def _tell(
    found: "list[Analysis]", refused: "dict[str, str]", files: "list[Path]", json_: bool
) -> None:
    """The findings, as a table or as JSON."""
    if json_:
        kept = ("notes", "findings")
        results = [{**_row(a), **{key: a.to_json()[key] for key in kept}} for a in found]
        answer = {"matrices": results, "refused": refused, "files": list(map(str, files))}
        echo_json(answer)
    else:
        rows = [_row(a) for a in found]
        echo_table(list(rows[0]), [list(row.values()) for row in rows])
        click.echo("\n".join(f"{a.name}: {note}" for a in found for note in a.notes))
        echo_written(files)


def _row(found: "Analysis") -> dict[str, str]:
    """One line for a matrix."""
    return {
        "matrix": found.name,
        "size": "x".join(map(str, found.shape)),
        "verdict": found.verdict,
    }


def _figures(out: Path, found: "list[Analysis]") -> list[Path]:
    """Heat map and report; without matplotlib, say how to get them."""
    try:
        from matrigami.plots import plot_gains, write_analysis
    except ModuleNotFoundError as error:
        say(
            f"No figures: {error.name} is not installed. `pip install matplotlib`, then "
            "the same command again."
        )
        return []
    heat_map = plot_gains(found, out / "gains.png")
    return [write_analysis(out, found, command=command_line()), heat_map]
