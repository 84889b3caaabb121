"""What is left of the time of a forward pass when half of the neurons or of the heads are gone.

    python -m benchmarks.shrunk [--write]

Random models of width 128 (the perceptron: 512), on one thread; without transformers the perceptron
alone. `shrink_` itself checks that the smaller model computes what the zeroed one does.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import torch
from torch import nn

from benchmarks._report import table, write
from benchmarks._timing import interleaved, machine, one_thread
from matrigami.compress import shrink_

WIDTH = 128
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
IDS = {"input_ids": torch.arange(256).view(4, 64) * 7 % 61 + 2}

Case = tuple[str, Callable[[], nn.Module], Any, dict[str, Any]]


def cases() -> Iterator[Case]:
    """Name, model, batch, and what goes."""
    yield "perceptron, neurons", perceptron, torch.randn(256, 64), {}
    try:
        import transformers as hf  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    llama = hf.LlamaConfig(vocab_size=64, num_key_value_heads=4, **SIZES)
    gpt2 = hf.GPT2Config(vocab_size=64, n_embd=WIDTH, n_layer=2, n_head=8)
    bert = hf.BertConfig(vocab_size=64, **SIZES)
    vit = hf.ViTConfig(image_size=32, patch_size=4, **SIZES)
    pixels = {"pixel_values": torch.randn(4, 3, 32, 32)}
    neurons = {"targets": "re:.*(down_proj|mlp.c_proj|[0-9].output.dense|fc2)"}
    heads = {"targets": "re:.*(o_proj|attn.c_proj|attention.output.dense)"}
    for name, kind, config, batch, groups in (
        ("Llama, shared keys", hf.LlamaForCausalLM, llama, IDS, 4),
        ("GPT-2", hf.GPT2LMHeadModel, gpt2, IDS, 8),
        ("BERT", hf.BertForSequenceClassification, bert, IDS, 8),
        ("ViT", hf.ViTForImageClassification, vit, pixels, 8),
    ):
        yield f"{name}, neurons", partial(kind, config), batch, neurons
        yield f"{name}, heads", partial(kind, config), batch, heads | {"heads": groups}


def perceptron() -> nn.Module:
    """64-512-512-10."""
    layers = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


@torch.no_grad()
def measured(name: str, make: Callable[[], nn.Module], batch: Any, what: Any) -> list[str]:
    """One row."""
    torch.manual_seed(0)
    model = make().eval()
    torch.manual_seed(0)
    small = make().eval()
    shrink_(small, [batch], 0.5, **what)
    run = {"before": partial(called, model, batch), "after": partial(called, small, batch)}
    seconds = interleaved(run, 15)
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    times = [seconds["before"], seconds["after"]]
    told = [f"{1e3 * t:.2f}" for t in times]
    return [name, f"{counts[1] / counts[0]:.2f}", *told, f"{times[1] / times[0]:.2f}"]


def called(model: nn.Module, batch: Any) -> Any:
    """A forward pass."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


@click.command()
@click.option("--write", "write_", is_flag=True, help="Put the table into benchmarks/README.md.")
def main(write_: bool) -> None:
    """Print the table."""
    about = {"command": "python -m benchmarks.shrunk --write", "setting": one_thread()}
    rows = [measured(*case) for case in cases()]
    head = ["half of the", "parameters", "ms before", "ms after", "ratio"]
    report = f"{table(('', ''), list((about | machine()).items()))}\n\n{table(head, rows)}"
    print(report)
    if write_:
        write(report, "shrunk")


if __name__ == "__main__":
    main()
