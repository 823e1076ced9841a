"""Places in one piece of memory for buffers that are not all needed at once."""

from __future__ import annotations

from typing import NamedTuple

ALIGNMENT = 64


def aligned(size: int) -> int:
    """``size`` rounded up to where a buffer may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Buffer(NamedTuple):
    """Bytes of memory that are needed from step ``first`` to step ``last``."""

    size: int
    first: int
    last: int


def place(buffers: list[Buffer], outputs: list[Buffer]) -> tuple[list[tuple[int, int]], int]:
    """A (space, offset) for each buffer, such that no two that are needed at once overlap.

    Space 0 is the arena, of as many bytes as the second result says; space 1 + i is the memory of output i, which is
    free until the output is written. Largest first, each in the first output with room, else in the arena.
    """
    places = [(0, 0)] * len(buffers)
    inside: list[list[int]] = [[] for _ in range(1 + len(outputs))]
    for i in sorted(range(len(buffers)), key=lambda i: -buffers[i].size):
        mine = buffers[i]
        size = aligned(mine.size)
        for space in [*range(1, 1 + len(outputs)), 0]:
            if space and mine.last >= outputs[space - 1].first:
                continue
            others = [j for j in inside[space] if _meet(mine, buffers[j])]
            offset = _lowest(size, sorted((places[j][1], buffers[j].size) for j in others))
            room = outputs[space - 1].size // ALIGNMENT * ALIGNMENT if space else 0
            if not space or offset + size <= room:
                places[i] = space, offset
                inside[space].append(i)
                break
    return places, max((places[i][1] + buffers[i].size for i in inside[0]), default=0)


def _meet(a: Buffer, b: Buffer) -> bool:
    return a.first <= b.last and b.first <= a.last


def _lowest(size: int, taken: list[tuple[int, int]]) -> int:
    """The lowest aligned offset at which ``size`` bytes are free; ``taken`` are (offset, size), in order."""
    offset = 0
    for start, length in taken:
        if offset + size <= start:
            break
        offset = max(offset, aligned(start + length))
    return offset
