"""The page for a newcomer, followed from an empty folder: files written, commands run."""

import doctest
import re
import shlex
from pathlib import Path

import pytest
import torch

from matrigami.cli._main import run

PAGE = (Path(__file__).parent.parent.parent / "docs" / "own.md").read_text()
BLOCK = re.compile(r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def followed(capsys, *, whole):
    """Do what the page says; how many of its outputs were compared."""
    printed, compared = "", 0
    for language, title, content in BLOCK.findall(PAGE):
        if title:
            Path(title).write_text(content)
        elif language == "python" and "savez" in content:
            exec(content, {})
        elif language == "sh":
            capsys.readouterr()
            short = [s for s in content.splitlines() if "study run" not in s or "--dry-run" in s]
            for line in content.splitlines() if whole else short:
                assert run(shlex.split(line)[1:]) == 0
            printed = capsys.readouterr().out
        elif language == "text":
            assert doctest.OutputChecker().check_output(content, printed, FLAGS), printed
            compared += 1
    return compared


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_page_can_be_followed(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as a reader has it
    assert followed(capsys, whole=whole) == 2
    assert Path("runs/one/record.json").exists()
    assert Path("runs/mine/report.html").exists() == whole
