"""Optimisers of runs: text, identity, learning rates, checkpoints of every kind of state."""

from dataclasses import replace

import pytest
import torch

from matrigami.optim import MatrixOptimizer
from matrigami.studies import (
    Interrupted,
    RunConfig,
    _train as training,
    canonical_optimizer,
    parse_optimizer,
    parse_spec,
    train_run,
)
from matrigami.studies._checkpoint import load_checkpoint, save_checkpoint
from matrigami.studies._optimizers import NAMES, build_optimizer
from tests.studies.test_train import digits, stop_after, timeless, weights

VARIANTS = [
    *NAMES,
    "adamw(betas=(0.8, 0.9), amsgrad=True)",
    "sgd(momentum=0.0)",
    "soap(frequency=3, statistics_every=2, one_sided=True)",
    "shampoo(frequency=3, graft=None, one_sided=True)",
    "muon(scale=spectral, polynomials=CANS)",
]


def run_of(optimizer: str, **changes) -> RunConfig:
    return digits(optimizer=canonical_optimizer(optimizer), epochs=2, augment=False, **changes)


@pytest.mark.parametrize("optimizer", VARIANTS)
@pytest.mark.parametrize("steps", [9])
def test_every_optimizer_resumes_bit_by_bit(tmp_path, optimizer, steps):
    config = run_of(optimizer)
    whole = train_run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "parts", stop=stop_after(steps))
    assert timeless(train_run(config, tmp_path / "parts")) == timeless(whole)
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("optimizer", NAMES)
def test_state_and_numbers_survive_a_checkpoint(tmp_path, optimizer):
    config = run_of(optimizer)
    task = training.load_task(config)
    run, other = (training.Run(config, tmp_path, task, torch.device("cpu")) for _ in range(2))
    with pytest.raises(Interrupted):
        list(run.train(lambda *_: None, stop_after(3)))
    other.resume()
    ours, theirs = run.optimizer.state_dict(), other.optimizer.state_dict()
    assert len(ours["state"]) == len(list(run.model.parameters()))
    for i, entry in ours["state"].items():
        for name, S in entry.items():
            assert theirs["state"][i][name].dtype == S.dtype
            assert torch.equal(theirs["state"][i][name], S)
    assert ours["param_groups"] == theirs["param_groups"]
    if isinstance(run.optimizer, MatrixOptimizer):
        assert other.optimizer.param_groups[0]["clock"] == 3


def test_a_checkpoint_of_stacked_state_has_no_pickle(tmp_path):
    config = run_of("soap")
    run = training.Run(config, tmp_path, training.load_task(config), torch.device("cpu"))
    save_checkpoint(tmp_path / "c", config, run.model, None, {}, run.epoch_state)
    assert load_checkpoint(tmp_path / "c", config, run.model, run.optimizer) is not None
    assert int.from_bytes((tmp_path / "c").read_bytes()[:8], "little") < 1e5  # a safetensors header


def test_adamw_is_the_default_and_not_part_of_the_identity():
    config = RunConfig("digits", "mlp", "dense", 64, seed=0, lr=1e-2, epochs=2, batch_size=64)
    assert "optimizer" not in config.canonical
    assert config.id == replace(config, optimizer="adamw").id
    soap, often = (replace(config, optimizer=o) for o in ("soap", "soap(frequency=5)"))
    assert len({config.id, soap.id, often.id}) == 3
    assert RunConfig.from_json(often.to_json()) == often


def test_a_study_compares_optimizers():
    study = parse_spec(
        """
        [study]
        name = "race"
        [task]
        dataset = "digits"
        [train]
        lr = 3e-3
        epochs = 1
        batch_size = 64
        optimizer = "soap( frequency=5 )"
        [[structure]]
        name = "dense"
        widths = [16]
        [[structure]]
        name = "btt"
        widths = [16]
        optimizer = "muon"
        lr = 1e-2
        """
    )
    assert [(c.optimizer, c.lr) for c in study.configs] == [
        ("soap(frequency=5)", 3e-3),
        ("muon", 1e-2),
    ]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sopa", "Did you mean 'soap'"),
        ("soap(frequensy=2)", "Did you mean 'frequency'"),
        ("soap(lr=2)", "The learning rate is the key lr"),
        ("soap(frequency=0)", "whole numbers from 1"),
        ("soap(frequency='often')", "whole numbers from 1"),
        ("adamw(betas=3)", "wrong type"),
        ("soap(5)", "Write for example"),
        ("soap(", "Write for example"),
        ("muon(scale=print)", "Write for example"),
    ],
)
def test_bad_optimizers_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_optimizer(text)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("optimizer", NAMES)
@pytest.mark.parametrize("width", [64, 256])
def test_a_step_takes_the_same_share_of_all_weights(tmp_path, optimizer, width):
    """It shrinks with the width, whatever the learning rate of a factor is."""
    config = RunConfig(
        "digits", "mlp", "monarch(blocks=4)", width, 0, 1e-2, 1, 64, depth=1, weight_decay=0.3
    )
    config = replace(config, optimizer=optimizer)
    run = training.Run(config, tmp_path, training.load_task(config), torch.device("cpu"))
    names = {id(p): name for name, p in run.model.named_parameters()}
    shares = {
        names[id(p)]: group["lr"] * group["weight_decay"]
        for group in build_optimizer(run.model, config).param_groups
        for p in group["params"]
    }
    for name, share in shares.items():
        decays = not name.endswith("bias") and "norm" not in name
        assert share == pytest.approx(1e-2 * 0.3 * 64 / width if decays else 0.0)
