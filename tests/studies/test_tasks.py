"""Data sets, augmentation, tasks: layouts byte by byte, resampling against torch, damage."""

import gzip
import hashlib
import math
import random
import struct

import numpy as np
import pytest
import torch

from matrigami.studies import RunConfig
from matrigami.studies.tasks import ImageTask, TeacherTask, load_task
from matrigami.studies.tasks._augment import crop_table, draw_crops, draw_mixing, resample
from matrigami.studies.tasks._datasets import Images, data_folder, load_images, read_idx
from matrigami.studies.tasks._sources import SOURCES, Source


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sha1(content):
    return hashlib.sha1(content).hexdigest()


def records(n, label_bytes, seed):
    """Random images in the layout of CIFAR."""
    rows = np.random.default_rng(seed).integers(0, 256, (n, label_bytes + 3072), np.uint8)
    rows[:, :label_bytes] %= 10
    return rows


# ------------------------------------------------------------------ files


@pytest.fixture
def cifar100(monkeypatch, tmp_path):
    """A small data set in the official layout, with its own hashes."""
    contents = {"train.bin": records(40, 2, 0).tobytes(), "test.bin": records(8, 2, 1).tobytes()}
    hashes = {name: sha1(content) for name, content in contents.items()}
    monkeypatch.setitem(SOURCES, "cifar100", Source("cifar100", (), "cifar-100-binary", hashes))
    (tmp_path / "cifar-100-binary").mkdir()
    for name, content in contents.items():
        (tmp_path / "cifar-100-binary" / name).write_bytes(content)
    return tmp_path


def test_cifar_pixels_and_fine_labels(cifar100):
    split = load_images("cifar100", cifar100)
    rows = records(40, 2, 0)
    assert split.classes == 100
    assert split.train.labels.tolist() == rows[:, 1].tolist()
    image = rows[7, 2:].reshape(3, 32, 32)
    for channel in range(3):
        assert np.array_equal(split.train.pixels[7, :, channel].numpy(), image[channel])
    assert len(split.test.labels) == 8


def test_cifar10_joins_its_batches_in_order(monkeypatch, tmp_path):
    parts = {f"data_batch_{i}.bin": records(3, 1, i) for i in range(1, 6)}
    parts["test_batch.bin"] = records(2, 1, 9)
    hashes = {name: sha1(rows.tobytes()) for name, rows in parts.items()}
    monkeypatch.setitem(SOURCES, "cifar10", Source("cifar10", (), "cifar-10-batches-bin", hashes))
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name, rows in parts.items():
        (tmp_path / "cifar-10-batches-bin" / name).write_bytes(rows.tobytes())
    train, test, classes = load_images("cifar10", tmp_path)
    labels = [label for i in range(1, 6) for label in parts[f"data_batch_{i}.bin"][:, 0]]
    assert train.labels.tolist() == labels
    assert (len(test.labels), classes) == (2, 10)


def test_damaged_file_is_refused_in_three_lines(cifar100):
    path = cifar100 / "cifar-100-binary" / "test.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-1") as caught:
        load_images("cifar100", cifar100)
    assert len(str(caught.value).splitlines()) in (2, 3)


def test_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="matrigami data get cifar10 --to") as caught:
        load_images("cifar10", tmp_path)
    assert len(str(caught.value).splitlines()) in (2, 3)


def test_official_hashes():
    assert SOURCES["cifar100"].files == {
        "train.bin": "e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
        "test.bin": "8fb6623e830365ff53cf14adec797474f5478006",
    }
    assert all(len(value) == 40 for source in SOURCES.values() for value in source.files.values())


def test_fashion_mnist_idx_files(monkeypatch, tmp_path):
    contents = {}
    for part, n in (("train", 6), ("t10k", 3)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, n, 28, 28)
        contents[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(header + pixels.tobytes())
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, n) + bytes(range(n))
        contents[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    hashes = {name: sha1(content) for name, content in contents.items()}
    monkeypatch.setitem(
        SOURCES, "fashion_mnist", Source("fashion_mnist", (), "fashion-mnist", hashes)
    )
    (tmp_path / "fashion-mnist").mkdir()
    for name, content in contents.items():
        (tmp_path / "fashion-mnist" / name).write_bytes(content)
    split = load_images("fashion_mnist", tmp_path)
    assert split.train.pixels.shape == (6, 28, 1, 28)
    assert split.test.labels.tolist() == [0, 1, 2]
    wanted = np.random.default_rng(3).integers(0, 256, (3, 28, 28), np.uint8)
    assert np.array_equal(split.test.pixels[:, :, 0].numpy(), wanted)


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"\0\0\x08\x01\0\0\0\x09ab")],
    ids=["empty", "plain", "short"],  # compressed bytes hold the time, which differs by process
)
def test_damaged_idx_is_refused(content):
    with pytest.raises(ValueError, match="damaged"):
        read_idx(content)


def test_data_folder_is_argument_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MATRIGAMI_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    assert data_folder("elsewhere").name == "elsewhere"
    monkeypatch.delenv("MATRIGAMI_DATA")
    assert data_folder().parts[-2:] == (".cache", "matrigami")


def test_digits_are_split_by_class():
    train, test, classes = load_images("digits")
    assert (len(train.labels), len(test.labels), classes) == (1442, 355, 10)
    shares = torch.bincount(test.labels) / (
        torch.bincount(train.labels) + torch.bincount(test.labels)
    )
    assert ((shares - 0.2).abs() < 0.006).all()


# ------------------------------------------------------------------ augmentation


def test_crops_equal_interpolation_of_the_crop():
    """Each crop, resized by torch's own bilinear interpolation and mirrored."""
    n, side = 64, 16
    pixels = torch.randint(0, 256, (n, side, 3, side), generator=generator(), dtype=torch.uint8)
    crops = draw_crops(n, side, generator(1))
    resampled = resample(pixels, crops, crop_table(side))
    sizes = set()
    for i in range(n):
        height, top = int(crops.rows[i]) // side + 1, int(crops.rows[i]) % side
        flip, column = divmod(int(crops.columns[i]), side**2)
        width, left = column // side + 1, column % side
        image = pixels[i].transpose(0, 1)[None].float()
        crop = image[..., top : top + height, left : left + width]
        wanted = torch.nn.functional.interpolate(
            crop, (side, side), mode="bilinear", align_corners=False
        )[0]
        wanted = wanted.flip(-1) if flip else wanted
        torch.testing.assert_close(resampled[i].transpose(0, 1), wanted, rtol=1e-4, atol=1e-2)
        sizes.add((height, width))
    assert len(sizes) > 20


def mean_area_of_single_crops(side, n):
    """The recipe one crop at a time."""
    draw, total = random.Random(0), 0.0
    for _ in range(n):
        for _ in range(10):
            area = draw.uniform(0.08, 1) * side**2
            ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < width <= side and 0 < height <= side:
                break
        else:
            width = height = side
        total += width * height / side**2
    return total / n


def test_crops_have_the_asked_area_and_aspect():
    side, n = 32, 20_000
    crops = draw_crops(n, side, generator())
    height, width = crops.rows // side + 1, crops.columns % side**2 // side + 1
    top, left = crops.rows % side, crops.columns % side
    assert (top + height <= side).all()
    assert (left + width <= side).all()
    area, aspect = height * width / side**2, width / height
    assert 0.06 < area.min() < 0.1
    assert area.max() > 0.95
    assert area.float().mean() == pytest.approx(mean_area_of_single_crops(side, 20_000), abs=0.01)
    assert ((aspect > 0.6) & (aspect < 1.7)).all()
    flipped = (crops.columns >= side**2).float().mean()
    assert flipped == pytest.approx(0.5, abs=0.02)


def test_mixing_weights_are_beta():
    weights = np.array(draw_mixing(40_000, 0.8, generator()))
    assert weights.mean() == pytest.approx(0.5, abs=0.01)
    assert weights.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.003)
    assert draw_mixing(3, 0.0, generator()) == [1.0, 1.0, 1.0]
    assert draw_mixing(9, 0.8, generator()) == draw_mixing(9, 0.8, generator())


# ------------------------------------------------------------------ tasks


def images(n, side=8, channels=3, classes=4, seed=0):
    pixels = torch.randint(
        0, 256, (n, side, channels, side), generator=generator(seed), dtype=torch.uint8
    )
    return Images(pixels, torch.arange(n) % classes)


def test_features_are_normalised_channel_by_channel():
    train = images(50)
    task = ImageTask(train, images(10, seed=1), 4)
    plan = task.plan(50, generator())
    batch = task.batch(plan, 0, 50)
    planes = train.pixels.permute(0, 2, 1, 3)[plan.order].float()
    mean, std = planes.mean((0, 2, 3), keepdim=True), planes.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(
        batch.inputs, ((planes - mean) / std).flatten(1), rtol=1e-3, atol=1e-3
    )
    assert batch.targets.tolist() == train.labels[plan.order].tolist()


def test_shuffled_pixels_are_the_same_in_training_and_test():
    same = images(20)
    task = ImageTask(same, same, 4, shuffle_pixels=True)
    plan = task.plan(20, generator())
    x, test = task.batch(plan, 0, 20).inputs, next(task.test_batches()).inputs
    torch.testing.assert_close(x, test[plan.order])
    plain = next(ImageTask(same, same, 4).test_batches()).inputs
    assert not torch.allclose(plain, test)
    torch.testing.assert_close(plain.sort(1).values, test.sort(1).values)


def test_epoch_covers_every_example_once():
    task = ImageTask(images(23), images(4), 4)
    plan = task.plan(5, generator())
    sizes = [len(task.batch(plan, start, 5).targets) for start in range(0, 23, 5)]
    assert sizes == [5, 5, 5, 5, 3]
    assert sorted(plan.order.tolist()) == list(range(23))


def test_mixture_of_pairs_its_loss_and_its_error():
    task = ImageTask(images(12), images(4), 4, mixup=0.8, label_smoothing=0.3)
    plan = task.plan(12, generator(2))
    batch = task.batch(plan, 0, 12)
    plain = ImageTask(images(12), images(4), 4).batch(plan, 0, 12)
    w = batch.weight
    assert 0 < w < 1
    mixed = w * plain.inputs + (1 - w) * plain.inputs.roll(1, 0)
    torch.testing.assert_close(batch.inputs, mixed, rtol=1e-4, atol=1e-4)

    outputs = torch.randn(12, 4, generator=generator())
    targets = torch.zeros(12, 4)
    for labels, share in ((batch.targets, w), (batch.others, 1 - w)):
        targets += share * (0.7 * torch.nn.functional.one_hot(labels, 4) + 0.3 / 4)
    score = task.score(outputs, batch)
    loss = -(targets * outputs.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(score.loss, loss)
    torch.testing.assert_close(score.loss_sum, 12 * loss)
    hits = [int((outputs.argmax(1) == labels).sum()) for labels in (batch.targets, batch.others)]
    assert int(score.error_sum) == 12 - max(hits)


def test_teacher_is_fixed_normalised_and_fresh():
    config = RunConfig(
        "teacher_small",
        "mlp",
        "dense",
        8,
        0,
        1e-3,
        epochs=1,
        batch_size=500,
        samples_per_epoch=4000,
    )
    one, two = load_task(config), load_task(config)
    g = generator()
    first, second = one.plan(500, g), one.plan(500, g)
    assert not torch.equal(first.order, second.order)
    ours, theirs = one.batch(first, 0, 4000), two.batch(first, 0, 4000)
    assert torch.equal(ours.targets, theirs.targets)
    assert ours.targets.mean().item() == pytest.approx(0, abs=0.1)
    assert ours.targets.std().item() == pytest.approx(1, abs=0.1)
    constant = [one.score(torch.zeros_like(b.targets), b).error_sum for b in one.test_batches()]
    assert float(sum(constant)) / 8000 == pytest.approx(1, abs=0.1)


def test_teacher_is_a_relu_network():
    task = TeacherTask(width=16, layers=3, samples=10)
    x = torch.randn(5, 8, generator=generator(), dtype=torch.float32)
    plan = task.plan(10, generator())._replace(order=x)
    W1, W2, W3 = task._weights
    y = (x @ W1).relu() @ W2
    y = y.relu() @ W3
    torch.testing.assert_close(task.batch(plan, 0, 5).targets, (y - task._mean) / task._std)


def test_unknown_task_is_refused():
    config = RunConfig("cifar", "mlp", "dense", 8, seed=0, lr=1e-3, epochs=1, batch_size=8)
    with pytest.raises(ValueError, match="known are digits"):
        load_task(config)
