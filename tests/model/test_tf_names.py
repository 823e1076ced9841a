"""Variables of google/automl's EfficientDet, listed here as its code makes them, become our state dict.

The listing is written from what is published of that code: the blocks of EfficientNet with their width and depth
factors, and the scopes of feature network and heads. No published checkpoint was at hand to compare it with.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from effdet import create_model
from effdet.errors import CheckpointError
from effdet.tf_names import convert, read, tf_names

# repeats, kernel, expansion, in, out of EfficientNet's stages
STAGES = [
    (1, 3, 1, 32, 16), (2, 3, 6, 16, 24), (2, 5, 6, 24, 40), (3, 3, 6, 40, 80),
    (3, 5, 6, 80, 112), (4, 5, 6, 112, 192), (1, 3, 6, 192, 320),
]  # fmt: skip
# width and depth factor of the backbone, filters, cells and head repeats, levels, fusion weights
MODELS = {
    "d0": ("b0", 1.0, 1.0, 64, 3, 3, 7, True),
    "d1": ("b1", 1.0, 1.1, 88, 4, 3, 7, True),
    "d2": ("b2", 1.1, 1.2, 112, 5, 3, 7, True),
    "d3": ("b3", 1.2, 1.4, 160, 6, 4, 7, True),
    "d4": ("b4", 1.4, 1.8, 224, 7, 4, 7, True),
    "d5": ("b5", 1.6, 2.2, 288, 7, 4, 7, True),
    "d6": ("b6", 1.8, 2.6, 384, 8, 5, 7, False),
    "d7": ("b6", 1.8, 2.6, 384, 8, 5, 7, False),
    "d7x": ("b7", 2.0, 3.1, 384, 8, 5, 8, False),
}
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def filters(count: int, width: float) -> int:
    """A multiple of 8 near count * width, not less than 0.9 of it."""
    scaled = count * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def norm(scope: str, channels: int) -> Shapes:
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        yield f"{scope}/{name}", (channels,)


def backbone(name: str, width: float, depth: float) -> Shapes:
    root = f"efficientnet-{name}"
    yield f"{root}/stem/conv2d/kernel", (3, 3, 3, filters(32, width))
    yield from norm(f"{root}/stem/tpu_batch_normalization", filters(32, width))
    number = 0
    for repeats, kernel, expansion, first, out in STAGES:
        for i in range(math.ceil(repeats * depth)):
            channels = filters(out if i else first, width)
            block, wide, squeezed = f"{root}/blocks_{number}", channels * expansion, channels // 4
            kernels = [channels, wide] if expansion > 1 else [wide]
            outputs = [wide, filters(out, width)] if expansion > 1 else [filters(out, width)]
            for j, (taken, given) in enumerate(zip(kernels, outputs, strict=True)):
                yield f"{block}/conv2d{f'_{j}' if j else ''}/kernel", (1, 1, taken, given)
            norms = [*([wide] if expansion > 1 else []), wide, filters(out, width)]
            for j, given in enumerate(norms):
                yield from norm(f"{block}/tpu_batch_normalization{f'_{j}' if j else ''}", given)
            yield f"{block}/depthwise_conv2d/depthwise_kernel", (kernel, kernel, wide, 1)
            yield f"{block}/se/conv2d/kernel", (1, 1, wide, squeezed)
            yield f"{block}/se/conv2d/bias", (squeezed,)
            yield f"{block}/se/conv2d_1/kernel", (1, 1, squeezed, wide)
            yield f"{block}/se/conv2d_1/bias", (wide,)
            number += 1


def separable(scope: str, taken: int, given: int) -> Shapes:
    yield f"{scope}/depthwise_kernel", (3, 3, taken, 1)
    yield f"{scope}/pointwise_kernel", (1, 1, taken, given)
    yield f"{scope}/bias", (given,)


def resample(scope: str, taken: int, given: int) -> Shapes:
    if taken != given:
        yield f"{scope}/conv2d/kernel", (1, 1, taken, given)
        yield f"{scope}/conv2d/bias", (given,)
        yield from norm(f"{scope}/bn", given)


def pyramid(maps: list[int], channels: int, cells: int, top: int, weighted: bool) -> Shapes:
    """`maps`: channels of P3 to P5; P6 is made of P5, coarser ones are pooled."""
    yield from resample("resample_p6", maps[-1], channels)
    levels = top - 2
    for cell in range(cells):
        sizes = [*maps, *[channels] * (levels - 3)] if cell == 0 else [channels] * levels
        # Of each level the maps that there are: its input, then what nodes add.
        ids = {level: [level] for level in range(levels)}
        order = [*range(levels - 2, -1, -1), *range(1, levels)]
        for node, level in enumerate(order):
            down = node < levels - 1
            inputs = (
                [ids[level][-1], ids[level + 1][-1]] if down else [*ids[level], ids[level - 1][-1]]
            )
            scope, count = f"fpn_cells/cell_{cell}/fnode{node}", levels + node
            for index, offset in enumerate(inputs):
                taken = sizes[offset] if offset < levels else channels
                yield from resample(f"{scope}/resample_{index}_{offset}_{count}", taken, channels)
                if weighted:
                    yield f"{scope}/WSM{f'_{index}' if index else ''}", ()
            yield from separable(f"{scope}/op_after_combine{count}/conv", channels, channels)
            yield from norm(f"{scope}/op_after_combine{count}/bn", channels)
            ids[level].append(count)


def heads(channels: int, repeats: int, top: int, classes: int) -> Shapes:
    for net, outputs in (("class", 9 * classes), ("box", 36)):
        for i in range(repeats):
            yield from separable(f"{net}_net/{net}-{i}", channels, channels)
            for level in range(3, top + 1):
                yield from norm(f"{net}_net/{net}-{i}-bn-{level}", channels)
        yield from separable(f"{net}_net/{net}-predict", channels, outputs)


def listing(name: str, classes: int = 90) -> dict[str, tuple[int, ...]]:
    scale, width, depth, channels, cells, repeats, top, weighted = MODELS[name]
    maps = [filters(count, width) for count in (40, 112, 320)]
    return {
        **dict(backbone(scale, width, depth)),
        **dict(pyramid(maps, channels, cells, top, weighted)),
        **dict(heads(channels, repeats, top, classes)),
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_variable_is_used_once_and_fits(name):
    model = create_model(f"tf_efficientdet_{name}", pretrained_backbone=False)
    expected = listing(name)
    parts = [variable for names in tf_names(model).values() for variable in names]
    assert sorted(parts) == sorted(expected)
    one = {variable: np.float32(i).reshape(()) for i, variable in enumerate(expected)}
    arrays = {v: np.broadcast_to(one[v], shape) for v, shape in expected.items()}
    state = convert(arrays, model)
    model.load_state_dict(state)
    assert sum(v.numel() for v in state.values()) - len(
        [k for k in state if k.endswith("tracked")]
    ) == sum(math.prod(shape) for shape in expected.values())


@pytest.fixture(scope="module")
def d0():
    return create_model("tf_efficientdet_d0", num_classes=3, pretrained_backbone=False)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0)
    return {n: drawn.random(s, dtype=np.float32) for n, s in listing("d0", classes=3).items()}


@pytest.mark.parametrize(
    ("variable", "key"),
    [
        ("efficientnet-b0/stem/conv2d/kernel", "backbone.conv_stem.weight"),
        ("efficientnet-b0/stem/tpu_batch_normalization/beta", "backbone.bn1.bias"),
        ("efficientnet-b0/blocks_0/conv2d/kernel", "backbone.blocks.0.0.conv_pw.weight"),
        ("efficientnet-b0/blocks_0/tpu_batch_normalization_1/gamma", "backbone.blocks.0.0.bn2.weight"),
        ("efficientnet-b0/blocks_2/conv2d/kernel", "backbone.blocks.1.1.conv_pw.weight"),
        ("efficientnet-b0/blocks_2/conv2d_1/kernel", "backbone.blocks.1.1.conv_pwl.weight"),
        ("efficientnet-b0/blocks_2/tpu_batch_normalization/moving_mean", "backbone.blocks.1.1.bn1.running_mean"),
        ("efficientnet-b0/blocks_2/tpu_batch_normalization_1/moving_variance", "backbone.blocks.1.1.bn2.running_var"),
        ("efficientnet-b0/blocks_15/se/conv2d/bias", "backbone.blocks.6.0.se.conv_reduce.bias"),
        ("efficientnet-b0/blocks_15/se/conv2d_1/kernel", "backbone.blocks.6.0.se.conv_expand.weight"),
        ("efficientnet-b0/blocks_15/depthwise_conv2d/depthwise_kernel", "backbone.blocks.6.0.conv_dw.weight"),
        ("resample_p6/conv2d/kernel", "fpn.resample.3.conv.conv.weight"),
        ("fpn_cells/cell_0/fnode5/resample_0_2_10/bn/gamma", "fpn.cell.0.fnode.5.combine.resample.2.conv.bn.weight"),
        ("fpn_cells/cell_2/fnode7/op_after_combine12/conv/bias", "fpn.cell.2.fnode.7.after_combine.conv.conv_pw.bias"),
        ("class_net/class-1-bn-4/gamma", "class_net.bn_rep.1.1.bn.weight"),
        ("class_net/class-2/depthwise_kernel", "class_net.conv_rep.2.conv_dw.weight"),
        ("box_net/box-predict/pointwise_kernel", "box_net.predict.conv_pw.weight"),
    ],
)  # fmt: skip
def test_variables_are_where_their_layer_is_and_in_our_layout(d0, arrays, variable, key):
    found, array = convert(arrays, d0)[key], torch.from_numpy(arrays[variable])
    if array.ndim == 4:
        out, taken = (2, 3) if "depthwise" in variable else (3, 2)
        array = torch.movedim(array, (out, taken), (0, 1))
    assert torch.equal(found, array)


def test_weights_of_a_fusion_are_in_the_order_of_its_inputs(d0, arrays):
    found = convert(arrays, d0)["fpn.cell.1.fnode.4.combine.edge_weights"]
    scope = "fpn_cells/cell_1/fnode4/WSM"
    assert found.tolist() == [float(arrays[scope + end]) for end in ("", "_1", "_2")]


def test_averages_come_first_and_an_optimizer_is_left_out(d0, arrays):
    name, key = "box_net/box-0/bias", "box_net.conv_rep.0.conv_pw.bias"
    more = {
        **arrays,
        f"{name}/ExponentialMovingAverage": arrays[name] + 1,
        f"{name}/Momentum": arrays[name],
        "global_step": np.array(3),
    }
    assert np.array_equal(convert(more, d0)[key], arrays[name] + 1)
    assert np.array_equal(convert(more, d0, average=False)[key], arrays[name])


def test_what_does_not_fit_is_named(d0, arrays):
    name = "box_net/box-0/bias"
    with pytest.raises(CheckpointError, match=rf"tf_efficientdet_d0: 1 missing \({name}\)"):
        convert({n: a for n, a in arrays.items() if n != name}, d0)
    with pytest.raises(CheckpointError, match=r"1 unknown \(box_net/box-9/bias\)"):
        convert({**arrays, "box_net/box-9/bias": arrays[name]}, d0)
    with pytest.raises(CheckpointError, match=rf"1 of another shape \({name} \(65,\) for box_net"):
        convert({**arrays, name: np.zeros(65)}, d0)
    with pytest.raises(CheckpointError, match="WSM"):
        convert({**arrays, "fpn_cells/cell_0/fnode0/WSM": np.zeros(2)}, d0)
    with pytest.raises(ValueError, match=r"got efficientdet_nano, takes a tf_efficientdet_\*"):
        convert(arrays, create_model("efficientdet_nano", pretrained_backbone=False))


def test_reading(arrays, tmp_path, monkeypatch):
    np.savez(tmp_path / "tf.npz", **arrays)
    found = read(tmp_path / "tf.npz")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    np.save(tmp_path / "array.npy", np.zeros(3))
    content = (tmp_path / "tf.npz").read_bytes()
    for broken in (b"PK", b"", content[:500], (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "broken.npz").write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"broken\.npz"):
            read(tmp_path / "broken.npz")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.npz")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(CheckpointError, match="takes the tensorflow package"):
        read(tmp_path / "model")


def test_tensorflow_reads_its_own_checkpoints(monkeypatch):
    class Reader:
        def get_variable_to_shape_map(self):
            return {"a/b": [2]}

        def get_tensor(self, name):
            return np.array([1.0, 2.0])

    tensorflow = ModuleType("tensorflow")
    tensorflow.train = ModuleType("train")
    tensorflow.train.load_checkpoint = {"model": Reader()}.__getitem__
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    assert read("model")["a/b"].tolist() == [1.0, 2.0]
