"""The option `--device` of commands that train."""

import click

device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu, cuda or cuda:0."
)


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Training on --device {device} was asked for.\nIt is not there: {reason}\n"
            "Use --device cpu, or install a torch build for it."
        ) from error
