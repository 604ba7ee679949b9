"""Draws what `diagnose` found: errors by unroll depth, calibration of values, depth of the trees."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distributed_muzero.observability.plotting import COLOURS, DPI, WIDTH

HEIGHT = 7.0  # inches
LEAST_SHARE = 0.01  # that the axis of a share reaches up to
BLUE, ORANGE, GREEN = COLOURS[:3]


def draw(result: Mapping[str, Any], title: str, image_format: str = "png") -> bytes:
    """`make_figure` as the content of a file. Raises RuntimeError for a format that needs what isn't installed."""
    buffer = io.BytesIO()
    make_figure(result, title).savefig(buffer, format=image_format, dpi=DPI)
    return buffer.getvalue()


def make_figure(result: Mapping[str, Any], title: str) -> Figure:
    """1200 pixels wide.   result: what `workers.diagnosis.diagnose` returns."""
    figure = Figure((WIDTH, HEIGHT), layout="constrained")
    figure.suptitle(title, fontsize=11)
    value, reward, policy, illegal, calibrated, grown = figure.subplots(2, 3).flat
    depths = result["depths"]

    _dress(value, "value error", "unroll depth k", "units of return")
    _curve(value, depths, "value_rmse", "RMSE against the return", BLUE, "o-")
    _curve(value, depths, "search_value_rmse", "RMSE against the search", ORANGE, "s-")
    _curve(value, depths, "value_bias", "bias against the return", BLUE, "o:")
    value.axhline(0, color="#444444", linewidth=0.8)

    _dress(reward, "reward error", "unroll depth k", "units of reward")
    _curve(reward, depths, "reward_rmse", "RMSE", BLUE, "o-")
    _curve(reward, depths, "reward_bias", "bias", BLUE, "o:")
    reward.axhline(0, color="#444444", linewidth=0.8)

    _dress(policy, "policy error", "unroll depth k", "nats")
    _curve(policy, depths, "policy_kl", "KL(search ‖ unrolled prior)", BLUE, "o-")
    policy.set_ylim(bottom=0)

    _dress(illegal, "prior on illegal actions", "unroll depth k", "share of the prior")
    _curve(illegal, depths, "illegal_mass", "mean", BLUE, "o-")
    illegal.set_ylim(0, max(illegal.get_ylim()[1], LEAST_SHARE))

    _draw_calibration(calibrated, result["calibration"])

    _dress(grown, "depth of the search's trees", "depth of the deepest node", "positions")
    grown.bar(*zip(*result["search"]["roots_by_highest"], strict=True), color=BLUE, width=0.8)

    for axes in (value, reward, policy, illegal):
        axes.set_xlim(-0.1, max(len(depths) - 1, 1) + 0.1)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if len(depths) - 1 > result["trained_depth"]:
            axes.axvline(
                result["trained_depth"],
                color="#444444",
                linestyle="--",
                linewidth=0.8,
                label="trained up to here",
            )
    grown.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    value.margins(y=0.6)
    for axes in (value, reward, policy, illegal, calibrated):
        axes.legend(fontsize=8, loc="upper left", framealpha=0.8, edgecolor="none")
    return figure


def _draw_calibration(axes: Axes, calibration: Mapping[str, Any]) -> None:
    _dress(axes, "calibration of root values", "predicted value", "mean return")
    found = []
    for name, colour, marker in (("network", BLUE, "o"), ("search", ORANGE, "s")):
        bins = calibration[name]["bins"]
        predicted, returned, counts = (
            np.array([one[key] for one in bins]) for key in ("predicted", "returned", "count")
        )
        found += [*predicted, *returned]
        axes.plot(predicted, returned, color=colour, linewidth=1)
        axes.scatter(
            predicted,
            returned,
            s=10 + 90 * counts / counts.sum(),
            color=colour,
            marker=marker,
            label=f"{name}, error {calibration[name]['error']:.3g}",
        )
    axes.plot([min(found), max(found)], [min(found), max(found)], "--", color="#444444", linewidth=0.8)


def _curve(
    axes: Axes, depths: Sequence[Mapping[str, Any]], name: str, label: str, colour: str, style: str
) -> None:
    points = [(row["k"], row[name]) for row in depths if row[name] is not None]
    axes.plot(*np.array(points).reshape(-1, 2).T, style, color=colour, label=label, markersize=4)


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    # Room for the legend.
    axes.margins(y=0.25)
