"""Data: parsers, data sets, transforms and loaders of detection data.

Order of sizes and boxes, as everywhere in `effdet`: `img_size` in a target is (width, height), the
`image_size` of a model config (height, width); boxes of annotations and anchors are yxyx, boxes of
detections xyxy; classes of annotations and detections count from 1, 0 is the background.
"""

from __future__ import annotations

from .dataset import DetectionDataset as DetectionDataset
from .dataset import DetectionDatset as DetectionDatset
from .dataset import SkipSubset as SkipSubset
from .dataset_factory import create_dataset as create_dataset
from .folder import coco_folder as coco_folder
from .folder import listed_pictures as listed_pictures
from .image import ImageError as ImageError
from .image import load_image as load_image
from .input_config import resolve_input_config as resolve_input_config
from .loader import create_loader as create_loader
from .loader import set_epoch as set_epoch
from .parsers import AnnotationError as AnnotationError
from .parsers import create_parser as create_parser
from .transforms import *  # noqa: F403
