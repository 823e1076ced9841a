"""Which backend serves a call: order, requests by name, absent backends, and the backward's choice."""

from __future__ import annotations

import threading

import pytest
import torch

import effdet_kernels as ek
from effdet_kernels import BackendError, _dispatch, _library, testing, use_backend

BOXES, SCORES = torch.rand(1, 5, 4), torch.rand(1, 5)


def test_native_kernel_comes_first_on_cpu():
    op = _library.OPS["soft_nms"]
    assert _dispatch.choose("soft_nms", op.impls, "cpu") == "cpu"


def test_reference_serves_where_there_is_nothing_else():
    op = _library.OPS["batch_norm_act"]
    assert _dispatch.choose("batch_norm_act", op.impls, "cuda") == "reference"


def test_request_by_name_ends_with_its_block():
    assert _dispatch.requested() is None
    with use_backend("reference"):
        assert _dispatch.requested() == "reference"
        with use_backend(None):
            assert _dispatch.requested() is None
    assert _dispatch.requested() is None


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("EFFDET_KERNELS_BACKEND", "reference")
    assert _dispatch.requested() == "reference"
    with use_backend("cpu"):
        assert _dispatch.requested() == "cpu"
    monkeypatch.setenv("EFFDET_KERNELS_BACKEND", "refrence")
    with pytest.raises(BackendError, match=r"refrence.*takes one of reference, cpu, triton, cuda"):
        ek.soft_nms(BOXES, SCORES)


def test_unknown_name():
    with pytest.raises(BackendError, match="'tensorrt', takes one of"), use_backend("tensorrt"):
        pass


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_absent_backend_says_why(name):
    reason = _dispatch.unavailable_reason(name)
    if reason is None:
        pytest.skip(f"{name} is available here")
    with pytest.raises(BackendError) as error, use_backend(name):
        pass
    assert reason in str(error.value)


def test_backend_without_the_op_is_an_error(monkeypatch):
    monkeypatch.delitem(_library.OPS["batch_norm_act"].impls, "cpu")
    mean = torch.ones(3)
    with use_backend("cpu"), pytest.raises(BackendError, match="batch_norm_act: has no 'cpu'"):
        ek.batch_norm_act(torch.rand(2, 3, 4, 4), mean, mean, eps=1e-3)


def test_request_belongs_to_its_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_dispatch.requested()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_backward_uses_the_backend_of_the_forward(monkeypatch):
    seen = []
    op = _library.OPS["batch_norm_act"]
    overload = op._backward_overload

    def record(*args):
        seen.append(_dispatch.requested())
        return overload(*args)

    monkeypatch.setattr(op, "_backward_overload", record)
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    with use_backend("reference"), testing.through_registration(op):
        y, _, _ = ek.batch_norm_act(x, torch.ones(3), torch.ones(3), eps=1e-3)
    y.sum().backward()
    assert seen == ["reference"]


def test_a_backward_of_its_own_serves_and_else_the_next_in_order(monkeypatch):
    op = _library.OPS["pointwise_conv"]
    monkeypatch.delitem(op.backwards, "cpu")  # a kernel for the forward only
    with use_backend("cpu"):
        assert op.backward_backend("cpu") == "reference"
    called = []
    right = op.backwards["reference"]

    def backward(grads, *rest):
        called.append(rest[-1])
        return right(grads, *rest)

    monkeypatch.setitem(op.backwards, "cpu", backward)
    assert op.backward_backend("cpu") == "cpu"
    x, weight = torch.rand(2, 3, 4, 4), torch.rand(5, 3, 1, 1, requires_grad=True)
    ek.pointwise_conv(x, weight).sum().backward()
    assert called == [[False, True]]  # x, weight
    with use_backend("reference"):
        assert op.backward_backend("cpu") == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_backward_and_the_references_graph_agree(dtype, monkeypatch):
    """Eager calls without a better kernel skip the registered op; the gradients are the same bits."""
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "reference")
    op = _library.OPS["pointwise_conv"]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 4, 4, generator=generator).requires_grad_()
    weight = torch.rand(5, 3, 1, 1, generator=generator).requires_grad_()

    def gradients():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = ek.pointwise_conv(x, weight, act="swish")
            assert y.dtype == dtype
            return torch.autograd.grad(y.sum(), (x, weight))

    direct = gradients()
    with testing.through_registration(op):
        registered = gradients()
    assert all(torch.equal(a, b) for a, b in zip(registered, direct, strict=True))


# The table of orders on a GPU -----------------------------------------------------------------------


def test_the_table_names_ops_backends_and_where_its_rows_are_from():
    for op, rows in _dispatch._rows().items():
        impls = _library.OPS[op.removesuffix("_backward")]
        found = impls.backwards if op.endswith("_backward") else impls.impls
        for row in rows:
            assert row.keys() <= {"order", "provenance", "architectures", "dtypes", "up_to"}
            assert set(row["order"]) == {"cuda", "triton"} and row["order"][0] in found
            assert row["provenance"] == "predicted" or row["provenance"].startswith("measured on ")


def test_the_first_row_that_fits_a_call_gives_the_order(monkeypatch):
    small = {"order": ["triton", "cuda"], "dtypes": ["bfloat16"], "up_to": 100}
    old = {"order": ["triton", "cuda"], "architectures": [80, 86]}
    rest = {"order": ["cuda", "triton"]}
    monkeypatch.setattr(_dispatch, "_rows", lambda: {"soft_nms": [small, old, rest]})
    row = _dispatch.table_row
    assert row("soft_nms", torch.bfloat16, 100, 90) is small
    assert row("soft_nms", torch.bfloat16, 101, 90) is rest
    assert row("soft_nms", torch.float32, 10, 86) is old
    assert row("decode_topk", torch.float32, 10, 86) is None


def test_a_call_on_a_gpu_takes_the_first_backend_of_its_row_that_serves_it(monkeypatch):
    class Refusing:
        def refuses(self, args):
            return None if args[0].dtype == torch.float32 else "x: no"

    impls = {"cuda": Refusing(), "triton": len, "reference": len}
    monkeypatch.setattr(_dispatch, "unavailable_reason", lambda name: None)
    monkeypatch.setattr(_dispatch, "_architecture", lambda index: 90)
    order = {"order": ["cuda", "triton"]}
    monkeypatch.setattr(_dispatch, "_rows", lambda: {"an_op": [order]})
    whole, half = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    assert _dispatch.choose("an_op", impls, "cuda", [whole]) == "cuda"
    assert _dispatch.choose("an_op", impls, "cuda", [half]) == "triton"
    order["order"] = ["triton", "cuda"]
    assert _dispatch.choose("an_op", impls, "cuda", [whole]) == "triton"
    with use_backend("cuda"), pytest.raises(BackendError, match="'cuda' was asked for, but x: no"):
        _dispatch.choose("an_op", impls, "cuda", [half])
