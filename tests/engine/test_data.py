from __future__ import annotations

import random

import pytest

from effdet.engine.data import EpochBatches, SeededSamples


class _RandomDataset:
    def __getitem__(self, index):
        return index, random.random()


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    samples = SeededSamples(_RandomDataset(), seed=1)
    first = samples[0, 3]
    random.seed(99)
    assert samples[0, 3] == first
    others = [samples[1, 3][1], samples[0, 4][1], SeededSamples(_RandomDataset(), seed=2)[0, 3][1]]
    assert first[1] not in others


def test_the_global_generator_is_left_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    _ = SeededSamples(_RandomDataset(), seed=1)[0, 0]
    assert random.random() == expected


def test_an_epoch_visits_each_image_once_in_its_own_order():
    batches = EpochBatches(count=10, batch_size=3, seed=0)
    orders = []
    for epoch in range(2):
        batches.seek(epoch, 0)
        keys = [key for batch in batches for key in batch]
        assert {e for e, _ in keys} == {epoch}
        orders.append([index for _, index in keys])
    assert len(batches) == 3
    assert all(len(set(order)) == 9 for order in orders)
    assert orders[0] != orders[1]


def test_seek_continues_where_an_uninterrupted_epoch_would_be():
    batches = EpochBatches(count=10, batch_size=2, seed=0)
    batches.seek(4, 0)
    whole = list(batches)
    batches.seek(4, 3)
    assert list(batches) == whole[3:]
    batches.seek(4, 5)
    assert list(batches) == []


def test_a_batch_larger_than_the_data_is_named():
    with pytest.raises(ValueError, match="batch_size: got 8, but the training split has 5 images"):
        EpochBatches(count=5, batch_size=8, seed=0)
