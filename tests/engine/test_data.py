from __future__ import annotations

import pytest
import torch

from effdet import get_efficientdet_config
from effdet.data import coco_folder, set_epoch
from effdet.engine.config import TrainConfig
from effdet.engine.data import eval_loader, train_loader
from effdet.scenes import generate_scenes

CPU = torch.device("cpu")
MODEL = get_efficientdet_config("efficientdet_nano")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    generate_scenes(folder, 7, seed=3, size=64)
    return folder


def loader_of(scenes, **settings):
    config = TrainConfig(data=str(scenes), out="", batch_size=2, **{"workers": 0, **settings})
    return train_loader(coco_folder(scenes, "train"), MODEL, config, CPU)


def batches(loader, epoch, first_batch=0):
    set_epoch(loader, epoch, first_batch)
    return [(images.clone(), target["img_idx"].tolist()) for images, target in loader]


def equal(a, b):
    return len(a) == len(b) and all(
        i == j and torch.equal(x, y) for (x, i), (y, j) in zip(a, b, strict=True)
    )


def test_an_epoch_has_whole_batches_in_an_order_of_its_own(scenes):
    loader = loader_of(scenes)
    first, second = batches(loader, 0), batches(loader, 1)
    for epoch in (first, second):
        seen = [i for _, indices in epoch for i in indices]
        assert len(epoch) == 3 and len(set(seen)) == 6
    assert [i for _, i in first] != [i for _, i in second]


def test_samples_depend_on_seed_and_epoch_alone(scenes):
    expected = batches(loader_of(scenes), 1)
    torch.manual_seed(99)
    assert equal(batches(loader_of(scenes, workers=2), 1), expected)
    assert not equal(batches(loader_of(scenes, seed=1), 1), expected)


def test_an_epoch_can_be_entered_in_its_middle(scenes):
    loader = loader_of(scenes)
    whole = batches(loader, 4)
    assert equal(batches(loader, 4, first_batch=2), whole[2:])
    assert batches(loader, 4, first_batch=3) == []


def test_the_global_generators_are_left_alone(scenes):
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    batches(loader_of(scenes), 0)
    list(eval_loader(coco_folder(scenes, "train"), MODEL, 4, 0, CPU))
    assert torch.equal(torch.rand(()), expected)


def test_evaluation_visits_every_image_once_in_order(scenes):
    loader = eval_loader(coco_folder(scenes, "train"), MODEL, 4, 0, CPU, size=(64, 96))
    found = list(loader)
    assert [i for _, target in found for i in target["img_idx"].tolist()] == list(range(7))
    assert found[-1][0].shape == (3, 3, 64, 96)


def test_a_batch_larger_than_the_data_is_named(scenes):
    config = TrainConfig(data=str(scenes), out="", batch_size=8)
    with pytest.raises(ValueError, match="batch_size: got 8, but the training split has 7 images"):
        train_loader(coco_folder(scenes, "train"), MODEL, config, CPU)
