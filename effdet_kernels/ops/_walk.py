"""How a map is cut into segments that programs walk down."""

from __future__ import annotations

import functools

MULTIPROCESSORS = 132  # of the GPU that launches are shaped for, an H100 or H200


@functools.cache
def segments(rows: int, most: int, others: int, resident: int, warps: int) -> int:
    """How many segments of at most ``most`` rows are done first: each ``others`` programs, ``resident`` of them at a
    time on a multiprocessor.

    Estimated from D0's profile on an H200, of an earlier kernel (bench/results/nvidia_h200/profile_d0_batch1.json): a
    program of 8 warps takes the time of its rows and of some six more (its weights, and the rows around a segment), and
    each other one on its multiprocessor a third more. Not measured since.
    """
    more = warps / 24

    def time(count: int) -> float:
        waves, last = divmod(-(-count * others // MULTIPROCESSORS), resident)
        crowds = waves * (1 + (resident - 1) * more) + (1 + (last - 1) * more if last else 0)
        return (-(-rows // count) + 6) * crowds

    return min(range(-(-rows // most), rows + 1), key=time)
