"""``python -m bench compile``: what is compiled ahead, and what it says of what does not compile."""

from __future__ import annotations

import argparse
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this run", allow_module_level=True)
pytest.importorskip("triton")

from bench import ahead, launches
from bench.ahead import Pointer, Source, Variant
from effdet_kernels import _triton


def command(*words):
    parser = argparse.ArgumentParser()
    ahead.add_arguments(parser)
    return ahead.run(parser.parse_args(words))


def launch(*arguments, **options):
    def kernel():
        pass

    return _triton.Launch(kernel, 1, arguments, options, (), 0)


def key(*arguments, **options):
    return ahead.variant(launch(*arguments, **options)).key


def test_launches_that_triton_compiles_once_are_one_variant():
    x = torch.zeros(64)
    assert key(x, 32, None, ACT="none") == key(x[16:], 48, None, ACT="none")
    others = [
        key(x[1:], 32, None, ACT="none"),  # an address that is no multiple of 16
        key(x.half(), 32, None, ACT="none"),
        key(x, 33, None, ACT="none"),
        key(x, 1, None, ACT="none"),
        key(x, 2**32, None, ACT="none"),
        key(x, 32.0, None, ACT="none"),
        key(x, True, None, ACT="none"),
        key(x, 32, x, ACT="none"),
        key(x, 32, None, ACT="relu"),
        key((x, x), 32, None, ACT="none"),
    ]
    assert len({key(x, 32, None, ACT="none"), *others}) == len(others) + 1


def test_a_variant_holds_no_memory():
    x = torch.zeros(64, dtype=torch.bfloat16)
    found = ahead.variant(launch(x[1:], (x, 3), BLOCK=8))
    small, aligned = Pointer(torch.bfloat16, 2), Pointer(torch.bfloat16, 0)
    assert found.arguments == (small, (aligned, 3)) and found.options == (("BLOCK", 8),)


@pytest.mark.parametrize(
    ("source", "kernels"),
    [
        (Source("verify", "squeeze_excite", "bf16", "forward"), {"squeeze_excite_fwd_kernel"}),
        (Source("verify", "weighted_fusion", "bf16", "large"), {"weighted_fusion_fwd_kernel"}),
        (Source("verify", "soft_nms", "fp32", "gradient"), set()),
        (Source("kernels", "squeeze_excite", "bf16", "backward"), {"squeeze_excite_bwd_kernel"}),
        (Source("model", "tf_efficientdet_lite0", "bf16", "1"), {"separable_conv_fwd_kernel"}),
    ],
)
def test_sources_note_what_they_launch(source, kernels):
    found = {variant.kernel for variant in source.variants(227).values()}
    assert kernels <= found and bool(kernels) == bool(found)


def test_gradients_of_single_tensors_and_layouts_are_among_what_verify_launches():
    variants = Source("verify", "weighted_fusion", "bf16", "gradient").variants(227).values()
    assert any(p.offset for v in variants for p in v.arguments if isinstance(p, Pointer))
    backward = [v for v in variants if v.kernel == "weighted_fusion_bwd_kernel"]
    assert len({tuple(a is None for a in v.arguments) for v in backward}) > 1


def test_the_cache_has_it_afterwards(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    words = ["--of", "kernels", "--op", "squeeze_excite", "--arch", "90", "--jobs", "1"]
    assert command(*words, "--count") == 0
    assert not list(tmp_path.rglob("*.cubin"))
    assert command(*words) == 0
    printed = capsys.readouterr().out
    names = {path.name for path in tmp_path.rglob("*.cubin")}
    assert {"squeeze_excite_fwd_kernel.cubin", "squeeze_excite_bwd_kernel.cubin"} <= names
    assert "14 variants for sm_90" in printed and "0 did not compile" in printed
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    source = Source("kernels", "squeeze_excite", "bf16", "forward")
    for each in source.variants(227).values():
        assert ahead._compile(each, 90, None)[1] == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == times


def test_what_does_not_compile_is_named(monkeypatch):
    def refused(*_):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(launches, "kernel_for", refused)
    variant = Variant(
        "effdet_kernels.ops.squeeze_excite.triton_fwd", "squeeze_excite_fwd_kernel", (), ()
    )
    assert ahead._compile(variant, 90, None)[1] == "RuntimeError: out of resource: shared memory"


def test_nothing_is_begun_after_the_deadline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    words = ["--of", "kernels", "--op", "squeeze_excite", "--jobs", "1"]
    assert command(*words, "--deadline", "0") == 0
    assert "0 of 14 compiled" in capsys.readouterr().out and not list(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "softnms"], "--op: got softnms, takes batch_norm_act"),
        (["--model", "d0"], "--model: "),
        (["--batch", "0"], "--batch: got 0, takes at least 1"),
        (["--jobs", "0"], "--jobs: got 0, takes at least 1"),
    ],
)
def test_bad_arguments_are_errors(words, message):
    with pytest.raises(ValueError, match=message):
        command(*words)
