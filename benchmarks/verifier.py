"""Verdicts per second: the worker pool beside single-process math-verify, on the same recorded model outputs.

python benchmarks/verifier.py [--workers 2] [--rows N] [--boxed]    with SDZERO_DATA naming the folder of larger data

Prints both rates, their ratio and how often the two agree on responses with a box. Both sides start warm:
imports, worker start and the first parse are not counted. Leaves out the code judge.
"""

import argparse
import gzip
import json
import logging
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=None, help="only the first N rows")
    parser.add_argument("--boxed", action="store_true", help="only responses with a box: others cost the pool nothing")
    arguments = parser.parse_args()
    folder = os.environ.get("SDZERO_DATA")
    if not folder:
        print(
            "error: SDZERO_DATA names no folder; wanted outputs/math_model_outputs.jsonl.gz in it",
            file=sys.stderr,
        )
        return 2
    with gzip.open(Path(folder) / "outputs" / "math_model_outputs.jsonl.gz", "rt", encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    rows = [row for row in rows if row["has_boxed"] or not arguments.boxed][: arguments.rows]
    golds, responses = [row["gold"] or "" for row in rows], [row["response"] for row in rows]
    ours, our_seconds = time_pool(golds, responses, arguments.workers)
    theirs, their_seconds = time_math_verify(golds, responses)
    boxed = [n for n, row in enumerate(rows) if row["has_boxed"]]
    same = sum((ours[n].outcome == "correct") == theirs[n] for n in boxed)
    print(f"rows                          {len(rows)}")
    print(f"pool, {arguments.workers} workers               {len(rows) / our_seconds:8.1f} verdicts/s")
    print(f"math-verify, one process      {len(rows) / their_seconds:8.1f} verdicts/s")
    print(f"ratio                         {their_seconds / our_seconds:8.2f}")
    print(f"same verdict, with a box      {100 * same / max(len(boxed), 1):8.2f} % of {len(boxed)}")
    return 0


def time_pool(golds, responses, workers: int):
    from sdzero_jax.verifiers import PoolSettings, VerifierPool

    with VerifierPool(PoolSettings(workers=workers)) as pool:
        pool.verify(["1"] * 8 * workers, [r"\boxed{1}"] * 8 * workers)
        while pool.starting():
            pool.verify(["1"] * 8, [r"\boxed{1}"] * 8)
        begun = time.perf_counter()
        verdicts = pool.verify(golds, responses)
        return verdicts, time.perf_counter() - begun


def time_math_verify(golds, responses):
    """As its README says: both texts parsed by its defaults, then compared."""
    from math_verify import parse, verify

    logging.disable(logging.WARNING)
    verify(parse("$1$"), parse(r"$\boxed{1}$"))
    begun = time.perf_counter()
    verdicts = [verify(parse(f"${gold}$"), parse(response)) for gold, response in zip(golds, responses)]
    return verdicts, time.perf_counter() - begun


if __name__ == "__main__":
    raise SystemExit(main())
