"""Shards are downloaded within a limit, from a hub on loopback that is a folder behind HTTP."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir

from petals_lightning.errors import CheckpointError
from petals_lightning.hf import Checkpoint
from tests.helpers.families import TINY_CONFIGS, save_tiny_checkpoint

REPOSITORY, COMMIT = "somebody/tiny", "0" * 40


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for files of one repository."""

    def __init__(self, folder: Path, asked: list[tuple[str, str]], *args):
        self._folder, self._asked = folder, asked
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        file = self._folder / self.path.rpartition("/")[2]
        self._asked.append((self.command, file.name))
        if f"/{REPOSITORY}/resolve/" not in self.path or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    """The folder of the hub's only repository, and what it was asked for."""
    folder = save_tiny_checkpoint(TINY_CONFIGS["llama"](), tmp_path / "repository", max_shard_size="20KB")
    asked: list[tuple[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, folder, asked))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield folder, asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_shards_that_would_not_fit_are_not_downloaded(hub, tmp_path):
    folder, asked = hub
    checkpoint = Checkpoint(REPOSITORY, cache_dir=str(tmp_path / "cache"))
    names = [name for name in checkpoint.shard_of if ".layers.2." in name]
    files = {checkpoint.shard_of[name] for name in names}
    size = sum((folder / file).stat().st_size for file in files)
    taken = scan_cache_dir(tmp_path / "cache").size_on_disk
    assert 0 < taken < size // 4
    with ExitStack() as stack:
        with pytest.raises(
            CheckpointError, match=r"would take .* GiB more, .* of --max-disk-space are taken: hold few"
        ):
            checkpoint.within_disk_space(taken + size // 2).tensors(names, stack)
        assert not files & {file for method, file in asked if method == "GET"}
        assert checkpoint.within_disk_space(taken + size + 8192).tensors(names, stack).keys() == set(names)
        assert files <= {file for method, file in asked if method == "GET"}
        # What is here already takes no more.
        assert checkpoint.within_disk_space(1).tensors(names, stack).keys() == set(names)
