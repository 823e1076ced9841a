"""The plan: the same numbers as module by module, and everything that must make it stand aside or start anew."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import random

import pytest
import torch
from torch import nn

import effdet
from effdet import plan as plan_module
from effdet.native_plan import Buffer, Plan, place
from effdet.plan import use_plan
from effdet_kernels import _native, use_backend

from .networks import in_threads


def build(name: str = "tf_efficientdet_d0", **options) -> nn.Module:
    """A small network whose norms have statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = effdet.create_model(name, pretrained_backbone=False, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def flat(maps) -> list[torch.Tensor]:
    return [*maps[0], *maps[1]]


@torch.no_grad()
def planned(model, x):
    """The outputs, which must come from a plan."""
    assert isinstance(model._plans.find(model, model._network, x), Plan)
    return flat(model(x))


@torch.no_grad()
def unplanned(model, x):
    with use_plan(False):
        return flat(model(x))


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def runs(monkeypatch):
    """A list with an entry for each call that a plan served."""
    served = []
    run = Plan.run

    def counted(self, *args):
        served.append(self)
        return run(self, *args)

    monkeypatch.setattr(Plan, "run", counted)
    return served


@pytest.mark.parametrize(
    "name",
    [
        "tf_efficientdet_d0",
        "efficientdet_d0",
        "tf_efficientdet_lite0",
        "tf_efficientdet_d1",
        "efficientdet_q0",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 96, 160), (2, 70, 101)])
def test_numbers_are_those_of_the_modules(name, dtype, shape):
    network = build(name).to(dtype)
    x = torch.randn(shape[0], 3, *shape[1:]).to(dtype)
    want = unplanned(network, x)
    got = planned(network, x)
    assert same(got, want)
    assert [y.stride() for y in got] == [y.stride() for y in want]


def test_the_reference_agrees(model):
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), use_backend("reference"):
        want = flat(model(x))
    for got, expected in zip(planned(model, x), want, strict=True):
        assert (got - expected).abs().max() <= 1e-3 * expected.std()


def test_a_plan_serves_eval_without_gradients_only(model, runs):
    x = torch.randn(2, 3, 64, 64)
    model(x)  # gradients are on
    with torch.no_grad():
        model.train()
        try:
            model(x)
        finally:
            model.eval()
        with use_plan(False):
            model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        with use_backend("reference"):
            model(x)
        assert not runs
        model(x)
        with use_backend("cpu"):
            model(x)
    with torch.inference_mode():
        model(x)
    assert len(runs) == 3


def test_hooks_and_training_submodules_run_module_by_module(runs):
    network, x, seen = build(), torch.randn(2, 3, 64, 64), []
    with torch.no_grad():
        network(x)
        handle = network.backbone.blocks[1].register_forward_hook(lambda *_: seen.append(1))
        network(x)
        assert seen and len(runs) == 1
        handle.remove()
        network(x)
        assert len(runs) == 2
        network.fpn.train()
        network(x)
        assert len(runs) == 2


def test_gradients_flow_in_eval_mode(model):
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    sum(y.sum() for y in flat(model(x))).backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0
    model.zero_grad()


def test_frozen_norms_are_fine_tuned_and_the_next_plan_has_the_new_weights():
    network, x = build(), torch.randn(2, 3, 64, 64)
    before = planned(network, x)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    sum(y.square().mean() for y in flat(network(x))).backward()
    assert network.backbone.bn1.weight.grad.abs().max() > 0
    optimizer.step()
    after = planned(network, x)
    assert not same(before, after)
    assert same(after, unplanned(network, x))


def test_results_are_not_overwritten_by_the_next_call(model):
    first = planned(model, torch.randn(1, 3, 64, 64))
    kept = [y.clone() for y in first]
    planned(model, torch.randn(1, 3, 64, 64))
    assert same(first, kept)


def _in_place(network):
    with torch.no_grad():
        network.class_net.predict.conv_pw.bias.add_(1)


def _loaded(network):
    network.load_state_dict({k: v * 0.9 for k, v in network.state_dict().items()})


def _assigned(network):
    state = {k: v * 0.9 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    network.load_state_dict(state, assign=True)


def _data_replaced(network):
    weight = network.backbone.conv_stem.weight
    weight.data = weight.data * 2


def _parameter_replaced(network):
    conv = network.box_net.predict.conv_pw
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def _module_replaced(network):
    network.backbone.act1 = nn.ReLU().eval()


def _statistics(network):
    network.backbone.bn1.running_mean.add_(0.5)


def _fusion_weight(network):
    with torch.no_grad():
        network.fpn.cell[0].fnode[0].combine.edge_weights.mul_(torch.tensor([1.0, 3.0]))


CHANGES = [
    _in_place,
    _loaded,
    _assigned,
    _data_replaced,
    _parameter_replaced,
    _module_replaced,
    _statistics,
    _fusion_weight,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_of_the_model_are_seen(change):
    network, x = build(), torch.randn(1, 3, 64, 64)
    before = planned(network, x)
    change(network)
    after = planned(network, x)
    assert not same(before, after)
    assert same(after, unplanned(network, x))


def test_what_data_hides_needs_a_refresh():
    network, x = build(), torch.randn(1, 3, 64, 64)
    planned(network, x)
    network.class_net.predict.conv_pw.bias.data.add_(1)
    network.refresh()
    assert same(planned(network, x), unplanned(network, x))


def test_another_dtype_makes_another_plan():
    network, x = build(), torch.randn(1, 3, 64, 64)
    planned(network, x)
    network.to(torch.float64)
    assert same(planned(network, x.double()), unplanned(network, x.double()))


def test_copies_have_plans_of_their_own():
    network, x = build(), torch.randn(1, 3, 64, 64)
    want = planned(network, x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert same(planned(other, x), want)
        with torch.no_grad():
            other.backbone.conv_stem.weight.mul_(2)
        assert not same(planned(other, x), want)
    assert same(planned(network, x), want)


def test_an_averaged_model_and_data_parallel_work():
    network, x = build(), torch.randn(2, 3, 64, 64)
    average = torch.optim.swa_utils.AveragedModel(network)
    with torch.no_grad():
        network.backbone.conv_stem.weight.mul_(2)
    average.update_parameters(network)
    average.eval()
    assert same(planned(average.module, x), unplanned(average.module, x))
    with torch.no_grad():
        assert same(flat(nn.DataParallel(network)(x)), planned(network, x))


def test_two_threads_may_call_one_model(model):
    images = [torch.randn(1, 3, 64, 64) for _ in range(4)]
    want = [planned(model, x) for x in images]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                if not same(flat(model(images[i])), want[i]):
                    wrong.append(i)

    in_threads(work, 4)
    assert not wrong


def test_the_number_of_threads_does_not_matter(model):
    x, threads = torch.randn(1, 3, 96, 96), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(planned(model, x))
    finally:
        torch.set_num_threads(threads)
    assert same(found[0], found[1]) and same(found[0], found[2])


def _worker(network, x, queue):
    torch.set_num_threads(1)  # as a DataLoader's worker does
    queue.put([y.numpy().copy() for y in planned(network, x)])


def test_a_forked_process_runs_the_plan(model):
    x = torch.randn(1, 3, 64, 64)
    want = planned(model, x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_worker, args=(model, x, queue))
    process.start()
    got = [torch.from_numpy(y) for y in queue.get()]
    process.join()
    assert process.exitcode == 0 and same(got, want)


def test_plans_are_bounded_and_arenas_reused(model):
    model.refresh()
    for side in range(64, 64 + 32 * 10, 32):
        planned(model, torch.randn(1, 3, side, side))
    assert len(model._plans._plans) == plan_module._MAX_PLANS
    planned(model, torch.randn(1, 3, 64, 64))
    assert len(model._plans._arenas) == 1


def test_images_of_other_layouts(model):
    x = torch.randn(2, 3, 128, 192)
    want = unplanned(model, x)
    wide = torch.randn(2, 5, 140, 199)
    wide[:, 1:4, 2:130, 1:193] = x
    for other in (x.contiguous(memory_format=torch.channels_last), wide[:, 1:4, 2:130, 1:193]):
        assert same(planned(model, other), want)


def test_a_network_with_other_operations_runs_without_a_plan():
    config = effdet.get_efficientdet_config("tf_efficientdet_d0")
    config.backbone_args.feature_location = "expansion"
    network = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = network._plans.find(network, network._network, x)
        assert isinstance(found, plan_module.NotPlannableError) and "mul" in str(found)
        assert same(flat(network(x)), unplanned(network, x))


def test_bad_images_are_refused_before_any_plan(model):
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"x: got shape \(3, 64, 64\)"):
            model(torch.randn(3, 64, 64))
        with pytest.raises(ValueError, match="weight"):
            model(torch.randn(1, 4, 64, 64))
        with pytest.raises(TypeError, match="float64"):
            model(torch.randn(1, 3, 64, 64, dtype=torch.float64))
        planned(model, torch.randn(1, 3, 64, 64))


def test_most_memory_between_maps_is_shared(model):
    with torch.no_grad():
        found = model._plans.find(model, model._network, torch.randn(1, 3, 512, 512))
    stem = 256 * 256 * 32 * 4
    assert (
        found.arena_bytes < 1.1 * stem
    )  # of two maps of that size that are needed at once, one is in an output
    assert len(found.names) < 100


@pytest.mark.parametrize("seed", range(20))
def test_no_two_buffers_that_are_needed_at_once_overlap(seed):
    draw = random.Random(seed)
    buffers = []
    for _ in range(60):
        first = draw.randrange(40)
        buffers.append(Buffer(draw.randrange(1, 5000), first, first + draw.randrange(8)))
    outputs = [Buffer(draw.randrange(100, 20000), draw.randrange(20, 50), 50) for _ in range(3)]
    places, arena = place(buffers, outputs)
    sizes = [arena, *[output.size for output in outputs]]
    for i, (space, offset) in enumerate(places):
        mine = buffers[i]
        assert offset % 64 == 0 and offset + mine.size <= sizes[space]
        assert not space or mine.last < outputs[space - 1].first
        for j in range(i):
            other_space, other = places[j]
            apart = offset + mine.size <= other or other + buffers[j].size <= offset
            alive = mine.first <= buffers[j].last and buffers[j].first <= mine.last
            assert apart or not alive or space != other_space


def test_a_copying_launcher_is_not_recorded():
    import effdet_kernels as ek

    x, w = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 1, 1)
    with pytest.raises(_native.NotRecordableError, match="strides"), _native.recorded():
        ek.pointwise_conv(x, w)  # NCHW: a copy is made
