"""Batch norm over several processes: with unequal batches it is one process with all images.

Two processes run everything once (`work`), each on its own share; the tests compare what they left with one process.
"""

from __future__ import annotations

import contextlib
import copy
import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from effdet import create_model, fused, sync_norm
from effdet_kernels.ops._activations import ACTIVATIONS, moments

from .networks import flat

WORLD = 2
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
EPS, MOMENTUM = 1e-3, 0.3
# By process the shape of its map.
IMAGES = (3, 6, 4, 7), (2, 6, 4, 7)
SIZES = (2, 6, 5, 3), (1, 6, 2, 2)
ONE_VALUE = (1, 6, 1, 1), (1, 6, 1, 1)
ONE_EMPTY = (2, 6, 3, 5), (0, 6, 3, 5)
SHAPES = {"images": IMAGES, "sizes": SIZES, "one value each": ONE_VALUE, "one empty": ONE_EMPTY}
HALF = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
BATCHES = (2, 1)
PLANTED = {
    "sums of one process": lambda: planted("dist.all_reduce", lambda sums, group: None),
    "count of one process": lambda: planted("_moments_of_all", with_own_count),
    "mean of means": lambda: planted("_moments_of_all", with_plain_means),
}


def planted(name: str, wrong: Callable[..., Any]) -> Any:
    return unittest.mock.patch(f"effdet.sync_norm.{name}", wrong)


def with_own_count(x, statistics, group, right=sync_norm._moments_of_all):
    mean, variance, count = right(x, statistics, group)
    return mean, variance, torch.full_like(count, x.numel() // x.shape[1])


def with_plain_means(x, statistics, group, right=sync_norm._moments_of_all):
    _, variance, count = right(x, statistics, group)
    mean = moments(x)[0]
    dist.all_reduce(mean, group=group)
    return mean / WORLD, variance, count


# What both sides draw ------------------------------------------------------------------------------


def drawn(shapes: Sequence[Sequence[int]], mean: float = 0.5) -> list[tuple[Tensor, Tensor]]:
    """By process x and the gradient of y."""
    generator = torch.Generator().manual_seed(3)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(draw(shape) * 1.5 + mean, draw(shape)) for shape in shapes]


def norm_of(kind: Callable[..., nn.Module] = nn.SyncBatchNorm, **how: Any) -> nn.Module:
    norm = kind(6, eps=EPS, **{"momentum": MOMENTUM, **how}).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, -1.5, 6))
        norm.bias.copy_(torch.linspace(-1, 1, 6))
    return norm


def step(
    x: Tensor,
    grad: Tensor,
    norm: nn.Module,
    act: str = "swish",
    statistics: Sequence[Tensor] = (),
    needs: bool = True,
) -> dict[str, Tensor]:
    """A norm's outputs, gradients and running statistics after a forward and a backward."""
    x = x.clone().requires_grad_(needs)
    y = fused.norm_act(x, norm, fused.activation_class(act)(), statistics)
    y.backward(grad)
    found = {"y": y.detach(), "weight": norm.weight.grad, "bias": norm.bias.grad}
    found |= {"mean": norm.running_mean, "variance": norm.running_var}
    return found | ({"x": x.grad} if needs else {})


def model_step(model: nn.Module, x: Tensor, called: nn.Module | None = None) -> dict[str, Tensor]:
    """Loss, gradients and running statistics after a step; the loss of a batch is the sum of those of its images.

    `called`: what is called in place of the model.
    """
    classes, boxes = (called or model)(x)
    loss = torch.stack([y.sin().sum() / y[0].numel() for y in (*classes, *boxes)]).sum()
    loss.backward()
    grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return {"loss": loss.detach(), **grads, **buffers}


def network() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("efficientdet_nano", pretrained_backbone=False, num_classes=3)
    return model.double().train()


def model_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    both = torch.randn(sum(BATCHES), 3, 64, 64, generator=generator, dtype=torch.float64)
    return list(both.split(BATCHES))


# The processes -------------------------------------------------------------------------------------


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    for act in ACTIVATIONS:
        found[f"act {act}"] = step(*drawn(IMAGES)[rank], norm_of(), act)
    for name, shapes in SHAPES.items():
        found[name] = step(*drawn(shapes)[rank], norm_of())
    x, grad = drawn(IMAGES)[rank]
    found["given"] = step(x, grad, norm_of(), statistics=moments(x))
    found["frozen below"] = step(x, grad, norm_of(), needs=rank == 1)
    found["cumulative"] = step(x, grad, norm_of(momentum=None))
    for dtype in HALF:
        found[str(dtype)] = step(x.to(dtype), grad.to(dtype), norm_of().float())
    far = [value.float() for value in drawn(IMAGES, mean=3000.0)[rank]]
    found["far from zero"] = step(*far, norm_of().float())
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = step(x.float(), grad.bfloat16(), norm_of().float())
    for name, plant in PLANTED.items():
        with plant():
            found[f"planted {name}"] = step(x, grad, norm_of())
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    found["alone"] = step(x, grad, norm_of(process_group=alone))
    found["two values"] = refusal(rank)
    with counted() as collectives:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
        found["model"] = model_step(model, model_images()[rank])
    wrapped = nn.parallel.DistributedDataParallel(network())
    nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)
    found["wrapped"] = model_step(wrapped.module, model_images()[rank], wrapped)
    norms = sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    found["collectives"] = (collectives, norms, norms_of_heads(model))
    torch.save(found, f"{folder}/{rank}.pt")
    del wrapped  # as the last owner of the group it could wait for ever for gloo's threads
    dist.destroy_process_group()


def refusal(rank: int) -> str:
    """What is said where all processes together have one value per channel."""
    x = torch.zeros((1, 0)[rank], 6, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        fused.norm_act(x, norm_of(), None)
    return str(error.value)


@contextlib.contextmanager
def counted():
    counts = dict.fromkeys((GATHER, "all_reduce"), 0)

    def counting(name: str, right: Callable[..., Any]) -> Any:
        def call(*args: Any, **how: Any) -> Any:
            counts[name] += 1
            return right(*args, **how)

        return unittest.mock.patch.object(dist, name, call)

    with contextlib.ExitStack() as stack:
        for name in counts:
            stack.enter_context(counting(name, getattr(dist, name)))
        yield counts


def norms_of_heads(model: nn.Module) -> int:
    nets = model.class_net, model.box_net
    return sum(isinstance(m, nn.SyncBatchNorm) for net in nets for m in net.modules())


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What each process has left."""
    folder = str(tmp_path_factory.mktemp("processes"))
    torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


# One process ---------------------------------------------------------------------------------------


def pixels(x: Tensor) -> Tensor:
    """[1, C, N, 1]: all values of each channel as one image."""
    return x.movedim(1, 0).reshape(1, x.shape[1], -1, 1)


def expected(shapes: Sequence[Sequence[int]], act: str = "swish", **how: Any) -> dict[str, Tensor]:
    """Of `nn.BatchNorm2d` on the values of all processes, by torch."""
    shares = drawn(shapes, how.pop("mean", 0.5))
    x, grad = (torch.cat([pixels(share[i]) for share in shares], 2) for i in range(2))
    norm = norm_of(nn.BatchNorm2d, **how)
    x.requires_grad_()
    y = ACTIVATIONS[act](norm(x))
    y.backward(grad)
    result = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return result | {"mean": norm.running_mean, "variance": norm.running_var}


def together(shares: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Maps of the processes one after the other, gradients of parameters added up, running statistics of the first."""
    maps = {n: torch.cat([pixels(share[n]) for share in shares], 2) for n in ("y", "x")}
    sums = {n: shares[0][n] + shares[1][n] for n in ("weight", "bias")}
    return maps | sums | {n: shares[0][n] for n in ("mean", "variance")}


def off(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """By name the largest error, relative to the largest entry."""
    assert found.keys() == exact.keys()
    return {n: float((found[n] - exact[n]).abs().max() / exact[n].abs().max()) for n in exact}


def of(found: list[dict[str, Any]], name: str) -> list[dict[str, Tensor]]:
    return [share[name] for share in found]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_two_processes_are_one_with_all_images(found, act):
    shares = of(found, f"act {act}")
    assert max(off(together(shares), expected(IMAGES, act)).values()) <= 1e-12
    for name in ("mean", "variance"):
        assert torch.equal(shares[0][name], shares[1][name])


@pytest.mark.parametrize("name", SHAPES)
def test_shares_of_any_size(found, name):
    assert max(off(together(of(found, name)), expected(SHAPES[name])).values()) <= 1e-12


def test_statistics_of_the_convolution_are_those_of_one_process(found):
    assert max(off(together(of(found, "given")), expected(IMAGES)).values()) <= 1e-12


def test_a_process_whose_map_needs_no_gradient_takes_part(found):
    frozen, other = of(found, "frozen below")
    exact = expected(IMAGES)
    assert "x" not in frozen
    exact["x"] = exact["x"][:, :, -other["x"][:, 0].numel() :]
    other["x"] = pixels(other["x"])
    assert off({"x": other["x"]}, {"x": exact["x"]})["x"] <= 1e-12
    for name in ("weight", "bias"):
        assert off({"": frozen[name] + other[name]}, {"": exact[name]})[""] <= 1e-12


def test_a_cumulative_average(found):
    exact = expected(IMAGES, momentum=None)
    assert max(off(together(of(found, "cumulative")), exact).values()) <= 1e-12


@pytest.mark.parametrize("dtype", [*HALF, "autocast"], ids=str)
def test_shorter_dtypes_have_float32_statistics(found, dtype):
    shares = of(found, str(dtype))
    assert shares[0]["mean"].dtype == torch.float32
    assert shares[0]["y"].dtype == (torch.bfloat16 if dtype == "autocast" else dtype)
    errors = off(together(shares), expected(IMAGES))
    assert max(errors.values()) <= HALF[torch.bfloat16 if dtype == "autocast" else dtype], errors


def test_a_large_mean_takes_no_digits_from_the_variance(found):
    errors = off(together(of(found, "far from zero")), expected(IMAGES, mean=3000.0))
    assert errors["variance"] <= 1e-4  # E[x^2] - E[x]^2 would be off by a third


def test_a_group_of_one_process_is_batch_norm_of_its_own(found):
    for rank, share in enumerate(of(found, "alone")):
        own = step(*drawn(IMAGES)[rank], norm_of(nn.BatchNorm2d))
        assert all(torch.equal(share[name], own[name]) for name in own)


def test_one_value_in_all_processes_is_refused_by_all(found):
    assert all("more than one value per channel" in share["two values"] for share in found)


@pytest.mark.parametrize("name", PLANTED)
def test_wrong_versions_are_seen(found, name):
    errors = off(together(of(found, f"planted {name}")), expected(IMAGES))
    assert max(errors.values()) > 1e-3, errors


def test_a_model_is_that_of_one_process_with_all_images(found):
    first, second = of(found, "model")
    exact = model_step(network(), torch.cat(model_images()))
    summed = {n for n in exact if n == "loss" or n.startswith("gradient")}
    compare_models({n: first[n] + (second[n] if n in summed else 0) for n in exact}, exact)


def compare_models(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    largest = max(float(b.abs().max()) for n, b in exact.items() if n.startswith("gradient"))
    assert found.keys() == exact.keys()
    for name, b in exact.items():
        # A bias before a norm has a gradient of 0 but for rounding, a map after one without activation such a mean.
        least = 1e-3 * largest if name.startswith("gradient") else 1e-3
        error = (found[name] - b).abs().max()
        assert error <= 1e-9 * max(float(b.abs().max()), least), name


def test_a_model_wrapped_for_several_processes_has_their_average_gradient(found):
    exact = model_step(network(), torch.cat(model_images()))
    for share in of(found, "wrapped"):
        gradients = {n: WORLD * g for n, g in share.items() if n.startswith("gradient")}
        compare_models({**exact, **gradients}, exact)


def test_a_norm_takes_one_collective_each_way(found):
    for collectives, norms, of_heads in (share["collectives"] for share in found):
        assert norms > of_heads > 0
        assert collectives == {GATHER: norms, "all_reduce": norms}


# Without processes ---------------------------------------------------------------------------------


def test_without_processes_it_is_batch_norm():
    x, grad = drawn(IMAGES)[0]
    own, other = (step(x, grad, norm_of(k)) for k in (nn.BatchNorm2d, nn.SyncBatchNorm))
    assert all(torch.equal(own[name], other[name]) for name in own)
    with pytest.raises(ValueError, match="more than one value per channel"):
        fused.norm_act(x[:1, :, :1, :1], norm_of(), None)


def test_a_converted_model_trains_as_before_without_processes():
    model = network()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    x = model_images()[0]
    before, after = model_step(model, x), model_step(converted, x)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_in_eval_mode_it_is_folded():
    model = network().float().eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    norms = [m for m in converted.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms and all(map(fused.is_folded, norms))
    x = model_images()[0].float()
    with torch.no_grad(), unittest.mock.patch.object(nn.SyncBatchNorm, "forward") as called:
        called.side_effect = AssertionError
        assert all(map(torch.equal, flat(converted, x), flat(model, x)))
    assert converted.plan_reason(x) == model.plan_reason(x)


def test_a_subclass_with_a_forward_of_its_own_is_called():
    class Own(nn.SyncBatchNorm):
        def forward(self, x):
            return x + 1

    x = torch.zeros(1, 6, 2, 2)
    assert torch.equal(fused.norm_act(x, Own(6), None), x + 1)
