"""`matrigami train`: one model, one optimiser, one folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from matrigami.cli._data import data_dir_option
from matrigami.cli._device import check_device, device_option
from matrigami.cli._paths import FILE
from matrigami.cli._terminal import ProgressLine, command_line, echo_json, echo_table, say

if TYPE_CHECKING:
    from matrigami.studies import RunConfig, RunSize


@click.command()
@click.argument("spec", type=FILE)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run; a second call goes on where the first ended.",
)
@click.option("--optimizer", metavar="NAME", help="adamw, sgd, soap, 'muon(scale=spectral)', ...")
@click.option("--structure", metavar="NAME", help="dense, btt, 'monarch(blocks=8)', ...")
@click.option("--width", type=click.IntRange(min=1), help="Features of the residual stream.")
@click.option("--lr", type=float, help="Learning rate of the dense model at base_width.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the data.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of weights, order, augmentation.")
@device_option
@data_dir_option
@click.option("--plan", "plan_only", is_flag=True, help="Print what each parameter takes; end.")
@click.option("--dry-run", is_flag=True, help="Print the settings and the size of the run; end.")
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of tables.")
def train(
    spec: Path,
    out: Path | None,
    optimizer: str | None,
    structure: str | None,
    width: int | None,
    lr: float | None,
    epochs: int | None,
    seed: int | None,
    device: str,
    data_dir: Path | None,
    plan_only: bool,
    dry_run: bool,
    json_: bool,
) -> int:
    """Train one model; go on after an interruption, bit by bit.

    SPEC is a TOML file as for `matrigami study run`. Of several runs the first counts that agrees
    with the options, which override the file. Under torchrun the processes share every batch.

    \b
    Examples:
      matrigami train spec.toml --optimizer soap --structure btt --out runs/soap
      torchrun --nproc-per-node 2 -m matrigami.cli train spec.toml --out runs/soap
    """
    from matrigami.studies import joined, load_spec, plan_run, single_run

    config = single_run(
        load_spec(spec),
        optimizer=optimizer,
        structure=structure,
        width=width,
        lr=lr,
        epochs=epochs,
        seed=seed,
    )
    size, table = plan_run(config, data_dir)
    if plan_only or dry_run:
        _echo_run(config, size, table if plan_only else None, json_)
        return 0
    if out is None:
        raise click.UsageError(
            "--out is missing: the folder that the run is written to. Or give --dry-run or --plan."
        )
    check_device(device)
    if optimizer is not None and lr is None:
        say(f"lr = {config.lr:g} is that of the file; {optimizer} may want another (--lr).")
    with joined(device) as (team, own_device):
        if team.leads and not json_:
            _echo_run(config, size, table, json_=False)
        return _train(
            config, out, json_, {"data_dir": data_dir, "device": own_device, "team": team}
        )


def _train(config: "RunConfig", out: Path, json_: bool, options: Mapping[str, Any]) -> int:
    """The run, its progress and its end."""
    from matrigami.studies import Interrupted, train_single

    line = ProgressLine(seconds=5.0, quiet=json_)
    leads = options["team"].leads
    try:
        record = train_single(config, out, progress=_progress(line), **options)
    except Interrupted as stopped:
        if leads:
            line.end()
            say(f"{stopped} Its state is kept. Go on with:\n  {command_line()}")
        return 130
    if leads:
        line.end()
        _echo_record(record, out, json_)
    return 0 if record["status"] == "done" else 1


def _progress(line: ProgressLine) -> Callable[[float, Mapping[str, Any]], None]:
    """Writes the state."""

    def show(fraction: float, info: Mapping[str, Any]) -> None:
        """Epoch and errors so far."""
        parts = [
            f"epoch {min(info['epoch'], info['epochs'])}/{info['epochs']}",
            f"train loss {info['train_loss']:.3f}",
        ]
        if info["test_error"] is not None:
            parts.append(f"test error {info['test_error']:.1f} %")
        line.show(" · ".join(parts), share=fraction, done=fraction >= 1)

    return show


def _echo_run(config: "RunConfig", size: "RunSize", table: str | None, json_: bool) -> None:
    """What will be trained."""
    if json_:
        settings = {"id": config.id, **config.to_json(), **size._asdict()}
        echo_json(settings | ({"plan": table.splitlines()} if table else {}))
        return
    click.echo(
        f"run {config.id}: {config.model} of {config.structure} on {config.dataset}, width "
        f"{config.width}, {size.params:,} parameters, {size.macs:,} MACs; {config.optimizer}, lr "
        f"{config.lr:g}, {config.epochs} epochs of batches of {config.batch_size}, seed "
        f"{config.seed}"
    )
    if table:
        click.echo(f"\n{table}\n")


def _echo_record(record: Mapping[str, Any], out: Path, json_: bool) -> None:
    """What came of it."""
    if json_:
        echo_json(record)
        return
    if record["status"] != "done":
        say(f"The run failed: {record['cause']}.")
        return
    columns = ("train_loss", "train_error", "test_loss", "test_error", "seconds")
    echo_table([*columns], [[f"{record[name]:.4g}" for name in columns]])
    click.echo(f"\nWritten: {out}\nNext: matrigami curvature {out}")
