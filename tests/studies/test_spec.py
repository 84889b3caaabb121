"""Study files: expansion into runs, identities, and what is refused."""

from dataclasses import replace

import pytest

from matrigami.studies import (
    RunConfig,
    canonical_structure,
    load_preset,
    load_spec,
    parse_spec,
    plan_study,
    preset_names,
    run_size,
)

SPEC = """
[study]
name = "two tasks"
[[task]]
dataset = "digits"
epochs = 3
[[task]]
dataset = "teacher_small"
epochs = 2
samples_per_epoch = 1000
[model]
name = "mlp"
depth = 1
[train]
lr = 1e-3
batch_size = 64
epochs = 9
seeds = [0]
[[structure]]
name = "dense"
widths = [8, 16]
repeat_widths = [16]
[[structure]]
name = "btt( rank = 1 )"
widths = [16]
lr = 2e-3
seeds = [5, 6]
datasets = ["digits"]
"""


def test_expands_tasks_structures_widths_and_seeds():
    runs = parse_spec(SPEC).configs
    found = [(c.dataset, c.structure, c.width, c.seed) for c in runs]
    dense = [(8, 0), (16, 0), (16, 1)]
    assert found == [
        *[("digits", "dense", *rest) for rest in dense],
        *[("digits", "btt(rank=1)", 16, seed) for seed in (5, 6)],
        *[("teacher_small", "dense", *rest) for rest in dense],
    ]
    assert {c.depth for c in runs} == {1}


def test_what_is_nearer_to_the_structure_wins():
    runs = parse_spec(SPEC).configs
    assert [c.epochs for c in runs] == [3] * 5 + [2] * 3
    assert [c.lr for c in runs if c.structure == "dense"] == [1e-3] * 6
    assert [c.lr for c in runs if c.structure != "dense"] == [2e-3] * 2
    assert {c.samples_per_epoch for c in runs if c.dataset == "digits"} == {None}


def test_a_run_that_is_named_twice_is_one_run():
    twice = SPEC + '[[structure]]\nname = "dense"\nwidths = [8]\n'
    assert parse_spec(twice).configs == parse_spec(SPEC).configs


def test_identity_is_that_of_the_result():
    config = RunConfig("digits", "mlp", "dense", 8, seed=0, lr=1e-3, epochs=1, batch_size=32)
    assert config.id == "308b4964a727"
    assert replace(config, checkpoint_seconds=1.0).id == config.id
    assert replace(config, mixup=0).id == config.id
    others = [replace(config, seed=1), replace(config, augment=True), replace(config, lr=2e-3)]
    assert len({c.id for c in [config, *others]}) == 4
    assert RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("old", "new", "wrong", "nearest"),
    [
        ("batch_size = 64", "batchsize = 64", "batchsize", "batch_size"),
        ("[train]", "[trian]", "trian", "train"),
        ("widths = [8, 16]", "width = [8, 16]", "width", "widths"),
        ('name = "dense"', 'name = "monach"', "monach", "monarch"),
    ],
    ids=["key", "table", "structure key", "structure name"],
)
def test_unknown_names_are_refused_with_the_nearest(old, new, wrong, nearest):
    with pytest.raises(ValueError, match=wrong) as caught:
        parse_spec(SPEC.replace(old, new, 1))
    lines = str(caught.value).splitlines()
    assert len(lines) in (2, 3)
    assert repr(nearest) in lines[2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('dataset = "digits"', "", "no 'dataset'"),
        ("widths = [8, 16]", "", "no 'widths'"),
        ("batch_size = 64", "", "batch_size"),
        ("lr = 1e-3", 'lr = "high"', "wrong type"),
        ("lr = 1e-3", "lr = 0.0", "lr should be above 0"),
        ("widths = [8, 16]", "widths = [0, 16]", "width should be from 1"),
        ("widths = [8, 16]", "widths = [16, 10000000000000000000]", "width should be from 1"),
        ("repeat_widths = [16]", "repeat_widths = [9]", "9 is none of its widths"),
        ("repeat_widths = [16]", 'datasets = ["digit"]', "Did you mean 'digits'"),
        ("lr = 1e-3", "lr = 1e-3\nmixup = inf", "mixup should be at least 0 and finite"),
        ("lr = 1e-3", "lr = 1e-3\ndepth = 100000", "depth should be from 1"),
        ('dataset = "teacher_small"', 'dataset = ""', "A name is empty"),
        ("[study]", "[study", "not valid TOML"),
    ],
)
def test_what_is_missing_or_out_of_range_is_refused_in_few_lines(old, new, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_spec(SPEC.replace(old, new, 1))
    assert len(str(caught.value).splitlines()) in (2, 3)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_spec(tmp_path / "absent.toml")
    path = tmp_path / "study.toml"
    path.write_text(SPEC)
    assert load_spec(path) == parse_spec(SPEC)


def test_a_study_can_be_cut_to_one_structure():
    study = parse_spec(SPEC)
    assert {c.structure for c in study.only("btt(rank=1)").configs} == {"btt(rank=1)"}
    with pytest.raises(ValueError, match="Did you mean 'btt\\(rank=1\\)'"):
        study.only("btt(rank=2)")


def test_spelling_of_structures():
    assert canonical_structure(" monarch( blocks=4 ) ") == "monarch(blocks=4)"
    assert canonical_structure("dense()") == "dense"
    with pytest.raises(ValueError, match="structure"):
        canonical_structure("btt(rank=")


def test_presets_are_complete_studies():
    assert {"demo", "cifar100_quick", "cifar100_small", "cifar100_full"} <= set(preset_names())
    for name in preset_names():
        study = load_preset(name)
        assert study.name == name
        assert study.description
        assert len({c.label for c in study.configs}) >= 4
    with pytest.raises(ValueError, match="Did you mean 'cifar100_small'"):
        load_preset("cifar100_smal")


def test_the_published_sizes_come_out():
    sizes = {(c.structure, c.width): run_size(c) for c in load_preset("cifar100_quick").configs}
    assert sizes["dense", 128].macs == 799232
    assert sizes["btt(rank=1)", 512].macs == 591872
    assert sizes["monarch(blocks=4)", 64].macs == 87296
    assert sizes["lowrank", 64].macs == 218368
    assert sizes["dense", 128].params == 802148
    assert sizes["dense", 128].examples == 8 * 50_000


def test_the_plan_begins_with_the_biggest_run():
    plan = plan_study(parse_spec(SPEC))
    work = [plan.work[c.id] for c in plan.configs]
    assert work == sorted(work, reverse=True)
    assert set(plan.sizes) == {c.id for c in plan.configs}


def test_a_structure_that_does_not_fit_is_known_before_anything_is_written():
    text = SPEC.replace('name = "dense"\n', 'name = "lowrank(rank=40)"\n', 1)
    with pytest.raises(ValueError, match="lowrank\\(rank=40\\) at width"):
        plan_study(parse_spec(text))
