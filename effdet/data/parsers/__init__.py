"""Readers of annotation formats: COCO, Pascal VOC and OpenImages."""

from __future__ import annotations

from .parser import AnnotationError as AnnotationError
from .parser import Parser as Parser
from .parser_coco import CocoParser as CocoParser
from .parser_config import CocoParserCfg as CocoParserCfg
from .parser_config import OpenImagesParserCfg as OpenImagesParserCfg
from .parser_config import VocParserCfg as VocParserCfg
from .parser_factory import create_parser as create_parser
from .parser_open_images import OpenImagesParser as OpenImagesParser
from .parser_voc import VocParser as VocParser
