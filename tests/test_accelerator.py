"""The measurements on a card, as far as a processor can run them."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import accelerator
from benchmarks._card import Clock, Sizes

ROOT = Path(__file__).parent.parent


def test_what_fails_is_a_row_and_the_others_go_on(monkeypatch):
    one, broken = ("one", lambda: {"ms": 1.0}), ("broken", lambda: 1 / 0)
    attempts = [one, broken, one]
    monkeypatch.setitem(accelerator.PARTS, "layers", lambda *_: iter(attempts))
    sizes = Sizes.of(dry=True)
    found = list(accelerator.rows("layers", sizes, Clock(sizes)))
    error = "broken: ZeroDivisionError: division by zero"
    assert found == [{"ms": 1.0}, {"error": error}, {"ms": 1.0}]
    page = accelerator.page({"machine": {}, "layers": found}, "make accelerator")
    assert "| ms | error |" in page
    assert f"|  | {error} |" in page


@pytest.mark.slow
def test_dry(tmp_path):
    """Every part, at small sizes; then one part again, which keeps the others."""
    for only in ([], ["--only", "factorizations"]):
        command = [sys.executable, "-m", "benchmarks.accelerator", str(tmp_path), "--dry", *only]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        page = (tmp_path / "README.md").read_text()
        assert "Error:" not in page
        assert [line[3:].lower() for line in page.splitlines() if line.startswith("## ")] == list(
            accelerator.PARTS
        )
