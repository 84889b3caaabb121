"""The networks of the study: published sizes, layout, and learning rates."""

from dataclasses import replace

import pytest
import torch

from matrigami.nn import StructuredLinear, StructuredMoE
from matrigami.structures import MultiLevelLowRankMatrix
from matrigami.studies import RunConfig, train_run
from matrigami.studies._optimizers import build_optimizer
from matrigami.studies.models import build_model
from matrigami.studies.tasks import Shape

CIFAR100 = Shape(channels=3, side=32, outputs=100)


def config(model="mlp", structure="btt(rank=1)", width=64, **changes):
    options = {"seed": 0, "lr": 3e-3, "epochs": 1, "batch_size": 8} | changes
    return RunConfig("cifar100", model, structure, width, **options)


@pytest.mark.parametrize(
    ("structure", "layers", "width", "macs", "params"),
    [
        ("dense", "all", 64, 301312, 302820),
        ("dense", "all", 128, 799232, 802148),
        ("btt(rank=1)", "all", 128, 104960, 107876),
        ("btt(rank=1)", "all", 512, 591872, 603236),
        ("monarch(blocks=4)", "all", 64, 87296, 88804),
        ("monarch(blocks=4)", "all", 128, 238080, 240996),
        ("monarch(blocks=4)", "all", 512, 2476032, 2487396),
        ("lowrank", "hidden", 64, 218368, 219876),
        ("lowrank", "hidden", 512, 1977344, 1988708),
    ],
)
def test_mlp_has_the_published_sizes(structure, layers, width, macs, params):
    model = build_model(
        config(structure=structure, width=width, structured_layers=layers), CIFAR100
    )
    assert model.macs() == macs
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(
    ("structure", "width", "published_macs", "params"),
    [("kronecker", 512, 591872, 81508), ("tt(rank=16)", 256, 3564544, 162404)],
)
def test_cheaper_contraction_order_saves_macs_not_parameters(
    structure, width, published_macs, params
):
    """The published counts contract in one fixed order."""
    model = build_model(config(structure=structure, width=width), CIFAR100)
    assert model.macs() < published_macs
    assert sum(p.numel() for p in model.parameters()) == params


def test_residual_stream_passes_and_the_head_is_zero_at_the_start():
    model = build_model(config(), CIFAR100, torch.Generator().manual_seed(1))
    x = torch.randn(4, 3072, dtype=torch.float32)
    stream = torch.nn.functional.gelu(model.embed(x))
    assert stream.std() > 0.01
    assert torch.equal(model.blocks[0](stream), stream)
    assert torch.equal(model(x), torch.zeros(4, 100, dtype=torch.float32))


def test_mlp_equals_its_formula_in_dense_matrices():
    shape = Shape(1, 4, 5)
    model = build_model(config(width=16, depth=1), shape, torch.Generator().manual_seed(1))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(3, 16, dtype=torch.float32)
    gelu, norm = torch.nn.functional.gelu, torch.nn.functional.layer_norm
    block = model.blocks[0]
    h = gelu(x @ model.embed.matrix().dense().T + model.embed.bias)
    z = norm(h, (16,), block.norm.weight, block.norm.bias)
    z = gelu(z @ block.expand.matrix().dense().T + block.expand.bias)
    h = h + z @ block.reduce.matrix().dense().T + block.reduce.bias
    expected = h @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_vit_counts_tokens_and_attention():
    model = build_model(config("vit", "dense", 64, depth=3), CIFAR100)
    tokens, w = 17, 64
    block = 4 * w * w + 8 * w * w
    assert model.macs() == 16 * 192 * w + 3 * (tokens * block + 2 * tokens**2 * w) + w * 100


def test_vit_sees_patches_of_the_image():
    """A change of one pixel reaches one token."""
    shape = Shape(3, 8, 4)
    vit = build_model(config("vit", "dense", 16, patch=4, heads=2), shape, torch.Generator())
    seen = []
    vit.embed.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    image = torch.randn(1, 3, 8, 8, dtype=torch.float32)
    changed = image.clone()
    changed[0, 1, 6, 1] += 1
    for x in (image, changed):
        assert vit(x.flatten(1)).shape == (1, 4)
    moved = (seen[0] - seen[1]).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, False, True, False]


@pytest.mark.parametrize("structure", ["dense", "btt(rank=1)", "monarch(blocks=4)", "tt(rank=2)"])
def test_vit_learns(structure):
    torch.manual_seed(0)
    shape = Shape(1, 8, 2)
    run = config("vit", structure, 16, depth=1, patch=4, heads=4)
    vit = build_model(run, shape, torch.Generator().manual_seed(0))
    x = torch.randn(32, 64, dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    optimizer = build_optimizer(vit, run)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(vit(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.35


def test_learning_rates_follow_structure_width_and_input_scale():
    """BTT of rank 1: `(n / f) / 2`, over `width / base_width` except for the input layer."""
    run = config(width=256)
    model = build_model(run, CIFAR100)
    rates = {id(p): g["lr"] for g in build_optimizer(model, run).param_groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert len(rates) == len(names)

    def rate(name):
        return rates[id(names[name])] / run.lr

    assert rate("blocks.0.expand.cores_0") == pytest.approx(256 / 16 / 2 * 64 / 256)
    assert rate("head.weight") == pytest.approx(64 / 256)
    assert rate("blocks.0.norm.weight") == rate("head.bias") == 1
    assert rate("embed.cores_0") == pytest.approx(0.1 * 3072 / 32 / 2)
    assert rate("embed.bias") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "cnn"}, "mlp, vit"),
        ({"model": "vit", "patch": 5}, "patches of 5 pixels"),
        ({"structure": "bttt"}, "Did you mean 'btt'"),
        ({"structure": "lowrank(rank=999)"}, "rank 999"),
    ],
)
def test_refused_in_three_lines(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_model(config(**changes), CIFAR100)
    assert len(str(caught.value).splitlines()) <= 3


def test_layers_of_the_blocks_can_be_mixtures_of_experts():
    """Multiply-adds are those of the active ones and of the gates; the head stays dense."""
    text = Shape(channels=16, side=1, outputs=20, is_text=True)
    plain = RunConfig("text", "gpt", "btt(rank=1)", 16, 0, 1e-2, 1, 8, depth=1, heads=2)
    mixed = replace(plain, experts=4, active=2)
    one, several = build_model(plain, text), build_model(mixed, text)
    layers = [m for m in several.modules() if isinstance(m, StructuredMoE)]
    structured = [m for m in one.modules() if isinstance(m, StructuredLinear)]
    assert len(layers) == len(structured) == 6
    assert not several.recordable
    once = sum(layer.cost().macs for layer in structured)
    gates = sum(4 * layer.in_features for layer in layers)
    assert several.macs() - one.macs() == 16 * (once + gates)
    assert several(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 20, 16)
    assert mixed.label == "btt(rank=1), 2 of 4"
    assert mixed.id != plain.id
    with pytest.raises(ValueError, match="from 1 to the experts"):
        replace(plain, experts=2, active=3)
    with pytest.raises(ValueError, match="puts no mixtures"):
        build_model(replace(mixed, model="mine.py:make"), text)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_mixtures_learn(tmp_path, optimizer):
    config = RunConfig(
        "digits", "mlp", "btt(rank=1)", 16, 0, 1e-2, 3, 100, depth=1, experts=4, active=2
    )
    record = train_run(replace(config, optimizer=optimizer), tmp_path)
    assert record["structure"] == "btt(rank=1), 2 of 4"
    assert record["test_error"] < 40


TEXT = Shape(16, 1, 7, is_text=True)


def scored(score, width=16, tokens=16):
    """An attention layer with random weights, its input, and a dense causal formula's parts."""
    text = Shape(tokens, 1, 7, is_text=True)
    run = config("gpt(positions=learned)", "dense", width, heads=2, depth=1, score=score)
    layer = build_model(run, text, torch.Generator().manual_seed(0)).double().blocks[0]
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer, torch.randn(3, tokens, width)


def attended(layer, x, S):
    """What the layer computes, from the scores of all pairs."""
    t = x.shape[1]
    v = layer.v(layer.norm(x)).unflatten(-1, (2, -1)).transpose(1, 2)
    later = torch.ones(t, t, dtype=torch.bool).triu(1)
    y = (S * 8 / layer.features).masked_fill(later, -torch.inf).softmax(-1) @ v
    return x + layer.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tokens", [16, 10])
def test_multi_level_scores_are_a_member_of_the_structure(tokens):
    layer, x = scored("mlr(2, 1, 1)", tokens=tokens)
    h = layer.norm(x)
    q, k = (f(h).unflatten(-1, (2, -1)).transpose(1, 2) for f in (layer.q, layer.k))
    q, k = layer.q_norm(q), layer.k_norm(k)
    padded = -(-tokens // 4) * 4
    groups = [[2, 3, 6, 7], [1, 5], [0, 4]]  # pairs (f, f + 4), the last ones to the coarse level
    S = x.new_zeros(3, 2, tokens, tokens)
    for level, features in enumerate(groups):
        block = torch.arange(tokens) // (padded // 2**level)
        near = block[:, None] == block
        S += near * (q[..., features] @ k[..., features].mT)
    torch.testing.assert_close(layer(x), attended(layer, x, S))
    parts = [layer.mix.parts(z) for z in (q, k)]
    A = MultiLevelLowRankMatrix(tuple(parts[0]), tuple(parts[1]))
    torch.testing.assert_close(A.dense()[..., :tokens, :tokens], S)


@pytest.mark.parametrize("score", ["btt(rank=1)", "dense", "lowrank(rank=3)"])
def test_bilinear_scores_are_those_of_the_dense_forms(score):
    layer, x = scored(score)
    h = layer.norm(x)
    eye = torch.eye(16)
    S = [layer.q_norm(h) @ layer.k_norm(M(h)).mT for M in layer.k.heads]
    torch.testing.assert_close(layer(x), attended(layer, x, torch.stack(S, 1)))
    ranks = {int(torch.linalg.matrix_rank(M(eye))) for M in layer.k.heads}
    assert ranks == {3 if "low" in score else 16}


def test_scores_count_their_multiply_adds():
    def macs(score):
        run = config("gpt", "dense", 16, heads=2, depth=1, score=score)
        return build_model(run, TEXT, device="meta").macs()

    plain, pairs = macs(""), 16 * 17 // 2
    levels = 2 * (4 * pairs + 2 * 2 * (8 * 9 // 2) + 2 * 4 * (4 * 5 // 2))
    assert macs("mlr(2, 1, 1)") == plain - 2 * 8 * pairs + levels
    forms = 2 * 16 * 16 * 16 + 2 * 16 * pairs
    assert macs("dense") == plain - 2 * 16 * 16 * 16 - 2 * 8 * pairs + forms


@pytest.mark.parametrize(
    ("score", "message"), [("mlr(3, 1, 1)", "do not split"), ("bttt", "Did you mean 'btt'")]
)
def test_a_score_that_does_not_fit_is_refused(score, message):
    with pytest.raises(ValueError, match="only the attention of a GPT"):
        build_model(config(score=score), CIFAR100)
    with pytest.raises(ValueError, match=message):
        build_model(config("gpt", "dense", 16, heads=2, score=score), TEXT)


def test_experts_can_be_whole_networks():
    """As a sum over all experts with weights, zero for those that rest; the active ones count."""
    run = config("gpt", "dense", 16, heads=2, depth=1, experts=4, active=2, mixture="network")
    model = build_model(run, TEXT, torch.Generator().manual_seed(0)).double()
    plain = build_model(replace(run, experts=1, active=1, mixture="layer"), TEXT)
    assert model.macs() - plain.macs() == 16 * (8 * 16 * 16 + 4 * 16)
    mixture = model.blocks[1].mixture
    for p in mixture.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(3, 5, 16, requires_grad=True)
    logits = mixture.gate(x)
    least = logits.topk(2).values[..., -1:]
    weights = logits.masked_fill(logits < least, -torch.inf).softmax(-1)
    expected = sum(weights[..., [e]] * net(x) for e, net in enumerate(mixture.networks))
    torch.testing.assert_close(mixture(x), expected)
    assert mixture.losses().balance >= 0
    assert run.label == "dense, 2 of 4 networks"
