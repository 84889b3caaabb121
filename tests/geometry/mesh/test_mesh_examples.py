"""The examples of the documentation, at small sizes."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples" / "mesh"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drum_has_its_tones(tmp_path):
    module = example("drum")
    mesh = module.drum(12)
    values, modes = module.tones(mesh, 3)
    assert float(values[0]) == pytest.approx(9.6397, rel=1e-2)
    assert float(values[2]) == pytest.approx(2 * math.pi**2, rel=5e-3)
    module.draw(mesh, values, modes, str(tmp_path / "drum.png"))
    assert (tmp_path / "drum.png").stat().st_size > 10_000


def test_steps_in_time_have_their_orders():
    module = example("implicit_heat")
    exact = module.cooled(9, 0.1 / 512, 512, 0.5)
    for theta, order in ((1.0, 1), (0.5, 2)):
        errors = [float((module.cooled(9, 0.1 / n, n, theta) - exact).norm()) for n in (16, 32)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)
