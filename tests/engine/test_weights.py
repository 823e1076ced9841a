from __future__ import annotations

import pytest
import torch

from effdet.bench import DetBenchPredict, DetBenchTrain
from effdet.engine.weights import bundled_checkpoint, default_class_names, load_model
from effdet.factory import create_model
from effdet.helpers import CheckpointError, load_checkpoint


@pytest.fixture(scope="module")
def state_dict():
    torch.manual_seed(1)
    return create_model("efficientdet_nano", num_classes=3, pretrained_backbone=False).state_dict()


def test_neither_name_nor_file_gives_the_bundled_model():
    loaded = load_model()
    assert loaded.name == "efficientdet_nano"
    assert loaded.class_names == ["circle", "square", "triangle", "star", "cross"]
    assert loaded.source == str(bundled_checkpoint())
    assert bundled_checkpoint().stat().st_size <= 2_000_000


def test_a_plain_state_dict_needs_a_name_and_gets_numbered_classes(tmp_path, state_dict):
    path = tmp_path / "plain.pth"
    torch.save({f"module.{key}": value for key, value in state_dict.items()}, path)
    loaded = load_model("efficientdet_nano", path)
    assert loaded.class_names == ["class 1", "class 2", "class 3"]
    assert loaded.category_ids == [1, 2, 3]
    own = loaded.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state_dict.items())
    with pytest.raises(CheckpointError, match=r"plain\.pth.*give the model's name"):
        load_model("", path)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("wrap", [DetBenchPredict, lambda model: DetBenchTrain(model, True)])
def test_weights_of_a_bench_are_those_of_its_model(tmp_path, state_dict, wrap, prefix):
    model = create_model("efficientdet_nano", num_classes=3, pretrained_backbone=False)
    model.load_state_dict(state_dict)
    path = tmp_path / "bench.pth"
    torch.save({prefix + key: value for key, value in wrap(model).state_dict().items()}, path)
    loaded = load_model("efficientdet_nano", path)
    own = loaded.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state_dict.items())
    bench = wrap(create_model("efficientdet_nano", num_classes=3, pretrained_backbone=False))
    load_checkpoint(bench, path)
    own = bench.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state_dict.items())


def test_a_model_with_a_bench_in_front_and_other_weights_is_refused(tmp_path, state_dict):
    path = tmp_path / "more.pth"
    torch.save(
        {**{f"model.{k}": v for k, v in state_dict.items()}, "optimizer": torch.ones(1)}, path
    )
    with pytest.raises(CheckpointError, match=r"519 not in the model \(model\.backbone"):
        load_model("efficientdet_nano", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": "efficientdet_nano", "state_dict": [1]}, "holds no state dict, but a list"),
        ({1: torch.zeros(1)}, "holds no state dict: its key 1 is no text"),
        ({"model": "efficientdet_nano", "lr": 0.1}, "holds no state dict, but a str"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth: {message}"):
        load_model("efficientdet_nano", tmp_path / "odd.pth")


def test_a_state_dict_under_model_is_found(tmp_path, state_dict):
    torch.save({"model": state_dict, "epoch": 3}, tmp_path / "run.pth")
    assert len(load_model("efficientdet_nano", tmp_path / "run.pth").class_names) == 3


def test_averaged_weights_are_taken_first_and_the_file_says_what_they_are(tmp_path, state_dict):
    path = tmp_path / "run.pth"
    torch.save(
        {
            "model": "efficientdet_nano",
            "image_size": [96, 128],
            "class_names": ["a", "b", "c"],
            "category_ids": [5, 7, 9],
            "state_dict": {key: torch.zeros_like(value) for key, value in state_dict.items()},
            "state_dict_ema": state_dict,
        },
        path,
    )
    loaded = load_model("", path)
    assert tuple(loaded.model.config.image_size) == (96, 128)
    assert (loaded.class_names, loaded.category_ids) == (["a", "b", "c"], [5, 7, 9])
    assert torch.equal(
        loaded.model.state_dict()["backbone.conv_stem.weight"],
        state_dict["backbone.conv_stem.weight"],
    )
    assert tuple(load_model("", path, (64, 64)).model.config.image_size) == (64, 64)


def test_names_that_do_not_fit_the_weights_are_counted(tmp_path, state_dict):
    path = tmp_path / "run.pth"
    torch.save({"model": "efficientdet_nano", "class_names": ["a"], "state_dict": state_dict}, path)
    with pytest.raises(CheckpointError, match=r"1 class names .* weights of 3 classes"):
        load_model("", path)


def test_a_model_without_published_weights_says_so():
    with pytest.raises(ValueError, match="efficientdet_nano: has no published weights"):
        load_model("efficientdet_nano")


def test_names_of_the_published_classes():
    names = default_class_names(90)
    assert len(names) == 90
    assert (names[0], names[17], names[89]) == ("person", "dog", "toothbrush")
    assert names[11] == "unused 12"
