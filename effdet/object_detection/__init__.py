"""Matching of ground truth to anchors, one image at a time, as composable classes.

Training does not go through here: ``effdet.AnchorLabeler`` labels a whole batch with one kernel.
These classes are for programs that assemble an assigner of their own.
"""

from .argmax_matcher import ArgMaxMatcher
from .box_coder import FasterRcnnBoxCoder
from .box_list import BoxList
from .matcher import Match
from .region_similarity_calculator import IouSimilarity
from .target_assigner import TargetAssigner

__all__ = [
    "ArgMaxMatcher",
    "BoxList",
    "FasterRcnnBoxCoder",
    "IouSimilarity",
    "Match",
    "TargetAssigner",
]
