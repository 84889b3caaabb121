"""Every kind of layer: its blocks are those of the dense matrix, by the sum over examples."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import ekfac, fisher, kfac, kfoc
from tests.curvature import reference

CLASSES = 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of the reference's vmap
]


class Pool(nn.Module):
    """Positions of a sequence or an image, averaged after a non-linear function."""

    def forward(self, x):
        return x.tanh().flatten(2).mean(2)


class Tokens(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4, **options), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.embedding(x).tanh().sum(1))


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, **options), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.bag(x).tanh())


def pooled(first, channels, *more):
    return nn.Sequential(first, *more, Pool(), nn.Linear(channels, CLASSES))


def image(n):
    return torch.randn(n, 4, 5, 6)


def volume(n):
    return torch.randn(n, 4, 3, 4, 3)


def sequence(n):
    return torch.randn(n, 4, 9)


def vectors(n):
    return torch.randn(n, 4)


def words(n):
    return torch.randn(n, 5, 4)


def tokens(n):
    return torch.randint(0, 3, (n, 6))


LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), vectors),
    "linear on words": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(25, 3)),
        words,
    ),
    "conv1d": (lambda: pooled(nn.Conv1d(4, 5, 3), 5), sequence),
    "conv1d strided, dilated": (
        lambda: pooled(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), 6),
        sequence,
    ),
    "conv1d circular": (
        lambda: pooled(nn.Conv1d(4, 5, 3, padding=2, padding_mode="circular"), 5),
        sequence,
    ),
    "conv2d": (lambda: pooled(nn.Conv2d(4, 5, 3), 5), image),
    "conv2d same": (lambda: pooled(nn.Conv2d(4, 5, (2, 3), padding="same"), 5), image),
    "conv2d strided, grouped": (
        lambda: pooled(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), groups=2), 6),
        image,
    ),
    "conv2d depthwise, dilated": (
        lambda: pooled(nn.Conv2d(4, 4, 3, dilation=(1, 2), padding=1, groups=4), 4),
        image,
    ),
    "conv2d reflected": (
        lambda: pooled(nn.Conv2d(4, 5, 3, padding=(1, 2), padding_mode="reflect"), 5),
        image,
    ),
    "conv2d without bias": (lambda: pooled(nn.Conv2d(4, 5, 3, bias=False), 5), image),
    "conv3d strided, grouped": (
        lambda: pooled(nn.Conv3d(4, 6, 2, stride=(1, 2, 1), padding=(0, 1, 1), groups=2), 6),
        volume,
    ),
    "conv transposed 1d": (
        lambda: pooled(
            nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), 6
        ),
        sequence,
    ),
    "conv transposed 2d": (
        lambda: pooled(nn.ConvTranspose2d(4, 5, (2, 3), stride=(2, 1), dilation=(2, 1)), 5),
        image,
    ),
    "conv transposed 3d": (lambda: pooled(nn.ConvTranspose3d(4, 2, 2, bias=False), 2), volume),
    "prelu of one slope": (lambda: pooled(nn.PReLU(), 4), image),
    "prelu of channels": (lambda: pooled(nn.PReLU(4), 4), image),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)), vectors),
    "layer norm of two axes": (
        lambda: nn.Sequential(nn.LayerNorm((5, 4)), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        words,
    ),
    "layer norm on words": (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        words,
    ),
    "layer norm without bias": (
        lambda: nn.Sequential(nn.LayerNorm(4, bias=False), nn.Tanh(), nn.Linear(4, 3)),
        vectors,
    ),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 3)), vectors),
    "batch norm of vectors": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
        vectors,
    ),
    "batch norm of sequences": (lambda: pooled(nn.BatchNorm1d(4), 4), sequence),
    "batch norm of images": (lambda: pooled(nn.BatchNorm2d(4), 4), image),
    "batch norm of volumes": (lambda: pooled(nn.BatchNorm3d(4), 4), volume),
    "group norm": (lambda: pooled(nn.GroupNorm(2, 4), 4), image),
    "instance norm": (lambda: pooled(nn.InstanceNorm2d(4, affine=True), 4), image),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def prepared(name, sizes=(4, 3)):
    """A model with statistics and weights that are not trivial, and two uneven batches."""
    make, draw = LAYERS[name]
    model = make()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    model(draw(6))  # running statistics
    return model.eval(), [(draw(n), torch.randint(CLASSES, (n,))) for n in sizes]


@every_layer
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
def test_the_sum_over_examples_is_the_block(name, joint):
    model, batches = prepared(name)
    loss = nn.CrossEntropyLoss()
    full = reference.gauss_newton(model, loss, batches)
    for names, found in reference.pair_sums(model, loss, batches, joint=joint).items():
        expected = reference.block(full, model, names, len(found))
        assert_close(found, expected, atol=1e-12, rtol=1e-10)


@every_layer
def test_the_trace_of_ekfac_is_that_of_the_matrix(name):
    model, batches = prepared(name)
    F = ekfac(model, nn.CrossEntropyLoss(), batches)
    full = reference.gauss_newton(model, nn.CrossEntropyLoss(), batches)
    assert_close(mg.trace(F), full.trace(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [name for name in LAYERS if "norm" in name])
@pytest.mark.parametrize("method", [kfac, ekfac, kfoc], ids=lambda f: f.__name__)
def test_blocks_of_norms_are_exact(name, method):
    model, batches = prepared(name)
    loss = nn.CrossEntropyLoss()
    full = reference.gauss_newton(model, loss, batches)
    F = method(model, loss, batches)
    value = F.blocks[0]
    expected = reference.block(full, model, F.names[0], value.shape[0])
    assert_close(value.dense(), expected, atol=1e-12, rtol=1e-9)
    at = reference.places(model, F.names[0]).flatten()
    whole = reference.assembled(full, model, F)
    assert_close(F.dense()[at][:, at], whole[at][:, at], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("padding", [None, 1], ids=["plain", "padded"])
def test_an_embedding_has_a_block_for_each_token(padding):
    """Exact where the factors are: the second moment of the gradients of one token."""
    model, loss = Tokens(padding_idx=padding), nn.CrossEntropyLoss()
    batches = [(tokens(n), torch.randint(CLASSES, (n,))) for n in (4, 3)]
    full = reference.gauss_newton(model, loss, batches)
    F = ekfac(model, loss, batches)
    assert_close(mg.trace(F), full.trace(), rtol=1e-10, atol=0)
    at = reference.places(model, ("embedding.weight",))[0].view(7, 4)
    by_token = full[at[:, :, None], at[:, None, :]]
    assert_close(mg.trace(F["embedding.weight"])[0], torch.einsum("tii->", by_token))
    B = kfac(model, loss, batches)["embedding.weight"].factors
    counts = torch.stack([torch.bincount(x.unique(), minlength=7) for b in batches for x in b[0]])
    if padding is not None:
        counts[:, padding] = 0
    frequencies = counts.sum(0) / counts.sum()
    assert_close(B[0].dense()[0], frequencies.diag())
    assert_close(B[1].dense()[0], by_token.sum(0), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_bags_are_embeddings(mode):
    """Their trace is that of the matrix; bags of one token are tokens."""
    bags, loss = Bags(mode=mode, padding_idx=1), nn.CrossEntropyLoss()
    batches = [(tokens(n), torch.randint(CLASSES, (n,))) for n in (4, 3)]
    full = reference.gauss_newton(bags, loss, batches)
    assert_close(mg.trace(ekfac(bags, loss, batches)), full.trace(), rtol=1e-10, atol=0)
    apart = Tokens(padding_idx=1)
    bags.bag.weight.data.copy_(apart.embedding.weight)
    bags.head.load_state_dict(apart.head.state_dict())
    single = [(x[:, :1], y) for x, y in batches]
    one, other = ekfac(bags, loss, single), ekfac(apart, loss, single)
    assert_close(one.dense(), other.dense())


def test_one_token_of_one_example_is_exact():
    model, loss = Tokens(), nn.CrossEntropyLoss()
    batches = [(torch.full((1, 3), 5), torch.tensor([1]))]
    full = reference.gauss_newton(model, loss, batches)
    for method in (kfac, ekfac, kfoc):
        F = method(model, loss, batches)
        assert_close(F.dense(), reference.assembled(full, model, F), atol=1e-12, rtol=1e-10)


class Attention(nn.Module):
    """One head, in training mode of nothing: linear layers and a fused product."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(((q @ k.mT).softmax(-1) @ v).mean(1))


def test_attention_through_its_projections():
    model, loss = Attention(), nn.CrossEntropyLoss()
    batches = [(words(n), torch.randint(CLASSES, (n,))) for n in (4, 3)]
    full = reference.gauss_newton(model, loss, batches)
    for names, found in reference.pair_sums(model, loss, batches).items():
        assert_close(found, reference.block(full, model, names), atol=1e-12, rtol=1e-9)
    F = kfac(model, loss, batches)
    q, k, v = (F[f"{name}.weight"].factors[1].dense() for name in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(k, v)


@pytest.mark.usefixtures("unchecked")
def test_the_fused_attention_layer_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.raises(TypeError, match=r"1, a Multihead.* fused .*separate_.*: in_proj"):
        kfac(model, nn.MSELoss(), (words(2), words(2)))


def test_the_pieces_of_a_fisher_matrix_by_products_agree():
    """The operator and the blocks of this file are two ways to one matrix."""
    model, batches = prepared("conv2d same")
    loss = nn.CrossEntropyLoss()
    full = fisher(model, loss, batches).dense()
    assert_close(full, reference.gauss_newton(model, loss, batches), atol=1e-12, rtol=1e-9)
