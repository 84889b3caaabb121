"""Several processes train as one does, whichever way the parameters are spread."""

from itertools import product
from pathlib import Path

import pytest

from tests.optim import distributed_cases as cases
from tests.ranks import on_ranks

EVERY = list(product(cases.METHODS, ["dense", "cores"]))
SOME = [("soap", "dense"), ("shampoo", "cores"), ("muon", "dense")]


each_kind = pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        (2, "fsdp"),
        (2, "ddp"),
        (4, "hsdp"),
        pytest.param(2, "redundant", marks=pytest.mark.slow),
        pytest.param(1, "fsdp", marks=pytest.mark.slow),
        pytest.param(4, "fsdp", marks=pytest.mark.slow),
        pytest.param(4, "ddp", marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_one_process(ranks: int, kind: str, tmp_path: Path):
    on_ranks(ranks, tmp_path, cases.agrees, kind, EVERY if kind == "fsdp" else SOME)


@each_kind
def test_a_checkpoint_of_two_resumes_on_any_number(kind: str, tmp_path: Path):
    saved = tmp_path / "saved"
    on_ranks(2, tmp_path, cases.saves, kind, SOME, saved)
    on_ranks(1, tmp_path, cases.resumes, "plain", SOME, saved)
    on_ranks(4, tmp_path, cases.resumes, "fsdp", SOME, saved)


@pytest.mark.slow
def test_a_checkpoint_with_replicas_resumes_on_fewer(tmp_path: Path):
    saved = tmp_path / "saved"
    on_ranks(4, tmp_path, cases.saves, "hsdp", SOME, saved)
    on_ranks(2, tmp_path, cases.resumes, "fsdp", SOME, saved)
    on_ranks(2, tmp_path, cases.resumes, "ddp", SOME, saved)


@each_kind
def test_states_are_given_and_asked_for_in_any_form(kind: str, tmp_path: Path):
    on_ranks(2, tmp_path, cases.exchanges_states, kind)


@each_kind
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(kind: str, tmp_path: Path):
    on_ranks(4, tmp_path, cases.skips, kind)


@each_kind
def test_accumulation_clipping_and_schedules(kind: str, tmp_path: Path):
    on_ranks(2, tmp_path, cases.accumulates_and_clips, kind)


@each_kind
def test_natural_gradients(kind: str, tmp_path: Path):
    on_ranks(2, tmp_path, cases.natural, kind)


@each_kind
def test_inputs_are_seen_on_all_ranks(kind: str, tmp_path: Path):
    on_ranks(2, tmp_path, cases.sees_inputs, kind)


def test_two_axes_of_a_mesh(tmp_path: Path):
    on_ranks(4, tmp_path, cases.takes_two_cuts)


@each_kind
def test_the_plan_names_owners(kind: str, tmp_path: Path):
    on_ranks(4, tmp_path, cases.plans, kind)


def test_ranks_check_annotations(tmp_path: Path):
    on_ranks(1, tmp_path, cases.checks_annotations)


def test_a_copy_without_the_others_is_refused(tmp_path: Path):
    on_ranks(2, tmp_path, cases.refuses_a_copy)
