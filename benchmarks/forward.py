"""Qwen3-4B forward on a GPU: achieved TFLOP/s beside the machine's matmul peak and beside torch.

python benchmarks/forward.py [--attention auto] [--repeats 5]

bfloat16, random weights, hidden states of every token (no logits), at 1 x 16,384 and 8 x 2,048 tokens. The
peak is the best of a few square matmuls, in jax. The twin is transformers' Qwen3Model with sdpa, in the same
call; without torch or transformers its column stays empty. Without a GPU a small model runs in float32 at
short lengths, which proves the script and nothing else. TPUs run the table without the twin.
"""

import argparse
import dataclasses
import functools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room beside jax

import jax
import jax.numpy as jnp

from sdzero_jax.models import DecoderConfig, LanguageModel

QWEN3_4B = DecoderConfig(
    151_936, 2560, 36, 32, 8, 128, 9728, rope_theta=5e6, tie_embeddings=True, param_dtype="bfloat16",
    compute_dtype="bfloat16",
)  # fmt: skip
SMALL = dataclasses.replace(
    QWEN3_4B, vocab_size=1024, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=64,
    intermediate_size=1024, param_dtype="float32", compute_dtype="float32",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    accelerator = jax.default_backend() != "cpu"
    config = dataclasses.replace(QWEN3_4B if accelerator else SMALL, attention=arguments.attention)
    shapes = [(1, 16_384), (8, 2048)] if accelerator else [(1, 1024), (8, 128)]
    peak = matmul_peak(8192 if accelerator else 1024, config.compute_dtype, arguments.repeats)
    print(f"{jax.devices()[0].device_kind}, {config.compute_dtype}, {config.num_layers} layers")
    print(f"matmul peak {peak / 1e12:.2f} TFLOP/s; columns: TFLOP/s, share of the peak")
    ours = time_jax(config, shapes, arguments.repeats)
    theirs = time_torch(config, shapes, arguments.repeats) if jax.default_backend() != "tpu" else None
    print(f"{'tokens':>12}{'this project':>22}{'torch sdpa':>22}{'torch/ours':>12}")
    for i, (batch, length) in enumerate(shapes):
        work = flops(config, batch, length)
        cells = f"{batch:>4} x {length:>5}{rate(work, ours[i], peak):>22}"
        if theirs:
            cells += f"{rate(work, theirs[i], peak):>22}{theirs[i] / ours[i]:12.2f}"
        print(cells)
    return 0


def rate(work: float, seconds: float, peak: float) -> str:
    return f"{work / seconds / 1e12:9.3f} {100 * work / seconds / peak:6.1f} %"


def flops(config: DecoderConfig, batch: int, length: int) -> float:
    """Of the matmuls, with the half of the scores that causality leaves; embedding and norms not counted."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim  # q, out, k, v
    weights = config.hidden_size * (heads + 3 * config.intermediate_size)
    scores = 2 * config.num_heads * config.head_dim * length / 2  # q k and weights v, per token
    return 2.0 * batch * length * config.num_layers * (weights + scores)


def matmul_peak(size: int, dtype: str, repeats: int) -> float:
    """FLOP/s of the best of `repeats` square matmuls."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2.0 * size**3 / best_of(functools.partial(jax.jit(jnp.matmul), x, x), jax.block_until_ready, repeats)


def time_jax(config: DecoderConfig, shapes: list[tuple[int, int]], repeats: int) -> list[float]:
    """Least seconds per shape; the parameters are freed on return."""
    model = LanguageModel(config)
    params = model.init(jax.random.key(0))
    forward = jax.jit(lambda params, tokens: model.apply(params, tokens)[0])
    tokens = [jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size) for shape in shapes]
    return [best_of(functools.partial(forward, params, x), jax.block_until_ready, repeats) for x in tokens]


def time_torch(config: DecoderConfig, shapes: list[tuple[int, int]], repeats: int) -> list[float] | None:
    """The same of transformers' model, None where torch or transformers is missing."""
    try:
        import torch
        from transformers import Qwen3Config, Qwen3Model
    except ImportError as error:
        print(f"no torch column: {error}", file=sys.stderr)
        return None
    cuda = torch.cuda.is_available()
    if jax.default_backend() == "gpu" and not cuda:
        print("no torch column: this torch sees no GPU", file=sys.stderr)
        return None
    twin = Qwen3Config(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        intermediate_size=config.intermediate_size, max_position_embeddings=32_768, attn_implementation="sdpa",
    )  # fmt: skip
    device, dtype = torch.device("cuda" if cuda else "cpu"), getattr(torch, config.compute_dtype)
    with device:
        model = Qwen3Model(twin).to(dtype).eval()
    wait = (lambda _: torch.cuda.synchronize()) if cuda else (lambda _: None)

    def run(tokens):
        with torch.inference_mode():
            return model(input_ids=tokens, use_cache=False).last_hidden_state

    tokens = [torch.randint(0, config.vocab_size, shape, device=device) for shape in shapes]
    return [best_of(functools.partial(run, x), wait, repeats) for x in tokens]


def best_of(run, wait, repeats: int) -> float:
    """The least seconds of `wait(run())`, after two calls that are not counted."""
    for _ in range(2):
        wait(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
