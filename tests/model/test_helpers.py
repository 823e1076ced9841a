"""Weights from files and from a server: what is loaded, refused, resumed and verified."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effdet.download as downloads
from effdet import create_model, load_checkpoint, load_pretrained
from effdet.download import DownloadError, download
from effdet.helpers import CheckpointError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


def filled(value: float) -> dict[str, torch.Tensor]:
    return {k: torch.full_like(v, value) for k, v in Net().state_dict().items()}


def assert_holds(model: nn.Module, value: float) -> None:
    assert all((v == value).all() for v in model.state_dict().values())


@pytest.mark.parametrize(
    ("content", "use_ema", "expected"),
    [
        (filled(2.0), True, 2.0),
        ({"state_dict": filled(2.0), "state_dict_ema": filled(3.0), "epoch": 4}, True, 3.0),
        ({"state_dict": filled(2.0), "state_dict_ema": filled(3.0)}, False, 2.0),
        ({"state_dict": filled(2.0), "state_dict_ema": None}, True, 2.0),
        ({"model": filled(5.0), "optimizer": {"lr": 0.1}}, True, 5.0),
        ({f"module.{k}": v for k, v in filled(6.0).items()}, True, 6.0),
        ({f"_orig_mod.module.{k}": v for k, v in filled(7.0).items()}, True, 7.0),
        ({f"module._orig_mod.{k}": v for k, v in filled(7.0).items()}, True, 7.0),
    ],
)
def test_layouts_of_checkpoints(tmp_path: Path, content: Any, use_ema: bool, expected: float):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    model = Net()
    load_checkpoint(model, str(path), use_ema=use_ema)
    assert_holds(model, expected)


def test_checkpoints_of_training_scripts_hold_their_arguments(tmp_path: Path) -> None:
    import argparse

    path = tmp_path / "last.pth.tar"
    torch.save({"args": argparse.Namespace(lr=0.1), "state_dict": filled(2.0)}, path)
    model = Net()
    load_checkpoint(model, path)
    assert_holds(model, 2.0)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(filled(2.0), path)
    model = Net()
    load_checkpoint(model, path)
    assert_holds(model, 2.0)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        load_checkpoint(model, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint_path.*none\.pth"):
        load_checkpoint(Net(), tmp_path / "none.pth")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.pth"
    torch.save(filled(2.0), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 and keep else int(keep)])
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        load_checkpoint(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class MakesFolder:
    """Unpickling an instance creates a folder: what a malicious file could do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_code_in_a_file_is_not_run(tmp_path: Path, save: Any) -> None:
    path, folder = tmp_path / "evil.pth", tmp_path / "made"
    save({"state_dict": filled(2.0), "extra": MakesFolder(folder)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth.*refused"):
        load_checkpoint(Net(), path)
    assert not folder.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1.0}, {"state_dict": {"layer": "text"}}])
def test_something_else_than_weights_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other\.pth.*no state dict"):
        load_checkpoint(Net(), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(tmp_path: Path, value: float) -> None:
    path, state = tmp_path / "nan.pth", filled(1.0)
    state["norm.running_var"][1] = value
    torch.save(state, path)
    model = Net()
    with pytest.raises(CheckpointError, match=r"nan\.pth.*norm\.running_var"):
        load_checkpoint(model, path)
    assert model.state_dict()["norm.running_var"].isfinite().all()


def test_weights_of_another_model_are_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(create_model("efficientdet_nano", pretrained_backbone=False).state_dict(), path)
    two = create_model("efficientdet_nano", pretrained_backbone=False, num_classes=2)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(two, path)
    message = str(caught.value)
    assert "2 of another shape" in message and "class_net.predict.conv_pw.bias (810,)" in message
    assert "other.pth" in message and "efficientdet_nano" in message
    with pytest.raises(CheckpointError, match=r"missing from the file.*not in the model"):
        load_checkpoint(Net(), path)


def test_loading_loosely_takes_what_fits(tmp_path: Path) -> None:
    path = tmp_path / "part.pth"
    torch.save({"layer.bias": torch.full((2,), 7.0), "gone": torch.ones(1)}, path)
    model = Net()
    load_checkpoint(model, path, strict=False)
    assert (model.layer.bias == 7.0).all()


class Server:
    """A local HTTP server with the faults that real ones have."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.cut_after: list[int] = []  # bytes sent before each of the next connections breaks
        self.supports_range = True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                server.requests.append((self.path, wanted))
                content = server.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                start = 0
                if wanted and server.supports_range:
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                    if start >= len(content):
                        return self.send_error(416)
                    self.send_response(206)
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                end = start + server.cut_after.pop(0) if server.cut_after else len(content)
                self.wfile.write(content[start:end])

            def log_message(self, *args: Any) -> None:
                pass

        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        threading.Thread(target=self._httpd.serve_forever, daemon=True).start()

    def publish(self, content: bytes, digest: str | None = None) -> str:
        digest = digest or hashlib.sha256(content).hexdigest()[:8]
        name = f"/v0.1/net-{digest}.pth"
        self.files[name] = content
        return self.url + name

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    return tmp_path / "hub" / "checkpoints"


def weights(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save(filled(value), buffer)
    return buffer.getvalue()


def test_pretrained_weights_are_fetched_once(server: Server, cache: Path) -> None:
    url = server.publish(weights(4.0))
    for _ in range(2):
        model = Net()
        load_pretrained(model, url)
        assert_holds(model, 4.0)
    assert len(server.requests) == 1
    assert (cache / url.rpartition("/")[2]).exists()
    assert not list(cache.glob("*.part"))


def test_pretrained_weights_pass_the_filter(server: Server) -> None:
    url = server.publish(weights(4.0))
    model = Net()
    load_pretrained(model, url, filter_fn=lambda sd: {k: v + 1 for k, v in sd.items()})
    assert_holds(model, 5.0)


def test_no_url_warns_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    before = model.layer.weight.clone()
    load_pretrained(model, "")
    assert "No pretrained weights" in caplog.text
    assert torch.equal(model.layer.weight, before)


@pytest.mark.parametrize("supports_range", [True, False])
def test_broken_transfers_are_continued(server: Server, supports_range: bool) -> None:
    content = weights(4.0)
    url = server.publish(content)
    server.supports_range = supports_range
    server.cut_after = [100, 50]
    assert download(url).read_bytes() == content
    ranges = [wanted for _, wanted in server.requests]
    resumed_at = 150 if supports_range else 50
    assert ranges == [None, "bytes=100-", f"bytes={resumed_at}-"]


def test_a_later_call_continues_a_partial_file(server: Server, cache: Path) -> None:
    content = weights(4.0)
    url = server.publish(content)
    server.cut_after = [300, 0, 0, 0]
    with pytest.raises(DownloadError, match="connection ended"):
        download(url)
    assert [p.stat().st_size for p in cache.glob("*.part")] == [300]
    assert download(url).read_bytes() == content
    assert server.requests[-1][1] == "bytes=300-"


def test_a_partial_file_longer_than_the_file_is_dropped(server: Server, cache: Path) -> None:
    content = weights(4.0)
    url = server.publish(content)
    cache.mkdir(parents=True)
    (cache / (url.rpartition("/")[2] + ".part")).write_bytes(content + b"more")
    assert download(url).read_bytes() == content


def test_a_wrong_hash_is_refused_and_nothing_kept(server: Server, cache: Path) -> None:
    url = server.publish(weights(4.0), digest="0123abcd")
    with pytest.raises(DownloadError, match=r"SHA-256.*0123abcd"):
        download(url)
    assert [p.suffix for p in cache.iterdir()] in ([], [".lock"])


def test_a_damaged_cached_file_is_named(server: Server) -> None:
    path = download(server.publish(weights(4.0)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DownloadError, match=r"net-.*SHA-256.*delete it"):
        download(server.url + "/v0.1/" + path.name)


def test_a_missing_file_on_the_server_is_not_retried(server: Server) -> None:
    with pytest.raises(DownloadError, match="404"):
        download(server.url + "/none-01234567.pth")
    assert len(server.requests) == 1


def test_offline_says_what_to_put_where(server: Server, cache: Path) -> None:
    url = server.publish(weights(4.0))
    server.close()
    with pytest.raises(DownloadError) as caught:
        load_pretrained(Net(), url)
    for part in (url, url.rpartition("/")[2], str(cache)):
        assert part in str(caught.value)
