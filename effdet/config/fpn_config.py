"""Feature pyramids as node lists.

A cell receives one map per level and appends one map per node to that list. A node names the level
of its output and the positions (`inputs_offsets`) in the list of the maps that it fuses. The last
`num_levels` maps of the list are the cell's result, so every list ends with one node per level.

Sources: BiFPN, FPN and PANet as drawn in figure 2 of arXiv:1911.09070; the quad-FPN is the
`qufpn` variant of the same authors' published code.
"""

from __future__ import annotations

import functools

from omegaconf import DictConfig, OmegaConf


class _Nodes:
    """Grows a node list while it remembers, for each level, the offsets of its maps so far."""

    def __init__(self, min_level: int, max_level: int, weight_method: str) -> None:
        self.weight_method = weight_method
        self.nodes: list[dict] = []
        self.offsets = {level: [i] for i, level in enumerate(range(min_level, max_level + 1))}
        self.count = len(self.offsets)

    def add(self, level: int, inputs: list[int], weight_method: str | None = None) -> int:
        """Append a node and return the offset of its output."""
        method = weight_method or self.weight_method
        self.nodes.append(
            {"feat_level": level, "inputs_offsets": list(inputs), "weight_method": method}
        )
        self.offsets[level].append(self.count)
        self.count += 1
        return self.count - 1

    def config(self) -> DictConfig:
        return OmegaConf.create({"nodes": self.nodes})


def bifpn_config(min_level: int, max_level: int, weight_method: str | None = None) -> DictConfig:
    """One BiFPN cell: top-down without the top level, then bottom-up over all earlier maps."""
    nodes = _Nodes(min_level, max_level, weight_method or "fastattn")
    last = nodes.offsets
    for level in range(max_level - 1, min_level - 1, -1):
        nodes.add(level, [last[level][-1], last[level + 1][-1]])
    for level in range(min_level + 1, max_level + 1):
        nodes.add(level, [*last[level], last[level - 1][-1]])
    return nodes.config()


def panfpn_config(min_level: int, max_level: int, weight_method: str | None = None) -> DictConfig:
    """One PANet cell: a full top-down pass, then a full bottom-up pass over its results."""
    nodes = _Nodes(min_level, max_level, weight_method or "fastattn")
    last = nodes.offsets
    for level in range(max_level, min_level - 1, -1):
        above = [] if level == max_level else [last[level + 1][-1]]
        nodes.add(level, [last[level][-1], *above])
    for level in range(min_level, max_level + 1):
        below = [] if level == min_level else [last[level - 1][-1]]
        nodes.add(level, [last[level][-1], *below])
    return nodes.config()


def fpn_config(min_level: int, max_level: int, weight_method: str | None = None) -> DictConfig:
    """One classic FPN cell (arXiv:1612.03144): a top-down pass only.

    The pass runs from the top, a cell's result from the bottom, so single-input nodes that follow
    put the maps in level order.
    """
    nodes = _Nodes(min_level, max_level, weight_method or "fastattn")
    last = nodes.offsets
    for level in range(max_level - 1, min_level, -1):
        nodes.add(level, [last[level][-1], last[level + 1][-1]])
    top_down = {level: offsets[-1] for level, offsets in last.items()}
    nodes.add(min_level, [last[min_level][0], top_down[min_level + 1]])
    for level in range(min_level + 1, max_level + 1):
        nodes.add(level, [top_down[level]])
    return nodes.config()


def qufpn_config(min_level: int, max_level: int, weight_method: str | None = None) -> DictConfig:
    """One quad-FPN cell: top-down then bottom-up, bottom-up then top-down, and their sum.

    The nodes that join the two halves always use fast attention.
    """
    nodes = _Nodes(min_level, max_level, weight_method or "fastattn")
    last = nodes.offsets
    levels = range(min_level, max_level + 1)
    first = {level: offsets[0] for level, offsets in last.items()}

    for level in range(max_level - 1, min_level - 1, -1):
        nodes.add(level, [first[level], last[level + 1][-1]])
    for level in range(min_level + 1, max_level):
        nodes.add(level, [*last[level], last[level - 1][-1]])
    nodes.add(max_level, [first[max_level], last[max_level - 1][-1]])
    down_up = {level: offsets[-1] for level, offsets in last.items()}

    up = dict(first)
    for level in range(min_level + 1, max_level + 1):
        up[level] = nodes.add(level, [first[level], up[level - 1]])
    up_down = {max_level: up[max_level]}
    for level in range(max_level - 1, min_level, -1):
        up_down[level] = nodes.add(level, [first[level], up[level], up_down[level + 1]])
    up_down[min_level] = nodes.add(min_level, [first[min_level], up_down[min_level + 1]])

    for level in levels:
        nodes.add(level, [down_up[level], up_down[level]], weight_method="fastattn")
    return nodes.config()


_FPN_CONFIGS = {
    "bifpn_sum": functools.partial(bifpn_config, weight_method="sum"),
    "bifpn_attn": functools.partial(bifpn_config, weight_method="attn"),
    "bifpn_fa": functools.partial(bifpn_config, weight_method="fastattn"),
    "pan_sum": functools.partial(panfpn_config, weight_method="sum"),
    "pan_fa": functools.partial(panfpn_config, weight_method="fastattn"),
    "qufpn_sum": functools.partial(qufpn_config, weight_method="sum"),
    "qufpn_fa": functools.partial(qufpn_config, weight_method="fastattn"),
    "fpn_sum": functools.partial(fpn_config, weight_method="sum"),
    "fpn_fa": functools.partial(fpn_config, weight_method="fastattn"),
}


def get_fpn_config(fpn_name: str | None, min_level: int = 3, max_level: int = 7) -> DictConfig:
    """The node list called `fpn_name` for the levels `min_level..max_level`.

    An empty name means `"bifpn_fa"`.

    Raises:
        KeyError: no such name; the message lists the names.
    """
    name = fpn_name or "bifpn_fa"
    if name not in _FPN_CONFIGS:
        raise KeyError(f"fpn_name: got {name!r}, expected one of {', '.join(_FPN_CONFIGS)}")
    return _FPN_CONFIGS[name](min_level=min_level, max_level=max_level)
