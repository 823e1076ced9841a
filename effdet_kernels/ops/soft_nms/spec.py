"""OpSpec of ``soft_nms``: the output is replayed in float64, step by step, so near-ties need no luck."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effdet_kernels.bound import accumulator, ratio, roundoff
from effdet_kernels.ops._cases import BENCH, BLOCKS, GPU, VECTORS, nbytes
from effdet_kernels.ops.soft_nms import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec


def _scene(
    generator: torch.Generator,
    batch: int,
    count: int,
    max_det: int,
    classes: int,
    method: str,
    extent: int = 512,
    **options,
) -> Inputs:
    """Clustered boxes: a few objects per image, candidates jittered around them, as a detector's are.

    The image has ``extent`` pixels a side.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    objects = max(1, count // 8)
    owner = torch.randint(objects, (batch, count), generator=generator)
    rows = torch.arange(batch)[:, None]
    center = (uniform(batch, objects, 2) * extent)[rows, owner] + uniform(batch, count, 2) * 12
    size = (uniform(batch, objects, 2) * 120 + 8)[rows, owner] * (
        0.8 + 0.4 * uniform(batch, count, 2)
    )
    arguments = {
        "boxes": torch.cat([center - size / 2, center + size / 2], -1),
        "scores": uniform(batch, count) * 0.98 + 0.01,
        "classes": torch.randint(classes, (batch, count), generator=generator) if classes else None,
        "num_valid": None,
        "max_det": max_det,
        "method": method,
        "sigma": 0.5,
        "iou_threshold": 0.3,
        "score_threshold": 0.001,
        "max_per_class": None,
    }
    return {**arguments, **options}


def _real(name: str, extent: int, *, batch=1, max_det=100, method="gaussian", **options) -> Case:
    """The candidates of a model for COCO on images of ``extent`` pixels a side."""

    def make(g: torch.Generator) -> Inputs:
        return _scene(g, batch, 5000, max_det, 90, method, extent)

    return Case(name, make, **{"tags": BENCH, **options})


def _awkward(generator: torch.Generator) -> Inputs:
    """Non-finite, degenerate, inverted and duplicate boxes, equal scores, fewer valid candidates than there are."""
    inputs = _scene(generator, 3, 40, 50, 2, "gaussian", num_valid=torch.tensor([40, 17, 0]))
    boxes, scores = inputs["boxes"], inputs["scores"]
    boxes[0, 3, 2], boxes[0, 4, 0], scores[0, 5] = torch.nan, torch.inf, torch.nan
    boxes[0, 6, 2:] = boxes[0, 6, :2]
    boxes[0, 7] = boxes[0, 7, [2, 3, 0, 1]]
    boxes[0, 9], scores[0, 9] = boxes[0, 8], scores[0, 8]
    boxes[1, 30, 0] = torch.nan  # behind the valid ones
    scores[1] = 0.5
    return inputs


def _shifted(inputs: Inputs) -> Inputs:
    """Scores around 0."""
    return {**inputs, "scores": inputs["scores"] - 0.5}


def _at_the_threshold(generator: torch.Generator) -> Inputs:
    """Overlaps of exactly the threshold, which do not suppress; of what does and what ties, all in float32's reach."""
    inputs = _scene(generator, 1, 6, 6, 0, "hard", iou_threshold=0.25, score_threshold=0.5)
    boxes = [
        [0, 0, 16, 16],
        [0, 0, 16, 4],
        [0, 0, 16, 5],
        [40, 0, 56, 16],
        [52, 0, 56, 16],
        [0, 9, 9, 16],
    ]
    inputs["boxes"] = torch.tensor([boxes], dtype=torch.float64)
    inputs["scores"] = torch.tensor([[0.9, 0.75, 0.5, 0.75, 0.75, 0.5]], dtype=torch.float64)
    return inputs


def _negative_classes(generator: torch.Generator) -> Inputs:
    inputs = _scene(generator, 1, 67, 60, 4, "gaussian")
    names = torch.tensor([-1, 0, 1 << 32, (1 << 40) + 1])
    return {**inputs, "classes": names[inputs["classes"]]}


def _ties(generator: torch.Generator) -> Inputs:
    """More candidates than a block has threads, four scores, classes that are equal modulo 128."""
    inputs = _scene(generator, 2, 530, 40, 4, "gaussian", extent=150)
    scores = ((inputs["scores"] * 4).floor() + 1) / 8
    return {**inputs, "scores": scores, "classes": inputs["classes"] * 128 + 5}


def _chunks(method: str, classes: int) -> Callable[[torch.Generator], Inputs]:
    """Picks that reach the last of more candidates than a block has threads, some of them with a score below 0."""

    def make(generator: torch.Generator) -> Inputs:
        inputs = _scene(
            generator, 1, 560, 60, classes, method, extent=20, sigma=0.02, iou_threshold=0.1
        )
        return {**inputs, "scores": inputs["scores"] - 0.1, "score_threshold": -0.05}

    return make


def _all_dropped(generator: torch.Generator) -> Inputs:
    inputs = _scene(generator, 2, 40, 5, 3, "linear")
    return {**inputs, "boxes": torch.full_like(inputs["boxes"], torch.nan)}


def compare(inputs: Inputs, outputs: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Replays the picks of ``outputs`` in float64: each must be a best candidate, within the accumulated rounding."""
    index, score, count, dropped = outputs
    if not torch.equal(dropped, _dropped(inputs)):
        return math.inf
    worst = 0.0
    for image in range(len(index)):
        worst = max(
            worst,
            _replay(inputs, image, index[image], score[image].double(), int(count[image]), dtype),
        )
    return worst


def _dropped(inputs: Inputs) -> Tensor:
    return reference.soft_nms(**{**inputs, "max_det": 0})[3]


def _replay(
    inputs: Inputs, image: int, index: Tensor, score: Tensor, count: int, dtype: torch.dtype
) -> float:
    boxes, scores, classes = inputs["boxes"][image], inputs["scores"][image], inputs["classes"]
    threshold, max_det = inputs["score_threshold"], inputs["max_det"]
    limit = len(scores) if inputs["num_valid"] is None else int(inputs["num_valid"][image])
    alive = boxes.isfinite().all(-1) & scores.isfinite() & (torch.arange(len(scores)) < limit)
    boxes = boxes.masked_fill(~boxes.isfinite(), 0)
    taken = torch.zeros(len(scores), dtype=torch.int64)  # picks of a candidate's class
    kinds = taken.clone() if classes is None else classes[image]
    # Each decay multiplies by a factor with a few roundings: of the IoU (magnified by 2 iou / sigma), exp, product.
    unit = roundoff(accumulator(dtype)) * (4 + 8 / inputs["sigma"])
    current = torch.where(alive, scores, -torch.inf)
    if (
        not 0 <= count <= max_det
        or bool((index[count:] != -1).any())
        or bool((score[count:] != 0).any())
    ):
        return math.inf
    worst = 0.0
    for step in range(count):
        pick = int(index[step])
        slack = unit * (step + 1)
        best = float(current.max())
        if pick < 0 or current[pick] == -torch.inf or not current[pick] >= best - slack * abs(best):
            return math.inf
        if bool((scores[:pick] == scores[pick])[current[:pick] == current[pick]].any()):
            return math.inf  # an equal candidate with a lower index was passed over
        decayed = current[pick] != scores[pick]  # an undecayed score is exact
        if not current[pick] > threshold - (slack * abs(threshold) if decayed else 0):
            return math.inf
        worst = max(worst, ratio(score[step], current[pick], slack * current[pick].abs()))
        iou = reference._iou(boxes[pick], boxes)
        other = kinds != kinds[pick]
        iou = iou.masked_fill(other, 0)
        method, sigma, limit = (inputs[k] for k in ("method", "sigma", "iou_threshold"))
        current = reference._decayed(current, iou, method, sigma, limit)
        current[pick] = -torch.inf
        if inputs["max_per_class"] is not None:
            taken += ~other
            current = current.masked_fill(taken >= inputs["max_per_class"], -torch.inf)
        current = current.masked_fill(~(current > threshold), -torch.inf)
    left = float(current.max()) if len(current) else -math.inf
    finished = count == max_det or not left > threshold + unit * (count + 1) * abs(threshold)
    return worst if finished else math.inf


def _bytes(boxes, scores, classes, num_valid, max_det, **_) -> int:
    images = len(boxes)
    return nbytes(boxes, scores, classes, num_valid) + images * (
        max_det * (8 + scores.element_size()) + 16
    )


def _flops(scores, classes, max_det, **_) -> int:
    """20 for each pair of a pick and a candidate of its class that is left, classes being equally many."""
    images, count = scores.shape
    picks = min(max_det, count)
    share = 1 if classes is None else max(1, classes.unique().numel())
    return round(20 * images * picks * (count - picks / 2) / share)


def _mutant(**replaced):
    """The reference with module functions or arguments replaced."""

    def mutant(**arguments):
        originals = {
            name: getattr(reference, name) for name in replaced if hasattr(reference, name)
        }
        try:
            for name in originals:
                setattr(reference, name, replaced[name])
            given = {k: v for k, v in replaced.items() if k not in originals}
            return reference.soft_nms(**{**arguments, **given})
        finally:
            for name, function in originals.items():
                setattr(reference, name, function)

    return mutant


def _iou_plus_one(a: Tensor, b: Tensor) -> Tensor:
    grow = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=a.dtype)
    return _right_iou(a + grow, b + grow)


def _decayed_without_square(score, iou, method, sigma, iou_threshold):
    root = iou.sqrt() if method == "gaussian" else iou
    return _right_decayed(score, root, method, sigma, iou_threshold)


def _undecayed_scores(**arguments):
    index, score, count, dropped = reference.soft_nms(**arguments)
    if arguments["scores"].numel():
        original = arguments["scores"].gather(1, index.clamp(min=0))
        score = torch.where(index >= 0, original, 0)
    return index, score, count, dropped


def _limit_of_all_classes(max_per_class, **arguments):
    index, score, count, dropped = reference.soft_nms(**arguments, max_per_class=None)
    if max_per_class is not None:
        index[:, max_per_class:], score[:, max_per_class:] = -1, 0
        count = count.clamp(max=max_per_class)
    return index, score, count, dropped


_right_iou, _right_decayed = reference._iou, reference._decayed

SPEC = OpSpec(
    name="soft_nms",
    op=op.soft_nms,
    reference=reference.soft_nms,
    compare=compare,
    dtypes=(torch.float32, torch.float64),
    uncompilable="torch.compile would unroll the loop over the picks",
    cases=(
        Case("gaussian", lambda g: _scene(g, 2, 67, 30, 4, "gaussian")),
        Case("linear", lambda g: _scene(g, 2, 67, 80, 4, "linear")),
        Case("hard", lambda g: _scene(g, 2, 67, 80, 4, "hard")),
        Case("agnostic", lambda g: _scene(g, 1, 33, 33, 0, "gaussian", sigma=0.3)),
        Case("no_threshold", lambda g: _scene(g, 1, 20, 25, 3, "hard", score_threshold=-math.inf)),
        Case(
            "negative", lambda g: _shifted(_scene(g, 1, 20, 25, 3, "linear", score_threshold=-9.0))
        ),
        Case("many_classes", lambda g: _scene(g, 2, 67, 40, 70_000, "gaussian", iou_threshold=0.6)),
        Case("looser", lambda g: _scene(g, 2, 67, 80, 2, "hard", iou_threshold=0.55)),
        Case("at_the_threshold", _at_the_threshold),
        Case("awkward", _awkward),
        Case("negative_classes", _negative_classes),
        Case("limit", lambda g: _scene(g, 2, 67, 30, 4, "gaussian", max_per_class=5)),
        Case("limit_one", lambda g: _scene(g, 2, 67, 80, 4, "hard", max_per_class=1)),
        Case("limit_agnostic", lambda g: _scene(g, 2, 33, 33, 0, "linear", max_per_class=7)),
        Case("one", lambda g: _scene(g, 1, 1, 1, 1, "gaussian")),
        Case("no_candidates", lambda g: _scene(g, 2, 0, 5, 2, "gaussian")),
        Case("no_images", lambda g: _scene(g, 0, 7, 5, 2, "gaussian")),
        Case("vectors_ties", _ties, VECTORS),
        Case("vectors_all_dropped", _all_dropped, VECTORS),
        *[
            Case(f"vectors_chunks_{method}", _chunks(method, classes), VECTORS)
            for method, classes in (("gaussian", 5), ("linear", 0), ("hard", 3))
        ],
        Case("vectors_no_picks", lambda g: _scene(g, 2, 40, 0, 3, "gaussian"), VECTORS),
        Case("vectors_one_pick", lambda g: _scene(g, 2, 40, 1, 3, "gaussian"), VECTORS),
        Case("vectors_limit", lambda g: {**_ties(g), "max_per_class": 3}, VECTORS),
        Case("blocks", lambda g: _scene(g, 2, 1100, 150, 90, "gaussian"), BLOCKS),
        Case("blocks_agnostic", lambda g: _scene(g, 1, 4500, 50, 0, "linear"), BLOCKS),
        Case("blocks_hard", lambda g: _scene(g, 2, 1100, 150, 90, "hard"), BLOCKS),
        Case(
            "blocks_limit",
            lambda g: _scene(g, 2, 1100, 150, 90, "linear", max_per_class=1),
            BLOCKS,
        ),
        _real("d0", 512),
        _real("d0_all", 512, max_det=5000),
        _real("d0_hard", 512, method="hard"),
        _real("d0_batch8", 512, batch=8),
        _real("d0_batch128", 512, batch=2, tags=GPU, times=64),
        _real("d4", 1024),
        _real("d7", 1536),
        _real("d7_batch8", 1536, batch=8),
    ),
    mutants={
        "class-agnostic": lambda **a: reference.soft_nms(**{**a, "classes": None}),
        "inclusive pixel boxes (+1)": _mutant(_iou=_iou_plus_one),
        "iou not squared": _mutant(_decayed=_decayed_without_square),
        "scores not decayed": _undecayed_scores,
        "sigma halved (TensorFlow's convention)": lambda **a: reference.soft_nms(
            **{**a, "sigma": a["sigma"] / 2}
        ),
        "threshold ignored": lambda **a: reference.soft_nms(**{**a, "score_threshold": -math.inf}),
        "max_per_class ignored": lambda **a: reference.soft_nms(**{**a, "max_per_class": None}),
        "max_per_class over all classes": _limit_of_all_classes,
    },
    batched=("boxes", "scores", "classes", "num_valid"),
    bytes=_bytes,
    flops=_flops,
)
