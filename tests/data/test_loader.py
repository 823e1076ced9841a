"""Batches: their form, nothing lost silently, the same whatever the number of workers."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch

from effdet.anchors import AnchorLabeler, Anchors
from effdet.data import SkipSubset, coco_folder, create_loader, set_epoch
from effdet.data.loader import DetectionFastCollate, PrefetchLoader
from effdet.data.samplers import EpochSampler
from effdet.data.seeding import sample_rng


def _sample(count: int, **target) -> tuple[np.ndarray, dict]:
    image = np.zeros((3, 4, 5), dtype=np.uint8)
    boxes = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
    return image, {"bbox": boxes, "cls": np.arange(1, count + 1), **target}


def test_collate():
    images, target = DetectionFastCollate(max_instances=4)(
        [
            _sample(2, img_idx=3, img_size=(7, 8), img_scale=0.5),
            _sample(0, img_idx=4, img_size=(9, 10), img_scale=2.0),
        ]
    )
    assert images.shape == (2, 3, 4, 5) and images.dtype == torch.uint8
    assert target["bbox"].shape == (2, 4, 4) and target["cls"].shape == (2, 4)
    assert target["cls"].tolist() == [[1, 2, -1, -1], [-1] * 4]
    assert target["bbox"][0, 1].tolist() == [4, 5, 6, 7]
    assert (target["bbox"][0, 2:] == -1).all() and (target["bbox"][1] == -1).all()
    dtypes = {key: value.dtype for key, value in target.items()}
    assert dtypes == {
        "bbox": torch.float32,
        "cls": torch.float32,
        "img_idx": torch.int64,
        "img_size": torch.int32,
        "img_scale": torch.float32,
    }
    assert target["img_size"].tolist() == [[7, 8], [9, 10]]


def test_keys_of_all_samples_are_kept():
    samples = [_sample(1), _sample(1, img_idx=4, bbox_ignore=np.ones((2, 4), np.float32))]
    del samples[1][1]["cls"]
    _, target = DetectionFastCollate(max_instances=2)(samples)
    assert target["img_idx"].tolist() == [-1, 4]
    assert target["bbox_ignore"][:, :, 0].tolist() == [[-1, -1], [1, 1]]
    assert target["cls"].tolist() == [[1, -1], [-1, -1]]


def test_boxes_that_do_not_fit_are_counted_and_warned_about_once():
    collate = DetectionFastCollate(max_instances=2)
    with pytest.warns(UserWarning) as caught:
        _, target = collate([_sample(5), _sample(1)])
        collate([_sample(3)])
    assert len(caught) == 1
    assert "5 boxes, max_instances=2: the last 3 are left out" in str(caught[0].message)
    assert collate.dropped_instances == 4
    assert target["cls"].tolist() == [[1, 2], [1, -1]]


def test_custom_instance_key():
    collate = DetectionFastCollate(instance_keys={"bbox", "cls", "area"}, max_instances=3)
    _, target = collate([_sample(1, area=np.array([2.5])), _sample(2, area=np.array([3, 4]))])
    assert target["area"].tolist() == [[2.5, -1, -1], [3, 4, -1]]


def test_ragged_key_is_refused():
    samples = [_sample(1, area=np.ones(1)), _sample(1, area=np.ones(2))]
    with pytest.raises(ValueError, match=r"target 'area' has shapes .* instance_keys"):
        DetectionFastCollate()(samples)


def test_labels_made_in_the_collate(make_coco):
    dataset = coco_folder(make_coco(4), "train")
    labeler = AnchorLabeler(Anchors(3, 7, 3, [1.0, 2.0, 0.5], 4.0, (128, 128)), 2)
    plain = next(iter(create_loader(dataset, 128, 4, num_workers=0, device="cpu")))[1]
    loader = create_loader(
        dataset, 128, 4, num_workers=0, device="cpu", anchor_labeler=labeler, max_instances=0
    )
    target = next(iter(loader))[1]
    classes, boxes, positives = labeler.batch_label_anchors(plain["bbox"], plain["cls"])
    assert "bbox" not in target and "cls" not in target
    assert positives.min() > 0
    assert torch.equal(target["label_num_positives"], positives)
    for level in range(5):
        assert torch.equal(target[f"label_cls_{level}"], classes[level])
        assert torch.equal(target[f"label_bbox_{level}"], boxes[level])


@pytest.mark.parametrize("is_training", [False, True])
def test_with_and_without_prefetcher(make_coco, is_training):
    dataset = coco_folder(make_coco(5), "train")
    batches = []
    for use_prefetcher in (True, False):
        loader = create_loader(
            dataset,
            (3, 32, 64),
            2,
            is_training,
            use_prefetcher,
            num_workers=0,
            device="cpu",
            seed=3,
        )
        assert len(loader) == 3
        batches.append(list(loader))
    for (images, target), (other_images, other_target) in zip(*batches, strict=True):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 32, 64)
        torch.testing.assert_close(images, other_images)
        assert all(torch.equal(target[key], other_target[key]) for key in target)


def _stream(loader) -> list[torch.Tensor]:
    return [tensor for images, target in loader for tensor in (images, *target.values())]


def _equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("use_prefetcher", [False, True])
def test_samples_depend_on_seed_and_epoch_only(make_coco, use_prefetcher):
    dataset = coco_folder(make_coco(7), "train")

    def loader(workers: int, seed: int = 3):
        return create_loader(
            dataset, 32, 2, True, use_prefetcher, num_workers=workers, device="cpu", seed=seed
        )

    reference = loader(0)
    set_epoch(reference, 4)
    random.seed(1)
    epoch4 = _stream(reference)
    random.seed(2)
    assert _equal(_stream(reference), epoch4)
    with_workers = loader(2)
    set_epoch(with_workers, 4)
    assert _equal(_stream(with_workers), epoch4)
    set_epoch(with_workers, 4, first_batch=2)
    assert len(with_workers) == 2
    assert _equal(_stream(with_workers), epoch4[-2 * len(epoch4) // 4 :])
    set_epoch(with_workers, 5)
    assert not _equal(_stream(with_workers), epoch4)
    other_seed = loader(0, seed=4)
    set_epoch(other_seed, 4)
    assert not _equal(_stream(other_seed), epoch4)


def test_global_generators_are_left_alone(make_coco):
    dataset = coco_folder(make_coco(3), "train")
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    expected = random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    list(create_loader(dataset, 32, 2, True, num_workers=0, device="cpu", seed=3))
    assert (random.random(), np.random.random(), torch.rand(1)) == expected  # noqa: NPY002


def test_sample_rng_seeds_every_generator():
    def draw(index: int) -> tuple:
        with sample_rng(1, 2, index):
            return random.random(), np.random.random(), float(torch.rand(1))  # noqa: NPY002

    first = draw(3)
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    assert draw(3) == first
    assert not set(draw(4)) & set(first)


def test_skip_subset(make_coco):
    subset = SkipSubset(coco_folder(make_coco(5), "train"), 2)
    loader = create_loader(subset, 32, 8, num_workers=0, device="cpu", seed=1)
    set_epoch(loader, 2)
    _, target = next(iter(loader))
    assert target["img_idx"].tolist() == [0, 2, 4]
    assert subset.seed == subset.dataset.seed == 1 and subset.dataset.epoch == 2
    assert subset.parser is subset.dataset.parser
    with pytest.raises(ValueError, match="n: got 0"):
        SkipSubset(subset, 0)


def test_custom_transform_and_collate(make_coco):
    dataset = coco_folder(make_coco(2), "train")
    loader = create_loader(
        dataset,
        32,
        2,
        use_prefetcher=False,
        num_workers=0,
        transform_fn=lambda image, target: (image.size, target),
        collate_fn=lambda batch: [image for image, _ in batch],
    )
    assert next(iter(loader)) == [(64, 48), (64, 48)]


def test_prefetch_loader_attributes(make_coco):
    dataset = coco_folder(make_coco(2), "train")
    loader = create_loader(dataset, 32, 2, num_workers=0, device="cpu")
    assert isinstance(loader, PrefetchLoader)
    assert loader.dataset is dataset and isinstance(loader.sampler, EpochSampler)


def test_erasing_in_training_only(make_coco):
    dataset = coco_folder(make_coco(2), "train")
    settings = {"num_workers": 0, "device": "cpu", "re_prob": 1.0, "re_mode": "const"}
    plain = next(iter(create_loader(dataset, 64, 2, num_workers=0, device="cpu")))[0]
    erased = create_loader(dataset, 64, 2, is_training=False, **settings)
    assert torch.equal(next(iter(erased))[0], plain)
    training = create_loader(dataset, 64, 2, is_training=True, seed=1, **settings)
    assert training.random_erasing is not None
    assert (next(iter(training))[0] == 0).any()  # only the mean colour itself becomes 0


def test_empty_batches_of_boxes_give_no_warning(make_coco):
    dataset = coco_folder(make_coco(2, []), "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, target = next(iter(create_loader(dataset, 32, 2, True, num_workers=0, device="cpu")))
    assert (target["cls"] == -1).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("shuffle", [False, True])
def test_sampler_shares(shuffle, world_size):
    samplers = [EpochSampler(range(7), shuffle, 5, rank, world_size) for rank in range(world_size)]
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {len(samplers[0])}
        assert {index for share in shares for index in share} == set(range(7))
        order = [share[place] for place in range(len(samplers[0])) for share in shares]
        assert sorted(order[:7]) == list(range(7))
        assert (order[:7] == list(range(7))) == (not shuffle)


def test_sampler_epochs_differ():
    sampler = EpochSampler(range(50), True, seed=0)
    orders = set()
    for seed in (0, 1, None, None):
        for epoch in (0, 1):
            sampler.seed = seed
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetch_on_cuda_gives_the_same_batches(make_coco):
    dataset = coco_folder(make_coco(40), "train")
    on_cpu = create_loader(dataset, 256, 4, num_workers=2, device="cpu")
    on_cuda = create_loader(dataset, 256, 4, num_workers=2, pin_mem=True, device="cuda:0")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # not the stream that the loader was made on
        for (images, target), (cuda_images, cuda_target) in zip(on_cpu, on_cuda, strict=True):
            assert torch.cuda.current_stream() == stream
            torch.testing.assert_close(cuda_images.cpu(), images)
            assert all(torch.equal(cuda_target[key].cpu(), target[key]) for key in target)
