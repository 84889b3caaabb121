"""Which structure a matrix has: planted ones are recognised, a Gaussian matrix has none."""

import json
import math

import pytest
import torch

import matrigami as mg
from matrigami.studies import analyze
from matrigami.studies.analysis import FAMILIES, Analysis, _partitions
from matrigami.studies.analysis._curves import competing, from_steps
from matrigami.studies.analysis._families import Place
from matrigami.studies.analysis._nulls import Nulls
from matrigami.studies.analysis._orderings import traits_of
from matrigami.studies.analysis._partitions import strong, weak

N = 64
FAST = {"orderings": ["given"], "draws": 2}


def uneven_tiles() -> torch.Tensor:
    """Tiles of ranks 0 to 3."""
    ranks = torch.randint(0, 4, (8, 8))
    tiles = [[torch.randn(8, r) @ torch.randn(r, 8) for r in row] for row in ranks.tolist()]
    return torch.cat([torch.cat(row, 1) for row in tiles])


def strongly_admissible() -> torch.Tensor:
    """A random rank-one block for each pair of clusters that are apart, and a dense near field."""
    part = strong(N, N)
    blocks = [
        torch.randn(b, p, 1) @ torch.randn(b, 1, q) if far else torch.randn(b, p, q)
        for (b, p, q), far in zip([s.shape for s in part.places], part.far, strict=True)
    ]
    return part.matrix(blocks)


def nested_bases() -> torch.Tensor:
    """Blocks `s u v.T` whose u and v are parts of the same vectors: bases that are nested."""
    part = strong(N, N)
    couplings = [
        torch.randn(b, 1, 1).expand(b, p, q) if far else torch.randn(b, p, q)
        for (b, p, q), far in zip([s.shape for s in part.places], part.far, strict=True)
    ]
    return part.matrix(couplings) * torch.randn(N, 1) * torch.randn(N)


def diagonals(offsets: range) -> torch.Tensor:
    """Random numbers on some diagonals."""
    return sum(torch.diag(torch.randn(N - abs(k)), k) for k in offsets)


def constant_diagonals() -> torch.Tensor:
    c = torch.randn(2 * N - 1)
    return c[torch.arange(N)[:, None] - torch.arange(N) + N - 1]


def few(share: float) -> torch.Tensor:
    return torch.randn(N, N) * (torch.rand(N, N) < share)


def member(recipe: mg.Structure) -> torch.Tensor:
    return recipe.init(N, N).dense()


PLANTED = {
    "low_rank": lambda: member(mg.LowRank(rank=3)),
    "sparse": lambda: few(0.1),
    "band": lambda: diagonals(range(-2, 3)),
    "block_diagonal": lambda: member(mg.BlockDiagonal(blocks=8)),
    "toeplitz": constant_diagonals,
    "kronecker": lambda: member(mg.Kronecker()),
    "kronecker_sum": lambda: member(mg.KroneckerSum()),
    "monarch": lambda: member(mg.Monarch(blocks=8, rank=1)),
    "btt": lambda: member(mg.BlockTensorTrain(rank=1)),
    "tt": lambda: member(mg.TensorTrain(rank=2, cores=3)),
    "blr": lambda: (
        uneven_tiles() * (torch.rand(8, 8) < 0.4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    ),
    "hodlr": lambda: member(mg.HODLR(leaf=8, rank=1)),
    "h": strongly_admissible,
    "h2": nested_bases,
    "sparse_low_rank": lambda: member(mg.LowRank(rank=2)) * N + 3 * few(0.05),
}


def test_each_family_is_planted():
    assert set(PLANTED) == set(FAMILIES)


BUDGETS = {"h": 0.45, "h2": 0.45}
"""Above a quarter where the near field alone takes a third of so small a matrix."""


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_structure_is_recognised(name: str):
    """The diagonal of the confusion matrix, with a thousandth of noise."""
    A = PLANTED[name]()
    A = A / A.norm() + 1e-3 * torch.randn(N, N) / N
    found = analyze(A, budget=BUDGETS.get(name, 0.27), **FAST)
    assert found.structure == name, str(found)
    assert found[name].gains[0] > 2
    assert "present" in found.verdict


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rounding_to_a_short_type_hides_no_exact_structure(dtype):
    x = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort()[0]
    K = torch.exp(-3 * (x[:, None] - x).abs())
    for A in (K.to(dtype), K.numpy().astype("float16")):
        found = analyze(A, ["low_rank", "kronecker", "h2"], orderings=["given"], draws=2)
        assert found.structure == "h2"
    assert type(found).from_json(found.to_json()).structure == "h2"


def test_a_gaussian_matrix_has_no_structure():
    found = analyze(torch.randn(N, N), draws=2)
    assert found.structure is None
    assert found.verdict == "no structure"
    assert set(found["hodlr"].errors) == {"given", "random", "pca", "rcm"}
    assert not any(any(f.traces) for f in found.findings)


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (2, 5)])
def test_the_smallest_matrices_have_no_structure(size):
    assert analyze(torch.randn(size), draws=2).verdict == "no structure"


def test_the_factors_of_a_layer_are_tried():
    """24 is not near a power of the root of 384."""
    assert (24, 24) in _partitions.factor_sizes(384, 384)
    assert _partitions.factor_sizes(7, 7) == [(3, 3)]


def test_decaying_singular_values_alone_are_no_structure():
    """HODLR reaches a lower error than on a Gaussian matrix, and still is not there."""
    U, V = (torch.linalg.qr(torch.randn(N, N)).Q for _ in range(2))
    found = analyze((U * 0.9 ** torch.arange(N)) @ V.T, **FAST, structures=["low_rank", "hodlr"])
    assert found.verdict == "no structure beyond a decaying spectrum"
    hodlr = found["hodlr"]
    assert hodlr.best[0] < 0.95 * hodlr.nulls["gaussian"][0][0]
    assert hodlr.gains[0] == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def cloud() -> torch.Tensor:
    """Points on a line in random order."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(N, 1, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def kernel(cloud) -> torch.Tensor:
    return torch.exp(-3 * (cloud - cloud.T).abs())


def test_orders_are_found_with_and_without_points(kernel, cloud):
    names = ["low_rank", "hodlr"]
    found = analyze(kernel, names, points=cloud, draws=2, budget=0.3)["hodlr"]
    assert found.errors["geometric"][0] < 0.01 < found.errors["given"][0]
    assert found.ordering == "geometric"
    assert found.present[0]
    blind = analyze(kernel, names, orderings=["random", "pca", "gram"], draws=2, budget=0.3)
    errors = {name: e[0] for name, e in blind["hodlr"].errors.items()}
    assert max(errors["pca"], errors["gram"]) < 0.1 * min(errors["given"], errors["random"])
    assert "after" in blind.verdict


def test_ranks_grow_with_blocks_where_there_is_no_order(kernel, cloud):
    found = analyze(kernel, ["low_rank", "hodlr"], points=cloud, draws=2)
    assert found.exponents["geometric"]["weak"]["0.0001"] == pytest.approx(0, abs=0.2)
    assert found.exponents["given"]["weak"]["0.0001"] > 0.5
    noise = analyze(torch.randn(N, N), ["low_rank"], **FAST)
    assert noise.exponents["given"]["weak"]["0.01"] == pytest.approx(1, abs=0.1)


def test_solutions_and_preconditioning_are_measured(kernel):
    A = kernel + 0.1 * torch.eye(N)
    found = analyze(A, ["low_rank", "hodlr"], orderings=["gram"], draws=2, budget=0.4)
    low, hodlr = (found[name].metrics for name in ("low_rank", "hodlr"))
    assert hodlr["solution error"] < 0.2 * low["solution error"]
    assert hodlr["condition"] < 5
    assert hodlr["CG steps"] < 15
    assert low["CG steps"] == math.inf  # not definite: a rank below full


def test_metrics_of_the_caller_see_the_given_order(kernel, cloud):
    seen = []
    options = {"points": cloud, "draws": 2, "budget": 0.5}
    analyze(kernel, ["hodlr"], metrics={"error": lambda B: seen.append(B) or 0.0}, **options)
    assert float((seen[0] - kernel).norm() / kernel.norm()) < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(37, 53), (48, 48)])
def test_members_have_the_error_of_the_curve(name: str, shape: tuple[int, int]):
    A = torch.randn(*shape) + torch.linspace(0, 3, shape[1])
    family, place = FAMILIES[name], Place(shape)
    curve = family.curve(A, place)
    for storage in (0.15, 0.3, 0.6):
        B = family.member(A, place, storage)
        error = float((A - B).norm() / A.norm())
        assert error <= curve.at(storage) * (1 + 1e-6) + 1e-7  # padding is counted in the curve
        if shape == (48, 48):
            assert error == pytest.approx(curve.at(storage), rel=1e-6, abs=1e-7)


def test_competing_singular_values_are_the_best_choice_of_ranks():
    """Against all choices of ranks of four small blocks."""
    values = torch.rand(4, 1) * 0.3 ** torch.arange(8)
    steps = competing([values], [(8, 12)])
    curve = from_steps(steps.costs, steps.gains, 4 * 96)
    energy = torch.cat([torch.zeros(4, 1), values.square().cumsum(1)], 1)
    choices = torch.cartesian_prod(*[torch.arange(5)] * 4)
    kept = energy.gather(1, choices.T).sum(0)
    for total in range(1, 7):
        best = kept[choices.sum(1) == total].max() / values.square().sum()
        assert curve.at(total * 20 / (4 * 96)) == pytest.approx(math.sqrt(1 - best), rel=1e-6)


@pytest.mark.parametrize("part", [weak(37, 53), strong(64, 64)])
def test_partitions_cover_each_entry_once(part):
    places = torch.cat([p.flatten() for p in part.places])
    size = part.size[0] * part.size[1]
    assert torch.bincount(places, minlength=size + 1)[:size].tolist() == [1] * size


@pytest.mark.parametrize("symmetric", [False, True])
def test_null_models_keep_what_they_say(symmetric: bool):
    A = torch.randn(20, 20) * torch.rand(20, 1) * torch.rand(20)
    A = A + A.T if symmetric else A
    models = Nulls(A, traits_of(A))
    S, B, E = (models.draw(name, 0) for name in ("spectrum", "norms", "shuffled"))
    torch.testing.assert_close(torch.linalg.svdvals(S), torch.linalg.svdvals(A))
    torch.testing.assert_close(B.square().sum(1), A.square().sum(1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(B.square().sum(0), A.square().sum(0), rtol=1e-3, atol=1e-6)
    entries = [
        M.triu().flatten().sort().values if symmetric else M.flatten().sort().values for M in (E, A)
    ]
    assert torch.equal(*entries)
    for M in (S, B, E, models.draw("gaussian", 0)):
        assert torch.allclose(M, M.T) == symmetric


def test_results_go_to_json_and_back(kernel, cloud):
    found = analyze(kernel, ["low_rank", "hodlr", mg.Kronecker()], points=cloud, draws=2)
    again = Analysis.from_json(json.loads(json.dumps(found.to_json())))
    assert again.verdict == found.verdict
    assert again["Kronecker(factors=None)"].best == found["Kronecker(factors=None)"].best
    assert again.structure == found.structure


@pytest.mark.parametrize(
    ("A", "options", "message"),
    [
        (torch.ones(3), {}, "array of shape (3,)"),
        (torch.ones(3, 3, 3), {}, "one matrix of a stack"),
        (torch.ones(3, 3) * 1j, {}, "complex"),
        (torch.full((3, 3), math.nan), {}, "9 of 9 entries"),
        (torch.zeros(3, 3), {}, "All are zero"),
        (torch.ones(3, 3), {"budget": 2.0}, "budget=2.0"),
        (torch.ones(3, 3), {"structures": ["hodrl"]}, "Did you mean 'hodlr'?"),
        (torch.ones(3, 3), {"orderings": ["metis"]}, "known are given"),
        (torch.ones(3, 3), {"points": torch.ones(4, 2)}, "for a 3x3 matrix"),
        (torch.empty(2**20, 2**20, device="meta"), {}, "GiB"),
    ],
)
def test_bad_input_is_refused_in_three_lines(A, options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        analyze(A, **options)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) in (2, 3)
