"""Where data sets come from: their official addresses, files and hashes."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """The published form of a data set.

    Args:
        name: Its name as a task.
        urls: What to download: one tar archive that holds `folder`, or the files themselves.
        folder: Folder below the data folder in which the files are.
        files: SHA-1 of each file.
    """

    name: str
    urls: tuple[str, ...]
    folder: str
    files: Mapping[str, str]


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_FASHION = {
    "train-images-idx3-ubyte.gz": "0cf37b0d40ed5169c6b3aba31069a9770ac9043d",
    "train-labels-idx1-ubyte.gz": "236021d52f1e40852b06a4c3008d8de8aef1e40b",
    "t10k-images-idx3-ubyte.gz": "626ed6a7c06dd17c0eec72fa3be1740f146a2863",
    "t10k-labels-idx1-ubyte.gz": "17f9ab60e7257a1620f4ad76bbbaf857c3920701",
}

SOURCES: dict[str, Source] = {
    "cifar100": Source(
        "cifar100",
        (f"{_TORONTO}/cifar-100-binary.tar.gz",),
        "cifar-100-binary",
        {
            "train.bin": "e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
            "test.bin": "8fb6623e830365ff53cf14adec797474f5478006",
        },
    ),
    "cifar10": Source(
        "cifar10",
        (f"{_TORONTO}/cifar-10-binary.tar.gz",),
        "cifar-10-batches-bin",
        {
            "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
            "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
            "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
            "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
            "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
            "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
        },
    ),
    "fashion_mnist": Source(
        "fashion_mnist", tuple(f"{_ZALANDO}/{name}" for name in _FASHION), "fashion-mnist", _FASHION
    ),
    "tinyshakespeare": Source(
        "tinyshakespeare",
        (
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        ),
        "tinyshakespeare",
        {"input.txt": "04486597058d11dcc2c556b1d0433891eb639d2e"},
    ),
}
"""Data sets that can be downloaded, by name."""
