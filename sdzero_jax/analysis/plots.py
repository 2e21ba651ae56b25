"""The figures of a report, drawn with matplotlib's Agg and returned as PNG bytes.

Each `draw_*` function fills a Figure and returns None when it has nothing to show; `png` draws it in
a light or a dark theme. Leaves out pyplot and its global state: nothing here touches a display.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

DPI = 144
WIDTH = 9.0  # inches; the page shows a figure about this wide, so 9 points stay readable


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of one appearance; the series colours differ in lightness too, for the colour-blind."""

    background: str
    text: str
    faint: str  # grid and axes
    muted: str  # bars of second rank
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1d2430", "#c9d0da", "#9aa5b4", ("#1f6fb4", "#d1601f", "#3d8f5f", "#8a4fa3"))
DARK = Theme("#1a202b", "#e4e8ee", "#465062", "#7b879c", ("#6cb2f2", "#f2935a", "#76c99a", "#c894de"))

# (panel title, label of the y axis, metric names drawn in it); the first panel with data comes first.
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Accuracy", "share correct", ("reward", "validation_accuracy")),
    ("Response length", "tokens", ("mean_tokens",)),
    ("Divergence of student and teacher", "nats per token", ("divergence",)),
    ("Student entropy", "nats per token", ("entropy",)),
    ("Sampler and trainer log-probs", "|Δ ln p|, nats", ("logprob_diff_mean", "logprob_diff_max")),
    ("Loss", "loss", ("loss", "validation_loss")),
    ("Keep rate", "share kept right", ("keep_rate",)),
    ("Gradient norm", "norm", ("grad_norm",)),
    ("Learning rate", "rate", ("learning_rate",)),
)
SERIES_LABELS = {
    "loss": "training",
    "validation_loss": "held out",
    "reward": "rollouts",
    "validation_accuracy": "validation",
    "logprob_diff_mean": "mean",
    "logprob_diff_max": "largest",
}
Rows = Sequence[Mapping[str, Any]]


def png(draw: Callable[[Any, Theme], bool], theme: Theme, height: float) -> bytes | None:
    """Runs `draw(figure, theme)` on a new figure of that height in inches; None if it draws nothing."""
    # Imported here: statistics and localisation must not cost the import of matplotlib.
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme.faint,
        "axes.facecolor": theme.background,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.faint,
        "grid.alpha": 0.5,
        "legend.frameon": False,
        "figure.facecolor": theme.background,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        if not draw(figure, theme):
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def join_rounds(rounds: Sequence[Rows]) -> tuple[list[dict[str, Any]], list[float]]:
    """Puts the rows of several rounds on one step axis; returns (rows, steps at which a round ended)."""
    joined: list[dict[str, Any]] = []
    ends: list[float] = []
    last = 0.0
    for rows in (rows for rows in rounds if rows):
        if joined:
            ends.append(last)
        # A round that counts its steps from the start of the run needs no shift.
        shift = last if joined and rows[0].get("step", 0) <= last else 0.0
        joined += [{**row, "step": row.get("step", 0) + shift} for row in rows]
        last = max(row["step"] for row in joined)
    return joined, ends


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], values [N]) of the finite values of one metric."""
    points = [(row["step"], row[name]) for row in rows if is_number(row.get(name)) and is_number(row.get("step"))]
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def present_panels(rows: Rows) -> list[tuple[str, str, list[str]]]:
    """The panels of `PANELS` that have at least one finite value in `rows`."""
    found = [(t, y, [name for name in names if series(rows, name)[0].size]) for t, y, names in PANELS]
    return [panel for panel in found if panel[2]]


def curves_height(rows: Rows) -> float:
    """Figure height for `draw_curves`: three panels a row."""
    return 2.4 * max(1, math.ceil(len(present_panels(rows)) / 3)) + 0.1


def draw_curves(figure: Any, theme: Theme, rows: Rows, ends: Sequence[float] = ()) -> bool:
    """Small multiples of the training metrics over steps; `ends` are marked as synchronisations."""
    from matplotlib.ticker import MaxNLocator

    panels = present_panels(rows)
    if not panels:
        return False
    axes = figure.subplots(math.ceil(len(panels) / 3), 3, squeeze=False).ravel()
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
    for axis, (title, unit, names) in zip(axes, panels, strict=False):
        for index, name in enumerate(names):
            steps, values = series(rows, name)
            colour = theme.series[index]
            label = SERIES_LABELS.get(name, name)
            # One line per round: a line across a synchronisation would draw a step that nobody took.
            for part in np.split(np.arange(steps.size), np.searchsorted(steps, ends, side="right")):
                smooth = values[part] if name == "learning_rate" else smoothed(values[part])
                axis.plot(steps[part], values[part], color=colour, alpha=0.3, linewidth=0.8)
                marker = "o" if part.size == 1 else None
                axis.plot(steps[part], smooth, color=colour, linewidth=1.6, marker=marker, label=label)
                label = None  # one legend entry for all rounds
        for end in ends:
            axis.axvline(end, color=theme.text, linestyle=":", linewidth=1)
        lowest = min(series(rows, name)[1].min() for name in names)
        if names[0].startswith("logprob_diff") and lowest > 0:
            axis.set_yscale("log")
        elif title in ("Accuracy", "Response length", "Keep rate"):
            # No axis that turns noise into a cliff: a share spans at least 0.2, a length at least 10%.
            _widen(axis, 0.2 if unit != "tokens" else 0.1 * float(np.mean(series(rows, names[0])[1])))
        axis.set(title=title, xlabel="optimiser step", ylabel=unit)
        axis.grid(True)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        if title == "Learning rate":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        if len(names) > 1:
            axis.legend(loc="best", fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return True


def smoothed(values: np.ndarray) -> np.ndarray:
    """Moving mean over about a tenth of the points; a short series is returned as it is.

    The window shrinks to one point at both ends, so that the ends are not biased inwards.
    """
    reach = values.size // 20
    if reach < 1:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    half = np.minimum(np.minimum(index, index[::-1]), reach)
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def draw_results(figure: Any, theme: Theme, models: Sequence[Mapping[str, Any]], k: int) -> bool:
    """Accuracy with its interval, response length, and correction / keep rates, one group per model.

    Args:
      models: {"label", "avg", "interval" (low, high) | None, "pass", "mean_tokens", "correction_rate",
        "keep_rate"}, numbers or None.
    """
    models = [model for model in models if is_number(model.get("avg"))]
    if not models:
        return False
    left, middle, right = figure.subplots(1, 3)
    place = np.arange(len(models))
    many = len(models) > 3
    labels = [_short(model["label"]) if many else model["label"] for model in models]
    _pair(left, theme, models, ("avg", f"avg@{k}"), ("pass", f"pass@{k}"))
    for index, model in enumerate(models):
        if model.get("interval"):
            low, high = model["interval"]
            left.plot([index - 0.2] * 2, [low, high], color=theme.text, linewidth=1.4)
    left.set(title="Accuracy", ylabel="share correct")
    tokens = [number_or_nan(model.get("mean_tokens")) for model in models]
    middle.bar(place, tokens, 0.6, color=theme.series[2])
    _write_values(middle, place, tokens, "{:.1f}")
    middle.set(title="Response length", ylabel="mean tokens")
    middle.margins(y=0.15)
    _pair(right, theme, models, ("correction_rate", "correction rate"), ("keep_rate", "keep rate"), first=3)
    right.set(title="Revising own attempts", ylabel="share right after revision")
    for axis in (left, middle, right):
        axis.set_xticks(place, labels)
        if many:
            axis.tick_params(axis="x", labelrotation=40)
            for label in axis.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axis.grid(True, axis="y")
        axis.set_axisbelow(True)
    for axis in (left, right):
        _share_axis_with_legend(axis, columns=2)
    return True


def draw_funnel(figure: Any, theme: Theme, collect: Mapping[str, Any]) -> bool:
    """Collection: what was sampled and what was kept, as horizontal bars."""
    names = {
        "questions": "questions",
        "generations": "generations sampled",
        "kept": "traces kept (revision right)",
        "kept_from_wrong": "of these, first attempt wrong",
    }
    items = [(label, collect[key]) for key, label in names.items() if is_number(collect.get(key))]
    if not items:
        return False
    axis = figure.subplots()
    place = np.arange(len(items))[::-1]
    counts = [count for _, count in items]
    axis.barh(place, counts, 0.62, color=[theme.series[i % len(theme.series)] for i in range(len(items))])
    for y, count in zip(place, counts, strict=True):
        axis.text(count, y, f" {count:,.0f}", va="center", ha="left")
    axis.set_yticks(place, [label for label, _ in items])
    axis.set_xlabel("count")
    axis.margins(x=0.12)
    axis.grid(True, axis="x")
    axis.set_axisbelow(True)
    return True


def draw_detection(figure: Any, theme: Theme, summary: Mapping[str, Any]) -> bool:
    """AUROC of three scores for "is the first wrong token", and top-1 / top-3 hit rates beside chance."""
    scores = [
        ("KL", "auroc_kl"),
        ("entropy\n(baseline)", "auroc_entropy"),
        ("ln S − ln T", "auroc_log_ratio"),
    ]
    values = [number_or_nan(summary.get(key)) for _, key in scores]
    if not np.isfinite(values).any():
        return False
    left, right = figure.subplots(1, 2)
    left.bar(range(3), values, 0.6, color=theme.series[:3])
    _write_values(left, range(3), values, "{:.3f}")
    left.axhline(0.5, color=theme.text, linestyle="--", linewidth=1)
    left.set_xlim(-0.5, 3.1)
    left.text(3.08, 0.51, "chance", ha="right", va="bottom", fontsize=8)
    left.set_xticks(range(3), [label for label, _ in scores])
    left.set(title="Which score finds the first wrong token?", ylabel="AUROC", ylim=(0, 1.08))
    kinds = [("kl", "KL"), ("entropy", "entropy"), ("chance", "chance")]
    colours = (theme.series[0], theme.series[1], theme.muted)
    present = [kind for kind in kinds if is_number(summary.get(f"top1_{kind[0]}"))]
    width = 0.8 / max(len(present), 1)
    for index, (key, label) in enumerate(present):
        place = np.arange(2) + (index - (len(present) - 1) / 2) * width
        hits = [number_or_nan(summary.get(f"top{n}_{key}")) for n in (1, 3)]
        right.bar(place, hits, width * 0.94, label=label, color=colours[kinds.index((key, label))])
        _write_values(right, place, hits, "{:.2f}")
    right.set_xticks([0, 1], ["highest token", "three highest tokens"])
    right.set(title="Is it among the highest?", ylabel="share of wrong responses")
    _share_axis_with_legend(right, columns=3)
    for axis in (left, right):
        axis.grid(True, axis="y")
        axis.set_axisbelow(True)
    return True


def draw_buckets(figure: Any, theme: Theme, buckets: Mapping[str, Any]) -> bool:
    """Tokens sorted by KL into buckets: mean KL and mean ln S - ln T of each, wrong beside right."""
    halves = [("wrong", "wrong responses", theme.series[1]), ("right", "right responses", theme.series[0])]
    halves = [half for half in halves if any(is_number(v) for v in (buckets.get(half[0]) or {}).get("kl", ()))]
    if not halves:
        return False
    left, right = figure.subplots(1, 2)
    for name, label, colour in halves:
        for axis, key in ((left, "kl"), (right, "log_ratio")):
            values = np.array([number_or_nan(value) for value in buckets[name].get(key, ())])
            place = np.arange(1, values.size + 1)
            axis.plot(place, values, marker="o", markersize=3.5, linewidth=1.4, color=colour, label=label)
    left.set(title="KL", ylabel="mean KL, nats")
    right.set(title="Token KL reward", ylabel="mean ln S − ln T, nats")
    right.axhline(0, color=theme.text, linewidth=0.8)
    for axis in (left, right):
        axis.set_xlabel("bucket of tokens sorted by KL (last = highest)")
        axis.locator_params(axis="x", integer=True)
        axis.grid(True)
        axis.legend(loc="best", fontsize=8)
    return True


def draw_offsets(figure: Any, theme: Theme, offsets: Mapping[str, Any]) -> bool:
    """Mean KL and mean entropy at token offsets around the first wrong token."""
    names = [("kl", "KL", theme.series[0]), ("entropy", "entropy (baseline)", theme.series[1])]
    names = [name for name in names if any(is_number(value) for value in offsets.get(name[0], ()))]
    if not names or not offsets.get("offset"):
        return False
    axes = figure.subplots(1, len(names), squeeze=False).ravel()
    for axis, (key, label, colour) in zip(axes, names, strict=True):
        values = [number_or_nan(value) for value in offsets[key]]
        axis.axvline(0, color=theme.text, linestyle=":", linewidth=1)
        axis.plot(offsets["offset"], values, marker="o", markersize=3.5, linewidth=1.4, color=colour)
        axis.set(title=label, xlabel="tokens from the first wrong one", ylabel="mean, nats")
        axis.locator_params(axis="x", integer=True)
        axis.set_ylim(bottom=min(0.0, float(np.nanmin(values))))
        axis.grid(True)
    return True


def draw_seconds(figure: Any, theme: Theme, seconds: Mapping[str, Any]) -> bool:
    """Wall-clock seconds of each stage, as horizontal bars."""
    items = [(name, value) for name, value in seconds.items() if is_number(value)]
    if not items:
        return False
    axis = figure.subplots()
    place = np.arange(len(items))[::-1]
    axis.barh(place, [value for _, value in items], 0.62, color=theme.series[0])
    for y, (_, value) in zip(place, items, strict=True):
        axis.text(value, y, f" {value:,.1f}", va="center", ha="left")
    axis.set_yticks(place, [str(name) for name, _ in items])
    axis.set_xlabel("seconds of wall-clock time")
    axis.margins(x=0.12)
    axis.grid(True, axis="x")
    axis.set_axisbelow(True)
    return True


def is_number(value: Any) -> bool:
    """True for a finite int or float, False for None, NaN, text and booleans."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number_or_nan(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def _pair(axis: Any, theme: Theme, models: Sequence[Mapping[str, Any]], one: Any, two: Any, first: int = 0) -> None:
    """Two bars per model."""
    place = np.arange(len(models))
    for shift, (key, label), colour in ((-0.2, one, theme.series[first]), (0.2, two, theme.muted)):
        values = [number_or_nan(model.get(key)) for model in models]
        axis.bar(place + shift, values, 0.38, color=colour, label=label)


def _write_values(axis: Any, places: Sequence[float], values: Sequence[float], form: str) -> None:
    for place, value in zip(places, values, strict=True):
        if math.isfinite(value):
            axis.annotate(
                form.format(value),
                (place, value),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )


def _share_axis_with_legend(axis: Any, columns: int) -> None:
    """An axis from 0 to 1 with room above it for the legend, so that no bar can hide behind it."""
    axis.set_ylim(0, 1.22)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.legend(loc="upper center", ncols=columns, fontsize=8, columnspacing=1, borderaxespad=0.1)


def _short(label: str, length: int = 18) -> str:
    return label if len(label) <= length else label[: length - 1] + "…"


def _widen(axis: Any, span: float) -> None:
    low, high = axis.get_ylim()
    if high - low < span:
        low = max((low + high - span) / 2, 0.0)
        axis.set_ylim(low, low + span)
