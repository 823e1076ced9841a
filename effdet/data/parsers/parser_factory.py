"""Parsers by name."""

from __future__ import annotations

from .parser import Parser
from .parser_coco import CocoParser
from .parser_open_images import OpenImagesParser
from .parser_voc import VocParser

_PARSERS = {"coco": CocoParser, "voc": VocParser, "openimages": OpenImagesParser}


def create_parser(name: str, **kwargs) -> Parser:
    """Parser "coco", "voc" or "openimages"; `cfg=` takes its config of `parser_config`."""
    if name not in _PARSERS:
        raise ValueError(f"name: got {name!r}; takes one of {', '.join(_PARSERS)}")
    return _PARSERS[name](**kwargs)
