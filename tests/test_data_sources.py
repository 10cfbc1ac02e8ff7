"""Where shards may lie: folders, globs, and URLs read by ranges or copied; all give the same batches."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from csm.config import DataConfig, ModelConfig
from csm.data import storage
from csm.data.corpora import split_folders
from csm.data.datamodule import CSMDataModule
from csm.data.shards import ShardReader

TALKS = [[(i % 4, "one two", 3 + i % 5), ((i + 1) % 4, "three", 4)] for i in range(60)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, write_conversations) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        write_conversations(folder / split, TALKS)
    return folder


@pytest.fixture
def in_memory(local: Path) -> Iterator[str]:
    """The same files in fsspec's memory file system."""
    files = fsspec.filesystem("memory")
    for path in local.rglob("*"):
        if path.is_file() and path.suffix != ".npy" and "verified" not in path.name:
            files.pipe_file(f"/bucket/data/{path.relative_to(local)}", path.read_bytes())
    yield "memory://bucket/data"
    files.rm("/bucket", recursive=True)


@pytest.fixture
def make(local: Path, tiny_model_config: ModelConfig, word_tokenizer):
    def make(path: object, **changes: object) -> CSMDataModule:
        config = DataConfig(kind="shards", path=path, seq_len=32, rows_per_batch=2)
        return CSMDataModule(replace(config, **changes), tiny_model_config, word_tokenizer)

    return make


def _tokens(module: CSMDataModule) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in module.train_dataloader()])


def test_urls_read_by_ranges_give_the_same_batches(make, local: Path, in_memory: str):
    expected = _tokens(make(str(local)))
    assert torch.equal(_tokens(make(in_memory, verify="size")), expected)
    assert torch.equal(_tokens(make(f"file://{local}", verify="size")), expected)
    assert fsspec.filesystem("memory").glob("/bucket/data/train/lengths-*")  # the next run need not measure


def test_shards_copied_to_a_cache_give_the_same_batches_and_are_read_from_there(make, local: Path, in_memory: str, tmp_path: Path):
    expected = _tokens(make(str(local)))
    assert torch.equal(_tokens(make(in_memory, cache_dir=str(tmp_path / "cache"))), expected)
    copies = list((tmp_path / "cache").iterdir())
    assert {path.suffix for path in copies} == {".tar"}
    files = fsspec.filesystem("memory")
    for path in files.glob("/bucket/data/*/*.tar"):
        files.pipe_file(path, bytes(files.size(path)))  # of the same size, and of no use
    assert torch.equal(_tokens(make(in_memory, cache_dir=str(tmp_path / "cache"))), expected)


def test_a_copy_whose_digest_differs_is_quarantined_and_not_kept(make, in_memory: str, tmp_path: Path):
    files = fsspec.filesystem("memory")
    for path in files.glob("/bucket/data/*/shard-000000.tar"):
        content = bytearray(files.cat_file(path))
        content[len(content) // 2] ^= 1
        files.pipe_file(path, bytes(content))
    module = make(in_memory, cache_dir=str(tmp_path / "cache"), max_bad_share=0.5)
    _tokens(module)
    reader = module._train.reader
    assert set(module._train.bad.reasons) == set(reader.samples_of(0))
    assert "sha256" in module._train.bad.reasons[0] and "upload it again" in module._train.bad.reasons[0]
    assert not (tmp_path / "cache" / f"{reader.indexes[0].shards[0].sha256}.tar").exists()


def test_remote_shards_ask_for_a_cache_or_for_sizes_only(make, in_memory: str):
    with pytest.raises(ValueError, match=r"memory://bucket/data/train: .*set data.cache_dir=<local folder>, or data.verify=size"):
        make(in_memory).setup()


def test_a_local_and_a_remote_folder_read_as_one(make, local: Path, in_memory: str):
    module = make([str(local), in_memory], verify="size")
    assert module.stats()["samples"] == 2 * len(TALKS)
    assert len(torch.unique(_tokens(module).flatten(1), dim=0)) > len(TALKS) // 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_http_server_gives_the_same_batches(make, local: Path, num_workers: int):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            path = Path(self.translate_path(self.path))
            if asked is None or not path.is_file():
                super().do_GET()
                return
            first, last = asked.removeprefix("bytes=").split("-")
            content = path.read_bytes()[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
            self.end_headers()
            self.wfile.write(content)

    expected = _tokens(make(str(local)))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(local)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        module = make(f"http://127.0.0.1:{server.server_port}", verify="size", num_workers=num_workers)
        assert torch.equal(_tokens(module), expected)
        module.teardown()
    finally:
        server.shutdown()
        server.server_close()


def test_globs_find_folders_and_urls(local: Path, in_memory: str):
    assert local / "train" in split_folders(str(local.parent / "data*"), "train")
    assert split_folders("memory://bucket/d*", "train") == ["memory:///bucket/data/train"]
    assert len(ShardReader(split_folders("memory://bucket/*", "train"))) == len(TALKS)
    with pytest.raises(FileNotFoundError, match="no folder matches that has a 'dev' split"):
        split_folders("memory://bucket/*", "dev")


def test_a_url_that_is_not_there_is_told_like_a_folder(make, in_memory: str):
    with pytest.raises(FileNotFoundError, match="memory://bucket/nothing/train: no such folder, expected shards and index.json"):
        make("memory://bucket/nothing", verify="size").setup()
    with pytest.raises(ValueError, match="nosuch://x/train: .*pip install s3fs"):
        make("nosuch://x", verify="size").setup()


def test_a_connection_that_fails_is_tried_again(make, local: Path, in_memory: str, monkeypatch: pytest.MonkeyPatch):
    expected = _tokens(make(str(local)))
    monkeypatch.setattr(storage, "RETRY_AFTER_S", (0.0, 0.0))
    real, failures = fsspec.get_filesystem_class("memory").cat_ranges, iter(range(10**6))

    def flaky(self: object, *arguments: object, **settings: object) -> list[bytes]:
        if next(failures) % 3 < 2:
            raise ConnectionError("reset by peer")
        return real(self, *arguments, **settings)

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_ranges", flaky)
    module = make(in_memory, verify="size")
    assert torch.equal(_tokens(module), expected) and not module.num_bad_samples
