"""A compression that is killed goes on where it was, and ends as if nothing had happened."""

import copy

import pytest
import torch

from matrigami import LowRank
from matrigami.compress import Grid, compress_, quantize_, unstructured
from tests.compress.test_models import Chain, batches

METHODS = {
    "stem": Grid(4, None),
    "*.0.*": Grid(3, 4),
    "*.1.*": unstructured(0.5),
    "*.up": LowRank(rank=2),
    "*": Grid(8, None, symmetric=False),
}


class Killed(Exception):  # noqa: N818
    """As `kill -9` between two layers."""


def killed_after(count):
    def progress(done, _every, _name):
        if done == count:
            raise Killed

    return progress


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_killed_compression_goes_on_and_ends_the_same(tmp_path, two_sided):
    model, data = Chain(), batches()
    whole = copy.deepcopy(model)
    expected = compress_(whole, data, METHODS, ignore="head", two_sided=two_sided)
    for count in (2, 4, 7):  # in the middle of blocks, whose layers are done again
        broken = copy.deepcopy(model)
        options = {"two_sided": two_sided, "progress": killed_after(count)}
        with pytest.raises(Killed):
            compress_(broken, data, METHODS, ignore="head", journal=tmp_path / "j", **options)
    told = []
    again = copy.deepcopy(model)
    report = compress_(
        again,
        data,
        METHODS,
        ignore="head",
        two_sided=two_sided,
        journal=tmp_path / "j",
        progress=lambda *now: told.append(now),
    )
    assert len(told) < len(expected.layers) == 7
    assert report.layers == expected.layers
    assert all(
        torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True)
    )
    assert torch.equal(report.values["blocks.0.up"].codes, expected.values["blocks.0.up"].codes)
    assert torch.equal(report.values["blocks.1.up"], expected.values["blocks.1.up"])


def test_the_journal_of_another_compression_is_refused(tmp_path):
    """The same vectors in other batches, of which others are held out, are another one."""
    given, data = Chain(), batches()
    quantize_(copy.deepcopy(given), data, Grid(4, None), journal=tmp_path / "j")
    others = [(Chain(), data, Grid(4, None)), (given, data, Grid(3, None))]
    for model, vectors, grid in [*others, (given, torch.cat(data).split(5), Grid(4, None))]:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="another model, calibration or method"):
            quantize_(model, vectors, grid, journal=tmp_path / "j")
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_damaged_journal_is_told(tmp_path):
    model, data = Chain(), batches()
    quantize_(copy.deepcopy(model), data, Grid(4, None), journal=tmp_path / "j")
    path = min((tmp_path / "j").iterdir())
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged"):
        quantize_(model, data, Grid(4, None), journal=tmp_path / "j")
