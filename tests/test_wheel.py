"""The wheel, built from the source archive, does its work outside the repository."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import matrigami

pytest.importorskip("hatchling", reason="needs hatchling, which builds the wheel")

ROOT = Path(__file__).parent.parent
DATA = re.compile(r"\.(toml|html|css|js|csv)$|py\.typed$")
pytestmark = pytest.mark.slow


def python(folder: Path, *arguments: str, path: Path | None = None) -> str:
    """What an interpreter prints that sees the folder, and not the repository."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel, unpacked as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    python(ROOT, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder))
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    source = next((folder / "source").iterdir())
    assert (source / "zensical.toml").exists()
    assert (source / "tests" / "test_wheel.py").exists()
    python(source, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_has_every_file_of_the_package(unpacked: Path):
    ours = {p.relative_to(ROOT / "src") for p in (ROOT / "src").rglob("*") if p.is_file()}
    wanted = {p for p in ours if p.suffix == ".py" or DATA.search(p.name)}
    assert wanted - {p.relative_to(unpacked) for p in unpacked.rglob("*")} == set()
    assert any(DATA.search(p.name) for p in wanted)


def test_it_has_one_version(unpacked: Path):
    metadata = next(unpacked.glob("*.dist-info")) / "METADATA"
    assert f"\nVersion: {matrigami.__version__}\n" in metadata.read_text()
    assert f"\nversion: {matrigami.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_it_runs(unpacked: Path, tmp_path: Path):
    told = python(tmp_path, "-m", "matrigami", "--version", path=unpacked)
    assert told == f"matrigami {matrigami.__version__}\n"
    assert "quantize" in python(tmp_path, "-m", "matrigami", "--help", path=unpacked)
    assert "cifar100" in python(tmp_path, "-m", "matrigami", "list", "presets", path=unpacked)
    python(tmp_path, "-m", "matrigami", "demo", "low-rank", path=unpacked)
    assert (tmp_path / "gallery" / "low-rank.html").stat().st_size > 10_000
    home = python(tmp_path, "-c", "import matrigami; print(matrigami.__file__)", path=unpacked)
    assert Path(home.strip()).is_relative_to(unpacked)
