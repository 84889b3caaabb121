"""The commands of compression on a model that the test makes, and their state after kill -9."""

import importlib.util
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import matrigami as mg
from matrigami.cli._main import run
from matrigami.cli._model import _text
from matrigami.studies._lock import hold

FACTORY = """
import torch
from torch import nn

def model(width=24, depth=3):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(nn.Linear(7, width), *blocks, nn.Linear(width, 5)).float()

def deep():
    return model(64, 40)

def nothing():
    return 3

def half():
    return model().bfloat16().requires_grad_(False)

def fails():
    raise RuntimeError("no such weights")

def attention():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 5))

def leaves():
    raise SystemExit(0)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    Path("made.py").write_text(FACTORY)
    save_file({"inputs": torch.randn(256, 7)}, "calib.safetensors")
    save_file({"inputs": torch.empty(0, 7)}, "none.safetensors")
    save_file({"input_ids": torch.ones(4, 4, dtype=torch.long)}, "ids.safetensors")
    Path("cut.safetensors").write_bytes(Path("calib.safetensors").read_bytes()[:500])
    Path("wrong.py").write_text("def model(:")
    return tmp_path


def out_of(capsys, *arguments):
    """What a command prints, in JSON."""
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


MODEL = ("made.py:model", "--calib", "calib.safetensors", "--batch", "32", "--sequences", "256")


def test_plan_compress_evaluate_and_export(place, capsys):
    planned = out_of(capsys, "quantize", *MODEL, "--plan")
    assert list(planned["options"]) == ["0", "1.0", "2.0", "3.0"]
    assert [o["index"] for o in planned["options"]["0"]] == [0, 1, 2, 3]
    for asked in (("quantize", *MODEL, "--bits", "3"), ("prune", *MODEL, "--pattern", "4:8")):
        (option,) = out_of(capsys, *asked, "--plan", "--targets", "1.0")["options"]["1.0"]
        assert option["method"].startswith(("Grid(3", "n_of_m(4, 8)"))
    done = out_of(capsys, "quantize", *MODEL, "-o", "small", "--bits", "3", "--group", "8")
    assert done["bytes"] == Path("small/matrigami.safetensors").stat().st_size
    assert all(layer["loss"] <= layer["simple"] for layer in done["layers"])
    assert not Path("small.journal").exists()
    assert json.loads(Path("small/matrigami.json").read_text())["factory"] == "made.py:model"
    data = ("--against", "made.py:model", "--data", "calib.safetensors", "--sequences", "64")
    found = out_of(capsys, "eval", "small", *data)
    assert found["tokens"] == 64
    assert 0 < found["kl"] < 0.1
    assert found["bytes"] < 0.5 * found["reference_bytes"]
    assert run(["eval", "small", *data]) == 0
    assert "divergence" in capsys.readouterr().out
    into = ("--into", "made.py:model")
    assert run(["export", "small", "--format", "dense", "-o", "plain", *into]) == 0
    assert run(["export", "small", "--format", "compressed-tensors", "-o", "packed", *into]) == 0
    assert "1.0.weight_packed" in load_file("packed/model.safetensors")
    if importlib.util.find_spec("onnxscript") is None:
        assert run(["export", "small", "--format", "onnx", "-o", "graph", *into, *data[2:4]]) == 2
        assert "pip install onnx onnxscript" in capsys.readouterr().err
    assert run(["export", "small", "--format", "onnx", "-o", "graph", *into]) == 2
    assert "Give --data FILE" in capsys.readouterr().err
    again = ("plain/model.safetensors", *into, *MODEL[1:])  # bare tensors, of a model that is named
    assert out_of(capsys, "prune", *again, "-o", "sparse")["layers"][0]["bits"] == 17


def test_structures_and_budgets(place, capsys):
    structured = ("-o", "low", "--structure", "lowrank(rank=4)", "--targets", "re:[12].0")
    done = out_of(capsys, "structure", *MODEL, *structured)
    assert [layer["method"] for layer in done["layers"]] == ["LowRank(rank=4)"] * 2
    made = {}
    exec(FACTORY, made)
    model = mg.load("low", into=made["model"]())
    assert model[1][0].structure == mg.LowRank(rank=4)
    assert run(["export", "low", "--format", "dense", "-o", "d", "--into", "made.py:model"]) == 0
    assert load_file("d/model.safetensors")["1.0.weight"].shape == (24, 24)
    done = out_of(capsys, "quantize", *MODEL, "-o", "mixed", "--budget", "0.15x bytes")
    other = out_of(capsys, "quantize", *MODEL, "-o", "o", "--budget", "0.15x bytes", "--one-sided")
    assert [r["loss"] for r in other["layers"]] != [r["loss"] for r in done["layers"]]
    sizes = [24 * 7, *[24 * 24] * 3]
    bits = sum(n * layer["bits"] for n, layer in zip(sizes, done["layers"], strict=True))
    assert 0.05 < bits / (32 * sum(sizes)) <= 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "model.bin", *MODEL[1:], "-o", "x"), "pickles"),
        (("quantize", "nowhere", *MODEL[1:], "-o", "x"), "no such folder"),
        (("quantize", "made.py:nothing", *MODEL[1:], "-o", "x"), "returned a int"),
        (("quantize", "made.py:fails", *MODEL[1:], "-o", "x"), "RuntimeError: no such weights"),
        (("quantize", "made.py:leaves", *MODEL[1:], "-o", "x"), "SystemExit: 0"),
        (("quantize", "wrong.py:model", *MODEL[1:], "-o", "x"), "SyntaxError"),
        (("quantize", "made.py:absent", *MODEL[1:], "-o", "x"), "KeyError: 'absent'"),
        (("quantize", "made.py:model", "--calib", "cut.safetensors", "-o", "x"), "damaged"),
        (("quantize", "made.py:model", "--calib", "none.safetensors", "-o", "x"), "there are none"),
        (("quantize", "made.py:model", "--calib", "ids.safetensors", "-o", "x"), "It failed:"),
        (("quantize", *MODEL, "-o", "x", "--batch", "0"), "not in the range"),
        (("quantize", *MODEL, "-o", "x", "--sequences", "-1"), "not in the range"),
        (("quantize", *MODEL, "-o", "x", "--bits", "9"), "not in the range"),
        (("quantize", *MODEL, "-o", "x", "--budget", "0.01x bytes"), "larger budget"),
        (("prune", *MODEL, "-o", "x", "--sparsity", "1"), "not in the range"),
        (("prune", *MODEL, "-o", "x", "--sparsity", "nan"), "can go"),
        (("quantize", *MODEL, "-o", "made.py/x"), "nothing can be written there"),
        (("quantize", *MODEL, "-o", "made.py"), "it exists"),
        (("quantize", *MODEL), "Give -o OUT, or --plan"),
        (("prune", *MODEL, "-o", "x", "--pattern", "24"), "two numbers"),
        (("prune", *MODEL, "-o", "x", "--pattern", "2:4"), "not a multiple of 4"),
        (("structure", *MODEL, "-o", "x"), "one of --structure and --budget"),
        (
            ("structure", *MODEL, "--plan", "--structure", "dense", "--budget", "0.5x macs"),
            "one of",
        ),
        (
            ("prune", *MODEL, "-o", "x", "--sparsity", "0.6", "--pattern", "2:4"),
            "one of --sparsity",
        ),
        (("quantize", *MODEL, "-o", "x", "--bits", "3", "--budget", "0.2x bytes"), "one of --bits"),
        (("quantize", *MODEL, "--plan", "--budget", "0.2x bytes"), "one of --budget and --plan"),
        (("structure", *MODEL, "-o", "x", "--structure", "lowrnk(2)"), "lowrank"),
        (("quantize", *MODEL, "-o", "x", "--targets", "mlp"), "matches no layer"),
        (("quantize", "calib.safetensors", *MODEL[1:], "-o", "x"), "--into"),
        (("quantize", "made.py:model", "--calib", "made.py", "-o", "x"), "tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(place, capsys, arguments, message):
    before = sorted(p.name for p in place.iterdir())
    assert run(list(arguments)) == 2
    assert message in capsys.readouterr().err
    assert [n for n in sorted(p.name for p in place.iterdir()) if n != "__pycache__"] == before


def test_half_precision_frozen_and_names_in_other_scripts(place, capsys):
    """Examples are brought to the type of the model."""
    made = ("made.py:half", *MODEL[1:], "-o", "kläin/小", "--bits", "8", "--group", "0")
    assert len(out_of(capsys, "quantize", *made)["layers"]) == 4
    assert load_file("kläin/小/matrigami.safetensors")["0.bias"].dtype == torch.bfloat16


def test_fused_attention_is_separated_on_demand(place, capsys):
    made = ("made.py:attention", *MODEL[1:], "--structure", "lowrank(rank=0.5)", "--batch", "32")
    names = [
        r["name"] for r in out_of(capsys, "structure", *made, "-o", "a", "--separate")["layers"]
    ]
    assert names[1:5] == [f"1.self_attn.{n}" for n in ("query", "key", "value", "out_proj")]
    data = ("--against", "made.py:attention", "--data", "calib.safetensors", "--sequences", "64")
    assert 0 < out_of(capsys, "eval", "a", *data)["kl"] < 0.1
    assert run(["export", "a", "--format", "dense", "-o", "d", "--into", "made.py:attention"]) == 0
    assert load_file("d/model.safetensors")["1.self_attn.in_proj_weight"].shape == (24, 8)


@pytest.mark.parametrize("budget", [(), ("--budget", "0.15x bytes")])
def test_two_processes_do_not_make_one_folder(place, capsys, budget):
    Path("x.journal").mkdir()
    with hold(Path("x.journal")):
        assert run(["quantize", *MODEL, "-o", "x", *budget]) == 2
        assert "another process" in capsys.readouterr().err
        assert Path("x.journal").exists()
    assert run(["quantize", *MODEL, "-o", "x", *budget]) == 0
    assert not Path("x.journal").exists()


@pytest.mark.parametrize("options", [(), ("--budget", "0.15x bytes"), ("--plan",)])
def test_a_full_disk_is_told_and_leaves_no_folder(place, capsys, options):
    """Here no file of more than 1000 bytes can be written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert run(["quantize", *MODEL, "-o", "x", "--one-sided", *options]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large.\nSee that" in capsys.readouterr().err
    assert {path.name for path in place.glob("*x*")} <= {"x.journal"}  # whole blocks of it stay
    assert run(["quantize", *MODEL, "-o", "x", "--one-sided", *options]) == 0


def test_a_killed_command_goes_on_where_it_was(place, capsys):
    options = ("--calib", "calib.safetensors", "-o", "small", "--bits", "3", "--one-sided")
    command = [sys.executable, "-m", "matrigami.cli", "quantize", "made.py:deep", *options]
    source = str(Path(mg.__file__).parent.parent)
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": source}, stderr=subprocess.DEVNULL
    )
    journal = place / "small.journal"
    while len(list(journal.glob("*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(journal.glob("*.safetensors")))
    assert 3 <= done < 41
    assert not (place / "small").exists()
    resumed = out_of(capsys, "quantize", "made.py:deep", *options)
    whole = out_of(capsys, "quantize", "made.py:deep", *options[:3], "whole", *options[4:])
    assert resumed["layers"] == whole["layers"]
    a, b = (load_file(f"{name}/matrigami.safetensors") for name in ("small", "whole"))
    assert all(torch.equal(t, b[name]) for name, t in a.items())
    assert not journal.exists()


def shown(page):
    """The commands of the first block about `MODEL` of a page."""
    text = (Path(__file__).parents[1] / page).read_text()
    block = next(b for b in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "MODEL" in b)
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.fixture
def language_model(place):
    """A folder `MODEL` with a small Llama and a tokenizer, and two texts."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
    words = {word: i for i, word in enumerate(["<s>", "?", *(f"w{i}" for i in range(60))])}
    kind = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    kind.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=kind, bos_token="<s>")
    fast.save_pretrained("MODEL")
    config = transformers.LlamaConfig(
        vocab_size=62,
        hidden_size=32,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained("MODEL")
    for name in ("text.txt", "held-out.txt"):
        Path(name).write_text(" ".join(f"w{i * i % 60}" for i in range(2600)))
    return transformers


@pytest.mark.parametrize("page", ["README.md", "docs/compression.md"])
def test_the_commands_of_a_page_run_as_they_stand(language_model, capsys, page):
    pytest.importorskip("compressed_tensors", reason="needs the extra hf")
    for command in shown(page):
        assert run(command) == 0, command
    capsys.readouterr()
    mg.compress.register_transformers()
    ids = torch.arange(2, 42).view(2, 20)
    for name in ("small", "sparse", "low"):
        again = language_model.AutoModelForCausalLM.from_pretrained(name)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, mg.load(name)(ids).logits)
    packed = language_model.AutoModelForCausalLM.from_pretrained("for-vllm")
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, mg.load("small")(ids).logits)


def folder(name, **files):
    """A folder of transformers with some files."""
    Path(name).mkdir()
    for file, text in {"config": '{"model_type": "llama"}', **files}.items():
        Path(name, f"{file.replace('_', '.')}.json").write_text(text)


def test_folders_of_transformers_that_are_not_whole(language_model, capsys, monkeypatch):
    weights = load_file("MODEL/model.safetensors")
    folder("broken", config="{")
    folder("strange", config='{"model_type": "nosuch"}')
    folder("empty")
    folder("outside", model_safetensors_index='{"weight_map": {"a": "../MODEL/model.safetensors"}}')
    folder("index", model_safetensors_index="[]")
    folder("lacking", config=Path("MODEL/config.json").read_text())
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, "lacking/model.safetensors", metadata={"format": "pt"})
    cases = {
        "broken": "cannot be loaded",
        "strange": "nosuch",
        "empty": "no file named",
        "outside": "outside of the folder",
        "index": "index.json is damaged",
        "lacking": "lack 1 tensors of a LlamaForCausalLM: model.layers.1.mlp.up_proj.weight",
    }
    for name, message in cases.items():
        assert run(["quantize", name, "--calib", "text.txt", "-o", "x"]) == 2
        assert message in capsys.readouterr().err
    assert run(["quantize", "MODEL", "--calib", "text.txt", "-o", "x", "--length", "9999"]) == 2
    assert "less than one sequence" in capsys.readouterr().err
    monkeypatch.setattr("matrigami.operators.free_memory", lambda: 1000)
    assert run(["quantize", "MODEL", "--calib", "text.txt", "-o", "x"]) == 2
    assert "are free" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "calibration.txt"
    path.write_bytes(b"once \xcd\xcd upon")
    with pytest.raises(ValueError, match=r"no text in UTF-8: invalid continuation byte(.|\n)*Give"):
        _text(path, 100)
    path.write_text("Es war einmal eine süße Dirne", encoding="utf-8")
    assert _text(path, 20) == "Es war einmal eine s"


def test_pages_of_reports(place, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    assert run(["quantize", *MODEL, "--plan", "-o", "planned"]) == 0
    assert run(["prune", *MODEL, "-o", "sparse", "--one-sided"]) == 0
    for name, word in (("planned", "predicted nats"), ("sparse", "unstructured(0.5)")):
        page = Path(name, "report.html").read_text()
        assert page.count("data:image/png;base64,") == 1
        assert word in page
        assert "http" not in page.replace("http://www.w3.org", "")
    layers = json.loads(Path("sparse/report.json").read_text())
    assert [layer["name"] for layer in layers] == ["0", "1.0", "2.0", "3.0"]
    assert len(json.loads(Path("planned/report.json").read_text())["options"]) == 4
