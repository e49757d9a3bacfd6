"""Curves of a run as SVG pictures, one group per stage.

matplotlib draws them; their colours are then exchanged for the CSS variables of the page
(`--ink`, `--muted`, `--line`, `--c1` ... `--c6`), so that one picture suits light and dark.
"""

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Metrics that share a unit share a panel; every other metric gets its own.
SHARED = ("reward", "search", "eval", "ending", "time")
RATIOS = ("reward", "search", "eval", "ending")  # drawn from 0 to 1, where their values stay within
FIRST = ("reward", "search", "eval", "train")  # then the others, in the order of the log
SMOOTH_FROM = 40  # points; from here on a moving mean is drawn over the pale raw curve

# Stand-ins that matplotlib writes into the SVG, and what they become.
INK, MUTED, LINE = "#010203", "#040506", "#070809"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
MOST = len(SERIES)  # curves in one panel
COLOURS = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {
    colour: f"--c{index}" for index, colour in enumerate(SERIES, start=1)
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One metric over the steps of one stage."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    series: tuple[Series, ...]


def stages(records: Sequence[dict[str, Any]]) -> dict[str, list[Panel]]:
    """Stage -> its panels, from the lines of `metrics.jsonl`, in the order of time.

    Lines of one stage and step are taken together. Values that cannot be drawn, and metrics with
    fewer than two points, are passed over: they make no curve.
    """
    points: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        metrics = points.setdefault(record["stage"], {})
        for name, value in record.items():
            if name not in ("step", "stage") and _number(value):
                metrics.setdefault(name, {})[record["step"]] = value
    found = {}
    for stage, metrics in points.items():
        series = [
            # Half a surrogate pair has no glyph, and cannot be written either.
            Series(name.encode("utf-8", "replace").decode(), tuple(curve), tuple(curve.values()))
            for name, curve in metrics.items()
            if len(curve) > 1
        ]
        if series:
            found[stage] = _panels(series)
    return found


def _number(value: Any) -> bool:
    """Can it be drawn? Axes near the end of what a float can hold cannot, nor longer integers."""
    return isinstance(value, int | float) and abs(value) < 1e100


def draw(panel: Panel) -> str:
    """One panel as the text of an `<svg>` element."""
    # Text stays text (crisp, and in the page's font); metric names are never read as formulas.
    style = {"svg.fonttype": "none", "svg.hashsalt": panel.title, "text.parse_math": False}
    file = io.StringIO()
    with matplotlib.rc_context(style):
        # No date: the same run gives the same page.
        _figure(panel).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue())


def _panels(series: Sequence[Series]) -> list[Panel]:
    groups: dict[str, list[Series]] = {}
    for one in series:
        family = one.name.partition("/")[0]
        groups.setdefault(family if family in SHARED else one.name, []).append(one)
    panels = [
        Panel(title if start == 0 else f"{title} (more)", tuple(members[start : start + MOST]))
        for family, members in groups.items()
        for title in [family if len(members) > 1 else members[0].name]
        for start in range(0, len(members), MOST)
    ]
    rank = {family: place for place, family in enumerate(FIRST)}
    return sorted(panels, key=lambda panel: rank.get(_family(panel), len(FIRST)))


def _family(panel: Panel) -> str:
    return panel.series[0].name.partition("/")[0]


def _figure(panel: Panel) -> Figure:
    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for series, colour in zip(panel.series, SERIES, strict=False):
        smooth = len(series.values) >= SMOOTH_FROM
        raw = {"alpha": 0.3, "linewidth": 0.8} if smooth else {"linewidth": 1.6}
        name = series.name.removeprefix(_family(panel) + "/")
        axes.plot(series.steps, series.values, color=colour, label=None if smooth else name, **raw)
        if smooth:
            axes.plot(
                series.steps, _moving_mean(series.values), color=colour, linewidth=1.8, label=name
            )
    values = [value for series in panel.series for value in series.values]
    if _family(panel) in RATIOS and min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(-0.02, 1.02)
    axes.set_title(panel.title, loc="left", color=INK, fontsize=10, fontweight="bold")
    axes.set_xlabel("step", color=MUTED, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.grid(True, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    if len(panel.series) > 1:
        axes.legend(
            frameon=False, fontsize=8, labelcolor=INK, ncols=3, loc="upper left",
            bbox_to_anchor=(-0.02, -0.2), handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip
    return figure


def _moving_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a tenth of the curve, narrower at the ends."""
    half = max(len(values) // 20, 1)
    return [
        sum(near) / len(near)
        for index in range(len(values))
        if (near := values[max(index - half, 0) : index + half + 1])
    ]


def _inline(svg: str) -> str:
    """The `<svg>` element alone, with the page's colours and without a fixed size or font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
