"""Each example of the documentation is short, gives its right number, and runs as a script."""

import ast
import doctest
import math
import re
import runpy
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import spsolve

import matrigami
from matrigami import krylov, logdet, solve
from matrigami.krylov import gmres, stochastic_logdet

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
PAGE = (FOLDER.parent / "algebra.md").read_text()
SCRIPTS = sorted(FOLDER.glob("*.py"))


def example(name: str) -> ModuleType:
    """Imported by its path: `docs` is no package."""
    spec = spec_from_file_location(name, FOLDER / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


heat = example("heat")
helmholtz = example("helmholtz")
logdet_estimate = example("logdet_estimate")
poisson_from_scipy = example("poisson_from_scipy")


def test_every_example_has_its_number_below():
    tested = [heat, helmholtz, logdet_estimate, poisson_from_scipy]
    assert [path.stem for path in SCRIPTS] == [module.__name__ for module in tested]


def test_the_page_names_every_function():
    functions = {name for name in matrigami.__all__ if name[0].islower()}
    solvers = {name for name in krylov.__all__ if callable(getattr(krylov, name))}
    elsewhere = {"is_hermitian", "is_large", "is_symmetric", "solve_iteratively", "Tridiagonal"}
    elsewhere |= {"parse", *matrigami.FILES}  # on the pages of structures and of compression
    assert (functions | solvers) - elsewhere - set(re.findall(r"\w+", PAGE)) == set()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_opens_with_its_formula(path: Path):
    lines = path.read_text().splitlines()
    formulas = ast.get_docstring(ast.parse(path.read_text())).split("\n    ")
    assert len(lines) < 80
    assert len(formulas) > 1


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs_as_a_script(path: Path, tmp_path, monkeypatch, capsys):
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as a reader has it
    runpy.run_path(str(path), run_name="__main__")
    plt.close("all")
    pattern = rf'title="{path.name}"\n.*?<!-- end -->\n\n```text\n(.*?)```'
    shown = re.search(pattern, PAGE, re.DOTALL)[1]
    assert doctest.OutputChecker().check_output(shown, capsys.readouterr().out, doctest.ELLIPSIS)
    assert [p.stem for p in tmp_path.glob("*.png")] == ["helmholtz"] * (path.stem == "helmholtz")


def test_helmholtz_on_a_line_is_of_second_order():
    errors = [float((u - G).abs().max()) for u, G in map(line, (51, 103, 207))]
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert orders == pytest.approx([2, 2], abs=0.02)


def line(N: int) -> tuple[torch.Tensor, torch.Tensor]:
    return helmholtz.on_a_line(N, 12.0)


def test_helmholtz_on_a_square_as_scipy_and_gmres_have_it():
    N, k = 24, 9.0
    A, b = helmholtz.on_a_square(N, k), helmholtz.point_source(N)
    u = solve(A, b)
    T = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(N, N)) * (N + 1) ** 2
    theirs = sp.kronsum(T, T) - complex(helmholtz.squared(k)) * sp.eye_array(N * N)
    torch.testing.assert_close(u, torch.as_tensor(spsolve(theirs.tocsc(), b.numpy())))
    found = gmres(A, b, restart=200)
    assert found.converged.all()
    torch.testing.assert_close(found.X, u, rtol=1e-8, atol=1e-8 * float(u.abs().max()))


def test_helmholtz_misfit_has_the_slope_of_its_differences():
    N, step = 16, 1e-4
    data = solve(helmholtz.on_a_square(N, 9.0), helmholtz.point_source(N))
    k = torch.tensor(8.7, requires_grad=True)
    (slope,) = torch.autograd.grad(helmholtz.misfit(k, data, N), k)
    ends = [float(helmholtz.misfit(torch.tensor(8.7 + s), data, N)) for s in (-step, step)]
    assert float(slope) == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-6)


def test_poisson_is_solved_as_by_scipy():
    theirs, ours = poisson_from_scipy.solved(20)
    assert type(ours) is type(theirs)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_poisson_has_the_smallest_eigenvalue_of_its_sines():
    wanted = 8 * math.sin(math.pi / 42) ** 2 * 21**2
    assert poisson_from_scipy.smallest_eigenvalue(20) == pytest.approx(wanted, rel=1e-10)


def test_poisson_has_the_derivative_of_its_formula():
    gradient, formula = poisson_from_scipy.sensitivity(12)
    assert len(gradient) == 12 * 12 + 4 * 12 * 11  # the five-point stencil
    torch.testing.assert_close(gradient, formula)


def test_logdet_is_that_of_its_eigenvalues():
    exact = float(logdet(logdet_estimate.precision(70)))
    assert exact == pytest.approx(logdet_estimate.closed_form(70), rel=1e-12)


def test_the_estimate_is_within_its_error_and_the_exact_name_is_refused():
    B = logdet_estimate.varying(70)
    value, error = stochastic_logdet(B, generator=torch.Generator().manual_seed(0))
    wanted = logdet_estimate.by_sparse_lu(70)
    assert 0 < float(error) < 0.01 * wanted
    assert float(value) == pytest.approx(wanted, abs=3 * float(error))
    with pytest.raises(ValueError, match="stochastic_logdet"):
        logdet(B)


def test_heat_decays_as_its_modes():
    found = heat.cooled(40, 0.02)
    wanted = found.pop("modes")
    assert float(wanted.norm()) == pytest.approx(
        41 / 2 * math.exp(-0.02 * 2 * math.pi**2), rel=1e-2
    )
    assert float(wanted.norm()) == pytest.approx(41 / 2 * math.exp(-0.04 * math.pi**2), rel=0.01)
    for u in found.values():
        torch.testing.assert_close(u, wanted, rtol=0, atol=1e-9)
