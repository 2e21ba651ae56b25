"""The report of a synthetic run: numbers equal summary.json, text is escaped, missing stages are said."""

import html.parser
import re

import numpy as np
import pytest
from test_comparison_report import fake

import run as command
from sdzero_jax.analysis import folders, localisation, page, plots, run_data, write_report, write_reports
from sdzero_jax.errors import UserError
from sdzero_jax.files import append_jsonl, write_json_atomic

NASTY = '<script>alert("x")</script> & <img src=x onerror=y> \ud800'


def result(avg, tokens, fix, rng):
    return {
        "avg@4": avg + rng.uniform(0, 1e-4),
        "pass@4": min(avg + 0.17, 0.99),
        "mean_tokens": tokens,
        "correction_rate": fix,
        "keep_rate": 0.93 + rng.uniform(0, 0.03),
        "fix": fix + 0.02,
        "keep": 0.95,
        "revised_accuracy": avg + 0.08,
        "truncated": 0.0021,
        "avg@4_interval": [avg - 0.031, avg + 0.029],
    }


def training_rows(steps, start, end, tokens, rng):
    """Rows with metrics that move from `start` to `end` accuracy."""
    rows = []
    for step in range(steps // 32 or 1, steps + 1, max(steps // 64, 1)):
        t = step / steps
        rows.append(
            {
                "step": step,
                "reward": start + (end - start) * t + rng.normal(0, 0.04),
                "mean_tokens": tokens[0] + (tokens[1] - tokens[0]) * t + rng.normal(0, 0.8),
                "divergence": 0.12 * np.exp(-2 * t) + rng.uniform(0, 0.01),
                "entropy": 0.5 - 0.2 * t + rng.uniform(0, 0.03),
                "grad_norm": rng.uniform(0.1, 0.6),
                "logprob_diff_mean": 1e-6 * rng.uniform(1, 2),
                "logprob_diff_max": 1e-4 * rng.uniform(1, 9),
                "loss": 1.1 * np.exp(-2 * t),
                "learning_rate": 4e-4 * t,
            }
        )
    return rows


def localisation_records(rng, responses=120):
    alphabet = list("0123456789+-*=#")
    records = []
    for index in range(responses):
        length, wrong = int(rng.integers(18, 29)), index % 2 == 0
        first = int(rng.integers(3, length - 3)) if wrong else None
        kl, entropy = rng.exponential(0.05, length), rng.exponential(0.2, length)
        log_ratio = rng.normal(-0.05, 0.3, length)
        if wrong:
            kl[first] += rng.exponential(0.8)
            entropy[first] += rng.exponential(0.9)
            log_ratio[first] += 0.5
        records.append(
            {
                "prompt": "7*9*5+2+1=",
                "tokens": [str(rng.choice(alphabet)) for _ in range(length - 1)] + ["<eos>"],
                "reward": int(not wrong),
                "kl": kl.tolist(),
                "entropy": entropy.tolist(),
                "log_ratio": log_ratio.tolist(),
                "first_error": first,
                "scored": [True] * (length - 1) + [False],
            }
        )
    return records


def make_run(directory, seed=0):
    """A run directory with every file that the pipeline writes, and awkward text in it."""
    rng = np.random.default_rng(seed)
    models = {
        "base": result(0.447, 23.9, 0.19, rng),
        "srt": result(0.601, 47.7, 0.43, rng),
        "sdzero": result(0.785, 23.94, 0.58, rng),
        "sdzero_sync": None,
    }
    intervals = {name: value.pop("avg@4_interval") for name, value in models.items() if value}
    records = localisation_records(rng)
    located = localisation.localisation_summary(records)
    seconds = {"base": 101.23, "collect": 8.4, "srt": 35.1, "distill": 48.92, "evaluate": 12.0}
    write_json_atomic(
        directory / "summary.json",
        models
        | {
            "sdzero_sync_reason": "budget spent <b>early</b>",
            "localisation": located,
            "seconds": seconds,
            "seed": 0,
        },
    )
    write_json_atomic(
        directory / "config.json",
        {
            "name": "synthetic",
            "model": {"layers": 2, "width": 96},
            "system": NASTY,
            "empty": {},
            "stop": [1, 2],
        },
    )
    phases = {
        "base": [{"step": s, "loss": 2.5 * np.exp(-s / 300), "validation_loss": 2.5 * np.exp(-s / 310) + 0.05,
                  "keep_rate": min(1.0, s / 900), "learning_rate": 3e-3 * (1 - s / 1000)}
                 for s in range(10, 1001, 10)],
        "srt": training_rows(64, 0.45, 0.6, (24, 48), rng),
        "distill/round_1": training_rows(128, 0.6, 0.72, (46, 24), rng),
        "distill/round_2": training_rows(128, 0.72, 0.79, (24, 24), rng),
    }  # fmt: skip
    for name, rows in phases.items():
        append_jsonl(directory / name / "metrics.jsonl", rows)
    write_json_atomic(
        directory / "collect" / "summary.json",
        {"questions": 1024, "generations": 2048, "kept": 510, "init_accuracy": 0.4471,
         "revised_accuracy": 0.498, "kept_from_wrong": 103, "sampled_tokens": 49213},
    )  # fmt: skip
    for name, value in models.items():
        if value is None:
            continue
        write_json_atomic(directory / "evaluate" / f"{name}.json", value | {"avg@4_interval": intervals[name]})
        append_jsonl(directory / "evaluate" / f"{name}.jsonl", [sample(i, rng) for i in range(40)])
    examples = [{key: value for key, value in record.items() if key != "scored"} for record in records[:16]]
    examples[0]["tokens"][1] = "<script>"
    examples[0]["tokens"][2] = "\n"
    write_json_atomic(directory / "localise" / "localisation.json", {"summary": located, "examples": examples})
    return models, intervals, located


def sample(index, rng):
    reward, revised = int(rng.integers(0, 2)), int(rng.integers(0, 2))
    return {
        "question_id": f"q{index}",
        "prompt": "7*9*5+2+1=" if index else NASTY,
        "gold": ["8"],
        "sample_index": 0,
        "response": NASTY if index < 8 else "7*9=3*5=5+2=7+1=8#8",
        "reward": reward,
        "tokens": 24,
        "revised_response": NASTY if index < 8 else "7*9=3*5=5+2=7+1=8#8",
        "revised_reward": revised,
        "revised_tokens": 1024,
    }


class Reader(html.parser.HTMLParser):
    """Collects the result cells, every tag and attribute, and the visible text; checks nesting."""

    VOID = ("meta", "img", "source", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.text, self.stack = [], {}, [], []
        self.model = self.key = None
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.model = attrs.get("data-model")
        if tag == "td":
            self.key = attrs.get("data-key")
            if self.model and self.key:
                self.cells[self.model, self.key] = [attrs.get("data-value"), ""]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        if tag in ("td", "tr"):
            self.key = None

    def handle_data(self, data):
        self.text.append(data)
        if self.model and self.key:
            self.cells[self.model, self.key][1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    models, intervals, located = make_run(directory)
    path = write_report(directory)
    text = path.read_text(encoding="utf-8")
    return {"path": path, "text": text, "page": Reader(text), "models": models,
            "intervals": intervals, "located": located}  # fmt: skip


def test_numbers_equal_the_summary(report):
    cells = report["page"].cells
    for name, values in report["models"].items():
        for key, value in (values or {}).items():
            exact, shown = cells[name, key]
            assert float(exact) == value
            digits = 1 if key == "mean_tokens" else 3
            assert shown.startswith(f"{value:.{digits}f}")
        if values:
            low, high = report["intervals"][name]
            assert cells[name, "avg@4"][1].endswith(f"[{low:.3f}, {high:.3f}]")
    assert not any(name == "sdzero_sync" for name, _ in cells)
    exact_values = {attrs["data-value"] for tag, attrs in report["page"].tags if "data-value" in attrs}
    for key in ("auroc_kl", "auroc_entropy", "auroc_log_ratio", "top1_kl", "top3_chance"):
        assert repr(report["located"][key]) in exact_values
    for value in (510, 103, 49213, 101.23, 48.92):
        assert repr(value) in exact_values


def test_the_page_is_self_contained_and_model_text_is_escaped(report):
    names = {tag for tag, _ in report["page"].tags}
    assert "script" not in names and "b" not in names and "link" not in names
    for tag, attrs in report["page"].tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "srcset", "href"):
            if name in attrs:
                assert attrs[name].startswith(("data:image/png;base64,", "#")), (tag, attrs[name][:50])
    assert "http://" not in report["text"] and "https://" not in report["text"]
    visible = "".join(report["page"].text)
    assert '<script>alert("x")</script> & <img src=x onerror=y>' in visible
    assert "not run: budget spent <b>early</b>" in visible


def test_token_viewer_marks_the_first_error_and_shades_by_kl(report):
    tokens = [attrs for tag, attrs in report["page"].tags if tag == "span" and "t" in attrs.get("class", "").split()]
    first = [attrs for attrs in tokens if "first" in attrs["class"].split()]
    assert len(first) == page.WRONG_SHOWN  # every wrong example of this run has a known first error
    assert all(attrs["title"].endswith("first wrong token") for attrs in first)
    shades = [float(re.match(r"--k:([\d.]+);--e:([\d.]+)$", attrs["style"])[1]) for attrs in tokens]
    values = [float(re.match(r"KL ([\d.]+), entropy [\d.]+, ln S − ln T [+-]", a["title"])[1]) for a in tokens]
    assert max(shades) == 1.0
    order = np.argsort(values)
    assert np.all(np.diff(np.array(shades)[order]) >= -0.011)  # both are rounded


def test_every_figure_is_there_in_both_themes(report):
    names = {"results", "curves_base", "curves_srt", "curves_distill", "funnel", "detection", "buckets",
             "offsets", "seconds"}  # fmt: skip
    files = {path.stem: path.read_bytes() for path in report["path"].parent.glob("*.png")}
    assert set(files) == names
    assert all(data.startswith(b"\x89PNG") for data in files.values())
    found = {attrs["id"] for tag, attrs in report["page"].tags if tag == "figure"}
    assert found == {f"figure-{name}" for name in names}
    lights = [attrs["src"] for tag, attrs in report["page"].tags if tag == "img"]
    darks = [attrs["srcset"] for tag, attrs in report["page"].tags if tag == "source"]
    assert len(lights) == len(darks) == len(names) and not set(lights) & set(darks)


def test_summary_markdown(report):
    text = (report["path"].parent / "summary.md").read_text()
    base = report["models"]["base"]
    low, high = report["intervals"]["base"]
    assert f"| base | {base['avg@4']:.3f} [{low:.3f}, {high:.3f}] | {base['pass@4']:.3f} | 23.9 |" in text
    assert "| SD-Zero + sync | not run: budget spent &lt;b>early&lt;/b> |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


def test_pairs_show_each_kind_once_filled(tmp_path):
    rows = [{"reward": 1.0, "revised_response": "b", "revised_reward": 1.0, "question_id": i} for i in range(9)]
    rows += [{"reward": 0.0, "revised_response": "b", "revised_reward": 1.0, "question_id": i} for i in range(10, 19)]
    rows += [{"reward": None, "revised_response": "b", "revised_reward": None, "question_id": 99}]
    append_jsonl(tmp_path / "x.jsonl", rows)
    assert [row["question_id"] for row in run_data.sample_pairs(tmp_path / "x.jsonl")] == [10, 11, 12, 0]
    append_jsonl(
        tmp_path / "plain.jsonl", [{"reward": 1, "revised_response": None, "question_id": i} for i in range(5)]
    )
    assert [row["question_id"] for row in run_data.sample_pairs(tmp_path / "plain.jsonl")] == [0, 1]


def test_missing_stages_and_broken_numbers(tmp_path):
    append_jsonl(tmp_path / "base" / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}])
    with open(tmp_path / "base" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 3, "lo')
    text = write_report(tmp_path).read_text()
    reader = Reader(text)
    visible = " ".join("".join(reader.text).split())
    assert "loss was not finite at step 2 (1 values in all)" in visible
    assert visible.count("not run") >= 9  # four models, two phases, collection, localisation, tokens, ...
    assert not reader.cells


def test_an_unfinished_run_takes_results_from_the_evaluations(tmp_path):
    write_json_atomic(tmp_path / "evaluate" / "base.json", {"avg@8": 0.25, "avg@4": 0.5, "mean_tokens": None})
    write_json_atomic(tmp_path / "evaluate" / "grpo.json", {"avg@8": float("nan")})
    reader = Reader(write_report(tmp_path).read_text())
    assert reader.cells["base", "avg@8"] == ["0.25", "0.250"]
    assert reader.cells["base", "mean_tokens"] == [None, "–"]
    assert reader.cells["grpo", "avg@8"] == [None, "nan"]


LEDGERS = {
    "collect": {"questions": 1024, "generations": 2048, "sampled_tokens": 49213, "verifier_calls": 2048},
    "srt": {"student_tokens": 60001},
    "train": {"questions": 96, "generations": 384, "sampled_tokens": 9001, "student_tokens": 11002,
              "teacher_tokens": 22003, "verifier_calls": 383},
}  # fmt: skip
MODEL = {"vocab_size": 20, "hidden_size": 6, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4,
         "intermediate_size": 10}  # fmt: skip


def make_train_run(directory, rewards=((1.0, 0.0), (1.0, 1.0)), prompt="1+1=", method="grpo"):
    """What `run.py train` leaves: one method's rounds and ledgers, and two models evaluated under hashes."""
    write_json_atomic(directory / "config.json", {"name": "alone", "model": MODEL, "train": {"method": method}})
    append_jsonl(directory / "train" / "round_1" / "metrics.jsonl", training_rows(64, 0.4, 0.6, (24, 20), RNG))
    for stage, ledger in LEDGERS.items():
        write_json_atomic(directory / stage / "done.json", {"ledger": ledger, "key": "x", "seconds": 12.5})
    for name, avg in (("base", 0.25), ("train", 0.75)):
        folder = directory / f"evaluate-{name[::-1]}0"
        write_json_atomic(folder / "metrics.json", {"model": name, "avg@2": avg, "pass@2": 0.8,
                                                    "pass@2_interval": [0.61, 0.92], "mean_tokens": 20.0})  # fmt: skip
        rows = [sample(q, RNG) | {"question_id": str(q), "prompt": prompt, "reward": r}
                for q, own in enumerate(rewards) for r in own]  # fmt: skip
        append_jsonl(folder / "responses.jsonl", [*rows, {"closes": 0}])
    return directory


RNG = np.random.default_rng(5)


def test_a_method_alone_has_its_curves_figures_budget_and_samples(tmp_path):
    path = write_report(make_train_run(tmp_path))
    reader = Reader(path.read_text(encoding="utf-8"))
    assert "figure-curves_train" in {attrs.get("id") for tag, attrs in reader.tags if tag == "figure"}
    assert (path.parent / "curves_train.png").exists()
    assert reader.cells["train", "avg@2"] == ["0.75", "0.750"] and reader.cells["base", "avg@2"] == ["0.25", "0.250"]
    assert reader.cells["train", "pass@2"][1] == "0.800[0.610, 0.920]"
    text = " ".join("".join(reader.text).split())
    assert "train (grpo)" in text and "38 s in all" in text and "question 0, sample 0" in text
    # 2 weights' products per token, 3 times that in training: by hand for collect, srt and all of them.
    weights = 2 * (6 * 4 * (2 * 2 + 2 * 1) + 3 * 6 * 10) + 20 * 6
    flops = {"collect": 2 * weights * 49213, "srt": 6 * weights * 60001}
    flops["train"] = 2 * weights * (9001 + 3 * 11002 + 22003)
    flops["all"] = sum(flops.values())
    for stage, wanted in flops.items():
        assert float(reader.cells[stage, "flops"][0]) == pytest.approx(wanted)
    assert reader.cells["all", "sampled_tokens"] == [str(49213 + 9001), "58,214"]
    assert reader.cells["train", "verifier_calls"] == ["383", "383"]
    markdown = (path.parent / "summary.md").read_text()
    assert "| stage | questions | generations | sampled tokens |" in markdown
    assert "| train | 96 | 384 | 9,001 | 11,002 | 22,003 | 383 |" in markdown
    assert "| train (grpo) | 0.750 | 0.800 [0.610, 0.920] |" in markdown


def test_a_ledger_of_another_model_has_no_flops_and_none_says_so(tmp_path):
    write_json_atomic(tmp_path / "config.json", {"model": {"layers": 2}})
    assert "budget" in write_report(tmp_path).read_text()
    write_json_atomic(tmp_path / "train" / "done.json", {"ledger": LEDGERS["train"]})
    cells = Reader(write_report(tmp_path).read_text()).cells
    assert (
        cells["train", "questions"] == ["96", "96"]
        and ("train", "flops") not in cells
        and not any(model == "all" for model, _ in cells)
    )


def test_two_runs_are_compared_question_by_question(tmp_path):
    one = make_train_run(tmp_path / "one", [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [None, None]])
    two = make_train_run(tmp_path / "two", [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]], method="rft")
    lines = write_reports([one, two])
    assert [line for line in lines if line.endswith(".html")] == lines[:2]
    row = next(line for line in lines if line.startswith("train"))
    # 0.5, 1, 0 against 1, 0.5, 1 on the three questions with verdicts on both sides; the fourth counts on neither.
    name, first, second, gap, low, high, count = row.replace("[", "").replace("]", "").replace(",", "").split()
    assert (name, first, second, gap, count) == ("train", "0.500", "0.833", "+0.333", "3")
    assert -0.5 <= float(low) < 0.333 < float(high) <= 1.0
    other = make_train_run(tmp_path / "other", [[1.0, 1.0]] * 4, prompt="2+2=")
    assert "other questions" in write_reports([one, other])[-1]
    assert len(write_reports([one])) == 1 and len(write_reports([one, two, other])) == 3


def test_the_report_of_a_comparison_is_written_again(tmp_path, capsys):
    write_json_atomic(tmp_path / "comparison.json", fake())
    assert command.main(["report", str(tmp_path)]) == 0
    path = tmp_path / "report" / "comparison.html"
    assert capsys.readouterr().out.strip() == str(path)
    assert "GRPO" in path.read_text()
    run = make_train_run(tmp_path / "run")
    assert folders.write_reports([tmp_path, run]) == [str(path), str(run / "report" / "report.html")]


def test_what_is_not_a_run_directory(tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"not a run directory; expected config\.json"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(UserError, match=r"summary\.json: holds a list, expected a JSON object"):
        write_report(tmp_path)


def test_rounds_are_joined_on_one_step_axis():
    one, two = [{"step": 1, "entropy": 1.0}, {"step": 4, "entropy": 2.0}], [{"step": 2, "entropy": 3.0}]
    rows, ends = plots.join_rounds([one, [], two])
    assert [row["step"] for row in rows] == [1, 4, 6] and ends == [4]
    rows, ends = plots.join_rounds([one, [{"step": 5, "entropy": 3.0}]])
    assert [row["step"] for row in rows] == [1, 4, 5] and ends == [4]
    assert two == [{"step": 2, "entropy": 3.0}]


def test_series_leaves_out_what_cannot_be_drawn():
    rows = [{"step": 1, "entropy": 0.5}, {"step": 2, "entropy": float("nan")}, {"step": 3},
            {"step": 4, "entropy": None},
            {"step": 5, "entropy": float("inf")}, {"step": 6, "entropy": 2}, {"entropy": 1.0}]  # fmt: skip
    steps, values = plots.series(rows, "entropy")
    assert steps.tolist() == [1, 6] and values.tolist() == [0.5, 2.0]
    assert [panel[0] for panel in plots.present_panels(rows)] == ["Student entropy"]


def test_smoothing_keeps_straight_lines_to_the_ends():
    line = np.linspace(3.0, -1.0, 60)
    np.testing.assert_allclose(plots.smoothed(line), line, atol=1e-12)
    spike = np.zeros(60)
    spike[30] = 7.0
    np.testing.assert_allclose(plots.smoothed(spike)[26:35], [0, 1, 1, 1, 1, 1, 1, 1, 0], atol=1e-12)
    short = np.arange(19.0) ** 2
    np.testing.assert_array_equal(plots.smoothed(short), short)


def test_verdict_on_kl_names_the_baseline():
    assert "ahead by 0.100" in page.verdict_on_kl({"auroc_kl": 0.9, "auroc_entropy": 0.8})
    assert "behind by 0.100" in page.verdict_on_kl({"auroc_kl": 0.8, "auroc_entropy": 0.9})
    assert "no better" in page.verdict_on_kl({"auroc_kl": 0.861, "auroc_entropy": 0.851})
    assert "baseline to beat" in page.verdict_on_kl({"auroc_kl": None})


def test_flatten():
    nested = {"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}
    assert list(page.flatten(nested)) == [("a.b", 1), ("a.c", {}), ("d", [1, {"e": 2}])]
