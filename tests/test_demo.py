"""The gallery: its list, its numbers, its pages."""

import contextlib
import inspect
import io
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.gallery import table
from matrigami.cli._main import run
from matrigami.demo import TOPICS, Topic, _book, load_topic, program, write_book
from matrigami.demo._program import ran

ROOT = Path(__file__).parent.parent
FEW = ("finite-differences", "low-rank", "monarch")

NUMBERS = {
    "three-ways": pytest.approx(0, abs=1e-12),
    "finite-differences": pytest.approx(4, abs=0.02),  # second order
    "p1-elements": pytest.approx(9.6397, rel=0.02),  # from above
    "particles": pytest.approx(0, abs=1e-4),  # as was asked for
    "composition": pytest.approx(3.5267, abs=1e-3),
    "linear-algebra": pytest.approx(0, abs=1e-12),
    "products": pytest.approx(0, abs=1e-12),
    "hadamard": 16,  # 4^2
    "low-rank": pytest.approx(0.0943, abs=1e-3),
    "kronecker": pytest.approx(0, abs=1e-13),  # separable
    "monarch": pytest.approx(0, abs=1e-14),  # the Fourier matrix is one
    "tensor-train": pytest.approx(1.9e-4, abs=2e-5),
    "block-tensor-train": pytest.approx(0, abs=1e-13),  # cos(a + b) has two terms
    "einsums": 8192,  # 2 n^1.5
    "scaling-laws": pytest.approx(0.139, abs=2e-3),  # of the committed study
    "mixture-of-experts": pytest.approx(0.2, abs=0.1),
    "backprop": pytest.approx(0.143, abs=5e-3),
    "hessian-and-fisher": pytest.approx(0.146, abs=0.03),
    "shampoo": pytest.approx(0.302, abs=0.01),
    "soap": pytest.approx(6.3, rel=0.3),
    "quantisation": pytest.approx(0.2546, abs=0.02),  # log2(2 pi e / 12) / 2, at three bits
    "pruning": pytest.approx(0.008, abs=2e-3),
    "hpc-against-ai": pytest.approx(0.32, abs=0.02),
    "equal-budget": pytest.approx(6.5, abs=1),
}
"""The number of each page."""

SLOW = {"scaling-laws", "mixture-of-experts", "soap", "hpc-against-ai", "equal-budget"}
"""Topics that take more than a second or two."""

each_topic = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TOPICS]
)


def test_every_topic_has_its_number_and_its_file():
    files = (ROOT / "src/matrigami/demo/topics").glob("_[a-z]*.py")
    assert list(NUMBERS) == list(TOPICS)
    assert {path.stem[1:].replace("_", "-") for path in files} == set(TOPICS)


@each_topic
def test_the_program_on_the_page_prints_the_number(name: str):
    """The shown code is run as a reader would, and gives the numbers of the page."""
    topic, printed = load_topic(name), io.StringIO()
    found = ran(topic)
    assert topic.numbers[0].value(found) == NUMBERS[name]
    before = torch.get_default_dtype()
    with contextlib.redirect_stdout(printed):
        exec(compile(program(topic), name, "exec"), {})
    torch.set_default_dtype(before)
    assert printed.getvalue().strip() == ", ".join(n.shown(found) for n in topic.numbers)
    assert topic.meaning.format_map(found)


@each_topic
def test_the_program_is_short_and_the_slider_starts_at_its_default(name: str):
    topic = load_topic(name)
    assert len(program(topic).splitlines()) <= 64
    if topic.slider:
        default = inspect.signature(topic.example).parameters[topic.slider.parameter].default
        assert default in topic.slider.values


def test_the_table_of_the_study_is_that_of_its_results():
    assert (ROOT / "src/matrigami/demo/cifar100.csv").read_text() == table()


def test_the_list(capsys):
    assert run(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(TOPICS)
    assert run(["demo", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["topics"]
    assert [topic["name"] for topic in listed] == list(TOPICS)


def test_the_documentation_lists_them():
    text = (ROOT / "docs/gallery.md").read_text()
    rows = [f"| `{name}` | {heading} | {line} |" for name, (heading, line) in TOPICS.items()]
    assert re.findall(r"^\| `.*$", text, re.MULTILINE) == rows


def test_an_unknown_topic_names_the_nearest(capsys):
    assert run(["demo", "lowrank"]) == 2
    assert "low-rank" in capsys.readouterr().err
    assert run(["demo", "low-rank", "--all"]) == 2


def test_one_topic_prints_and_writes(tmp_path, capsys):
    assert run(["demo", "low-rank", "-o", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "0.0943" in text
    assert "1,536" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["low-rank.html", "low-rank.svg"]
    assert run(["demo", "low-rank", "-o", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["numbers"]["macs"] == 1536


def test_the_book_links_its_pages_and_needs_no_network(tmp_path):
    made, missing = write_book(tmp_path, lambda *_: None, FEW)
    assert [shown.name for shown in made] == list(FEW)
    assert missing == {}
    for path in tmp_path.glob("*.html"):
        check_page(path)
    contents = (tmp_path / "index.html").read_text()
    assert re.findall(r'<li><a href="([^"]+)', contents) == [f"{name}.html" for name in FEW]


def check_page(path: Path) -> None:
    """Links lead to files beside it, and nothing is fetched from elsewhere."""
    text = path.read_text()
    assert set(re.findall(r'href="([^"#]+\.html)"', text)) <= {
        p.name for p in path.parent.iterdir()
    }
    loaded = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import|fetch\(', text)
    kinds = {(a or b).split(":")[0] for a, b in loaded if not (a or b).endswith(".html")}
    assert kinds <= {"data"}
    if frames := re.search(r'id="frames">(.*?)</script>', text, re.DOTALL):
        assert all(frame["panels"] for frame in json.loads(frames[1]))


def test_a_missing_package_is_one_line_and_does_not_stop_the_book(tmp_path, monkeypatch):
    def without(topic: Topic, **changes: object) -> dict[str, object]:
        if topic is load_topic("low-rank"):
            raise ModuleNotFoundError(name="sklearn.datasets")
        return ran(topic, **changes)

    monkeypatch.setattr(_book, "ran", without)
    made, missing = write_book(tmp_path, lambda *_: None, FEW)
    assert [shown.name for shown in made] == ["finite-differences", "monarch"]
    assert missing == {
        "low-rank": "low-rank needs scikit-learn, which is not installed: pip install scikit-learn"
    }
    assert "pip install" in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_the_whole_book(tmp_path):
    made, missing = write_book(tmp_path, lambda *_: None)
    assert [shown.name for shown in made] == list(TOPICS)
    assert missing == {}
    for path in tmp_path.glob("*.html"):
        check_page(path)
