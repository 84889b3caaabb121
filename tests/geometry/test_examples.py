"""The examples of the documentation, at small sizes."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "particles"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gaussian_process_finds_the_noise_that_was_drawn():
    _, noise, likelihood = example("gaussian_process").fit(1200)
    assert noise == pytest.approx(0.09, rel=0.1)
    assert likelihood > -0.4  # the noise alone has -0.22


def test_leapfrog_conserves_the_energy(tmp_path: Path):
    module = example("n_body")
    places, energies = module.simulate(60, steps=60)
    kinetic_scale = abs(energies[0])
    assert max(abs(e - energies[0]) for e in energies) < 2e-3 * kinetic_scale
    assert float((places[-1] - places[0]).norm() / places[0].norm()) > 0.1  # they moved
    module.draw(places, energies, str(tmp_path / "stars.png"))
    assert (tmp_path / "stars.png").stat().st_size > 10_000
