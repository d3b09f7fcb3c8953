"""Draw curves with matplotlib as SVG for a page, whose CSS sets their colours in light and dark mode."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

NUM_COLOURS = 8
WIDTH, HEIGHT = 4.6, 2.5  # inches: text of 9 points is then readable on a phone and on a screen

# The placeholder colours that matplotlib draws with, and the CSS variables that replace them.
_INK, _GRID = "#fe0000", "#fe0001"
_COLOURS = {number: f"#fe01{number:02x}" for number in range(1, NUM_COLOURS + 1)}
_CSS = {_INK: "var(--dim)", _GRID: "var(--line)"} | {
    colour: f"var(--c{number})" for number, colour in _COLOURS.items()
}


class Line(NamedTuple):
    """A line of a chart; None or NaN leaves a gap. The page shows `name` beside `colour`, 1 to 8."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int
    dotted: bool = False
    """Draw a dot at each point"""
    dashed: bool = False


class Chart(NamedTuple):
    title: str
    unit: str
    lines: Sequence[Line]
    svg: Markup


def draw(
    title: str, unit: str, lines: Sequence[Line], x_name: str = "update", from_zero: bool = False
) -> Chart:
    """Draw a chart of one or more lines. Its SVG contains no text from a user or a model."""
    from matplotlib import rc_context  # takes half a second to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
        "svg.hashsalt": title,
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.formatter.limits": (-3, 5),
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            ys = np.array(line.ys, dtype=np.float64)
            # Without two adjacent points no line is visible: draw markers.
            has_no_segment = bool((np.isfinite(ys[1:]) & np.isfinite(ys[:-1])).sum() == 0)
            axes.plot(
                line.xs,
                ys,
                color=_COLOURS[line.colour],
                linewidth=2 if line.dotted else 1.4,
                linestyle="--" if line.dashed else "-",
                marker="o" if line.dotted or has_no_segment else None,
                markersize=4.5,
                clip_on=False,
            )
        axes.set_xlabel(x_name)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x_name == "update"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="y", color=_GRID, linewidth=0.7, clip_on=False)
        axes.tick_params(length=0)
        axes.margins(x=0.02, y=0.08)
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
        if from_zero:
            axes.set_ylim(bottom=0)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, unit, lines, _for_page(file.getvalue(), _describe(title, lines)))


def _describe(title: str, lines: Sequence[Line]) -> str:
    """Describe the chart for screen readers: the first and last value of each line."""
    ends = []
    for number, line in enumerate(lines, 1):
        known = [y for y in line.ys if y is not None and np.isfinite(y)]
        ends.append(
            f"line {number} from {known[0]:.4g} to {known[-1]:.4g}" if known else f"line {number} empty"
        )
    return f"{title}: {', '.join(ends)}"


def _for_page(svg: str, label: str) -> Markup:
    """Turn matplotlib's SVG file into an element of a page.

    Its fonts and colours are replaced by the page's. Its group ids are removed: several charts have the same.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r' font-family: [^;"]*;', "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    for colour, css in _CSS.items():
        svg = svg.replace(colour, css)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    return Markup(f'<svg {view[0]} role="img" aria-label="{label}">{svg[svg.index(">") + 1 :]}')
