"""Match each anchor to the ground truth box that it overlaps most."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .matcher import IGNORED, UNMATCHED, Match


def one_hot_bool(x: Tensor, num_classes: int) -> Tensor:
    """``[N]`` int64 indices as a ``[N, num_classes]`` boolean one-hot matrix."""
    return F.one_hot(x, num_classes).bool()


class ArgMaxMatcher:
    """Each column takes the row of its highest similarity, if that is high enough.

    Args:
        matched_threshold: a column whose best similarity is at least this is matched.
        unmatched_threshold: a column below it is unmatched; between the two it is ignored.
            ``None`` means ``matched_threshold``, so that nothing is ignored.
        negatives_lower_than_unmatched: ``False`` swaps the two meanings: below is ignored,
            between is unmatched.
        force_match_for_each_row: every row also claims the column that it is most similar to,
            whatever the similarity. Of several rows that claim one column the first gets it.

    Raises:
        ValueError: the thresholds contradict each other.
    """

    def __init__(
        self,
        matched_threshold: float,
        unmatched_threshold: float | None = None,
        negatives_lower_than_unmatched: bool = True,
        force_match_for_each_row: bool = False,
    ) -> None:
        if matched_threshold is None:
            raise ValueError("matched_threshold must be a number, got None")
        if unmatched_threshold is None:
            unmatched_threshold = matched_threshold
        if unmatched_threshold > matched_threshold:
            raise ValueError(
                "unmatched_threshold must not exceed matched_threshold, got "
                f"{unmatched_threshold} and {matched_threshold}"
            )
        if not negatives_lower_than_unmatched and unmatched_threshold == matched_threshold:
            raise ValueError(
                "negatives_lower_than_unmatched=False puts the negatives between the thresholds, "
                f"so they must differ, got {matched_threshold} for both"
            )
        self._matched_threshold = matched_threshold
        self._unmatched_threshold = unmatched_threshold
        self._negatives_lower_than_unmatched = negatives_lower_than_unmatched
        self._force_match_for_each_row = force_match_for_each_row

    def match(self, similarity_matrix: Tensor) -> Match:
        """Match the columns of a ``[rows, columns]`` similarity matrix."""
        if similarity_matrix.ndim != 2:
            raise ValueError(
                f"similarity_matrix must be [rows, columns], got {list(similarity_matrix.shape)}"
            )
        if similarity_matrix.numel() == 0:
            return Match(self._match_when_rows_are_empty(similarity_matrix))
        return Match(self._match_when_rows_are_non_empty(similarity_matrix))

    def _match_when_rows_are_empty(self, similarity_matrix: Tensor) -> Tensor:
        columns = similarity_matrix.shape[1]
        return similarity_matrix.new_full((columns,), UNMATCHED, dtype=torch.int64)

    def _match_when_rows_are_non_empty(self, similarity_matrix: Tensor) -> Tensor:
        best, matches = similarity_matrix.max(dim=0)
        below = best < self._unmatched_threshold
        between = (best < self._matched_threshold) & ~below
        if self._negatives_lower_than_unmatched:
            below_value, between_value = UNMATCHED, IGNORED
        else:
            below_value, between_value = IGNORED, UNMATCHED
        matches = self._set_values_using_indicator(matches, below, below_value)
        matches = self._set_values_using_indicator(matches, between, between_value)
        if not self._force_match_for_each_row:
            return matches
        rows, columns = similarity_matrix.shape
        claims = one_hot_bool(similarity_matrix.argmax(dim=1), columns)
        # argmax over booleans does not promise the first of several; over weights it is unique
        priority = torch.arange(rows, 0, -1, device=claims.device)
        first_claim = (claims * priority[:, None]).argmax(dim=0)
        return torch.where(claims.any(dim=0), first_claim, matches)

    def _set_values_using_indicator(self, x: Tensor, indicator: Tensor, val: int) -> Tensor:
        return x.masked_fill(indicator, val)
