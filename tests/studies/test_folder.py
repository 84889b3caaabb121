"""A folder of images: nothing in it is changed without a word, and what is damaged is named."""

import numpy as np
import pytest

from matrigami.studies.tasks._folder import read_folder


@pytest.mark.parametrize(
    ("shape", "kind", "fault"),
    [
        ((9, 9), np.uint8, "9 x 9, no square of side 8"),
        ((8, 9), np.uint8, "9 x 8, no square of side 8"),
        ((8, 8), np.uint16, "more than 8 bits"),
        ((8, 8), np.int32, "more than 8 bits"),
        ((8, 8), np.float32, "more than 8 bits"),
    ],
)
def test_an_image_that_would_be_changed_without_a_word_is_refused(tmp_path, shape, kind, fault):
    image = pytest.importorskip("PIL.Image")
    for place in ("train/a", "train/b", "test/a"):
        (tmp_path / "pets" / place).mkdir(parents=True)
        image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "pets" / place / "0.tif")
    assert read_folder("pets", tmp_path / "pets").train.pixels.shape == (2, 8, 3, 8)
    image.fromarray(np.ones(shape, kind)).save(tmp_path / "pets" / "test" / "a" / "1.tif")
    with pytest.raises(ValueError, match=f"1.tif .*{fault}") as error:
        read_folder("pets", tmp_path / "pets")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "webp", "tif"])
def test_a_damaged_image_is_named(tmp_path, ending):
    """Whatever the reader of its format raises, be it for a size of billions of pixels."""
    image = pytest.importorskip("PIL.Image")
    for place in ("train/a", "train/b", "test/a"):
        (tmp_path / "pets" / place).mkdir(parents=True)
        made = image.fromarray(np.full((8, 8, 3), 7, np.uint8))
        made.save(tmp_path / "pets" / place / f"0.{ending}")
    path, draw = tmp_path / "pets" / "test" / "a" / f"0.{ending}", np.random.default_rng(0)
    whole, told = path.read_bytes(), []
    for _ in range(60):
        damaged = bytearray(whole)
        for place in draw.integers(0, min(len(whole), 64), 4):
            damaged[place] = draw.integers(256)
        path.write_bytes(damaged)
        try:
            read_folder("pets", tmp_path / "pets", 8)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 5
    assert all(str(path) in message for message in told)


def test_a_single_class_is_refused(tmp_path):
    """As labels that are all the same are: there is nothing to learn."""
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / part / "a" / "0.png")
    with pytest.raises(ValueError, match="train has only the class a"):
        read_folder("pets", tmp_path, 8)


def test_an_image_is_opened_once(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    for place in ("train/a", "train/b", "test/a"):
        (tmp_path / place).mkdir(parents=True)
        image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / place / "0.png")
    read, opened = image.open, []
    monkeypatch.setattr(image, "open", lambda path: opened.append(path) or read(path))
    read_folder("pets", tmp_path)
    assert len(opened) == 3 + 1  # the first, for the side that all must have


def test_a_class_without_images_is_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for place in ("train/a", "train/b", "test/a"):
        (tmp_path / place).mkdir(parents=True)
        image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / place / "0.png")
    (tmp_path / "train" / "b" / "0.png").rename(tmp_path / "train" / "b" / "0.txt")
    with pytest.raises(ValueError, match="train/b has no images"):
        read_folder("pets", tmp_path)
