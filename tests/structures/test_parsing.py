"""Recipes as text."""

import pytest

from matrigami import (
    BlockDiagonal,
    BlockTensorTrain,
    Dense,
    Diagonal,
    Einsum,
    Hadamard,
    Kronecker,
    LowRank,
    Monarch,
    TensorTrain,
    parse,
)


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("dense", Dense()),
        ("dense()", Dense()),
        ("diagonal", Diagonal()),
        ("block_diagonal(blocks=4)", BlockDiagonal(blocks=4)),
        ("lowrank", LowRank()),
        ("lowrank(rank=0.25)", LowRank(rank=0.25)),
        ("lowrank(8)", LowRank(rank=8)),
        ("kronecker", Kronecker()),
        ("kronecker(factors=3)", Kronecker(factors=3)),
        ("hadamard(rank=2)", Hadamard(rank=2)),
        ("monarch(blocks=16)", Monarch(blocks=16)),
        ("monarch(blocks=4, rank=2, interleaved=False)", Monarch(4, 2, interleaved=False)),
        ("tt(rank=16)", TensorTrain(rank=16)),
        ("btt(rank=2)", BlockTensorTrain(rank=2)),
        (" btt( rank = 1 , cores = 3 ) ", BlockTensorTrain(rank=1, cores=3)),
        ("einsum(0.5,0,0.5,0,0.5,0.5,0)", Einsum(theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0))),
        ("einsum(dims=(2,1,3,1,4,2,1))", Einsum(dims=(2, 1, 3, 1, 4, 2, 1))),
    ],
)
def test_text_names_a_recipe(text, recipe):
    assert parse(text) == recipe


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("monach(blocks=4)", "monarch"),
        ("low_rank", "lowrank"),
        ("kron", "kronecker"),
        ("bttt(rank=1)", "btt"),
        ("Dense", "dense"),
        ("hadamart(2)", "hadamard"),
    ],
)
def test_unknown_names_suggest_the_nearest(text, suggestion):
    with pytest.raises(ValueError, match=f"Did you mean '{suggestion}'") as caught:
        parse(text)
    asked, known, _ = str(caught.value).splitlines()
    assert text.split("(")[0] in asked
    assert "monarch" in known


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "btt(rank=)",
        "btt(rank=r)",
        "btt.rank",
        "btt(rank=2)(3)",
        "1",
        "btt rank=2",
        "__import__('os')",
        "btt(**{'rank': 2})",
        "btt(rank=__import__('os'))",
        "btt(ranks=2)",
        "monarch",
        "monarch(1, 2, 3, 4, 5, 6)",
        "btt(rank='two')",
        "btt(rank=True)",
        "btt(cores=2.5)",
        "kronecker(factors=2.5)",
        "monarch(blocks=None)",
        "einsum(theta='abcdefg')",
        "einsum(0.5, 0.5)",
        "einsum(0.5,0,0.5,0,0.5,0.5,0, theta=(1,))",
    ],
)
def test_other_text_is_refused_in_three_lines(text):
    with pytest.raises(ValueError, match=r"^[^\n]*: |was given") as caught:
        parse(text)
    assert 2 <= len(str(caught.value).splitlines()) <= 3
