"""Weights on the Hugging Face Hub: its own client, against a server in this process."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from effdet import Detector, create_model, hub, load_checkpoint, load_pretrained
from effdet.download import DownloadError
from effdet.engine import checkpoint as checkpoints
from effdet.engine.weights import load_model
from effdet.errors import CheckpointError

COMMIT = "0123456789abcdef" * 2 + "01234567"
FIELDS = {
    "model": "efficientdet_nano",
    "image_size": [96, 128],
    "class_names": ["a", "b", "c"],
    "category_ids": [5, 7, 9],
}


class Server(http.server.ThreadingHTTPServer):
    """Answers as the Hub does for files of the repository someone/nano."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str], bytes] = {}  # by revision and name
        self.asked: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        self.server.asked.append(self.path)
        repo, _, rest = unquote(self.path[1:]).partition("/resolve/")
        revision = next((r for r, _ in self.server.files if rest.startswith(f"{r}/")), None)
        content = self.server.files.get((str(revision), rest.removeprefix(f"{revision}/")))
        problem = None
        if repo != "someone/nano":
            problem = "RepoNotFound"
        elif revision is None:
            problem = "RevisionNotFound"
        elif content is None:
            problem = "EntryNotFound"
        self.send_response(404 if problem else 200)
        if problem:
            self.send_header("X-Error-Code", problem)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if with_content and content:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    client = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        endpoint = f"http://127.0.0.1:{running.server_port}"
        here = {"endpoint": endpoint, "cache_dir": tmp_path / "cache"}
        monkeypatch.setattr(
            client, "hf_hub_download", functools.partial(client.hf_hub_download, **here)
        )
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return create_model("efficientdet_nano", num_classes=3, pretrained_backbone=False).state_dict()


def exported(folder: Path, state_dict: dict[str, torch.Tensor], **fields: object) -> Path:
    content = {**FIELDS, **fields, "format": checkpoints.FORMAT, "state_dict_ema": state_dict}
    checkpoints.save_atomically(content, folder / "best.pth")
    return checkpoints.export_half(folder / "best.pth", folder / "model.safetensors")


def test_an_export_is_a_model_from_the_hub(server, state_dict, tmp_path):
    path = exported(tmp_path, state_dict, bn_eps=0.02)
    assert path == tmp_path / "model.safetensors"
    server.files["main", "model.safetensors"] = path.read_bytes()
    loaded = load_model(checkpoint="hf://someone/nano")
    assert (loaded.name, loaded.class_names, loaded.category_ids) == (
        "efficientdet_nano", ["a", "b", "c"], [5, 7, 9]
    )  # fmt: skip
    assert loaded.source == "hf://someone/nano" and loaded.bn_eps == 0.02
    assert tuple(loaded.model.config.image_size) == (96, 128)
    own = loaded.model.state_dict()
    for key, value in state_dict.items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(own[key], expected)
    assert not any("config.json" in path for path in server.asked)


def test_all_that_load_weights_take_it(server, state_dict, tmp_path):
    server.files["v2", "small/w.safetensors"] = exported(tmp_path, state_dict).read_bytes()
    reference = "hf://someone/nano@v2/small/w.safetensors"
    other = create_model("efficientdet_nano", num_classes=3, pretrained_backbone=False)
    load_checkpoint(other, reference)
    third = create_model("efficientdet_nano", num_classes=3, pretrained_backbone=False)
    load_pretrained(third, reference)
    made = create_model("efficientdet_nano", num_classes=3, checkpoint_path=reference)
    for model in (other, third, made):
        weight = model.state_dict()["class_net.predict.conv_pw.weight"]
        assert torch.equal(weight, state_dict["class_net.predict.conv_pw.weight"].half().float())


@pytest.mark.parametrize(
    "value", ["hf://someone/nano", "hf-hub:someone/nano", "w.pth", Path("w"), "https://x.org/w"]
)
def test_a_file_is_no_value_of_pretrained(server, value):
    """PyPI's effdet takes any text as True, and loads other weights than those that are named."""
    with pytest.raises(ValueError, match=rf"pretrained: got '{value}'.* checkpoint_path='{value}'"):
        create_model("efficientdet_nano", pretrained=value)
    assert not server.asked


@pytest.mark.parametrize("text", ["True", "coco"])
def test_other_text_is_true_as_in_pypis_effdet(text, caplog):
    create_model("efficientdet_nano", pretrained=text)
    assert "No pretrained weights exist" in caplog.text


@pytest.mark.parametrize(
    "name", ["hf://someone/nano", "hf-hub:someone/nano", "hf_hub:someone/nano"]
)
def test_a_repository_is_no_name_of_a_model(server, state_dict, tmp_path, name):
    """timm's way to write it; the message's own way works."""
    with pytest.raises(KeyError, match=f"model_name: got '{name}'.* checkpoint_path='{name}'"):
        create_model(name, pretrained=True)
    server.files["main", "model.safetensors"] = exported(tmp_path, state_dict).read_bytes()
    create_model("efficientdet_nano", num_classes=3, checkpoint_path=name)
    assert Detector(checkpoint=name, device="cpu").class_names == ["a", "b", "c"]


def test_a_file_without_description_has_a_config_beside_it(server, state_dict, tmp_path):
    from safetensors.torch import save_file

    save_file(dict(state_dict), tmp_path / "plain.safetensors")
    server.files["main", "model.safetensors"] = (tmp_path / "plain.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="does not say which model"):
        load_model(checkpoint="hf://someone/nano")
    server.files["refs/pr/1", "model.safetensors"] = server.files["main", "model.safetensors"]
    server.files["refs/pr/1", "config.json"] = json.dumps({"effdet": FIELDS}).encode()
    loaded = load_model(checkpoint="hf-hub:someone/nano@refs%2Fpr%2F1")
    assert loaded.class_names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf://someone/other", "no repository someone/other, or it takes an access token"),
        ("hf://someone/nano@v9", "someone/nano has no revision v9"),
        ("hf://someone/nano/x.pth", r"someone/nano, revision main has no file x\.pth"),
        ("hf://nano", r"takes hf://owner/name\[@revision\]\[/file\]"),
        ("hf://someone/nano@", r"takes hf://owner/name"),
    ],
)
def test_what_is_not_there_is_named(server, reference, message):
    server.files["main", "model.safetensors"] = b"x"
    with pytest.raises(DownloadError, match=f"^{reference}: .*{message}"):
        hub.fetch(reference)


def test_offline_the_cache_is_enough_and_without_it_the_message_says_what_to_do(
    server, state_dict, tmp_path, monkeypatch
):
    server.files["main", "model.safetensors"] = exported(tmp_path, state_dict).read_bytes()
    path = hub.fetch("hf://someone/nano")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    server.asked.clear()
    assert hub.fetch("hf://someone/nano") == path
    with pytest.raises(DownloadError, match=r"b\.pth of .* is not in the Hub's cache.*OFFLINE"):
        hub.fetch("hf://someone/nano/b.pth")
    assert not server.asked


def test_a_file_damaged_in_the_cache_is_found(server, state_dict, tmp_path):
    server.files["main", "model.safetensors"] = exported(tmp_path, state_dict).read_bytes()
    path = hub.fetch("hf://someone/nano")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(DownloadError, match=r"SHA-256.*delete .* to fetch it again"):
        hub.fetch("hf://someone/nano")


def test_missing_packages_are_named(monkeypatch, state_dict, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"hf://a/b: .*effdet-kernels\[hub\]"):
        load_model(checkpoint="hf://a/b")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*effdet-kernels\[hub\]"):
        exported(tmp_path, state_dict)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("image_size", [96]),
        ("image_size", [96.0, 96]),
        ("class_names", "abc"),
        ("category_ids", ["1"]),
        ("bn_eps", "0.001"),
    ],
)
def test_a_field_of_another_type_is_named(state_dict, tmp_path, field, value):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    metadata = {"effdet": json.dumps({**FIELDS, field: value})}
    save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{field}: got .*, takes"):
        load_model(checkpoint=path)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_description_that_is_no_object_is_named(tmp_path, text):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"effdet": text})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: effdet"):
        load_model(checkpoint=tmp_path / "model.safetensors")


def test_a_config_of_something_else_is_no_description(state_dict, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(dict(state_dict), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model": {"type": "other"}, "image_size": 3}')
    loaded = load_model("efficientdet_nano", tmp_path / "model.safetensors")
    assert loaded.class_names == ["class 1", "class 2", "class 3"]
