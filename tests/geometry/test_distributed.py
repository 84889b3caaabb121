"""Products of particles that several processes own are those of one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matrigami import DenseMatrix
from matrigami.geometry import distributed, distributed_kernel_matrix
from matrigami.geometry.particles import kernel_matrix
from tests.geometry import distributed_cases as cases
from tests.ranks import on_ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("ranks", "cloud"),
    [
        (2, "uniform"),
        (4, "uneven"),
        pytest.param(1, "uniform", marks=pytest.mark.slow),
        pytest.param(4, "uniform", marks=pytest.mark.slow),
        pytest.param(2, "uneven", marks=pytest.mark.slow),
    ],
)
def test_products_are_those_of_one_process(ranks: int, cloud: str, tmp_path: Path):
    on_ranks(ranks, tmp_path, cases.multiplies, cloud)
    on_ranks(ranks, tmp_path, cases.shares, cloud)


@pytest.mark.parametrize(
    "ranks", [2, *[pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4)]]
)
def test_each_process_builds_what_it_owns(ranks: int, tmp_path: Path):
    on_ranks(ranks, tmp_path, cases.builds, 4500)


@pytest.mark.parametrize(
    ("ranks", "cloud"), [(2, "uniform"), pytest.param(4, "uneven", marks=pytest.mark.slow)]
)
def test_solutions_are_the_same_on_all_ranks(ranks: int, cloud: str, tmp_path: Path):
    on_ranks(ranks, tmp_path, cases.solves, cloud)


@pytest.mark.parametrize(
    "ranks",
    [3, *[pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4)]],
)
def test_points_on_a_line_are_solved_directly(ranks: int, tmp_path: Path):
    on_ranks(ranks, tmp_path, cases.line, 1500)


@pytest.mark.slow
def test_the_example_of_the_page_prints_what_the_page_says():
    page = (ROOT / "docs" / "particles.md").read_text()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    script = "docs/examples/particles/processes.py"
    assert f"torchrun --nproc-per-node 2 {script}" in page
    told = subprocess.run(
        [*command, script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "\n".join(sorted(told.splitlines())) in page


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="must be an H2Matrix or a HODLR"):
        distributed(DenseMatrix(torch.eye(2)))
    with pytest.raises(ValueError, match="there is no process group"):
        distributed(kernel_matrix(torch.rand(3000, 2), "gaussian"))
    with pytest.raises(ValueError, match="there is no process group"):
        distributed_kernel_matrix(torch.rand(3000, 2), "gaussian")
    with pytest.raises(ValueError, match="must be an H2Matrix or a HODLR"):
        distributed_kernel_matrix(torch.rand(300, 2), "gaussian")
