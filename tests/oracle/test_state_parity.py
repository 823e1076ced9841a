"""Weights move between PyPI effdet and this package, both ways: the same keys in the same order, strictly."""

from __future__ import annotations

import pytest
import torch

from effdet import create_model


@pytest.mark.parametrize("bench_task", ["", "train", "predict"])
@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_d0"])
def test_weights_both_ways(oracle, name, bench_task):
    model = create_model(name, bench_task=bench_task, pretrained_backbone=False)
    ours = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = oracle.call("state_of", name=name, bench_task=bench_task)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key

    model.load_state_dict(theirs, strict=True)
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
    back = oracle.call("state_of", name=name, bench_task=bench_task, state=ours)
    assert all(torch.equal(value, ours[key]) for key, value in back.items())
