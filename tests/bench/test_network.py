"""`python -m bench aot --model`: the launches of a network, noted without a GPU, and what they add up to."""

from __future__ import annotations

import collections
import math
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this run", allow_module_level=True)

from bench import launches, network
from bench.sass import Code
from effdet import graph

D0 = {  # of a profile on a GPU: bench/results/nvidia_h200/profile_d0_batch1.json
    "pointwise_conv_fwd_kernel": 37,
    "separable_conv_fwd_kernel": 32,
    "depthwise_conv_fwd_kernel": 16,
    "squeeze_excite_fwd_kernel": 16,
    "weighted_fusion_fwd_kernel": 2,
    "dense_conv_fwd_patch_kernel": 1,
}
HEADS = 4  # launches fewer since: a layer of both heads is one


@pytest.fixture
def fake_code(monkeypatch):
    """Stands in for compiling."""
    code = Code(
        registers=64,
        shared=1024,
        local=0,
        warps=4,
        outside=500,
        loops=(100,),
        vector_loads=1,
        scalar_loads=0,
        matrix="HMMA",
        special=(2, 0),
    )
    monkeypatch.setattr(launches, "compiled", lambda launch, architecture: code)


@pytest.mark.parametrize("size", [64, 512])
def test_d0_launches_what_a_gpu_was_seen_to_launch_but_for_the_heads_in_one(size):
    noted = network.of_model("tf_efficientdet_d0", size, 1, torch.bfloat16, 227)
    counts = collections.Counter(launch.kernel.__name__ for launch in noted)
    assert sum(counts.values()) == 104 - HEADS
    if size == 512:
        assert counts == {**D0, "separable_conv_fwd_kernel": 32 - HEADS}
    assert "meta" not in graph.CAPTURES


def test_d0_with_cuda_kernels_is_85_launches():
    counts = network.with_cuda("tf_efficientdet_d0", 512, 1, torch.bfloat16)
    assert sum(counts.values()) == 85
    # Norms folded together, casts of the image and of what the heads add.
    assert sum(count for name, count in counts.items() if name.startswith("aten.")) == 13


def test_the_sum_is_finite_and_grows_with_the_batch(fake_code):
    sums = []
    for batch in (1, 64):
        noted = network.of_model("tf_efficientdet_d0", 512, batch, torch.float16, 99)
        found = network.predictions(noted, 86)
        every = [p for each in found.values() for p in each]
        assert len(every) == len(noted)
        assert all(p.alone >= p.program > 0 and p.alone > p.total >= 0 for p in every)
        sums.append(sum(p.alone for p in every))
    assert all(map(math.isfinite, sums)) and sums[1] > 5 * sums[0]


def test_the_report_has_a_line_per_kernel_and_the_sum(fake_code, capsys):
    network.report("tf_efficientdet_lite0", 64, 1, "bf16", 90)
    head, columns, *rows, together, _ = capsys.readouterr().out.splitlines()
    assert head == "tf_efficientdet_lite0 64x64 b1 bf16 sm_90, microseconds"
    assert columns.split()[-1] == "sum" and together.startswith("together")
    assert int(together.split()[1]) == sum(int(row.split()[1]) for row in rows)
    total = sum(float(row.split()[-1]) for row in rows)
    assert float(together.split()[-1]) == pytest.approx(total, abs=0.5)


def test_bad_models_and_sizes_are_errors():
    with pytest.raises(ValueError, match="--model"):
        network.of_model("no_such_model", 64, 1, torch.bfloat16, 227)
    with pytest.raises(ValueError, match="got 64 and 0"):
        network.of_model("tf_efficientdet_d0", 64, 0, torch.bfloat16, 227)


@pytest.mark.slow
def test_the_kernels_of_a_network_really_compile():
    noted = network.of_model("tf_efficientdet_lite0", 64, 1, torch.bfloat16, 227)
    found = network.predictions(noted, 90)
    assert all(math.isfinite(p.alone) and p.alone > 1e-6 for each in found.values() for p in each)
