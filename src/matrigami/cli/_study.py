"""`matrigami study`: run, follow and present a scaling study."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from matrigami.cli._compare import compare
from matrigami.cli._data import data_dir_option
from matrigami.cli._device import check_device, checked_workers, device_option, launcher_option
from matrigami.cli._outcome import echo_fit, echo_plan, present
from matrigami.cli._paths import FILE, FOLDER, SPEC
from matrigami.cli._search import search
from matrigami.cli._terminal import ProgressLine, command_line, echo_json, echo_table, say

if TYPE_CHECKING:
    from matrigami.studies import Study, StudyPlan

as_json = click.option(
    "--json", "json_", is_flag=True, help="Print one JSON object instead of a table."
)


@click.group()
def study() -> None:
    """Compare structures at equal compute.

    \b
    Example:
      matrigami study run --preset demo --out runs/demo
    """


study.add_command(search)


@study.command()
@click.argument("spec", required=False, type=SPEC)
@click.option(
    "--preset",
    metavar="NAME",
    help="A study that ships with the library; see `matrigami study presets`.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the study; a second call goes on where the first ended.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Worker processes. [default: one for each core]"
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of each worker. [default: cores / workers]",
)
@click.option(
    "--together",
    type=click.IntRange(min=1),
    help="Runs of one task that a worker trains side by side; a batch is made once for all of one "
    "seed, and small runs that differ only in seed and learning rate are trained as one. [default: "
    "1; on an accelerator 64]",
)
@device_option
@launcher_option
@data_dir_option
@click.option("--only", metavar="STRUCTURE", help="Only the runs of one structure.")
@click.option("--grow", is_flag=True, help="Keep the runs of another study that the folder holds.")
@click.option(
    "--dry-run", is_flag=True, help="Print the runs with their sizes; train and write nothing."
)
@as_json
def run(
    spec: Path | None,
    preset: str | None,
    out: Path | None,
    workers: int | None,
    threads: int | None,
    together: int | None,
    device: str,
    launcher: str,
    data_dir: Path | None,
    only: str | None,
    grow: bool,
    dry_run: bool,
    json_: bool,
) -> int:
    """Train what a study lacks, then fit, plot and report.

    SPEC is a TOML file; or give --preset. Finished runs are skipped, interrupted ones resume from
    their last checkpoint.

    \b
    Example:
      matrigami study run my_study.toml --out runs/mine --workers 2
    """
    from matrigami.studies import plan_study, run_study

    whole = _load(spec, preset)
    plan = plan_study(whole, data_dir)
    part = plan_study(whole.only(only), data_dir) if only else plan
    if dry_run:
        _check(part, launcher, device)
        echo_plan(part, json_)
        return 0
    out = _given(out)
    workers = checked_workers(workers, launcher, device)
    line = ProgressLine(quiet=json_)
    outcome = run_study(
        plan,
        out,
        part=part,
        workers=workers,
        threads=threads,
        together=together,
        device=device,
        launcher=launcher,
        data_dir=data_dir,
        grow=grow,
        report=lambda now: line.show(
            now.line(), done=now.finished == now.total, bad=now.failed > 0
        ),
    )
    line.end()
    if outcome.interrupted and outcome.left:
        say(
            f"Interrupted with {outcome.left} of {outcome.total} runs to go; their state is "
            f"kept. Go on with:\n  {command_line()}"
        )
        return 130
    return present(out, outcome, json_)


@study.command()
@click.argument("folder", type=FOLDER)
@as_json
def status(folder: Path, json_: bool) -> int:
    """How far a study is.

    \b
    Example:
      matrigami study status runs/demo
    """
    from matrigami.studies import load_plan, run_states

    plan = load_plan(folder)
    states = run_states(plan, folder)
    if json_:
        echo_json({"study": plan.name, "runs": states})
        return 0
    rows = [
        [
            s["id"],
            s["dataset"],
            s["structure"],
            s["optimizer"],
            s["width"],
            s["seed"],
            f"{s['macs']:.2e}",
            s["status"],
            f"{100 * s['fraction']:.0f} %",
            s["cause"] or "",
        ]
        for s in states
    ]
    echo_table(
        [
            "run",
            "dataset",
            "structure",
            "optimizer",
            "width",
            "seed",
            "MACs",
            "status",
            "done",
            "cause",
        ],
        rows,
    )
    kinds = [s["status"] for s in states]
    click.echo(
        f"{plan.name}: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    )
    return 0


@study.command()
@click.argument("folder", type=FOLDER)
@as_json
def fit(folder: Path, json_: bool) -> int:
    """Fit the scaling laws of results.csv anew and write fit.json.

    \b
    Example:
      matrigami study fit runs/demo
    """
    from matrigami.studies import fit_results, read_results, update_results, write_fit

    update_results(folder)
    records = read_results(folder / "results.csv")
    if not records:
        raise ValueError(
            f"study fit {folder}: no run has ended (results.csv, runs/*/status.json).\n"
            f"See `matrigami study status {folder}` for the causes."
        )
    result = fit_results(records)
    write_fit(folder / "fit.json", result)
    if json_:
        click.echo((folder / "fit.json").read_text("utf-8"))
    else:
        echo_fit(result)
    return 0


@study.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "--reference", type=FILE, help="CSV with published points, drawn with hollow markers."
)
def plot(folder: Path, reference: Path | None) -> int:
    """Draw fig/scaling, fig/time and fig/exponents from results.csv.

    \b
    Example:
      matrigami study plot runs/demo --reference published.csv
    """
    from matrigami.plots import plot_study
    from matrigami.studies import update_results

    update_results(folder)
    for path in plot_study(folder, command=command_line(), reference=reference):
        click.echo(path)
    return 0


@study.command()
@click.argument("folder", type=FOLDER)
def report(folder: Path) -> int:
    """Write report.html, one file that opens without a network.

    \b
    Example:
      matrigami study report runs/demo
    """
    from matrigami.plots import write_report
    from matrigami.studies import update_results

    update_results(folder)
    click.echo(write_report(folder, command=command_line()))
    return 0


@study.command()
def presets() -> int:
    """List the studies that ship with the library.

    \b
    Example:
      matrigami study presets
    """
    from matrigami.studies import load_preset, preset_names

    studies = [(name, load_preset(name)) for name in preset_names()]
    echo_table(
        ["preset", "runs", "what"], [[name, len(s.configs), s.description] for name, s in studies]
    )
    return 0


study.add_command(compare)


def _check(plan: "StudyPlan", launcher: str, device: str) -> None:
    """Refuse what could not be trained on this machine, if that is where it would be."""
    from matrigami.studies._launchers import is_here
    from matrigami.studies._run import check_sizes

    if is_here(launcher):
        check_device(device)
    check_sizes(plan, device, launcher)


def _given(out: Path | None) -> Path:
    """The folder."""
    if out is None:
        raise click.UsageError(
            "--out is missing: the folder that the study is written to. Or give --dry-run."
        )
    return out


def _load(spec: Path | None, preset: str | None) -> "Study":
    """The study that was asked for."""
    from matrigami.studies import load_preset, load_spec

    if (spec is None) == (preset is None):
        raise click.UsageError(
            "Give a study: either a SPEC.toml or --preset NAME (`matrigami study presets` "
            "lists them)."
        )
    return load_spec(spec) if spec else load_preset(str(preset))
