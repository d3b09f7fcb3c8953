"""Curves as SVG inside a page: drawn by matplotlib, coloured by the page, for light and dark alike."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

NUM_COLOURS = 8
WIDTH, HEIGHT = 4.6, 2.5  # inches: lettering of 9 points then has a page's size on a phone and on a screen

# What matplotlib draws in, and what the page makes of it.
_INK, _GRID = "#fe0000", "#fe0001"
_COLOURS = {number: f"#fe01{number:02x}" for number in range(1, NUM_COLOURS + 1)}
_CSS = {_INK: "var(--dim)", _GRID: "var(--line)"} | {
    colour: f"var(--c{number})" for number, colour in _COLOURS.items()
}


class Line(NamedTuple):
    """Points by update; None or NaN leaves a gap. `name` is shown by the page, beside `colour`, 1 to 8."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int
    dotted: bool = False
    """With a dot at each point"""
    dashed: bool = False


class Chart(NamedTuple):
    title: str
    unit: str
    lines: Sequence[Line]
    svg: Markup


def draw(
    title: str, unit: str, lines: Sequence[Line], x_name: str = "update", from_zero: bool = False
) -> Chart:
    """A chart of one or more lines. Nothing that a user or a model wrote is in its SVG."""
    from matplotlib import rc_context  # brings half a second of libraries
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: in the page's font, and to be searched
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
            # A line through fewer than two neighbours is none.
            is_alone = bool((np.isfinite(ys[1:]) & np.isfinite(ys[:-1])).sum() == 0)
            axes.plot(
                line.xs,
                ys,
                color=_COLOURS[line.colour],
                linewidth=2 if line.dotted else 1.4,
                linestyle="--" if line.dashed else "-",
                marker="o" if line.dotted or is_alone else None,
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
    return Chart(title, unit, lines, _for_page(file.getvalue(), _in_words(title, lines)))


def _in_words(title: str, lines: Sequence[Line]) -> str:
    """For those who cannot see it: where each line begins and ends."""
    ends = []
    for number, line in enumerate(lines, 1):
        known = [y for y in line.ys if y is not None and np.isfinite(y)]
        ends.append(
            f"line {number} from {known[0]:.4g} to {known[-1]:.4g}" if known else f"line {number} empty"
        )
    return f"{title}: {', '.join(ends)}"


def _for_page(svg: str, label: str) -> Markup:
    """matplotlib's file as an element of a page: no fonts and colours of its own, and no ids of groups, which
    would stand there twice."""
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
