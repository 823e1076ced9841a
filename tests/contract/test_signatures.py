"""Every public name of PyPI effdet 0.4.1 is here, with its parameters in the same order and the same defaults.

`signatures.txt` lists them as `inspect` printed them. Parameters may be added at the end, as keywords.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LISTING = Path(__file__).with_name("signatures.txt")
# The names of the package itself, then what other repositories import beyond them.
IMPORTED = Path(__file__).with_name("names.txt").read_text().split()

# Deliberate differences. Private helpers that nothing outside calls:
ABSENT = {
    "effdet.efficientdet.HeadNet._forward",
    "effdet.efficientdet.HeadNet._forward_level_first",
    "effdet.distributed._pad_to_largest_tensor",
    "effdet.distributed._serialize_to_tensor",
    "effdet.evaluation.np_box_list._copy_extra_fields",
    "effdet.evaluation.np_box_list._update_valid_indices_by_removing_high_iou_boxes",
    "effdet.evaluation.object_detection_evaluation.ObjectDetectionEvaluation._initialize_detections",
    *(
        f"effdet.evaluation.per_image_evaluation.PerImageEvaluation.{name}"
        for name in (
            "_compute_cor_loc",
            "_compute_is_class_correctly_detected_in_image",
            "_compute_tp_fp",
            "_compute_tp_fp_for_single_class",
            "_get_ith_class_arrays",
            "_get_overlaps_and_scores_box_mode",
            "_get_overlaps_and_scores_mask_mode",
            "_remove_invalid_boxes",
        )
    ),
}
# Defaults that were wrong.
CHANGED_DEFAULTS = {
    ("effdet.data.dataset_config.VocCfg", "num_classes"),  # VOC has 20 classes
    ("effdet.data.dataset_config.Voc2007Cfg", "num_classes"),
    ("effdet.data.dataset_config.Voc2012Cfg", "num_classes"),
    ("effdet.data.dataset_config.Voc0712Cfg", "num_classes"),
    ("effdet.data.parsers.parser_config.VocParserCfg", "img_filename"),  # "%.jpg" lacks its s
    ("effdet.data.loader.create_loader", "device"),  # CUDA where available, else the CPU
    ("effdet.data.loader.PrefetchLoader", "device"),
}


def entries() -> list[tuple[str, str]]:
    """(qualified name, signature or value) of each line of the listing."""
    found, module, owner = [], "", ""
    for line in LISTING.read_text().splitlines():
        if re.fullmatch(r"effdet[.\w]*", line):
            module = line
            continue
        match = re.match(r"  (?:class|def|const|torch-obj) (\w+)(.*)", line)
        if match:
            owner = f"{module}.{match[1]}"
            found.append((owner, match[2]))
        elif match := re.match(r"      \.(\w+)(.*)", line):
            found.append((f"{owner}.{match[1]}", match[2]))
    return found


def resolve(name: str):
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


def split_parameters(signature: str) -> list[tuple[str, str | None]]:
    """(name, default or None) of each parameter in "(a, b: int = 1) -> c"."""
    depth, start, parts = 0, 1, []
    for i, char in enumerate(signature):
        depth += (char in "([{") - (char in ")]}")
        if (char == "," and depth == 1) or depth == 0:
            parts.append(signature[start:i].strip())
            start = i + 1
        if depth == 0:
            break
    pairs = []
    for part in filter(None, parts):
        name, _, default = part.partition("=")
        pairs.append((name.split(":")[0].strip(), default.strip() or None))
    return pairs


NAMES = [entry for entry in entries() if entry[0] not in ABSENT]
CALLABLE = [entry for entry in NAMES if entry[1].startswith("(")]


def test_listing_is_read():
    assert len(NAMES) > 200 and len(CALLABLE) > 150


@pytest.mark.parametrize("name", [name for name, _ in NAMES])
def test_name_exists(name):
    resolve(name)


@pytest.mark.parametrize(("name", "signature"), CALLABLE, ids=[name for name, _ in CALLABLE])
def test_parameters(name, signature):
    ours = list(inspect.signature(resolve(name)).parameters.values())
    if name.endswith(".from_config") and ours[0].name != "cls":
        ours.insert(0, inspect.Parameter("cls", inspect.Parameter.POSITIONAL_OR_KEYWORD))
    theirs = split_parameters(signature)
    assert [p.name for p in ours[: len(theirs)]] == [
        parameter.lstrip("*") for parameter, _ in theirs
    ]
    for extra in ours[len(theirs) :]:
        optional = extra.default is not inspect.Parameter.empty
        assert optional or extra.kind in (extra.VAR_KEYWORD, extra.VAR_POSITIONAL), extra
    for parameter, (label, default) in zip(ours, theirs, strict=False):
        if default is None or "<" in default or (name, label) in CHANGED_DEFAULTS:
            continue
        namespace = {"torch": torch}
        assert parameter.default == eval(default, namespace), label


@pytest.mark.parametrize("name", IMPORTED)
def test_import(name):
    resolve(name)


def test_import_needs_neither_torchvision_nor_timm():
    code = """
import sys
sys.modules["torchvision"] = sys.modules["timm"] = None
import effdet, effdet.anchors, effdet.bench, effdet.data, effdet.distributed, effdet.evaluator, effdet.factory
import effdet.helpers, effdet.loss, effdet.object_detection, effdet.soft_nms
effdet.create_model("tf_efficientdet_d0", pretrained_backbone=False)
"""
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], check=True)


def test_exceptions_are_still_exceptions():
    """A deviation that no longer deviates must leave the tables above."""
    for name in ABSENT:
        with pytest.raises(AttributeError):
            resolve(name)
    listed = dict(NAMES)
    for name, label in CHANGED_DEFAULTS:
        theirs = dict(split_parameters(listed[name]))[label]
        ours = inspect.signature(resolve(name)).parameters[label].default
        assert "<" in theirs or ours != eval(theirs)
