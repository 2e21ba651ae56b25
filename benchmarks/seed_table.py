"""The demo over several seeds: a Markdown table and the margins that must hold, from finished runs.

    for s in 0 1 2; do python run.py seed=$s task.seed=$s run_dir=runs/seed$s; done
    python benchmarks/seed_table.py runs/seed0 runs/seed1 runs/seed2

Exit status 1 when a margin does not hold, 2 for a folder without a finished run.
"""

import json
import pathlib
import sys

MODELS = {"base": "base", "srt": "SRT", "sdzero": "SD-Zero", "sdzero_sync": "SD-Zero + sync"}
COLUMNS = ("avg@4", "pass@4", "greedy", "mean_tokens", "correction_rate", "keep_rate", "fix", "keep")
# name -> (summary -> figure, least value)
MARGINS = {
    "SRT - base, avg@4": (lambda s: s["srt"]["avg@4"] - s["base"]["avg@4"], 0.06),
    "SD-Zero - SRT, avg@4": (lambda s: s["sdzero"]["avg@4"] - s["srt"]["avg@4"], 0.05),
    "fix(SRT) / fix(base)": (lambda s: s["srt"]["fix"] / s["base"]["fix"], 1.5),
    "length(SRT) / length(base)": (lambda s: s["srt"]["mean_tokens"] / s["base"]["mean_tokens"], 1.8),
    "length(SRT) / length(SD-Zero)": (lambda s: s["srt"]["mean_tokens"] / s["sdzero"]["mean_tokens"], 1 / 0.6),
}


def main(folders: list[str]) -> int:
    missing = [folder for folder in folders if not (pathlib.Path(folder) / "summary.json").is_file()]
    if missing or not folders:
        print(f"error: no finished run in {missing or 'no folder'}; wanted RUN [RUN ...]", file=sys.stderr)
        return 2
    summaries = [json.loads((pathlib.Path(folder) / "summary.json").read_text()) for folder in folders]
    print("| seed | model | " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * (len(COLUMNS) + 2))
    for summary in summaries:
        for name, label in MODELS.items():
            metrics = summary[name]
            if metrics is None:
                print(f"| {summary['seed']} | {label} | {summary[f'{name}_reason']} |" + " |" * (len(COLUMNS) - 1))
                continue
            cells = " | ".join(f"{metrics[c]:.1f}" if c == "mean_tokens" else f"{metrics[c]:.3f}" for c in COLUMNS)
            print(f"| {summary['seed']} | {label} | {cells} |")
    print("\n| margin | wanted | " + " | ".join(f"seed {s['seed']}" for s in summaries) + " |")
    print("|" + "---|" * (len(summaries) + 2))
    good = True
    for name, (figure, least) in MARGINS.items():
        values = [figure(summary) for summary in summaries]
        good &= all(value >= least for value in values)
        print(f"| {name} | >= {least:.2f} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    print("\n| AUROC of | " + " | ".join(f"seed {s['seed']}" for s in summaries) + " |")
    print("|" + "---|" * (len(summaries) + 1))
    for name, label in (("auroc_kl", "per-token KL"), ("auroc_entropy", "student entropy (baseline)")):
        print(f"| {label} | " + " | ".join(f"{s['localisation'][name]:.3f}" for s in summaries) + " |")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
