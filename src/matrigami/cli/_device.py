"""Options that say where to train: `--device` and `--launcher`."""

import click

from matrigami.cli._terminal import say

device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu, cuda or cuda:0."
)

launcher_option = click.option(
    "--launcher",
    default="processes",
    show_default=True,
    metavar="LAUNCHER",
    help="Where workers run: processes of this machine, slurm, ray; with options as in "
    "slurm(timeout_min=600).",
)


def checked_workers(workers: int | None, launcher: str, device: str) -> int | None:
    """No more processes of this machine than cores, and says so; refuses a device it lacks."""
    from matrigami.studies import default_workers

    cores = default_workers()
    if launcher == "processes":  # elsewhere, other machines have the device and the cores
        check_device(device)
    if workers is None or workers <= cores or launcher != "processes":
        return workers
    say(f"--workers {workers} is above the {cores} cores that are free to use: {cores} it is.")
    return cores


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Training on --device {device}: it is not there: {reason}\n"
            "Use --device cpu, or install a torch build for it."
        ) from error
