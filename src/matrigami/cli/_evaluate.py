"""`matrigami eval` and `matrigami export`: how good a compressed model is, and other formats."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from matrigami.cli._model import EXAMPLES, batches_of, located, model_of, new_place, with_options
from matrigami.cli._paths import FILE, FOLDER
from matrigami.cli._terminal import echo_json, echo_table

if TYPE_CHECKING:
    from torch import nn


@click.command("eval")
@click.argument("out", type=FOLDER)
@click.option("--against", required=True, metavar="MODEL", help="The model that it was made of.")
@click.option("--data", required=True, type=FILE, help="Text, or tensors in safetensors.")
@with_options(*EXAMPLES)
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate(
    out: Path, against: str, data: Path, length: int, sequences: int, batch: int, json_: bool
) -> int:
    """Compare the model in OUT with the one that it was made of.

    Perplexity (where the examples are tokens), divergence of the predictions in nats, share of
    equal best predictions, bytes, and tokens or examples a second on this machine.

    \b
    Examples:
      matrigami eval small --against stories260k --data stories.txt
      matrigami eval small --against my_model.py:trained --data inputs.safetensors --json
    """
    from matrigami.compress import evaluate as compared

    against = str(located(against))
    reference = model_of(against)
    model = model_of(str(out), None if (out / "config.json").exists() else against)
    examples = batches_of(data, _tokenizer(out, against), length, sequences, batch, reference)
    found = asdict(compared(model, reference, examples))
    found |= {"bytes": _size(out, model), "reference_bytes": _size(Path(against), reference)}
    if json_:
        echo_json({"out": str(out), "against": against, **found})
        return 0
    _echo(found, str(out), against)
    return 0


def _echo(found: dict[str, Any], out: str, against: str) -> None:
    """The two models beside each other."""
    is_text = not math.isnan(found["perplexity"])
    thing, each = ("token", "a token") if is_text else ("example", "an example")
    pairs = [("perplexity", "{:.4f}", "perplexity")] if is_text else []
    pairs += [("bytes", "{}", "bytes"), (f"{thing}s a second", "{:.0f}", "tokens_per_second")]
    rows = [
        [label, form.format(found[key]), form.format(found[f"reference_{key}"])]
        for label, form, key in pairs
    ]
    echo_table(["", out, against], rows)
    click.echo(
        f"divergence {found['kl']:.3e} nats {each}, the same best prediction at "
        f"{100 * found['agreement']:.2f} % of {found['tokens']} {thing}s"
    )


@click.command()
@click.argument("out", type=FOLDER)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["compressed-tensors", "gptq", "dense", "onnx"]),
    required=True,
    help="What vLLM and transformers load, plain numbers, or a graph for other runtimes.",
)
@click.option("-o", "--to", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--into", metavar="MODEL", help="The model, where OUT does not say which.")
@click.option("--data", type=FILE, help="Examples; for onnx, of a model that reads no tokens.")
def export(out: Path, format_: str, to: Path, into: str | None, data: Path | None) -> int:
    """Write the model in OUT in the format of other programs.

    Structured layers become dense, but for onnx, where they stay products of their factors and
    what is quantised becomes plain numbers.

    \b
    Example:
      matrigami export small --format compressed-tensors -o for-vllm
    """
    from matrigami.compress import (
        quantized_values,
        save_compressed_tensors,
        save_dense,
        save_gptq,
        save_onnx,
    )
    from matrigami.nn import to_dense_

    new_place(to)
    model = model_of(str(out), into)
    if format_ == "onnx":
        save_onnx(model, _example(out, data), to, out)
        click.echo(f"Written: {to}")
        return 0
    to_dense_(model)
    if format_ == "dense":
        save_dense(model, to, out)
    else:
        values = quantized_values(out)
        if not values:
            raise ValueError(
                f"--format {format_}: nothing in {out} is quantised.\nUse --format dense."
            )
        save = save_gptq if format_ == "gptq" else save_compressed_tensors
        save(model, values, to, out)
    click.echo(f"Written: {to}")
    return 0


def _example(out: Path, data: Path | None) -> Any:
    """A batch that the model is followed on."""
    import torch

    if data is not None:
        return batches_of(data, str(out), 16, 2, 2)[0]
    if (out / "config.json").exists():
        return {"input_ids": torch.ones(2, 16, dtype=torch.long)}
    raise ValueError(
        "--format onnx: the model is followed on an example, and none is given.\n"
        "Give --data FILE, a safetensors file with inputs."
    )


def _tokenizer(out: Path, against: str) -> str:
    """The folder that has the tokenizer."""
    return str(out) if (out / "tokenizer.json").exists() else against


def _size(path: Path, model: "nn.Module") -> int:
    """Bytes of the files, or of the tensors of a model that has none."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return path.stat().st_size if path.is_file() else sum(p.nbytes for p in model.parameters())
