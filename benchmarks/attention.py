"""Attention rungs side by side: seconds of forward + gradient, each as a ratio to the first.

python benchmarks/attention.py [--length 4096] [--window 512] [--heads 8] [--kv-heads 2] [--head-dim 64] [--repeats 3]

One row, all tokens real, bfloat16 on GPU and TPU and float32 on CPU. Rows of the table are the chunked rung
when it visits every block ("all blocks"), when it visits what can be seen (as shipped), then the kernel of
the device, if it has one; columns are full causal attention and the window. The reference is left out: at
these lengths its scores are what the others avoid.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from kernels import attention_chunked
from sdzero_jax import ops


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("length", 4096), ("window", 512), ("heads", 8), ("kv-heads", 2), ("head-dim", 64), ("repeats", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    kernel = {"gpu": ["cudnn"], "tpu": ["splash"]}.get(device.platform, [])
    print(f"{device.device_kind}: {vars(arguments)}")
    print(f"{'':14}{'causal':>10}{'ratio':>7}{'window':>10}{'ratio':>7}")
    first = None
    for name in ["all blocks", "chunked", *kernel]:
        seconds = [time_rung(name, arguments, window) for window in (None, arguments.window)]
        first = first or seconds
        cells = "".join(f"{s:9.3f}s{s / f:7.2f}" for s, f in zip(seconds, first, strict=True))
        print(f"{name:14}{cells}", flush=True)
    return 0


def time_rung(name: str, arguments: argparse.Namespace, window: int | None) -> float:
    """The least seconds of forward + gradient over some repeats, compilation not counted."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    length = arguments.length
    q, k, v = (
        jax.random.normal(key, (1, length, heads, arguments.head_dim), dtype)
        for key, heads in zip(
            jax.random.split(jax.random.key(0), 3),
            (arguments.heads, arguments.kv_heads, arguments.kv_heads),
            strict=True,
        )
    )
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    segments = jnp.ones_like(positions)

    def loss(q, k, v):
        out = ops.attention(
            q, k, v, q_positions=positions, kv_positions=positions, q_segments=segments, kv_segments=segments,
            window=window, layout="padded", implementation="chunked" if name == "all blocks" else name,
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32) ** 2)

    visits = attention_chunked._visits
    if name == "all blocks":
        attention_chunked._visits = every_block
    try:
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return best_of(functools.partial(step, q, k, v), arguments.repeats)
    finally:
        attention_chunked._visits = visits


def every_block(q_positions, kv_positions, q_segments, kv_segments, window, q_size, kv_size):
    """In place of `attention_chunked._visits`: no block is left out."""
    queries, keys = (-(-x.shape[1] // size) for x, size in ((q_positions, q_size), (kv_positions, kv_size)))
    return jnp.zeros(queries, jnp.int32), jnp.full(queries, keys, jnp.int32)


def best_of(run, repeats: int) -> float:
    """The least seconds of `run()`, after one call that is not counted."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
