"""What models, weights and batches may be wrong: told in words, and nothing is changed."""

import copy

import pytest
import torch
from torch import nn

from matrigami import LowRank
from matrigami.compress import (
    Grid,
    allocate,
    compress_,
    evaluate,
    load,
    n_of_m,
    plan,
    prune_,
    quantize_,
    quantized_values,
    round_ldl,
    save,
    save_compressed_tensors,
    set_weight,
    shrink_,
    structure_,
    unstructured,
    weight,
)
from matrigami.compress._calibration import chain
from matrigami.nn import StructuredLinear, replace_, separate_, to_dense_


def network(width=12):
    return nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, 8), nn.Linear(8, 5))


def batches(count=4):
    return list(torch.randn(count, 16, 7))


def spoiled(name, value=torch.nan):
    """A network with one bad weight."""
    model = network()
    model.get_parameter(name).data.view(-1)[0] = value
    return model


def complex_ones():
    """Two layers of complex weights."""
    return nn.Sequential(*[nn.Linear(7, 7, dtype=torch.complex128) for _ in range(2)])


@torch.inference_mode()
def inferred():
    """A network whose weights nobody may change."""
    return network()


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (spoiled("0.weight"), batches(), "0: its weight has NaN"),
        (network(), [], "no batches with examples"),
        (network(), [torch.empty(0, 7)], "no batches with examples"),
        (network(), [torch.randn(16, 9)], r"called with float32 \(16, 9\)(.|\n)*It failed: mat1"),
        (network(), [{"tokens": torch.ones(2)}], "unexpected keyword argument 'tokens'"),
        (network(), [torch.randn(16, 7).double()], "float64(.|\n)*same dtype"),
        (network(), [torch.full((16, 7), torch.nan)], "NaN"),
        (complex_ones(), batches(), "0: its weight is complex"),
        (inferred(), batches(), r"0: its weight was made under torch\.inference_mode"),
        (network(), [1, 2], "called with a int"),
        (network(), [[1.0] * 7], r"called with a float, a float, a float, a float, \.\.\.\."),
        (nn.Sequential(), batches(), "none of its layers is one matrix"),
        (nn.Linear(7, 5), batches(), "only itself is one matrix"),
        (nn.Sequential(nn.Linear(7, 5)), batches(), "only 0 is one matrix"),
    ],
)
def test_bad_models_and_batches_are_refused_in_words(model, data, message, two_sided):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        quantize_(model, data, Grid(4, None), two_sided=two_sided)
    assert str(caught.value).count("\n") >= 1
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name], equal_nan=True, rtol=0, atol=0)


def test_a_lazy_layer_is_called_first():
    model = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"lazy layers have no sizes yet\.\nCall it on a batch"):
        quantize_(model, batches(), Grid(4, None))
    model(batches()[0])
    assert len(quantize_(model, batches(), Grid(4, None)).layers) == 1


WRONG = {
    "a number for a grid": lambda m: quantize_(m, batches(), 4),
    "a number for a support": lambda m: prune_(m, batches(), 0.5),
    "a grid for a support": lambda m: prune_(m, batches(), Grid(4)),
    "a text for a structure": lambda m: structure_(m, batches(), "lowrank"),
    "a class for a structure": lambda m: structure_(m, batches(), LowRank),
    "a number for a method": lambda m: compress_(m, batches(), 3),
    "a class for the new structure": lambda m: replace_(m, LowRank),
    "a number among structures": lambda m: replace_(m, {"0": LowRank(rank=2), "2": 3}),
    "a class for names": lambda m: quantize_(m, batches(), targets=nn.Linear),
    "classes for names": lambda m: quantize_(m, batches(), ignore=[nn.Linear]),
    "a text for batches": lambda m: quantize_(m, "text.txt"),
    "one mapping for batches": lambda m: quantize_(m, {"input": batches()[0]}),
    "nothing for batches": lambda m: quantize_(m, None),
    "a word for two sides": lambda m: quantize_(m, batches(), two_sided="yes"),
    "a class for a model": lambda m: quantize_(nn.Linear, batches()),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_is_of_another_kind_is_refused_and_nothing_is_changed(call):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError):
        call(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("damping", [-1.0, float("nan"), ()])
def test_dampings_are_numbers_from_zero(damping):
    with pytest.raises(ValueError, match="a number from 0"):
        prune_(network(), batches(), unstructured(0.5), damping=damping)


def test_what_has_no_numbers_is_told_by_name(tmp_path):
    model = network().to("meta")
    for call in (
        lambda: quantize_(model, batches()),
        lambda: replace_(model, LowRank(rank=2)),
        lambda: save(model, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"0.* is on the meta device"):
            call()
    assert not (tmp_path / "out").exists()
    replace_(model, LowRank(rank=2), init="random")
    assert model[0].U.is_meta


@pytest.mark.parametrize(
    "call",
    [
        lambda: replace_(nn.Linear(8, 8), LowRank(rank=2), targets="*"),
        lambda: structure_(nn.Linear(7, 8), batches(), LowRank(rank=2), targets="*"),
        lambda: to_dense_(StructuredLinear(8, 8, LowRank(rank=2))),
    ],
    ids=["replace_", "structure_", "to_dense_"],
)
def test_a_model_that_is_one_layer_is_not_exchanged(call):
    """It cannot be: who holds it would keep the old one."""
    with pytest.raises(ValueError, match="would itself be another layer"):
        call()


def test_a_model_that_is_one_layer_is_rounded_if_it_is_asked_for(tmp_path):
    model = nn.Linear(7, 8)
    before = model.weight.detach().clone()
    report = quantize_(model, batches(), Grid(4, None), targets="*")
    torch.testing.assert_close(model.weight.detach(), report.values[""].dense().to(before))
    assert not torch.equal(model.weight, before)
    folder = save(model, tmp_path / "lone", report.values)
    again = nn.Linear(7, 8)
    assert torch.equal(load(folder, into=again).weight, model.weight)
    assert quantized_values(folder).keys() == {""}
    with pytest.raises(ValueError, match="the model itself; the format knows"):
        save_compressed_tensors(model, report.values, tmp_path / "packed")


def test_all_layers_that_do_not_fit_are_named():
    model = network(width=10)
    for call in (
        lambda: prune_(model, batches(), n_of_m(2, 4)),
        lambda: replace_(model, budget="0.1x macs"),
        lambda: structure_(model, batches(), LowRank(rank=9)),
        lambda: replace_(model, LowRank(rank=9)),
    ):
        with pytest.raises(ValueError, match=r"(?s)^0: .*Refused, too, 1: 2\."):
            call()


def test_a_batch_that_fails_in_a_block_is_told_in_words():
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"called with float32 \(16, 7\)"):
        quantize_(model, [*batches(), batches()[0].float()], two_sided=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_shares_are_below_one(share):
    with pytest.raises(ValueError, match="can go"):
        unstructured(share)
    with pytest.raises(ValueError, match="can go"):
        shrink_(network(), batches(), share)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 2)])
def test_patterns_keep_some_of_a_group(n, m):
    with pytest.raises(ValueError, match=f"at most {m} can stay"):
        n_of_m(n, m)


def test_a_pattern_that_does_not_divide_names_the_layer():
    model = network()
    with pytest.raises(ValueError, match=r"0: n_of_m\(2, 4\): the matrix has 7 columns"):
        prune_(model, batches(), n_of_m(2, 4))
    prune_(model, batches(), n_of_m(2, 4), ignore="0")
    assert int((model[2].weight == 0).sum()) == model[2].weight.numel() // 2


def test_a_recurrent_layer_is_refused_by_its_kind():
    model = nn.ModuleDict({"cell": nn.LSTM(4, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match="in the ModuleDict: LSTM"):
        quantize_(model, batches(), targets="cell")


class Named(nn.Module):
    """Outputs by name, and layers called by keyword."""

    def __init__(self, *names):
        super().__init__()
        self.first, self.head, self.names = nn.Linear(7, 8), nn.Linear(8, 5), names

    def forward(self, *, x):
        y = self.head(input=self.first(input=x).relu())
        return dict.fromkeys(self.names, y)


@pytest.mark.parametrize("names", [("logits", "more"), ("answer",)])
def test_keywords_and_mappings_of_outputs(names):
    model, data = Named(*names), [{"x": x} for x in batches()]
    made = copy.deepcopy(model)
    report = quantize_(made, data, Grid(4, None), two_sided=True)
    assert [(r.name, r.rows) for r in report.layers] == [("first", 48)]
    assert evaluate(made, model, data).tokens == 64
    structure_(made, data, LowRank(rank=4), targets="first")
    assert made(**data[0])[names[0]].shape == (16, 5)
    assert list(plan(model, data, [Grid(4, None)]).options) == ["first"]


@pytest.mark.parametrize("names", [("a", "b"), ("last_hidden_state",), ()])
def test_outputs_that_are_no_logits_need_one_side(names):
    model, data = Named(*names), [{"x": x} for x in batches()]
    with pytest.raises(ValueError, match=r"(?s)returns a dict.*one-sided"):
        quantize_(model, data, Grid(4, None), two_sided=True)
    assert len(quantize_(model, data, Grid(4, None)).layers) == 1


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("two_sided", [False, True])
def test_types_modes_and_frozen_parameters_are_kept(kind, two_sided):
    model = network().to(kind).requires_grad_(False).train()
    before = copy.deepcopy(model)
    x = [b.to(kind) for b in batches()]
    quantize_(model, x, Grid(8, None), two_sided=two_sided)
    assert {p.dtype for p in model.parameters()} == {kind}
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.training
    expected = before(x[0]).double()
    assert (model(x[0]).double() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_few_bad_rows_are_left_out_and_told(two_sided):
    x = torch.randn(64, 7)
    model, clean = network(), network()
    clean.load_state_dict(model.state_dict())
    report = quantize_(clean, list(x.split(16)), Grid(4, None), two_sided=two_sided)
    spoilt = torch.cat([x, torch.full((4, 7), torch.inf)])[torch.arange(68) * 5 % 68]
    told = quantize_(model, list(spoilt.split(17)), Grid(4, None), two_sided=two_sided)
    assert [r.rejected for r in report.layers] == [0, 0]
    assert [r.rejected for r in told.layers] == [4, 4]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_inputs_and_dead_inputs_keep_the_nearest(rows):
    """Statistics of low rank: the weights of inputs that are always zero are rounded to nearest."""
    x = torch.randn(rows, 16)
    x[:, 8:] = 0.0
    model = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 3))
    grid = Grid(4, None, fitted=False)
    nearest = grid.round(weight(model[0]))
    report = quantize_(model, [x], grid)
    assert torch.equal(report.values["0"].codes[:, 8:], nearest.codes[:, 8:])
    assert report.layers[0].loss <= report.layers[0].simple + 1e-12


@pytest.mark.parametrize("power", [-75, 80])
def test_squares_of_very_small_and_large_inputs_are_squares(power):
    """In single precision they would vanish or overflow, as in networks that were never trained."""
    model = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 3)).float()
    x, made = torch.randn(40, 16).float(), [copy.deepcopy(model), model]
    grid = Grid(4, None)
    reports = [
        quantize_(m, [scale * x], grid) for m, scale in zip(made, (1, 2.0**power), strict=True)
    ]
    assert reports[0].layers[0].loss == reports[1].layers[0].loss > 0
    assert torch.equal(*(report.values["0"].codes for report in reports))


def test_what_cannot_lose_anything_loses_nothing():
    """Outputs that are multiplied by zero have no gradient: the relative loss is no NaN."""
    W, A = torch.randn(5, 6), torch.eye(6)
    found = round_ldl(W, A, torch.zeros(5, 5))
    assert (float(found.loss), float(found.nearest)) == (0.0, 0.0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3))
    model[3].weight.data.zero_()
    report = quantize_(model, [torch.randn(40, 6)], Grid(4, None), two_sided=True)
    assert [r.loss for r in report.layers[:2]] == [0.0, 0.0]


def test_nothing_is_predicted_of_what_is_not_reached():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(7, 1, batch_first=True)
            self.up, self.head = nn.Linear(7, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.up(self.attention(x, x, x)[0]).relu())

    data = list(torch.randn(4, 2, 6, 7))
    with pytest.raises(ValueError, match=r"nothing can be predicted of attention\.out_proj"):
        allocate(Fused(), data, "0.2x bytes", [Grid(4, None)])
    found = allocate(Fused(), data, "0.2x bytes", [Grid(4, None)], ignore="attention.*")
    assert found.size <= 0.2 * found.dense
    assert "left as they are, 71 %: attention.in_proj_weight, attention" in str(found.report)
    model = Fused()
    separate_(model)
    report = allocate(model, data, "0.2x bytes", [Grid(4, None)]).report
    assert [r.rows for r in report.layers] == [36] * 5


def test_blocks_with_arguments_of_their_own_are_no_chain():
    """What the second block is given beside its input is not what the first was given."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x, scale):
            return x + scale * self.layer(x)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(6, 3)

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                x = block(x, torch.full((), 1.0 + 9 * i))
            return self.head(x)

    model, data = Scaled(), list(torch.randn(4, 16, 6))
    report = quantize_(model, data, Grid(8, None))
    inputs = torch.cat(data)
    seen = inputs + model.blocks[0].layer(inputs)  # behind the compressed first block
    W = torch.randn(6, 6)
    assert [r.rows for r in report.layers] == [48, 48]
    set_weight(model.blocks[1].layer, W)
    torch.testing.assert_close(model(inputs), model.head(seen + 10 * model.blocks[1].layer(seen)))


@pytest.mark.parametrize(("window", "blocks"), [(8, 2), (5, 0)])
def test_masks_made_anew_are_a_chain_if_all_batches_say_so(window, blocks):
    """In the first batch, which is short, the masks of both blocks are equal at any rate."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, mask):
            return x + mask * self.layer(x)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block, width in zip(self.blocks, (8, window), strict=True):
                x = block(x, (torch.arange(x.shape[-2]) < width).float()[:, None])
            return x

    data = [torch.randn(2, n, 8) for n in (4, 7)]
    assert len(chain(Masked(), ["blocks.0.layer"], data)) == blocks
    assert len(chain(Masked(), ["blocks.0.layer"], data[:1])) == 2
