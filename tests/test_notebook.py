"""The notebook for teachers runs from the top and prints what it shows."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra plots")

DOCS = Path(__file__).parent.parent / "docs"
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


def test_the_notebook_prints_what_it_shows():
    tools = runpy.run_path(str(DOCS / "run_notebook.py"))
    kept = json.loads((DOCS / "notebooks" / "tour.ipynb").read_text(encoding="utf-8"))
    torch.set_default_dtype(torch.float32)  # as a reader has it
    ran = tools["executed"](kept)
    assert 10 <= len(ran["cells"]) <= 18
    for shown, printed in zip(tools["printed"](kept), tools["printed"](ran), strict=True):
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
        wanted = list(map(float, NUMBER.findall(shown)))
        assert list(map(float, NUMBER.findall(printed))) == pytest.approx(wanted, rel=0.1, abs=0.02)
    drawn = [sum("data" in o for o in c.get("outputs", ())) for c in ran["cells"]]
    assert sum(drawn) == 3
