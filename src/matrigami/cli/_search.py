"""`matrigami study search`: random members of the einsum family under a budget."""

from contextlib import suppress
from pathlib import Path

import click

from matrigami._words import cause
from matrigami.cli._data import data_dir_option
from matrigami.cli._device import (
    checked_workers,
    device_option,
    launcher_option,
)
from matrigami.cli._paths import FILE
from matrigami.cli._terminal import ProgressLine, command_line, echo_json, echo_table, say


@click.command()
@click.argument("spec", type=FILE)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the search; a second call goes on where the first ended.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Worker processes. [default: one for each core]"
)
@click.option(
    "--together",
    type=click.IntRange(min=1),
    help="Candidates that a worker trains side by side, with one pass over the data. [default: 8; "
    "on an accelerator 64]",
)
@device_option
@launcher_option
@data_dir_option
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of a table.")
def search(
    spec: Path,
    out: Path,
    workers: int | None,
    together: int | None,
    device: str,
    launcher: str,
    data_dir: Path | None,
    json_: bool,
) -> int:
    """Search the einsum family under a budget, and compare its taxonomy with what was measured.

    SPEC is a study file with a table [search] instead of structures. Every candidate trains at the
    first sizes; the best by their laws go on to the next. Texts in OUT/expected.md and OUT/notes.md
    become part of the page.

    \b
    Example:
      matrigami study search teacher.toml --out runs/search
    """
    from matrigami.studies import write_atomic
    from matrigami.studies._record import write_json
    from matrigami.studies.search import load_search, run_search, search_page, taxonomy

    asked = load_search(spec)
    texts = {part: _text(out / f"{part}.md") for part in ("expected", "notes")}
    workers = checked_workers(workers, launcher, device)
    line = ProgressLine(quiet=json_)
    records = None
    with suppress(KeyboardInterrupt):  # between two sizes, or the second one
        records = run_search(
            asked,
            out,
            workers=workers,
            threads=1,
            together=together or (8 if device == "cpu" else None),
            device=device,
            launcher=launcher,
            data_dir=data_dir,
            report=lambda size, now: line.show(f"size {size} of {len(asked.macs)}: {now.line()}"),
        )
    line.end()
    if records is None:
        say(f"Interrupted; what was trained is kept. Go on with:\n  {command_line()}")
        return 130
    result = taxonomy(asked, records)
    write_json(out / "search.json", result)
    page = search_page(asked, result, texts | {"command": command_line()})
    write_atomic(out / "README.md", page)
    _draw(out, asked.name, result)
    if json_:
        echo_json(result)
        return 0
    rows = [
        [r["structure"], r["omega"], r["psi"], r["nu"], f"{r['error']:.2f}", f"{r['exponent']:.3f}"]
        for r in result["candidates"]
    ]
    echo_table(["structure", "omega", "psi", "nu", "error %", "exponent"], rows)
    click.echo("\n" + "\n".join(result["claims"]) + f"\n\nWritten: {out / 'README.md'}")
    return 0


def _text(path: Path) -> str:
    """A text that somebody put there."""
    try:
        return path.read_text("utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: it cannot be read: {cause(error)}.\nSave it as a text in UTF-8."
        ) from error


def _draw(out: Path, name: str, result: dict[str, object]) -> None:
    """The figure; without matplotlib, say how to get it."""
    try:
        from matrigami.plots import plot_taxonomy
    except ModuleNotFoundError as error:
        say(f"No figure: {error.name} is not installed. `pip install matplotlib`.")
        return
    plot_taxonomy(result, out / "fig" / "taxonomy.png", title=name)
