"""Pictures of a run: SVG whose colours follow the page's light or dark theme, and one PNG for a README."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benthic.base.log import number
from benthic.eval.record import Curve, Record, read

# Name -> (light, dark). Figures are drawn in the light colours; in SVG each becomes var(--name).
COLORS = {
    "ink": ("#18222d", "#e8edf1"),
    "muted": ("#5d6975", "#97a4b0"),
    "rule": ("#dde2e6", "#2a343e"),
    "blue": ("#1f63c6", "#6aa8f7"),
    "orange": ("#cf5a1f", "#f0935a"),
    "green": ("#14806a", "#41bfa0"),
    "violet": ("#7548b8", "#ad8dec"),
    "grey": ("#9aa5b0", "#66727e"),
}
LIGHT = {name: light for name, (light, _) in COLORS.items()}
ROUND = [1, 2, 5, 10]  # ticks at multiples of these
POINTS = 400  # a curve is thinned to this many points
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib; the page replaces it by its own
    "font.size": 10,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "benthic",
}
# Transparent in the middle, so that an even load has the colour of the page in both themes.
LOAD_MAP = LinearSegmentedColormap.from_list(
    "load",
    [
        (0.0, (0.12, 0.39, 0.78, 1.0)),
        (0.5, (0.12, 0.39, 0.78, 0.0)),
        (0.5, (0.86, 0.40, 0.14, 0.0)),
        (1.0, (0.86, 0.40, 0.14, 1.0)),
    ],
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart. `dots` marks single measurements; `smooth` draws the mean over neighbouring steps."""

    label: str
    curve: Curve
    color: str = "blue"
    dots: bool = False
    smooth: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over steps, with horizontal `marks` (label, value) to compare with."""

    lines: Sequence[Line]
    y: str
    x: str = "step"
    marks: Sequence[tuple[str, float]] = ()
    zero: bool = False  # the y axis starts at 0


def chart(spec: Chart, *, width: float = 5.4, height: float = 2.9) -> str:
    """One chart as SVG text."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        _draw(figure.subplots(), spec)
        return _svg(figure)


def row(specs: Sequence[Chart], *, height: float = 2.3) -> str:
    """Small charts side by side, each with its own scale, as one SVG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, height), layout="constrained")
        for axes, spec in zip(figure.subplots(1, len(specs), squeeze=False)[0], specs):
            _draw(axes, spec)
            axes.set_title(spec.y, loc="left", fontsize=10, color=LIGHT["ink"])
            axes.set_ylabel("")
        return _svg(figure)


def heat(steps: list[int], loads: list[list[list[float]]], *, most: int = 4) -> str:
    """Experts x time, one strip per MoE layer (evenly chosen ones when there are more than `most`)."""
    grid = np.array(loads)  # [steps, layers, experts]
    layers = sorted({round(i) for i in np.linspace(0, grid.shape[1] - 1, min(most, grid.shape[1]))})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 0.55 + 1.25 * len(layers)), layout="constrained")
        strips = figure.subplots(len(layers), 1, squeeze=False, sharex=True)[:, 0]
        for axes, layer in zip(strips, layers):
            image = _thin_columns(grid[:, layer].T)
            extent = (steps[0], max(steps[-1], steps[0] + 1), grid.shape[2] - 0.5, -0.5)
            axes.imshow(image, LOAD_MAP, vmin=0, vmax=2, aspect="auto", interpolation="none", extent=extent)
            axes.grid(False)
            axes.set_ylabel(f"MoE layer {layer + 1}")
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
        strips[-1].set_xlabel("step")
        return _svg(figure)


def pass_bars(before: dict[str, list[float]], after: dict[str, list[float]]) -> str:
    """pass@1 and pass@8 before and after, with 95% intervals."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        _draw_bars(figure.subplots(), before, after)
        return _svg(figure)


def overview(folder: Path) -> Path:
    """Write folder/overview.png: compression, reward and pass@k side by side, for a README."""
    record = read(folder)
    specs = [bits_chart(record), reward_chart(record)]
    panels = [spec for spec in specs if any(line.curve for line in spec.lines)]
    rl = record.results.get("rl")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 3.6), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(panels) + bool(rl), squeeze=False)[0]
        for one, spec in zip(axes, panels):
            _draw(one, spec)
            one.set_title(spec.y, loc="left", color=LIGHT["ink"])
            one.set_ylabel("")
        if rl:
            _draw_bars(axes[-1], rl["before"], rl["after"])
            axes[-1].set_title("problems solved", loc="left", color=LIGHT["ink"])
        path = folder / "overview.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def bits_chart(record: Record) -> Chart:
    """Held-out bits per byte while pretraining, against gzip and the untrained model."""
    bits = record.results.get("bits_per_byte")
    marks = [("untrained model", bits["untrained"]), ("gzip -9", bits["gzip"])] if bits else []
    curve = record.curve("pretrain", "heldout_bits_per_byte")
    return Chart(lines=[Line(label="this model", curve=curve, dots=True)], y="bits per byte", marks=marks)


def reward_chart(record: Record) -> Chart:
    """Mean reward of the sampled answers while reinforcement learning."""
    line = Line(label="reward", curve=record.curve("grpo", "reward"), color="orange", smooth=True)
    return Chart(lines=[line], y="mean reward")


def _draw(axes: Axes, spec: Chart) -> None:
    drawn = [line for line in spec.lines if line.curve]
    ends = [(label, value, LIGHT["muted"]) for label, value in spec.marks]
    for line in drawn:
        color, curve = LIGHT[line.color], _thin(line.curve)
        if line.smooth:
            axes.plot(curve.steps, curve.values, color=color, linewidth=0.9, alpha=0.3)
            curve = _smooth(curve)
        marker = "o" if line.dots else ""
        axes.plot(curve.steps, curve.values, color=color, linewidth=2.0, marker=marker, markersize=3.5)
        ends.append((line.label, curve.values[-1], color))
    for _, value in spec.marks:
        axes.axhline(value, color=LIGHT["muted"], linewidth=1.1, linestyle=(0, (4, 3)))
    axes.margins(x=0.02, y=0.1)
    low, high = axes.get_ylim()
    if high - low < 1e-6 * abs(high):  # a constant: do not magnify its rounding
        axes.set_ylim(low - 0.1 * abs(high), high + 0.1 * abs(high))
    if spec.zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(spec.x)
    axes.set_ylabel(spec.y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    if len(ends) > 1:
        _label_right(axes, ends)


def _label_right(axes: Axes, labels: list[tuple[str, float, str]]) -> None:
    """Name lines at their right end, pushed apart until no two names touch."""
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label[1])
    places = [(value - low) / (high - low) for _, value, _ in labels]
    gap = 0.085
    for _ in range(200):
        for i, (a, b) in enumerate(pairwise(places)):
            if b - a < gap:
                places[i], places[i + 1] = (a + b - gap) / 2, (a + b + gap) / 2
    for (text, _, color), place in zip(labels, places):
        axes.annotate(text, (1.015, place), xycoords="axes fraction", color=color, va="center", fontsize=9.5)


def _draw_bars(axes: Axes, before: dict[str, list[float]], after: dict[str, list[float]]) -> None:
    keys = ["pass@1", "pass@8"]
    for shift, name, color, outcome in ((-0.2, "before", "grey", before), (0.2, "after", "orange", after)):
        for at, key in enumerate(keys):
            value, low, high = outcome[key]
            axes.bar(at + shift, value, 0.36, color=LIGHT[color], label=f"{name} RL" if at == 0 else None)
            axes.plot([at + shift] * 2, [low, high], color=LIGHT["ink"], linewidth=1.4, solid_capstyle="butt")
            axes.annotate(
                f"{value:.0%}", (at + shift, high), (0, 4), textcoords="offset points", ha="center", fontsize=10
            )
    axes.set_xticks(range(len(keys)), keys, color=LIGHT["ink"])
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    axes.grid(False, axis="x")
    axes.tick_params(axis="x", length=0)
    axes.legend(frameon=False, loc="upper left", fontsize=9.5, ncols=2, borderaxespad=0, handlelength=1.0)


def _thin(curve: Curve) -> Curve:
    """At most POINTS points, each the mean of its neighbours; the last step stays the last."""
    size = -(-len(curve.steps) // POINTS)
    if size == 1:
        return curve
    starts = range(0, len(curve.steps), size)
    means = [float(np.mean(curve.values[i : i + size])) for i in starts]
    return Curve(steps=[curve.steps[min(i + size, len(curve.steps)) - 1] for i in starts], values=means)


def _thin_columns(image: np.ndarray) -> np.ndarray:
    size = -(-image.shape[1] // POINTS)
    return np.stack([image[:, i : i + size].mean(1) for i in range(0, image.shape[1], size)], axis=1)


def _smooth(curve: Curve) -> Curve:
    """Centred moving mean over a twentieth of the curve; shorter at the ends."""
    half = len(curve.values) // 40
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    at = np.arange(len(curve.values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(at))
    return replace(curve, values=((sums[high] - sums[low]) / (high - low)).tolist())


def _svg(figure: Figure) -> str:
    """Inline SVG that fills its place: no header, link, size or style of its own; theme colours, the page's font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    head, _, body = buffer.getvalue().partition("<svg")[2].partition(">")
    head = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"(font-family: |font: [\d.]+px )[^;\"]+", r"\1var(--sans)", body)
    for name, color in LIGHT.items():
        body = body.replace(color, f"var(--{name})")
    return f"<svg{head}>{body}"
