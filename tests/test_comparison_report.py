"""The report of a comparison written by hand: numbers equal comparison.json, text is escaped, stops are said."""

import html.parser
import math
import re

import pytest

from sdzero_jax.analysis import comparison, page, write_comparison
from sdzero_jax.errors import UserError
from sdzero_jax.files import write_json_atomic

NAN = float("nan")
NASTY = "<script>alert('x')</script> | $\\frac$"
LEDGER = {"questions": 1024.0, "generations": 4096.0, "sampled_tokens": 98304.0, "student_tokens": 200001.0,
          "teacher_tokens": 0.0, "verifier_calls": 4095.0, "flops": 1.234e12}  # fmt: skip


def method(label, values, reference, *, share=1.0, interval=(NAN, NAN), stopped=None, **changed):
    """A method as `compare.summarise` writes it, from its avg@4 by seed."""
    avg = sum(values.values()) / len(values) if values else NAN
    mean = {"avg@4": avg, "pass@4": 0.91, "maj@4": 0.72, "greedy": 0.7, "mean_tokens": 23.94, "truncated": 0.0021,
            "revised_accuracy": 0.81, "revised_tokens": 47.75, "correction_rate": 0.43, "keep_rate": 0.955,
            "fix": 0.41, "keep": 0.965}  # fmt: skip
    seeds = {seed: {"metrics": {"avg@4": value}, "ledger": LEDGER, "seconds": 12.5} for seed, value in values.items()}
    gaps = {seed: value - reference[seed] for seed, value in values.items()}
    gap = sum(gaps.values()) / len(gaps) if gaps else NAN
    difference = {"mean": gap, "seeds": gaps, "interval": [gap - 0.04, gap + 0.05],
                  "question_interval": [gap - 0.02, gap + 0.03]}  # fmt: skip
    return {
        "label": label,
        "settings": ["train.method=x", "train.samples=1"],
        "seeds": seeds | {seed: {"stopped": reason} for seed, reason in (stopped or {}).items()},
        "budget_share": share,
        "at_budget": abs(share - 1.0) <= 0.05,
        "mean": (mean if values else {}) | changed,
        "interval": list(interval),
        "ledger": LEDGER if values else {},
        "difference": difference if values else None,
    }


def fake():
    """Eight methods on two seeds; one stopped on one seed, one on both; base lacks a metric and has one of NaN."""
    grpo = {"0": 0.60, "1": 0.64}
    methods = {
        "base": method("base", {"0": 0.40, "1": 0.44}, grpo, share=0.0, **{"maj@4": None, "fix": NAN}),
        "sft": method("SFT", {"0": 0.41, "1": 0.43}, grpo),  # level with base
        "grpo": method("GRPO", grpo, grpo, interval=(0.366, 0.874)),
        "srt": method("SRT at a label so long that it takes more than one line", {"0": 0.51, "1": 0.56}, grpo,
                      share=0.52, interval=(0.51, 0.56)),
        "sdft": method("SDFT", {"0": 0.3}, grpo, stopped={"1": "keep rate 0.1 < 0.2 <b>gate</b>"}),
        "phase2": method("phase 2 only", {}, grpo, stopped={"0": "entropy fell", "1": "entropy fell"}),
        "sdzero": method("SD-Zero", {"0": 0.58, "1": 0.61}, grpo, interval=(0.5, 0.7)),
        "hybrid": method(NASTY, {"0": 0.7, "1": 0.75}, grpo, interval=(0.65, 0.8)),
    }  # fmt: skip
    config = {"name": "fake", "evaluate": {"questions": 1500, "k": 4}, "stop": [1, "<i>"]}
    return {"name": "fake & <b>", "budget": 98304, "seeds": [0, 1], "k": 4, "reference": "grpo", "config": config,
            "methods": methods}  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Cells by (section, method, heading), tags and visible text; checks nesting."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.text, self.stack = [], {}, [], []
        self.section = self.model = self.key = None
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in ("meta", "img", "source", "br"):
            self.stack.append(tag)
        if tag == "section":
            self.section = attrs["id"]
        if tag == "tr":
            self.model = attrs.get("data-model")
        if tag == "td" and "data-key" in attrs:
            self.key = (self.section, self.model, attrs["data-key"])
            self.cells[self.key] = [attrs.get("data-value"), ""]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        if tag == "td":
            self.key = None

    def handle_data(self, data):
        self.text.append(data)
        if self.key:
            self.cells[self.key][1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    write_json_atomic(folder / "comparison.json", fake())
    path = write_comparison(folder)
    text = path.read_text()
    return {"path": path, "text": text, "page": Reader(text), "md": (path.parent / "comparison.md").read_text()}


def markdown_rows(text, title):
    """{label: cells} of one table of the Markdown."""
    part = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in lines}) == 1
    return {line[0].strip(): dict(zip([head.strip() for head in lines[0]], map(str.strip, line))) for line in lines}


def test_numbers_equal_the_json(report):
    cells, rows = report["page"].cells, markdown_rows(report["md"], "Results")
    names = {"avg@4": "avg@4", "pass@4": "pass@4", "maj@4": "maj@4", "greedy": "greedy", "mean_tokens": "tokens",
             "truncated": "cut off", "correction_rate": "correction rate", "keep_rate": "keep rate", "fix": "fix",
             "keep": "keep"}  # fmt: skip
    for name, own in fake()["methods"].items():
        row = next(row for label, row in rows.items() if label.startswith(comparison.plain(own["label"])))
        for key, heading in names.items():
            exact, shown = cells["results", name, heading]
            value = own["mean"].get(key)
            if value is None or math.isnan(value):
                assert (exact, shown[0], row[heading][0]) == (None, "–", "–")
                continue
            assert float(exact) == value
            text = f"{value:.1f}" if key == "mean_tokens" else f"{value:.3f}"
            assert shown.startswith(text) and row[heading].startswith(text)
    assert cells["results", "sdzero", "avg@4"][1] == "0.595[0.500, 0.700]"
    assert rows["SD-Zero"]["avg@4"] == "0.595 [0.500, 0.700]"
    assert cells["results", "sft", "avg@4"][1] == "0.420–"  # an interval of NaN
    assert rows["SD-Zero"]["difference to GRPO"] == (
        "-0.025 seeds [-0.065, +0.025] questions [-0.045, +0.005]"  # by hand: (0.58 + 0.61) / 2 - 0.62
    )
    assert rows["GRPO"]["difference to GRPO"] == "reference"
    assert cells["results", "phase2", "avg@4"] == [None, "–"] == cells["results", "phase2", "difference to GRPO"]


def test_budget_ledger_revision_and_seeds(report):
    md, cells = report["md"], report["page"].cells
    marks = {name: cells["results", name, "budget"][1] for name in ("base", "grpo", "srt", "phase2")}
    assert marks == {"base": "x 0.00 of budget", "grpo": "full", "srt": "x 0.52 of budget", "phase2": "–"}
    row = markdown_rows(md, "Budget")["GRPO"]
    assert list(row.values()) == ["GRPO", "1,024", "4,096", "98,304", "200,001", "0", "4,095", "1.23e+12", "12.5"]
    row = markdown_rows(md, "Generate, then revise")["GRPO"]
    assert list(row.values())[1:] == ["0.620", "0.810", "0.430", "0.955", "23.9", "47.8"]
    rows = markdown_rows(md, "Seed by seed")
    assert list(rows["SD-Zero"].values())[1:] == ["0.580", "0.610", "-0.020", "-0.030"]
    assert list(rows["SDFT"].values())[1:] == ["0.300", "stopped", "-0.300", "–"]
    assert list(rows["GRPO"].values())[1:] == ["0.600", "0.640", "–", "–"]
    assert cells["seeds", "sdzero", "Δ seed 1"][1] == "-0.030"


def test_the_order_is_compared_with_the_paper(report):
    # Ours: grpo .62 > sdzero .595 > srt .535 > base .42 = sft .42 > sdft .30; the paper's: sdzero > srt > grpo >
    # sdft > sft > base. Of 15 pairs, five differ.
    sentence = (
        "agrees with that of Qwen3 on 10 of 15 pairs; differs on: GRPO above SD-Zero, GRPO above SRT, "
        "SFT above SDFT, base above SDFT, base level with SFT."
    )
    assert sentence in report["md"] and sentence in "".join(report["page"].text)
    rows = markdown_rows(report["md"], "Beside the paper")
    assert list(rows["SD-Zero"].values()) == ["SD-Zero", "59.5", "60.3", "51.5"]
    assert list(rows["phase 2 only"].values()) == ["phase 2 only", "–", "51.4", "–"]
    assert list(rows["RFT"].values()) == ["RFT", "–", "54.3", "46.7"]  # not among our methods
    summary = fake()
    summary["methods"] = {name: summary["methods"][name] for name in ("grpo", "base", "hybrid")}
    assert comparison.order_sentence(summary).endswith("agrees with that of Qwen3 on 1 of 1 pairs.")
    del summary["methods"]["base"]
    assert "paper" not in [table.name for table in comparison.build_tables(summary)], "one method has no order"


def test_stopped_methods_say_why(report):
    visible = "".join(report["page"].text)
    for text in (visible, report["md"].replace("&lt;", "<")):
        assert "SDFT stopped on seed 1: keep rate 0.1 < 0.2 <b>gate</b>." in text
        assert "phase 2 only stopped on seed 0: entropy fell; seed 1: entropy fell." in text
        assert "SDFT (stopped on 1 of 2 seeds)" in text and "phase 2 only (stopped on 2 of 2 seeds)" in text


def test_the_page_is_self_contained_and_escaped(report):
    names = {tag for tag, _ in report["page"].tags}
    assert not names & {"script", "b", "i", "link"}
    for _, attrs in report["page"].tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in {"src", "srcset", "href"} & set(attrs):
            assert attrs[name].startswith(("data:image/png;base64,", "#"))
    assert "http://" not in report["text"] and "https://" not in report["text"]
    policies = [attrs["content"] for _, attrs in report["page"].tags if "http-equiv" in attrs]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert page.STYLE in report["text"]
    assert NASTY in "".join(report["page"].text) and "<script" not in report["md"]


def test_lead_and_settings(report):
    visible = "".join(report["page"].text)
    lead = "8 methods at equal numbers of sampled tokens, 98,304 for each, on 2 seeds (0, 1): base; SFT; GRPO; "
    for text in (visible, report["md"]):
        assert lead in text
        assert "avg@4 is the accuracy over 4 samples of each of 1,500 test questions. Differences are to GRPO." in text
    assert "train.method=xtrain.samples=1" in visible and "4 shared settings" in visible
    assert "evaluate.questions" in visible
    assert "- SD-Zero: train.method=x, train.samples=1\n" in report["md"]


def test_the_lead_of_a_large_grid_names_its_split_and_not_every_point():
    methods = {str(i): {"label": f"point {i}"} for i in range(21)}
    summary = {"k": 4, "seeds": [0], "methods": methods, "reference": "0", "budget": 10}
    text = comparison.describe(summary | {"config": {"evaluate": {"questions": 512, "split": "validation"}}})
    assert "each of 512 validation questions" in text and "point 20" not in text and "point 0." in text
    few = summary | {"methods": dict(list(methods.items())[:20]), "config": {}}
    assert "point 19" in comparison.describe(few)


def test_figures_in_both_themes(report):
    files = {path.stem: path.read_bytes() for path in report["path"].parent.glob("*.png")}
    assert set(files) == {"accuracy", "difference"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in files.values())
    lights = [attrs["src"] for tag, attrs in report["page"].tags if tag == "img"]
    darks = [attrs["srcset"] for tag, attrs in report["page"].tags if tag == "source"]
    assert len(lights) == len(darks) == 2 and not set(lights) & set(darks)


def test_nothing_measured_draws_nothing(tmp_path):
    summary = fake()
    summary["methods"] = {"phase2": summary["methods"]["phase2"]}
    write_json_atomic(tmp_path / "comparison.json", summary | {"reference": "phase2"})
    reader = Reader(write_comparison(tmp_path).read_text())
    assert "figure" not in {tag for tag, _ in reader.tags}
    assert reader.cells["results", "phase2", "avg@4"][0] is None


def test_what_is_not_a_comparison(tmp_path):
    with pytest.raises(UserError, match=r"comparison\.json: no such file"):
        write_comparison(tmp_path)
    for change, message in (
        (lambda s: s.pop("budget"), r"comparison\.json: lacks 'budget'; expected .*name, budget"),
        (lambda s: s["methods"]["srt"].pop("mean"), r"methods\.srt: lacks 'mean'"),
        (lambda s: s.update(methods=[]), "'methods' is a list; expected"),
        (lambda s: s.update(reference="gpro"), "reference 'gpro' is none of base, sft"),
    ):
        summary = fake()
        change(summary)
        write_json_atomic(tmp_path / "comparison.json", summary)
        with pytest.raises(UserError, match=message):
            write_comparison(tmp_path)
    assert not (tmp_path / "report").exists()
