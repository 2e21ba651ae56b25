"""Writes the report of a comparison: one HTML page that needs no network, PNG figures, comparison.md.

It reads comparison.json and nothing else. Every table is built once and rendered twice, so that the page and
the Markdown cannot disagree. Leaves out the statistics, which `compare.summarise` has computed.
"""

import functools
import itertools
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdzero_jax.analysis import page, plots
from sdzero_jax.analysis.page import Picture, escape, format_value
from sdzero_jax.analysis.plots import is_number
from sdzero_jax.analysis.report import plain
from sdzero_jax.errors import UserError
from sdzero_jax.files import read_json, write_bytes_atomic

# arXiv 2604.12002, Table 1: avg@8 in percent over eight benchmarks. Entry name -> method, Qwen3-4B-Instruct,
# Olmo-3-7B-Instruct.
PAPER = {
    "base": ("base", 49.8, 41.1),
    "sft": ("SFT", 50.0, 42.4),
    "rft": ("RFT", 54.3, 46.7),
    "grpo": ("GRPO", 53.1, 44.8),
    "sdft": ("SDFT", 51.2, 43.4),
    "srt": ("SRT", 57.6, 50.3),
    "phase2": ("phase 2 only", 51.4, None),
    "sdzero": ("SD-Zero", 60.3, 51.5),
}
WANTED = {"name": str, "budget": int, "seeds": list, "k": int, "reference": str, "config": dict, "methods": dict}
WANTED_OF_METHOD = {"label": str, "settings": list, "seeds": dict, "budget_share": (int, float), "at_budget": bool,
                    "mean": dict, "interval": list, "ledger": dict, "difference": (dict, type(None))}  # fmt: skip
_NAMED = 20  # with more methods than this the first paragraph does not name them
LEDGER = ("questions", "generations", "sampled_tokens", "student_tokens", "teacher_tokens", "verifier_calls")
Summary = Mapping[str, Any]
Method = Mapping[str, Any]


class Cell(NamedTuple):
    """Text of a table cell, its exact value, and small print under it; nothing is escaped yet."""

    text: str
    value: Any = None
    below: tuple[str, ...] = ()


class Table(NamedTuple):
    """A titled table; a row is (entry name, label, cells), and `heads` leaves out the column of the labels."""

    name: str
    title: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Cell]]]
    note: str


class Dot(NamedTuple):
    """One row of a dot plot: mean, one value per seed, one (low, high) per kind of interval."""

    label: str
    mean: float
    seeds: Sequence[float]
    intervals: Sequence[Sequence[float]]
    at_budget: bool


def write_comparison(folder: str | os.PathLike) -> Path:
    """Writes `folder/report/`: comparison.html, comparison.md and figures as PNG; returns the path of the page.

    Raises UserError if `folder/comparison.json` is missing or lacks what `compare.summarise` writes.
    """
    summary = read_comparison(Path(folder) / "comparison.json")
    report, tables, pictures = Path(folder) / "report", build_tables(summary), draw_pictures(summary)
    for picture in pictures:
        write_bytes_atomic(report / f"{picture.name}.png", picture.light)
    write_bytes_atomic(report / "comparison.md", build_markdown(summary, tables).encode("utf-8", "replace"))
    write_bytes_atomic(report / "comparison.html", build_page(summary, tables, pictures).encode("utf-8", "replace"))
    return report / "comparison.html"


def read_comparison(path: Path) -> dict[str, Any]:
    """What `compare` wrote; UserError names the first thing that is missing or of another type."""
    summary = read_json(path)
    _check(summary, WANTED, f"{path}: ")
    for name, method in summary["methods"].items():
        _check(method, WANTED_OF_METHOD, f"{path}: methods.{name}: ")
    if summary["reference"] not in summary["methods"]:
        raise UserError(f"{path}: reference {summary['reference']!r} is none of {', '.join(summary['methods'])}")
    return summary


def _check(value: Any, wanted: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}holds a {type(value).__name__}, expected a JSON object")
    for key, kind in wanted.items():
        if not isinstance(value.get(key), kind):
            came = f"{key!r} is a {type(value[key]).__name__}" if key in value else f"lacks {key!r}"
            raise UserError(f"{where}{came}; expected what compare writes: {', '.join(wanted)}")


# -------------------------------------------------------------------------------------- the tables


def build_tables(summary: Summary) -> list[Table]:
    """All tables, in the order of the page; the paper's only where two of its methods can be put in order."""
    paper = (paper_table,) if len(_paper_methods(summary)) > 1 else ()
    return [build(summary) for build in (results_table, revision_table, *paper, seeds_table, ledger_table)]


def results_table(summary: Summary) -> Table:
    """Accuracy, length, revision rates, difference to the reference and budget of each method."""
    k, reference = summary["k"], summary["reference"]
    names = {name: name for name in (f"avg@{k}", "greedy", f"pass@{k}", f"maj@{k}")}
    names |= {"mean_tokens": "tokens", "truncated": "cut off", "correction_rate": "correction rate",
              "keep_rate": "keep rate", "fix": "fix", "keep": "keep"}  # fmt: skip
    rows = []
    for name, method in summary["methods"].items():
        first, *others = _means(method["mean"], names)
        if first.value is not None:
            first = first._replace(below=(_bracket(method["interval"], "{:.3f}"),))
        difference = Cell("reference") if name == reference else _difference(method["difference"])
        rows.append((name, stopped_label(method), [first, *others, difference, Cell(budget_mark(method))]))
    note = (
        "Means over the seeds that finished. Brackets: 95% t-interval over seeds; for the difference, which is paired "
        f"by seed, also the 95% bootstrap interval over all seeds' questions. avg@{k}, pass@{k}, maj@{k}: mean "
        f"accuracy of {k} samples per question, at least one right, the most frequent answer right. Tokens: mean "
        "length of a response; cut off: share that hit the length limit. Correction and keep rate: accuracy after the "
        "model revises its own wrong and right first attempts; fix and keep: after it revises those of the base model. "
        "Budget: sampled tokens spent, full within a few percent."
    )
    heads = [*names.values(), f"difference to {summary['methods'][reference]['label']}", "budget"]
    return Table("results", "Results", heads, rows, note)


def revision_table(summary: Summary) -> Table:
    """Generate, then revise."""
    names = {f"avg@{summary['k']}": f"first accuracy (avg@{summary['k']})", "revised_accuracy": "revised accuracy",
             "correction_rate": "correction rate", "keep_rate": "keep rate", "mean_tokens": "first tokens",
             "revised_tokens": "revised tokens"}  # fmt: skip
    rows = [(name, stopped_label(method), _means(method["mean"], names)) for name, method in summary["methods"].items()]
    note = "Each model revises its own first attempts, and reads whether they were right: not what one can deploy."
    return Table("revision", "Generate, then revise", list(names.values()), rows, note)


def paper_table(summary: Summary) -> Table:
    """Our avg@k beside the averages that the paper reports, in percent."""
    ours = _paper_methods(summary)
    rows = []
    for name, (label, *reported) in PAPER.items():
        first = Cell(f"{100 * ours[name]:.1f}", ours[name]) if name in ours else Cell("–")
        rows.append((name, label, [first, *(_cell(value, "{:.1f}") for value in reported)]))
    heads = [f"ours, avg@{summary['k']} %", "Qwen3-4B-Instruct, avg@8 %", "Olmo-3-7B-Instruct, avg@8 %"]
    note = (
        "Qwen3 and Olmo: arXiv 2604.12002, Table 1, average over eight benchmarks, as reported, other models and "
        f"tasks: only the order can be compared. {order_sentence(summary)}"
    )
    return Table("paper", "Beside the paper", heads, rows, note)


def order_sentence(summary: Summary) -> str:
    """On how many pairs of methods our order of avg@k is the paper's order on Qwen3, and where it is not."""
    ours = _paper_methods(summary)
    pairs = list(itertools.combinations(sorted(ours, key=lambda name: -PAPER[name][1]), 2))  # the paper's better first
    gaps = [(better, worse, round(ours[worse] - ours[better], 9)) for better, worse in pairs]  # equal but for rounding
    differing = [
        f"{PAPER[worse][0]} {'above' if gap > 0 else 'level with'} {PAPER[better][0]}"
        for better, worse, gap in gaps
        if gap >= 0
    ]
    where = f"; differs on: {', '.join(differing)}" if differing else ""
    counts = f"{len(pairs) - len(differing)} of {len(pairs)} pairs"
    return f"Our order of means, whatever their intervals, agrees with that of Qwen3 on {counts}{where}."


def _paper_methods(summary: Summary) -> dict[str, float]:
    """avg@k of the entries that the paper has too and that were measured here."""
    means = {name: method["mean"].get(f"avg@{summary['k']}") for name, method in summary["methods"].items()}
    return {name: means[name] for name in PAPER if is_number(means.get(name))}


def seeds_table(summary: Summary) -> Table:
    """avg@k of each seed, and its difference to the reference on the same seed."""
    seeds, reference = [str(seed) for seed in summary["seeds"]], summary["reference"]
    rows = []
    for name, method in summary["methods"].items():
        runs = [method["seeds"].get(seed, {}) for seed in seeds]
        gaps = {} if name == reference else (method["difference"] or {}).get("seeds", {})
        cells = [Cell("stopped") if "stopped" in r else _cell(_accuracy(r, summary["k"]), "{:.3f}") for r in runs]
        rows.append((name, method["label"], cells + [_cell(gaps.get(seed), "{:+.3f}") for seed in seeds]))
    heads = [f"seed {seed}" for seed in seeds] + [f"Δ seed {seed}" for seed in seeds]
    label = summary["methods"][reference]["label"]
    return Table("seeds", "Seed by seed", heads, rows, f"avg@{summary['k']}; Δ: difference to {label} on that seed.")


def ledger_table(summary: Summary) -> Table:
    """What each method spent."""
    rows = []
    for name, method in summary["methods"].items():
        seconds = [run["seconds"] for run in method["seeds"].values() if is_number(run.get("seconds"))]
        cells = [_cell(method["ledger"].get(key), "{:,.0f}") for key in LEDGER]
        cells += [_cell(method["ledger"].get("flops"), "{:.2e}"), _cell(seconds and np.mean(seconds), "{:,.1f}")]
        rows.append((name, stopped_label(method), cells))
    note = (
        "Means over the seeds that finished. What two methods share is counted in both. Sampling for gates and "
        "validation, which no method learns from, is left out. Seconds: wall clock of the stages after the base model."
    )
    return Table("ledger", "Budget", [*(key.replace("_", " ") for key in LEDGER), "FLOPs", "seconds"], rows, note)


def budget_mark(method: Method) -> str:
    if not method["mean"]:
        return "–"
    return "full" if method["at_budget"] else f"x {method['budget_share']:.2f} of budget"


def stop_sentences(summary: Summary) -> list[str]:
    """Which methods a gate or a lack of data stopped, on which seeds, and why."""
    sentences = []
    for method in summary["methods"].values():
        stops = [f"seed {seed}: {run['stopped']}" for seed, run in method["seeds"].items() if "stopped" in run]
        if stops:
            sentences.append(f"{method['label']} stopped on {'; '.join(stops)}.")
    return sentences


def stopped_label(method: Method) -> str:
    """What tables call a method, with the number of seeds that it did not finish."""
    stopped = sum("stopped" in run for run in method["seeds"].values())
    return f"{method['label']} (stopped on {stopped} of {len(method['seeds'])} seeds)" if stopped else method["label"]


def _means(values: Mapping[str, Any], names: Mapping[str, str]) -> list[Cell]:
    return [_cell(values.get(key), "{:.1f}" if key.endswith("tokens") else "{:.3f}") for key in names]


def _cell(value: Any, form: str) -> Cell:
    """A number, or an en dash for one that is missing or not finite."""
    return Cell(format_value(value, form), float(value)) if is_number(value) else Cell("–")


def _difference(gap: Mapping[str, Any] | None) -> Cell:
    if gap is None:
        return Cell("–")
    kinds = {"seeds": "interval", "questions": "question_interval"}
    below = tuple(f"{name} {_bracket(gap[key], '{:+.3f}')}" for name, key in kinds.items())
    return _cell(gap["mean"], "{:+.3f}")._replace(below=below)


def _bracket(interval: Sequence[Any], form: str) -> str:
    """[low, high], or an en dash: one seed has no interval."""
    return f"[{', '.join(map(form.format, interval))}]" if all(map(is_number, interval)) else "–"


def _accuracy(run: Mapping[str, Any], k: int) -> Any:
    return run.get("metrics", {}).get(f"avg@{k}")


# ------------------------------------------------------------------------------------- the figures


def draw_pictures(summary: Summary) -> list[Picture]:
    """Accuracy and difference of the methods, in both themes; what has no data is left out."""
    k, methods = summary["k"], summary["methods"]
    reference = methods[summary["reference"]]["label"]
    accuracy, difference = [], []
    for name, method in methods.items():
        mean, gap, seeds = method["mean"].get(f"avg@{k}"), method["difference"], method["seeds"].values()
        if is_number(mean):
            values = [_accuracy(run, k) for run in seeds]
            accuracy.append(Dot(method["label"], mean, values, [method["interval"]], method["at_budget"]))
        if name != summary["reference"] and gap is not None and is_number(gap["mean"]):
            values, intervals = list(gap["seeds"].values()), [gap["interval"], gap["question_interval"]]
            difference.append(Dot(method["label"], gap["mean"], values, intervals, method["at_budget"]))
    wanted = (
        ("accuracy", accuracy, f"avg@{k}", "{:.3f}", 0.0, f"avg@{k}: mean, interval and each seed."),
        ("difference", difference, f"difference of avg@{k} to {reference}", "{:+.3f}", -1.0,
         f"Difference of avg@{k} to {reference}: mean, intervals and each seed."),
    )  # fmt: skip
    pictures = []
    for name, dots, xlabel, form, lowest, caption in wanted:
        draw = functools.partial(draw_dots, dots=dots, xlabel=xlabel, form=form, lowest=lowest)
        light, dark = (plots.png(draw, theme, 0.95 + 0.36 * len(dots)) for theme in (plots.LIGHT, plots.DARK))
        if light is not None:
            pictures.append(Picture(name, light, dark, caption))
    return pictures


def draw_dots(figure: Any, theme: plots.Theme, dots: Sequence[Dot], xlabel: str, form: str, lowest: float) -> bool:
    """A row per method: dot for the mean, ticks for the seeds, a line per interval, the mean in figures.

    No value can lie below `lowest` or above 1; an interval of few seeds can, and is cut there.
    """
    if not dots:
        return False
    axis = figure.subplots()
    place = np.arange(len(dots))[::-1]
    for index, label in enumerate(("95% over seeds (t)", "95% over questions (bootstrap)")):
        ends = [(y, *d.intervals[index]) for y, d in zip(place, dots) if len(d.intervals) > index]
        ends = [end for end in ends if all(map(is_number, end[1:]))]
        if ends:
            y, low, high = np.array(ends).T
            width, colour = 2.2 - 0.8 * index, theme.series[index]
            axis.hlines(y - 0.26 * index, low, high, color=colour, linewidth=width, label=label)
    points = [(value, y) for y, dot in zip(place, dots) for value in dot.seeds if is_number(value)]
    axis.plot(*zip(*points), "|", color=theme.text, markersize=9, label="one seed")
    for full, label, face in ((True, "mean", theme.series[0]), (False, "mean, not at full budget", theme.background)):
        means = [(dot.mean, y) for y, dot in zip(place, dots) if dot.at_budget == full]
        if means:
            axis.plot(*zip(*means), "o", color=theme.series[0], markerfacecolor=face, markersize=6.5, label=label)
    for y, dot in zip(place, dots):
        axis.annotate(form.format(dot.mean), (1.01, y), xycoords=("axes fraction", "data"), va="center")
    if lowest < 0:
        axis.axvline(0, color=theme.text, linewidth=0.8)
    # A label is text, not mathematics, whatever dollar signs it holds.
    axis.set_yticks(place, [textwrap.fill(dot.label[:60], 30) for dot in dots], parse_math=False)
    axis.set_ylim(-0.6, len(dots) - 0.4)
    low, high = axis.get_xlim()
    axis.set_xlim(max(low, lowest - 0.01), min(high, 1.01))
    axis.set_xlabel(xlabel, parse_math=False)
    axis.grid(True, axis="x")
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8)
    return True


# ------------------------------------------------------------------------------------ the two texts


def describe(summary: Summary) -> str:
    """What is compared, in a few plain sentences."""
    k, seeds, methods = summary["k"], summary["seeds"], summary["methods"]
    asked = summary["config"].get("evaluate", {})
    questions, split = asked.get("questions"), asked.get("split", "test")
    each = f"each of {questions:,} {split} questions" if is_number(questions) else f"each {split} question"
    names = "; ".join(method["label"] for method in methods.values())
    reference = methods[summary["reference"]]["label"]
    named = f": {names}" if len(methods) <= _NAMED else ""
    return (
        f"{len(methods)} methods at equal numbers of sampled tokens, {summary['budget']:,} for each, on "
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)} ({', '.join(map(str, seeds))}){named}. "
        f"avg@{k} is the accuracy over {k} samples of {each}. Differences are to {reference}."
    )


def build_markdown(summary: Summary, tables: Sequence[Table]) -> str:
    """Every table, what stopped, and the settings of each method."""
    lines = [f"# Comparison: {plain(summary['name'])}", "", plain(describe(summary))]
    lines += [f"\n{plain(sentence)}" for sentence in stop_sentences(summary)]
    for table in tables:
        lines += ["", f"## {table.title}", "", f"| method | {' | '.join(map(plain, table.heads))} |"]
        lines.append("|---" * (len(table.heads) + 1) + "|")
        for _, label, cells in table.rows:
            lines.append(f"| {' | '.join(map(plain, [label, *(' '.join((c.text, *c.below)) for c in cells)]))} |")
        lines += ["", plain(table.note)]
    lines += ["", "## Settings", ""]
    for method in summary["methods"].values():
        lines.append(f"- {plain(method['label'])}: {plain(', '.join(map(str, method['settings']))) or 'as shared'}")
    return "\n".join(lines) + "\n"


def build_page(summary: Summary, tables: Sequence[Table], pictures: Sequence[Picture]) -> str:
    """The whole page as text."""
    sections = [(table.name, table.title, _table_html(table)) for table in tables]
    sections[0] = (*sections[0][:2], sections[0][2] + "".join(map(page.figure, pictures)))
    sections.append(("configuration", "Settings", _settings_html(summary)))
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "\n".join(f'<section id="{name}"><h2>{title}</h2>\n{text}\n</section>' for name, title, text in sections)
    stops = "".join(f'<p class="warning">{escape(sentence)}</p>\n' for sentence in stop_sentences(summary))
    title = f"Comparison: {escape(summary['name'])}"
    lead = f'<p class="lead">{escape(describe(summary))}</p>\n{stops}<nav>{links}</nav>\n{body}'
    return page.document(title, lead, STYLE)


def _table_html(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in ("method", *table.heads))
    rows = []
    for name, label, cells in table.rows:
        body = "".join(map(_cell_html, table.heads, cells))
        rows.append(f'<tr data-model="{escape(name)}"><th scope="row">{escape(label)}</th>{body}</tr>\n')
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{heads}</tr></thead>\n<tbody>\n{"".join(rows)}'
        f'</tbody></table></div>\n<p class="note">{escape(table.note)}</p>\n'
    )


def _cell_html(head: str, cell: Cell) -> str:
    exact = "" if cell.value is None else f' data-value="{cell.value!r}"'
    below = "".join(f'<span class="interval">{escape(line)}</span>' for line in cell.below)
    return f'<td data-key="{escape(head)}"{exact}>{escape(cell.text)}{below}</td>'


def _settings_html(summary: Summary) -> str:
    methods = summary["methods"].values()
    own = [(m["label"], "<br>".join(map(escape, m["settings"])) or "as shared", None) for m in methods]
    shared = [(name, escape(value), None) for name, value in page.flatten(summary["config"])]
    return (
        f"<h3>Of each method</h3>{page.two_columns(own)}\n"
        f"<details><summary>{len(shared)} shared settings</summary>{page.two_columns(shared)}</details>"
    )


# Twelve columns want more room than a run's report does, and a long label may take two lines.
STYLE = """
main{max-width:1340px}figure{max-width:1020px}.note{max-width:110ch}
.results td,.results th{padding:5px 8px;font-size:.9rem}.results tbody th{white-space:normal;min-width:9em}
"""
