"""Draws runs' curves: one panel a metric, one colour a run, or for all runs that differ in their seed alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from distributed_muzero.observability.curves import AXES, Curve, Group, spread, thinned
from distributed_muzero.observability.metrics import metric_of

# Okabe and Ito's, which people with any kind of colour vision tell apart; without its yellow, too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 100
WIDTH = 12.0  # inches: 1200 pixels
ROW_HEIGHT, FIRST_HEIGHT, LEGEND_HEIGHT = 2.4, 3.6, 0.3  # inches
NUM_COLUMNS = 3
MOST_POINTS = 200  # of a curve
MOST_RATES = 60  # of one that jumps from second to second
MOST_THIN = 5  # single runs beside their mean
MOST_IN_A_ROW = 3  # entries of the legend
LARGE = 10_000  # from here on, numbers on axes are 10k and 2M


class Panel(NamedTuple):
    title: str
    # of one unit; the first in full, the others faint
    metrics: tuple[str, ...]
    most_points: int = MOST_POINTS


RETURNS = Panel("return", ("eval/mean_return", "rollout/ep_rew_mean"))
ELO = Panel("Elo", ("eval/elo",))
PANELS = (
    Panel("value loss", ("train/value_loss",)),
    Panel("policy loss", ("train/policy_loss",)),
    Panel("reward loss", ("train/reward_loss",)),
    Panel("environment steps a second", ("rollout/env_steps_per_second",), MOST_RATES),
    Panel("learner steps a second", ("train/learner_steps_per_second",), MOST_RATES),
    Panel("simulations a second", ("search/simulations_per_second",), MOST_RATES),
    Panel("staleness of sampled games", ("train/staleness",)),
    Panel("replay: stored transitions", ("replay/transitions",)),
    Panel("replay: samples per insert", ("replay/samples_per_insert",)),
)


def image_formats() -> set[str]:
    """Suffixes, without the dot."""
    return set(Figure().canvas.get_supported_filetypes())


def draw(groups: Sequence[Group], over: str, metrics: Sequence[str] = (), image_format: str = "png") -> bytes:
    """`make_figure` as the content of a file. Raises RuntimeError for a format that needs what isn't installed."""
    buffer = io.BytesIO()
    make_figure(groups, over, metrics).savefig(buffer, format=image_format, dpi=DPI)
    return buffer.getvalue()


def make_figure(groups: Sequence[Group], over: str, metrics: Sequence[str] = ()) -> Figure:
    """1200 pixels wide: large panels, small ones below, the legend below these.

    over: one of AXES.   metrics: a panel each; without, what tells most of a run and is recorded.
    """
    asked = [Panel(name, (name,)) for name in metrics]
    large = [panel for panel in asked or (RETURNS, ELO) if _has(panel, groups, over)]
    small = [panel for panel in PANELS if not asked and _has(panel, groups, over)]
    rows = [(row, len(row), FIRST_HEIGHT) for row in _in_rows(large, 2)]
    rows += [(row, NUM_COLUMNS, ROW_HEIGHT) for row in _in_rows(small, NUM_COLUMNS)]
    heights = [height for *_, height in rows] + [LEGEND_HEIGHT * -(-len(groups) // MOST_IN_A_ROW)]
    figure = Figure((WIDTH, sum(heights)), layout="constrained")
    places = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    styles = _styles(len(groups))
    for (panels, num_columns, _), place in zip(rows, places[:-1], strict=True):
        all_axes = place.subplots(1, num_columns, squeeze=False)[0]
        for panel, axes in zip(panels, all_axes, strict=False):
            _draw_panel(axes, panel, groups, styles, over)
        for axes in all_axes[len(panels) :]:
            axes.set_axis_off()
    handles = [Line2D([], [], linewidth=2, **style) for style in styles]
    labels = [group.label for group in groups]
    places[-1].legend(handles, labels, loc="center", ncols=MOST_IN_A_ROW, frameon=False)
    return figure


def _has(panel: Panel, groups: Sequence[Group], over: str) -> bool:
    return any(group.curves(name, over) for group in groups for name in panel.metrics)


def _in_rows(panels: Sequence[Panel], most: int) -> list[Sequence[Panel]]:
    return [panels[at : at + most] for at in range(0, len(panels), most)]


def _styles(number: int) -> list[dict[str, Any]]:
    """Another colour each, then other dashes as well; the same again after 21."""
    looks = list(product(DASHES, zip(COLOURS, MARKERS, strict=True)))
    chosen = (looks[index % len(looks)] for index in range(number))
    return [{"linestyle": dash, "color": colour, "marker": marker} for dash, (colour, marker) in chosen]


def _draw_panel(
    axes: Axes, panel: Panel, groups: Sequence[Group], styles: Sequence[dict[str, Any]], over: str
) -> None:
    lowest = 0.0
    for group, style in zip(groups, styles, strict=True):
        # The faint ones first, to lie below.
        for name in reversed(panel.metrics):
            curves = [thinned(curve, panel.most_points) for curve in group.curves(name, over)]
            marker = style["marker"] if name.startswith("eval/") else ""
            lowest = min([lowest, *(curve.y.min() for curve in curves)])
            _draw_curves(axes, curves, {**style, "marker": marker}, name != panel.metrics[0])
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(AXES[over], fontsize=9)
    axes.set_ylabel(_unit(panel.metrics[0]), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if panel not in (RETURNS, ELO) and lowest >= 0:
        axes.set_ylim(bottom=0)
    for axis, top in ((axes.xaxis, axes.get_xlim()[1]), (axes.yaxis, axes.get_ylim()[1])):
        if top >= LARGE:
            axis.set_major_formatter(EngFormatter(sep=""))
    if panel is RETURNS:
        looks = (
            ("evaluation", {"marker": "o", "linewidth": 1.8}),
            ("in training", {"alpha": 0.45, "linewidth": 1}),
        )
        handles = [
            Line2D([], [], color="#444444", markersize=4, label=label, **look) for label, look in looks
        ]
        axes.legend(handles=handles, fontsize=8, frameon=False, loc="best")


def _draw_curves(axes: Axes, curves: Sequence[Curve], style: dict[str, Any], is_faint: bool) -> None:
    """Of one metric and one group: the mean with a band of one standard deviation, or what there is."""
    alpha, width = (0.45, 1.0) if is_faint else (1.0, 1.8)
    together = spread(curves)
    if together is None:
        for curve in curves:
            axes.plot(*curve, **style, markersize=4, linewidth=width, alpha=alpha)
        return
    bounds = together.mean - together.std, together.mean + together.std
    axes.fill_between(together.x, *bounds, color=style["color"], alpha=0.18 * alpha, linewidth=0)
    axes.plot(together.x, together.mean, **{**style, "marker": ""}, linewidth=width, alpha=alpha)
    if len(curves) <= MOST_THIN and not is_faint:
        for curve in curves:
            axes.plot(*curve, **style, markersize=2.5, linewidth=0.6, alpha=0.5)


def _unit(name: str) -> str:
    try:
        unit = metric_of(name)[0].unit
    except ValueError:
        return ""
    return "" if unit == "1" else unit
