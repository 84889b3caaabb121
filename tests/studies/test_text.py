"""Texts: tokens, windows, their score, and the generative transformer."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from matrigami.curvature import kfac
from matrigami.studies import RunConfig, build_model, load_task, parse_model
from matrigami.studies.models._gpt import Turn
from matrigami.studies.tasks import TASKS, Shape, TextTask
from matrigami.studies.tasks._download import get_dataset
from matrigami.studies.tasks._sources import SOURCES
from matrigami.studies.tasks._tokens import byte_pairs, characters
from matrigami.testing import check_model, check_task

TEXT = "the cat sat on the mat. the dog sat on the log; the cat sees the dog.\n" * 12
SHAPE = Shape(channels=6, side=1, outputs=11, is_text=True)


def config(model="gpt", structure="dense", width=16, **changes):
    options = {
        "seed": 0,
        "lr": 1e-2,
        "epochs": 1,
        "batch_size": 8,
        "heads": 4,
        "depth": 1,
    } | changes
    return RunConfig("text", model, structure, width, **options)


def test_characters_are_numbered_by_the_alphabet():
    tokens = characters("hello")
    assert tokens.tokens == ["e", "h", "l", "o"]
    assert tokens.encode("hole") == [1, 3, 2, 0]


def test_pairs_are_joined_by_how_often_they_come():
    """The classical example: es, est, lo, low come before newest is whole."""
    words = "low " * 5 + "lower " * 2 + "newest " * 6 + "widest " * 3
    tokens = byte_pairs(words, 14, "".join(sorted(set(words))))
    assert tokens.tokens[:11] == sorted(set(words))
    assert tokens.tokens[11:] == ["st", "est", "we"] or tokens.tokens[11:13] == ["st", "est"]
    assert tokens.decode(tokens.encode(words)) == words


@pytest.mark.parametrize("size", [40, 60])
def test_pairs_make_fewer_tokens_and_the_same_text(size):
    alphabet = "".join(sorted(set(TEXT)))
    tokens = byte_pairs(TEXT, size, alphabet)
    assert len(tokens.tokens) <= size
    numbers = tokens.encode(TEXT)
    assert tokens.decode(numbers) == TEXT
    assert len(numbers) < 0.6 * len(TEXT)
    assert max(numbers) < len(tokens.tokens)


def naive_pairs(text, merges):
    """The textbook: count all pairs anew for each merge."""
    from matrigami.studies.tasks._tokens import WORD, joined

    words, found = [list(w) for w in WORD.findall(text)], []
    for _ in range(merges):
        counts = Counter(p for w in words for p in pairwise(w))
        if not counts:
            break
        best = max(counts, key=lambda p: (counts[p], p))
        if counts[best] < 2:
            break
        found.append(best)
        words = [joined(w, best) for w in words]
    return found


def test_pairs_are_those_of_the_textbook():
    alphabet = "".join(sorted(set(TEXT)))
    tokens = byte_pairs(TEXT, len(alphabet) + 25, alphabet)
    assert list(tokens.ranks) == naive_pairs(TEXT, 25)


def test_an_epoch_covers_the_text_once():
    task = TextTask(TEXT, 16)
    plan = task.plan(4, torch.Generator().manual_seed(3))
    first = int(plan.order.min())
    assert sorted(plan.order.tolist()) == [first + 16 * i for i in range(task.examples)]
    batch = task.batch(plan, 0, 4)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    place = int(plan.order[0])
    cut = len(TEXT) - len(TEXT) // 10
    assert task.tokens.decode(batch.targets[0].tolist()) == TEXT[:cut][place + 1 : place + 17]
    test = torch.cat([b.inputs for b in task.test_batches()])
    assert task.tokens.decode(test[0].tolist()) == TEXT[cut : cut + 16]


@pytest.mark.parametrize("vocabulary", [None, 40])
@pytest.mark.parametrize("samples", [None, 30])
def test_texts_obey_the_laws(vocabulary, samples):
    check_task(TextTask(TEXT, 8, vocabulary, samples=samples))


def test_a_guess_that_knows_nothing_has_an_error_of_one():
    task = TextTask(TEXT, 8)
    batch = next(task.test_batches())
    n = len(batch.inputs)
    score = task.score(torch.zeros(n, task.shape.outputs, 8), batch)
    assert float(score.error_sum) / n == pytest.approx(1)
    assert float(score.loss) == pytest.approx(math.log(task.shape.outputs))
    torch.testing.assert_close(
        task.score(y := torch.randn(n, task.shape.outputs, 8), batch).loss,
        functional.cross_entropy(y, batch.targets),
    )


def test_texts_that_do_not_fit_are_refused():
    for call in (lambda: TextTask("short", 8), lambda: TextTask(TEXT, 8, vocabulary=5)):
        with pytest.raises(ValueError, match="Give a l") as caught:
            call()
        assert len(str(caught.value).splitlines()) in (2, 3)


def test_a_known_text_is_got_from_a_file(tmp_path, monkeypatch):
    from hashlib import sha1

    source = replace(
        SOURCES["tinyshakespeare"], files={"input.txt": sha1(TEXT.encode()).hexdigest()}
    )
    monkeypatch.setitem(SOURCES, "tinyshakespeare", source)
    (tmp_path / "here.txt").write_text(TEXT)
    (path,) = get_dataset("tinyshakespeare", tmp_path / "data", at_hand=tmp_path / "here.txt")
    assert path.read_text() == TEXT
    task = load_task(replace(config(), dataset="tinyshakespeare", context=8), tmp_path / "data")
    assert task.shape.outputs == len(set(TEXT))


@pytest.mark.parametrize(
    ("model", "structure"),
    [
        ("gpt", "btt(rank=1)"),
        ("gpt(positions=learned)", "dense"),
        ("gpt(qk_norm=False)", "monarch(blocks=4)"),
    ],
)
def test_gpt_obeys_the_laws(model, structure):
    check_model(config(model, structure), SHAPE)


@pytest.mark.parametrize(("model", "structure"), [("mlp", "dense"), ("vit", "tt(rank=2)")])
def test_models_of_images_obey_the_laws(model, structure):
    own = {"patch": 4} if model == "vit" else {"heads": 8}
    check_model(config(model, structure, **own), Shape(3, 8, 5))


@pytest.mark.parametrize("model", ["gpt", "gpt(positions=learned)"])
def test_a_token_sees_those_before_it(model):
    gpt = build_model(config(model), SHAPE, torch.Generator().manual_seed(0)).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randint(11, (1, 6))
    changed = x.clone()
    changed[0, 3] = (x[0, 3] + 1) % 11
    moved = (gpt(x) - gpt(changed)).abs().amax((0, 1)) > 1e-6
    assert moved.tolist() == [False, False, False, True, True, True]


def test_rotary_products_depend_on_the_distance_alone():
    turn = Turn(12, 8)
    q, k = torch.randn(2, 8)
    turned = [turn(t.float().expand(1, 1, 12, 8))[0, 0] for t in (q, k)]
    scores = turned[0] @ turned[1].T
    for distance in (0, 3, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert (scores[0] - scores[0, 0]).abs().max() > 1e-2


def test_gpt_equals_its_formula():
    """One block, dense, one head: the equations written out."""
    gpt = build_model(
        config("gpt(positions=learned, qk_norm=False)", heads=1), SHAPE, torch.Generator()
    )
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randint(11, (2, 6))
    attention, mlp = gpt.blocks

    def norm(h, layer):
        return functional.layer_norm(h, (16,), layer.weight, layer.bias)

    h = gpt.embed.weight[x] + gpt.positions.weight
    z = norm(h, attention.norm)
    scores = (z @ attention.q.weight.T) @ (z @ attention.k.weight.T).mT * 8 / 16
    mask = torch.full((6, 6), -torch.inf).triu(1)
    mixed = (scores + mask).softmax(-1).float() @ (z @ attention.v.weight.T)
    h = h + mixed @ attention.out.weight.T + attention.out.bias
    h = h + mlp.reduce(functional.gelu(mlp.expand(norm(h, mlp.norm))))
    y = norm(h, gpt.norm) @ gpt.head.weight.T + gpt.head.bias
    torch.testing.assert_close(gpt(x), y.mT, rtol=1e-4, atol=1e-4)


def test_gpt_counts_linear_layers_and_half_of_the_scores():
    gpt = build_model(config(depth=2), SHAPE)
    linear = 2 * (4 * 16 * 16 + 8 * 16 * 16) + 16 * 11
    assert gpt.macs() == 6 * linear + 2 * 2 * (6 * 7 // 2) * 16


def test_curvature_of_a_text_is_known():
    gpt = build_model(config(), SHAPE, torch.Generator().manual_seed(0)).double()
    x = torch.randint(11, (5, 6))
    K = kfac(gpt, torch.nn.CrossEntropyLoss(), [(x, x.roll(1, 1))])
    assert K.shape[0] == sum(p.numel() for p in gpt.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gtp", "Did you mean 'gpt'"),
        ("gpt(position=rope)", "no option 'position'"),
        ("gpt(qk_norm=1)", "no option 'qk_norm' of this value"),
        ("gpt(positions=sine)", "no option 'positions' of this value"),
        ("gpt(rope)", "no name with literal|not a name"),
        ("mlp(width=3)", "keys of their own"),
    ],
)
def test_unknown_models_and_options_are_refused(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        parse_model(text)
    assert len(str(caught.value).splitlines()) in (2, 3)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"model": "gpt"}, Shape(3, 8, 5), "no text"),
        ({"model": "mlp"}, SHAPE, "on a text"),
        ({"model": "gpt", "width": 12}, SHAPE, "twice the heads"),
    ],
)
def test_models_that_do_not_fit_the_task_are_refused(changes, shape, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_model(config(**changes), shape)
    assert len(str(caught.value).splitlines()) in (2, 3)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_is(name):
    entry = TASKS[name]
    assert entry.about
    assert entry.source
    assert entry.size is None or name in entry.source
