"""The HTML of a report: one page without network, scripts or outside files, in light or dark.

Every text that comes from a run (prompts, responses, settings) goes through `escape`. Leaves out the
drawing of figures (`plots`) and the reading of files (`run_data`).
"""

import base64
import dataclasses
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdzero_jax.analysis.plots import is_number
from sdzero_jax.analysis.run_data import PHASES, ResultRow, RunData

TOKENS_SHOWN = 400  # of one heat-map example; a longer response is shown around its first error
TEXT_SHOWN = 3000  # characters of one prompt or response
WRONG_SHOWN, RIGHT_SHOWN = 8, 4


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the result table: key in the evaluation, heading, number format and what it means."""

    key: str
    heading: str
    form: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure drawn for both appearances, as PNG bytes."""

    name: str
    light: bytes
    dark: bytes
    caption: str


def columns(k: int) -> tuple[Column, ...]:
    """The columns of the result table for avg@k and pass@k."""
    return (
        Column(
            f"avg@{k}",
            f"avg@{k}",
            "{:.3f}",
            f"mean accuracy of {k} samples per question at the run's temperature",
        ),
        Column(
            f"pass@{k}",
            f"pass@{k}",
            "{:.3f}",
            f"share of questions with at least one right answer in {k} samples",
        ),
        Column("mean_tokens", "tokens", "{:.1f}", "mean length of a response"),
        Column(
            "correction_rate",
            "correction rate",
            "{:.3f}",
            "accuracy after the model revises its own wrong first attempts",
        ),
        Column("keep_rate", "keep rate", "{:.3f}", "the same for its own right first attempts"),
        Column("fix", "fix", "{:.3f}", "accuracy after revising the base model's wrong attempts: equal ground"),
        Column("keep", "keep", "{:.3f}", "the same for the base model's right attempts"),
        Column("revised_accuracy", "revised", "{:.3f}", "accuracy of generate-then-revise over all questions"),
        Column("revision_words", "revision words", "{:.2f}", "explicit revisions in a response, such as “wait” or P"),
        Column("truncated", "cut off", "{:.3f}", "share of responses that hit the length limit"),
    )


def escape(text: Any) -> str:
    """HTML-escapes any value, quotes included, so that it is safe in text and in attributes."""
    return html.escape(str(text), quote=True)


def format_value(value: Any, form: str) -> str:
    """A number in its format, an en dash for a missing one, the name of one that is not finite."""
    if is_number(value):
        return form.format(value)
    return "–" if value is None else escape(value)


def build_page(run: RunData, pictures: Mapping[str, Picture]) -> str:
    """The whole page as text; `pictures` by name, those missing were not drawn."""
    sections = (
        ("results", "Results", _results(run, pictures)),
        ("training", "Training curves", _training(run, pictures)),
        ("collection", "Collection of revisions", _collection(run, pictures)),
        ("localisation", "Where the KL falls", _localisation(run, pictures)),
        ("tokens", "Token by token", _token_viewer(run.examples)),
        ("samples", "Generate, then revise", _samples(run)),
        ("budget", "Budget", _budget(run)),
        ("time", "Seconds per stage", _seconds(run, pictures)),
        ("configuration", "Configuration", _configuration(run.config)),
    )
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "\n".join(f'<section id="{name}"><h2>{title}</h2>\n{text}\n</section>' for name, title, text in sections)
    title = f"SD-Zero run: {escape(run_name(run))}"
    return document(title, f'<p class="lead">{escape(describe(run))}</p>\n<nav>{links}</nav>\n{body}')


def document(title: str, body: str, style: str = "") -> str:
    """A page of its own: nothing is loaded and no script runs, whatever a model wrote. `title` is escaped already."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def run_name(run: RunData) -> str:
    name = run.config.get("name")
    return name if isinstance(name, str) and name else run.directory.resolve().name


def describe(run: RunData) -> str:
    """What was run and what came of it, in a few plain sentences."""
    sentences = [
        "SD-Zero turns a binary reward into dense supervision: a model learns to revise its own answers "
        "(SRT), then, reading its own answer and whether it was right, teaches itself token by token "
        "(phase 2)."
    ]
    done = [row for row in run.rows if is_number(row.values.get(f"avg@{run.k}"))]
    if done:
        scores = ", ".join(f"{row.label} {row.values[f'avg@{run.k}']:.3f}" for row in done)
        lengths = [row for row in done if is_number(row.values.get("mean_tokens"))]
        sentence = f"avg@{run.k}: {scores}"
        if lengths:
            sentence += "; mean tokens: " + ", ".join(f"{row.label} {row.values['mean_tokens']:.1f}" for row in lengths)
        sentences.append(sentence + ".")
    facts = []
    if is_number(run.summary.get("seed")):
        facts.append(f"seed {run.summary['seed']}")
    seconds = [value for value in run.seconds.values() if is_number(value)]
    if seconds:
        facts.append(f"{sum(seconds):,.0f} s in all")
    if facts:
        sentences.append(f"One run: {', '.join(facts)}.")
    return " ".join(sentences)


def _results(run: RunData, pictures: Mapping[str, Picture]) -> str:
    shown = columns(run.k)
    heads = "".join(f'<th scope="col">{escape(column.heading)}</th>' for column in shown)
    body = "\n".join(_result_row(row, shown) for row in run.rows)
    legend = "".join(f"<dt>{escape(c.heading)}</dt><dd>{escape(c.meaning)}</dd>" for c in shown)
    interval = any(interval_of(row, column.key) for row in run.rows for column in shown)
    note = "Brackets: 95% bootstrap interval over questions. " if interval else ""
    return (
        '<div class="scroll"><table class="results">\n'
        f'<thead><tr><th scope="col">model</th>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>\n"
        f'<p class="note">{note}Tokens are counted per response.</p>\n'
        f"<details><summary>What the columns mean</summary><dl>{legend}</dl></details>\n"
        + figure(pictures.get("results"))
    )


def _result_row(row: ResultRow, shown: Sequence[Column]) -> str:
    start = f'<tr data-model="{escape(row.name)}"><th scope="row">{escape(row.label)}</th>'
    if not row.values:
        reason = f": {escape(row.note)}" if row.note else ""
        return f'{start}<td colspan="{len(shown)}" class="missing">not run{reason}</td></tr>'
    cells = []
    for column in shown:
        value = row.values.get(column.key)
        text = format_value(value, column.form)
        if interval := interval_of(row, column.key):
            text += f'<span class="interval">[{interval[0]:.3f}, {interval[1]:.3f}]</span>'
        exact = f' data-value="{value!r}"' if is_number(value) else ""
        cells.append(f'<td data-key="{escape(column.key)}"{exact}>{text}</td>')
    return f"{start}{''.join(cells)}</tr>"


def interval_of(row: ResultRow, key: str) -> tuple[float, float] | None:
    """The 95% interval of a figure, if the evaluation has one."""
    interval = row.values.get(f"{key}_interval")
    if isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(is_number, interval)):
        return interval[0], interval[1]
    return None


def _training(run: RunData, pictures: Mapping[str, Picture]) -> str:
    parts = []
    for phase, title in PHASES.items():
        rounds = run.phases.get(phase) or []
        parts.append(f"<h3>{escape(title)}</h3>")
        if not rounds:
            parts.append(NOT_RUN)
            continue
        parts.append(figure(pictures.get(f"curves_{phase}")) or '<p class="note">No curve was logged.</p>')
        parts.append("".join(_last_values(rows, n, len(rounds)) for n, rows in enumerate(rounds, start=1)))
    return "\n".join(parts)


def _last_values(rows: Sequence[Mapping[str, Any]], number: int, rounds: int) -> str:
    """The last logged value of each metric, and a warning where one was not finite."""
    last: dict[str, Any] = {}
    for row in rows:
        last.update({key: value for key, value in row.items() if is_number(value)})
    bad = [
        (row.get("step"), key)
        for row in rows
        for key, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    values = ", ".join(f"{escape(key)} {value:.4g}" for key, value in sorted(last.items()) if key != "step")
    where = f"Round {number}, last" if rounds > 1 else "Last"
    text = f'<p class="note">{where} values (step {format_value(last.get("step"), "{:g}")}): {values}.</p>'
    if bad:
        step, key = bad[0]
        where = f"{key} was not finite at step {step} ({len(bad)} values in all)."
        text += f'<p class="warning">{escape(where)}</p>'
    return text


def _collection(run: RunData, pictures: Mapping[str, Picture]) -> str:
    if not run.collect:
        return NOT_RUN
    names = {
        "questions": ("questions", "{:,.0f}"),
        "generations": ("generations sampled", "{:,.0f}"),
        "init_accuracy": ("accuracy of first attempts", "{:.3f}"),
        "revised_accuracy": ("accuracy of revisions", "{:.3f}"),
        "kept": ("traces kept: the revision is right", "{:,.0f}"),
        "kept_from_wrong": ("of these, with a wrong first attempt", "{:,.0f}"),
        "sampled_tokens": ("tokens sampled", "{:,.0f}"),
    }
    rows = [
        (label, format_value(run.collect[key], form), run.collect[key])
        for key, (label, form) in names.items()
        if key in run.collect
    ]
    return figure(pictures.get("funnel")) + two_columns(rows)


def _localisation(run: RunData, pictures: Mapping[str, Picture]) -> str:
    summary = run.localisation
    if not summary:
        return NOT_RUN
    names = {
        "auroc_kl": "AUROC of the per-token KL",
        "auroc_entropy": "AUROC of the student's entropy (baseline, needs no teacher)",
        "auroc_log_ratio": "AUROC of ln S − ln T",
        "top1_kl": "first wrong token has the highest KL",
        "top1_entropy": "… the highest entropy (baseline)",
        "top1_chance": "… by chance",
        "top3_kl": "first wrong token is among the three highest KL",
        "top3_entropy": "… among the three highest entropies (baseline)",
        "top3_chance": "… by chance",
    }
    rows = [(label, format_value(summary[k], "{:.3f}"), summary[k]) for k, label in names.items() if k in summary]
    for half in ("wrong", "right"):
        spread = summary.get(f"concentration_{half}") or {}
        if isinstance(spread, Mapping):
            for key, label in (
                ("top5_share", "share of the KL in the top 5% of tokens"),
                ("gini", "Gini of the KL"),
            ):
                if key in spread:
                    rows.append((f"{half} responses: {label}", format_value(spread[key], "{:.3f}"), spread[key]))
    counts = [(summary.get("responses"), "responses"), (summary.get("localised"), "with a known first error")]
    measured = ", ".join(f"{count:,} {label}" for count, label in counts if is_number(count))
    return (
        f"<p>{escape(verdict_on_kl(summary))}</p>\n"
        '<p class="note">The label of a token is “is the first wrong value”, over wrong responses with a '
        f"known first error; end and control tokens are left out. {escape(measured)}.</p>\n"
        + "".join(figure(pictures.get(name)) for name in ("detection", "buckets", "offsets"))
        + two_columns(rows)
    )


def verdict_on_kl(summary: Mapping[str, Any]) -> str:
    """What the AUROCs say, said without overselling: entropy is the baseline to beat."""
    text = (
        "A per-token KL that is high where a response goes wrong is not yet credit assignment: the plain "
        "entropy of the student needs neither teacher nor verdict, so it is the baseline to beat."
    )
    kl, entropy = summary.get("auroc_kl"), summary.get("auroc_entropy")
    if not (is_number(kl) and is_number(entropy)):
        return text
    gap = kl - entropy
    judged = f"ahead by {gap:.3f}" if gap > 0.02 else f"behind by {-gap:.3f}" if gap < -0.02 else "no better"
    scores = f"the AUROC of the KL is {kl:.3f}, that of entropy {entropy:.3f}"
    return f"{text} Here {scores}: the KL is {judged} (one run)."


def _token_viewer(examples: Sequence[Mapping[str, Any]]) -> str:
    """Responses with each token coloured by KL; two radio buttons switch to entropy without a script."""
    wrong = [e for e in examples if e.get("reward") == 0]
    located = [e for e in wrong if e.get("first_error") is not None]
    right = [e for e in examples if e.get("reward") == 1]
    chosen = (located + [e for e in wrong if e.get("first_error") is None])[:WRONG_SHOWN] + right[:RIGHT_SHOWN]
    if not chosen:
        return NOT_RUN
    scales = {key: _scale(chosen, key) for key in ("kl", "entropy")}
    blocks = "\n".join(_example(example, scales) for example in chosen)
    return (
        '<p class="note">The stronger the colour, the larger the value. Hover over a token for its numbers; '
        "the first wrong token is underlined. Strength is the square root of value over scale, which is the "
        f"99th percentile here: {scales['kl']:.3g} nats for KL, {scales['entropy']:.3g} for entropy.</p>\n"
        '<div class="viewer"><input type="radio" name="by" id="by-kl" checked><label for="by-kl">KL</label>'
        '<input type="radio" name="by" id="by-entropy"><label for="by-entropy">entropy (baseline)</label>\n'
        f'<div class="examples">\n{blocks}\n</div></div>'
    )


def _scale(examples: Sequence[Mapping[str, Any]], key: str) -> float:
    """99th percentile (nearest rank), so that one outlier does not bleach everything else."""
    values = sorted(v for example in examples for v in example.get(key) or () if is_number(v))
    return max(values[math.ceil(0.99 * len(values)) - 1], 1e-6) if values else 1.0


def _example(example: Mapping[str, Any], scales: Mapping[str, float]) -> str:
    tokens, first = example.get("tokens") or [], example.get("first_error")
    start = 0
    if first is not None and first >= TOKENS_SHOWN:
        start = first - TOKENS_SHOWN // 2
    stop = min(start + TOKENS_SHOWN, len(tokens))
    spans = "".join(_token(example, index, index == first, scales) for index in range(start, stop))
    before = f'<span class="cut">… {start:,} tokens before … </span>' if start else ""
    after = f'<span class="cut"> … {len(tokens) - stop:,} tokens after</span>' if stop < len(tokens) else ""
    return (
        f'<div class="example">{_badge(example.get("reward"))}'
        f'<pre class="prompt">{_clip(example.get("prompt", ""))}</pre>'
        f'<pre class="tokens">{before}{spans}{after}</pre></div>'
    )


def _token(example: Mapping[str, Any], index: int, is_first_error: bool, scales: Mapping[str, float]) -> str:
    values = {key: _at(example.get(key), index) for key in ("kl", "entropy", "log_ratio", "p_student", "p_teacher")}
    shades = {
        key: math.sqrt(min(max(values[key] / scale, 0.0), 1.0)) if is_number(values[key]) else 0.0
        for key, scale in scales.items()
    }
    title = (
        f"KL {format_value(values['kl'], '{:.4f}')}, entropy {format_value(values['entropy'], '{:.4f}')}, "
        f"ln S − ln T {format_value(values['log_ratio'], '{:+.4f}')}\n"
        f"S {format_value(values['p_student'], '{:.3f}')}, T {format_value(values['p_teacher'], '{:.3f}')}"
    )
    for name, key in (("S", "top_student"), ("T", "top_teacher")):
        if likeliest := _at(example.get(key), index):
            title += f"\n{name} prefers " + ", ".join(f"{token} {p:.3f}" for token, p in likeliest)
    if is_first_error:
        title += ", first wrong token"
    text = escape(example["tokens"][index]).replace("\n", "↵\n")
    return (
        f'<span class="t{" first" if is_first_error else ""}" '
        f'style="--k:{shades["kl"]:.2f};--e:{shades["entropy"]:.2f}" title="{escape(title)}">{text}</span>'
    )


def _at(values: Any, index: int) -> Any:
    return values[index] if values is not None and index < len(values) else None


def _samples(run: RunData) -> str:
    parts = []
    labels = [label for label, rows in run.pairs.items() if rows]
    for label in labels:
        blocks = "\n".join(_pair(row) for row in run.pairs[label])
        opened = " open" if label == labels[-1] else ""
        parts.append(f"<details{opened}><summary>{escape(label)}</summary>\n{blocks}\n</details>")
    return "\n".join(parts) or NOT_RUN


def _pair(row: Mapping[str, Any]) -> str:
    gold = row.get("gold", "")
    gold = ", ".join(map(str, gold)) if isinstance(gold, (list, tuple)) else gold
    head = f"question {row.get('question_id', '?')}, sample {row.get('sample_index', 0)}, gold {gold}"
    text = (
        f'<div class="pair"><p class="note">{escape(head)}</p><pre class="prompt">{_clip(row.get("prompt", ""))}</pre>'
    )
    text += _attempt(row.get("reward"), "first attempt", row.get("tokens"), row.get("response", ""))
    if row.get("revised_response") is not None:
        text += _attempt(
            row.get("revised_reward"), "after revision", row.get("revised_tokens"), row["revised_response"]
        )
    return text + "</div>"


def _attempt(reward: Any, name: str, tokens: Any, response: str) -> str:
    head = f"<p>{_badge(reward)} {name}, {format_value(tokens, '{:,}')} tokens</p>"
    return f"<div>{head}<pre>{_clip(response)}</pre></div>"


def _badge(reward: Any) -> str:
    name = {0: "wrong", 1: "right"}.get(reward, "no verdict")
    return f'<span class="badge {name.replace(" ", "-")}">{name}</span>'


def _clip(text: Any) -> str:
    text = str(text)
    if len(text) <= TEXT_SHOWN:
        return escape(text)
    return f'{escape(text[:TEXT_SHOWN])}<span class="cut"> … {len(text) - TEXT_SHOWN:,} more characters</span>'


def ledger_form(name: str) -> str:
    """The format of a ledger's column: whole counts, FLOPs by their size."""
    return "{:.2e}" if name == "flops" else "{:,.0f}"


def _budget(run: RunData) -> str:
    """What each stage spent, as it recorded itself."""
    if not run.ledgers:
        return NOT_RUN
    names = list(next(iter(run.ledgers.values())))
    heads = "".join(f'<th scope="col">{escape(LEDGER_HEADS.get(name, name.replace("_", " ")))}</th>' for name in names)
    rows = []
    for stage, spent in run.ledgers.items():
        cells = (f'<td data-key="{n}" data-value="{spent[n]!r}">{ledger_form(n).format(spent[n])}</td>' for n in names)
        rows.append(f'<tr data-model="{escape(stage)}"><th scope="row">{escape(stage)}</th>{"".join(cells)}</tr>\n')
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th scope="col">stage</th>{heads}</tr></thead>\n'
        f'<tbody>\n{"".join(rows)}</tbody></table></div>\n<p class="note">{LEDGER_NOTE}</p>\n'
    )


def _seconds(run: RunData, pictures: Mapping[str, Picture]) -> str:
    rows = [(name, format_value(value, "{:,.1f}"), value) for name, value in run.seconds.items()]
    return figure(pictures.get("seconds")) + two_columns(rows) if rows else NOT_RUN


def _configuration(config: Mapping[str, Any]) -> str:
    if not config:
        return '<p class="missing">no config.json</p>'
    rows = [(name, escape(value), None) for name, value in flatten(config)]
    return f"<details><summary>{len(rows)} settings</summary>{two_columns(rows)}</details>"


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted name, leaf) pairs; a list is a leaf, an empty mapping too."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def two_columns(rows: Sequence[tuple[str, str, Any]]) -> str:
    """A table of (label, already escaped text, exact value)."""
    if not rows:
        return ""
    cells = []
    for label, text, value in rows:
        exact = f' data-value="{value!r}"' if is_number(value) else ""
        cells.append(f'<tr><th scope="row">{escape(label)}</th><td{exact}>{text}</td></tr>')
    return f'<div class="scroll"><table class="pairs"><tbody>{"".join(cells)}</tbody></table></div>'


def figure(picture: Picture | None) -> str:
    if picture is None:
        return ""
    light, dark = (base64.b64encode(data).decode("ascii") for data in (picture.light, picture.dark))
    caption = escape(picture.caption)
    return (
        f'<figure id="figure-{escape(picture.name)}"><div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{caption}" src="data:image/png;base64,{light}"></picture></div>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


LEDGER_HEADS = {"flops": "FLOPs"}
LEDGER_NOTE = (
    "Student and teacher tokens are those read in training, prompts included. Sampling for gates, validation and "
    "evaluation, which no method learns from, is left out, and so is training the base model."
)
NOT_RUN = '<p class="missing">not run</p>'

STYLE = """
:root{--page:#f5f6f8;--card:#fff;--text:#1d2430;--soft:#59636f;--line:#d9dee5;--link:#1f6fb4;
--hot:209,96,31;--cool:31,111,180;--good:#1f7a46;--bad:#b3372b}
@media (prefers-color-scheme:dark){:root{--page:#12161d;--card:#1a202b;--text:#e4e8ee;--soft:#a3adba;
--line:#343d4b;--link:#6cb2f2;--hot:190,84,24;--cool:36,104,170;--good:#76c99a;--bad:#f08a7e}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1060px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;margin:.2em 0}h2{font-size:1.25rem;margin:0 0 .6em}
h3{font-size:1.02rem;margin:1.4em 0 .4em}
.lead{max-width:75ch}nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:8px 0 20px}a{color:var(--link)}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:18px 20px;
margin:0 0 18px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.94rem}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top}
.results{width:100%}.results td,.results thead th{text-align:right}.results th:first-child{text-align:left}
.results thead th{font-weight:600;color:var(--soft);vertical-align:bottom}
.results tbody th{white-space:nowrap}
.results td.missing{text-align:left}
.interval{display:block;color:var(--soft);font-size:.8rem;white-space:nowrap}
.pairs{margin-top:12px}.pairs th{text-align:left;font-weight:400}
.pairs td{text-align:right;overflow-wrap:anywhere}
#configuration .pairs td{text-align:left;font-family:ui-monospace,monospace;font-size:.85rem}
#configuration .pairs th{font-family:ui-monospace,monospace;font-size:.85rem}
.note,.missing,figcaption{color:var(--soft);font-size:.9rem}.warning{color:var(--bad);font-weight:600}
.missing{font-style:italic}figure{margin:10px 0 16px}
figure img{display:block;width:100%;min-width:680px;height:auto}
details{margin:8px 0}summary{cursor:pointer;color:var(--link)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;font-size:.9rem}dt{font-weight:600}
dd{margin:0}
pre{font:14px/1.6 ui-monospace,"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere;
margin:4px 0}
pre.prompt{color:var(--soft)}.cut{color:var(--soft);font-style:italic}
.badge{display:inline-block;border:1px solid currentColor;border-radius:4px;padding:0 7px;font-size:.8rem}
.badge.right{color:var(--good)}.badge.wrong{color:var(--bad)}.badge.no-verdict{color:var(--soft)}
.viewer>label{margin:0 16px 0 4px}.example,.pair{border-top:1px solid var(--line);padding:10px 0}
.t{background:rgba(var(--hot),calc(var(--k)*.8));border-radius:2px}
#by-entropy:checked~.examples .t{background:rgba(var(--cool),calc(var(--e)*.8))}
.t.first{text-decoration:underline 3px var(--bad);text-underline-offset:4px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:0 20px}
.pair>.note,.pair>.prompt{grid-column:1/-1;margin:2px 0}
.pair p{margin:4px 0}.pair>div{min-width:0}
@media (max-width:640px){.pair{grid-template-columns:1fr}section{padding:14px 12px}}
"""
