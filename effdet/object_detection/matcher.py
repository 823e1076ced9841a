"""The result of matching anchors (columns) to ground truth boxes (rows)."""

from __future__ import annotations

import torch
from torch import Tensor

UNMATCHED = -1
IGNORED = -2


class Match:
    """One integer per column: the row that it is matched to, -1 unmatched, -2 ignored.

    Args:
        match_results: ``[columns]`` int32 or int64.

    Raises:
        ValueError: another rank or dtype.
    """

    def __init__(self, match_results: Tensor) -> None:
        if match_results.ndim != 1:
            raise ValueError(f"match_results must have rank 1, got {list(match_results.shape)}")
        if match_results.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"match_results must be int32 or int64, got {match_results.dtype}")
        self.match_results = match_results

    def matched_column_indices(self) -> Tensor:
        """Columns that have a row, ascending."""
        return _positions(self.matched_column_indicator())

    def matched_column_indicator(self) -> Tensor:
        """``[columns]`` bool: whether each column has a row."""
        return self.match_results >= 0

    def num_matched_columns(self) -> int:
        """How many columns have a row."""
        return self.matched_column_indices().numel()

    def unmatched_column_indices(self) -> Tensor:
        """Columns that are unmatched (-1), ascending."""
        return _positions(self.unmatched_column_indicator())

    def unmatched_column_indicator(self) -> Tensor:
        """``[columns]`` bool: whether each column is unmatched (-1)."""
        return self.match_results == UNMATCHED

    def num_unmatched_columns(self) -> int:
        """How many columns are unmatched (-1)."""
        return self.unmatched_column_indices().numel()

    def ignored_column_indices(self) -> Tensor:
        """Columns that are ignored (-2), ascending."""
        return _positions(self.ignored_column_indicator())

    def ignored_column_indicator(self) -> Tensor:
        """``[columns]`` bool: whether each column is ignored (-2)."""
        return self.match_results == IGNORED

    def num_ignored_columns(self) -> int:
        """How many columns are ignored (-2)."""
        return self.ignored_column_indices().numel()

    def unmatched_or_ignored_column_indices(self) -> Tensor:
        """Columns without a row, ascending."""
        return _positions(self.match_results < 0)

    def matched_row_indices(self) -> Tensor:
        """The row of each matched column, int64, in column order."""
        return self.match_results[self.matched_column_indices()].long()

    def gather_based_on_match(
        self,
        input_tensor: Tensor,
        unmatched_value: Tensor | float,
        ignored_value: Tensor | float,
    ) -> Tensor:
        """For each column the ``input_tensor`` row that it is matched to, or a filler.

        Args:
            input_tensor: ``[rows, ...]``.
            unmatched_value: filler for unmatched columns: a number, or a tensor ``[...]`` or
                ``[1, ...]`` of one row.
            ignored_value: the same for ignored columns.

        Returns:
            ``[columns, ...]``, dtype of ``input_tensor``.
        """
        fillers = torch.stack(
            [_one_row(value, input_tensor) for value in (ignored_value, unmatched_value)]
        )
        return torch.cat([fillers, input_tensor])[(self.match_results + 2).clamp(min=0)]


def _positions(indicator: Tensor) -> Tensor:
    return indicator.nonzero().squeeze(1)


def _one_row(value: Tensor | float, like: Tensor) -> Tensor:
    row = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return row.reshape(like.shape[1:]) if row.numel() > 1 else row.expand(1, *like.shape[1:])[0]
