"""Writes a run's report: one HTML page that needs no network and no server, PNG figures, summary.md.

It reads the run directory and nothing else, so a report can be made again, or of a run copied from
another machine. Leaves out comparing runs (`folders`).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdzero_jax.analysis import plots
from sdzero_jax.analysis.page import (
    LEDGER_HEADS,
    LEDGER_NOTE,
    Picture,
    build_page,
    columns,
    describe,
    format_value,
    interval_of,
    ledger_form,
    run_name,
    verdict_on_kl,
)
from sdzero_jax.analysis.run_data import PHASES, ResultRow, RunData, load_run
from sdzero_jax.files import write_bytes_atomic


def write_report(run_dir: str | os.PathLike) -> Path:
    """Writes `run_dir/report/`: report.html, figures as PNG and summary.md; returns the path of the page.

    Stages without files are shown as not run. Raises UserError if `run_dir` is not a run directory or
    one of its files is broken.
    """
    run = load_run(Path(run_dir))
    folder = run.directory / "report"
    pictures = draw_pictures(run)
    for picture in pictures.values():
        write_bytes_atomic(folder / f"{picture.name}.png", picture.light)
    # A model may emit half of a surrogate pair, which UTF-8 cannot hold.
    write_bytes_atomic(folder / "summary.md", summary_markdown(run).encode("utf-8", "replace"))
    path = folder / "report.html"
    write_bytes_atomic(path, build_page(run, pictures).encode("utf-8", "replace"))
    return path


def draw_pictures(run: RunData) -> dict[str, Picture]:
    """Every figure that the run has data for, by name, in both themes."""
    wanted: list[tuple[str, Callable[..., bool], float, str]] = [
        (
            "results",
            lambda figure, theme: plots.draw_results(figure, theme, [_bars(row, run.k) for row in run.rows], run.k),
            3.2,
            "Accuracy (thin line: 95% interval, where known), mean response length, and how often a revision "
            "of the model's own wrong (correction) and right (keep) first attempts is right.",
        )
    ]
    for phase, title in PHASES.items():
        rows, ends = plots.join_rounds(run.phases.get(phase) or [])
        caption = f"{title}: what was logged; strong line: moving mean, where there are many points"
        caption += "; dotted line: the teacher became a copy of the student." if ends else "."
        draw = _curves(rows, ends)
        wanted.append((f"curves_{phase}", draw, plots.curves_height(rows), caption))
    located = run.localisation
    wanted += [
        (
            "funnel",
            lambda figure, theme: plots.draw_funnel(figure, theme, run.collect),
            2.0,
            "From questions to the revision traces that SRT learns from.",
        ),
        (
            "detection",
            lambda figure, theme: plots.draw_detection(figure, theme, located),
            3.2,
            "Left: AUROC for “this is the first wrong token”; 0.5 is chance, entropy the baseline. Right: "
            "how often the first wrong token has the highest score of its response, or one of the three "
            "highest.",
        ),
        (
            "buckets",
            lambda figure, theme: plots.draw_buckets(figure, theme, located.get("buckets") or {}),
            3.0,
            "Tokens sorted by KL into equal buckets, separately for wrong and right responses. Above 0 on "
            "the right: the teacher finds the sampled token less likely than the student does.",
        ),
        (
            "offsets",
            lambda figure, theme: plots.draw_offsets(figure, theme, located.get("offsets") or {}),
            2.8,
            "Mean KL and mean entropy around the first wrong token (offset 0), wrong responses.",
        ),
        (
            "seconds",
            lambda figure, theme: plots.draw_seconds(figure, theme, run.seconds),
            0.8 + 0.3 * len(run.seconds),
            "Wall-clock seconds per stage.",
        ),
    ]
    pictures = {}
    for name, draw, height, caption in wanted:
        light = plots.png(draw, plots.LIGHT, height)
        if light is not None:
            pictures[name] = Picture(name, light, plots.png(draw, plots.DARK, height), caption)
    return pictures


def summary_markdown(run: RunData) -> str:
    """The result table, the localisation verdict and the budget in Markdown."""
    shown = columns(run.k)
    lines = [f"# SD-Zero run: {plain(run_name(run))}", "", plain(describe(run)), ""]
    lines.append("| model | " + " | ".join(column.heading for column in shown) + " |")
    lines.append("|---" * (len(shown) + 1) + "|")
    for row in run.rows:
        cells = [format_value(row.values.get(column.key), column.form) for column in shown]
        for index, column in enumerate(shown):
            if interval := interval_of(row, column.key):
                cells[index] += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        if not row.values:
            cells = ["not run" + (f": {plain(row.note)}" if row.note else "")] + [""] * (len(shown) - 1)
        lines.append(f"| {plain(row.label)} | " + " | ".join(cells) + " |")
    if run.localisation:
        lines += ["", verdict_on_kl(run.localisation)]
    if run.ledgers:
        names = list(next(iter(run.ledgers.values())))
        lines += ["", f"| stage | {' | '.join(LEDGER_HEADS.get(name, name.replace('_', ' ')) for name in names)} |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for stage, spent in run.ledgers.items():
            lines.append(f"| {stage} | {' | '.join(ledger_form(name).format(spent[name]) for name in names)} |")
        lines += ["", LEDGER_NOTE]
    if run.seconds:
        items = (f"{plain(name)} {format_value(value, '{:,.1f}')}" for name, value in run.seconds.items())
        lines += ["", f"Seconds per stage: {', '.join(items)}."]
    return "\n".join(lines) + "\n"


def _curves(rows: list[dict[str, Any]], ends: list[float]) -> Callable[..., bool]:
    return lambda figure, theme: plots.draw_curves(figure, theme, rows, ends)


def _bars(row: ResultRow, k: int) -> Mapping[str, Any]:
    names = {"avg": f"avg@{k}", "pass": f"pass@{k}"}
    names |= {name: name for name in ("mean_tokens", "correction_rate", "keep_rate")}
    values = {name: row.values.get(key) for name, key in names.items()}
    return {"label": row.label, "interval": interval_of(row, f"avg@{k}"), **values}


def plain(text: str) -> str:
    """Text on one line that cannot end a table cell or open a tag."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
