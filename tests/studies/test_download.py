"""`matrigami data get`, against a server on this machine that breaks off and knows ranges."""

import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from matrigami.cli._main import run
from matrigami.studies.tasks import _download as downloading
from matrigami.studies.tasks._sources import SOURCES, Source

CONTENTS = {
    "train.bin": np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes(),
    "test.bin": np.random.default_rng(1).integers(0, 256, 50_000, np.uint8).tobytes(),
}
HASHES = {name: hashlib.sha1(content).hexdigest() for name, content in CONTENTS.items()}


def tar(members):
    """A gzipped archive of files, links and what else is asked for."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
    return packed.getvalue()


ARCHIVE = tar({f"cifar-100-binary/{name}": content for name, content in CONTENTS.items()})


class Handler(BaseHTTPRequestHandler):
    """Serves one archive; `server.cut` bytes at most in each answer."""

    def do_GET(self):
        content, start = self.server.content, 0
        self.server.ranges.append(self.headers.get("Range"))
        if self.server.knows_ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server that stands in for the home page of CIFAR-100."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.cut, server.knows_ranges, server.ranges = ARCHIVE, 10**9, True, []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-100-binary.tar.gz"
        monkeypatch.setitem(
            SOURCES, "cifar100", Source("cifar100", (url,), "cifar-100-binary", HASHES)
        )
        yield server
        server.shutdown()
        thread.join()


def fetched(folder):
    return {p.name: p.read_bytes() for p in (folder / "cifar-100-binary").iterdir()}


def test_get_downloads_checks_and_unpacks(server, tmp_path, capsys):
    assert run(["data", "get", "cifar100", "--to", str(tmp_path)]) == 0
    assert fetched(tmp_path) == CONTENTS
    out, err = capsys.readouterr()
    assert [Path(line).name for line in out.splitlines()] == list(CONTENTS)
    assert "100 %" in err
    assert run(["data", "get", "cifar100", "--to", str(tmp_path)]) == 0
    assert len(server.ranges) == 1


def test_broken_connections_are_continued(server, tmp_path):
    server.cut = 100_000
    assert run(["data", "get", "cifar100", "--to", str(tmp_path)]) == 0
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert fetched(tmp_path) == CONTENTS


def test_what_arrived_is_kept_for_the_next_call(server, tmp_path, capsys):
    server.cut = 50_000
    assert run(["data", "get", "cifar100", "--to", str(tmp_path)]) == 1
    assert "250000 bytes are kept" in capsys.readouterr().err
    server.cut = 10**9
    assert run(["data", "get", "cifar100", "--to", str(tmp_path)]) == 0
    assert server.ranges[-1] == "bytes=250000-"
    assert fetched(tmp_path) == CONTENTS


def test_server_without_ranges_starts_again(server, tmp_path):
    part = tmp_path / "cifar-100-binary" / "cifar-100-binary.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 10_000)
    server.knows_ranges = False
    downloading.get_dataset("cifar100", tmp_path)
    assert fetched(tmp_path) == CONTENTS


@pytest.mark.parametrize("have", [ARCHIVE, ARCHIVE + b"too long"])
def test_part_that_is_whole_or_too_long(server, tmp_path, have):
    part = tmp_path / "cifar-100-binary" / "cifar-100-binary.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(have)
    downloading.get_dataset("cifar100", tmp_path)
    assert fetched(tmp_path) == CONTENTS


@pytest.mark.parametrize("folder", [False, True])
def test_files_at_hand_need_no_network(server, tmp_path, folder):
    origin = tmp_path / "at_hand"
    if folder:
        origin.mkdir()
        for name, content in CONTENTS.items():
            (origin / name).write_bytes(content)
    else:
        origin.write_bytes(ARCHIVE)
    arguments = ["data", "get", "cifar100", "--from", str(origin), "--to", str(tmp_path / "to")]
    assert run(arguments) == 0
    assert fetched(tmp_path / "to") == CONTENTS
    assert server.ranges == []


def test_nothing_but_the_expected_files_is_unpacked(server, tmp_path):
    hostile = {"../evil": b"x", "/evil": b"x", "cifar-100-binary/more": b"x", "evil": "../../etc"}
    server.content = tar({**hostile, **{f"./cifar-100-binary/{k}": v for k, v in CONTENTS.items()}})
    target = tmp_path / "a" / "b"
    downloading.get_dataset("cifar100", target)
    assert fetched(target) == CONTENTS
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(CONTENTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "cannot be read as a tar archive"),
        (ARCHIVE[: len(ARCHIVE) // 2], "cannot be read as a tar archive"),
        (tar({"cifar-100-binary/train.bin": b"wrong", "cifar-100-binary/test.bin": b""}), "SHA-1"),
        (tar({"cifar-100-binary/test.bin": "/etc/passwd"}), "cannot be read"),
    ],
)
def test_damaged_archive_is_refused_in_three_lines(server, tmp_path, capsys, content, message):
    server.content = content
    assert run(["data", "get", "cifar100", "--to", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert message in err
    lines = [line for line in err.splitlines() if not line.startswith("cifar-100-binary.tar.gz:")]
    assert len(lines) in (2, 3)


def test_unknown_data_set_and_unwritable_folder(tmp_path, capsys):
    assert run(["data", "get", "imagenet", "--to", str(tmp_path)]) == 2
    assert "cifar100" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(["data", "get", "cifar100", "--to", str(tmp_path / "file" / "below")]) == 2
    assert len(capsys.readouterr().err.splitlines()) in (2, 3)
