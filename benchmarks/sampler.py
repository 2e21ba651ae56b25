"""The sampler: how full its slots are, and its speed beside transformers' generate.

python benchmarks/sampler.py utilisation            512 requests of heavy-tailed lengths, with and without refill
python benchmarks/sampler.py speed [--repeats 3]    64 prompts x 128 new tokens; needs torch and transformers
python benchmarks/sampler.py prefix                 prefill tokens saved by shared prompts and continued slots
python benchmarks/sampler.py cache                  log-probs with a narrow cache beside a full one, and its bytes

Lengths are imposed by each request's limit (no stop id is given), so both engines decode the same number of
tokens. In `speed` both sides are greedy, in float32, with the same weights, and must draw the same tokens;
transformers is given the faster of its dynamic and static caches, and prompts of one length.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from sdzero_jax.models import DecoderConfig, LanguageModel, cache_bytes, save_pretrained
from sdzero_jax.sampler import Request, Sampler

SLOTS = 64


def tiny(max_position: int = 4096) -> LanguageModel:
    return LanguageModel(
        DecoderConfig(
            vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
            intermediate_size=384, max_position=max_position,
        )
    )  # fmt: skip


def small() -> LanguageModel:
    return LanguageModel(
        DecoderConfig(
            vocab_size=8192, hidden_size=512, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=64,
            intermediate_size=1536, rope_theta=1e6, rope_theta_sliding=1e6, tie_embeddings=True, max_position=512,
        )
    )  # fmt: skip


def heavy_tailed(count: int, mean: float, most: int) -> np.ndarray:
    """Lengths of a log-normal distribution cut at `most`, scaled so that their mean is `mean`."""
    draws = np.random.default_rng(0).lognormal(0.0, 1.2, count)
    scale = mean
    for _ in range(100):  # the cut lowers the mean: scale until it is right
        lengths = np.clip(np.round(draws * scale), 1, most)
        scale *= mean / lengths.mean()
    return lengths.astype(int)


def utilisation() -> None:
    model = tiny()
    params = model.init(jax.random.key(0))
    lengths = heavy_tailed(512, 300, 2000)
    rng = np.random.default_rng(1)
    requests = [
        Request(id=str(i), prompt=rng.integers(0, 512, 48).tolist(), max_new_tokens=int(n))
        for i, n in enumerate(lengths)
    ]
    sampler = Sampler(model, slots=SLOTS, max_len=2048, stop_ids=())
    for _ in sampler.generate(params, requests[:2], seed=0):
        pass  # compiles
    print(f"{len(lengths)} requests, {lengths.sum():,} tokens, mean {lengths.mean():.0f}, longest {lengths.max()}")

    def run(groups):
        session, begun, decoded, steps = None, time.perf_counter(), 0, 0
        for group in groups:
            session = sampler.session(params, seed=0)
            session.submit(group)
            while session.busy:
                session.step()
            decoded += session.statistics.decoded
            steps += session.statistics.steps
        return decoded / (time.perf_counter() - begun), decoded / (steps * SLOTS), session.statistics.utilisation

    refilled, share, while_queued = run([requests])
    waiting, share_without, _ = run([requests[i : i + SLOTS] for i in range(0, len(requests), SLOTS)])
    print(f"live slots until the queue is empty: {while_queued:.1%}; over the whole run {share:.1%}")
    print(f"with refill {refilled:,.0f} tokens/s: {refilled / waiting:.2f} x")
    print(f"without {waiting:,.0f} tokens/s, {share_without:.1%} of the slots live")


def speed(repeats: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = small()
    params = model.init(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, 8192, (SLOTS, 32))
    new = 128
    requests = [
        Request(id=str(i), prompt=row.tolist(), max_new_tokens=new, temperature=0.0) for i, row in enumerate(prompts)
    ]
    sampler = Sampler(model, slots=SLOTS, max_len=256, stop_ids=())
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, model, params)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ours():
        done = {c.request_id: c.ids for c in sampler.generate(params, requests, seed=0)}
        return [done[r.id] for r in requests]

    def sampled():
        warm = [Request(id=r.id, prompt=r.prompt, max_new_tokens=new) for r in requests]
        return list(sampler.generate(params, warm, seed=0))

    def generate(cache):
        def run():
            with torch.no_grad():
                ids = torch.from_numpy(prompts)
                out = theirs.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                    cache_implementation=cache, pad_token_id=0,
                )  # fmt: skip
            return [tuple(row) for row in out[:, ids.shape[1] :].tolist()]

        return run

    sides = {"sdzero_jax": ours, "sdzero_jax, sampled": sampled, "generate, dynamic": generate(None)}
    sides["generate, static"] = generate("static")
    seconds = {name: [] for name in sides}
    results = {name: run() for name, run in sides.items()}  # compiles
    same = np.mean([a == b for a, b in zip(results["sdzero_jax"], results["generate, dynamic"])])
    for _ in range(repeats):
        for name, run in sides.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    rates = {name: SLOTS * new / np.median(times) for name, times in seconds.items()}
    best = max(rates["generate, dynamic"], rates["generate, static"])
    print(f"{SLOTS} prompts x {new} new tokens, 6 layers x 512, float32; rows with the same greedy ids: {same:.0%}")
    for name, rate in rates.items():
        print(f"{name:<22}{rate:8,.0f} tokens/s   {rate / best:.2f} x the best generate")


def prefix() -> None:
    model = tiny()
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    sampler = Sampler(model, slots=SLOTS, max_len=1024, stop_ids=())
    phrase = rng.integers(0, 512, 12).tolist()

    def run(n, continued):
        session = sampler.session(params, seed=0)
        prompts = [rng.integers(0, 512, 200).tolist() for _ in range(SLOTS)]
        session.submit(
            [Request(id=str(i), prompt=p, max_new_tokens=100, n=n, hold=continued) for i, p in enumerate(prompts)]
        )
        begun = time.perf_counter()
        while session.busy:
            for done in session.step():
                if not done.request_id.startswith("r"):
                    prompt = [*prompts[int(done.request_id)], *done.ids, *phrase]
                    again = Request(
                        id=f"r{done.request_id}/{done.sample_index}", prompt=prompt, max_new_tokens=100,
                        prefix=(done.request_id, done.sample_index),
                    )  # fmt: skip
                    session.submit([again])
        used = session.statistics
        seconds = time.perf_counter() - begun
        return f"prefilled {used.prefilled:>8,}  saved {used.reused:>8,}  {used.decoded / seconds:8,.0f} tokens/s"

    for n, continued in ((1, False), (1, True), (4, False), (4, True)):
        run(n, continued)
        print(f"n={n}, revisions {'continue their slot' if continued else 'prefill again'}: {run(n, continued)}")


def cache() -> None:
    model = tiny()
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    requests = [Request(id=str(i), prompt=rng.integers(0, 512, 200).tolist(), max_new_tokens=200) for i in range(SLOTS)]
    full = {}
    for dtype in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
        sampler = Sampler(model, slots=SLOTS, max_len=512, stop_ids=(), cache_dtype=dtype)
        done = {c.request_id: c for c in sampler.generate(params, requests, seed=0)}
        full = full or done
        differences, split = [], 0
        for name, completion in done.items():
            for ours, theirs, a, b in zip(completion.ids, full[name].ids, completion.logprobs, full[name].logprobs):
                if ours != theirs:
                    split += 1
                    break
                differences.append(abs(a - b))
        size = cache_bytes(model.config, SLOTS, 512, dtype, 16) / 2**20
        print(
            f"{dtype:<14} {size:6.1f} MiB; log-probs differ by {np.mean(differences):.1e} on average, "
            f"{np.max(differences):.1e} at most, until {split} of {SLOTS} rows drew another token"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["utilisation", "speed", "prefix", "cache"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    try:
        {"speed": lambda: speed(arguments.repeats)}.get(arguments.what, globals()[arguments.what])()
    except ImportError as error:
        print(f"error: {error.name} cannot be imported; wanted requirements-oracle.txt installed", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
