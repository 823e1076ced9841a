"""What plots share: their colours, and an SVG whose bytes depend on the drawing alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

INK, PAPER, RULE = "#1f2329", "#fefefd", "#d8dee5"  # the page replaces these by its own
COLOURS = (  # so are these
    "#d9480f",
    "#1c7ed6",
    "#2b8a3e",
    "#9c36b5",
    "#7f5539",
    "#0b7285",
    "#c2255c",
    "#66800b",
)
MARKERS = "osD^vPX*"


def svg(width: float, height: float, salt: str, draw: Callable[[Any], object]) -> str:
    """The SVG of what ``draw`` does to a ``matplotlib.figure.Figure`` of that size, in inches.

    ``salt`` tells the names in it from those of other plots on a page.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"plots need matplotlib ({error}): install the extra [plot], or pass --no-plot"
        ) from error
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 9,
        "text.color": INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), facecolor=PAPER)
        FigureCanvasSVG(figure)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def style(axes: Any, x: str, y: str) -> None:
    """Labels, a grid and quiet lines."""
    axes.set_facecolor(PAPER)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.grid(color=RULE, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(RULE)
