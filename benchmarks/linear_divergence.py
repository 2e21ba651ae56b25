"""Divergence from hidden states: time and memory of dense, chunked, Pallas, torch and Liger, side by side.

python benchmarks/linear_divergence.py [--sizes 1024x512x8192 ...] [--divergence reverse_kl] [--repeats 7]
python benchmarks/linear_divergence.py --memory        the compiler's numbers at 16,384 x 2,560 x 151,936, no run

A size is tokens x width x vocabulary. Every row is value and gradient with respect to the student's hidden
states and unembedding; per-token values, log-probs and entropy are computed too, as the train step does (not by
torch and Liger). Calls are interleaved; medians, and ratios to dense. "temporaries" is what the compiler
allocates beyond inputs and outputs (torch on a GPU: the allocator's peak beyond what stood before). The
authors' way (`top-64`) truncates to the teacher's 64 likeliest tokens after full logits of both sides.
Rows that cannot run say why. Leaves out meshes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from sdzero_jax import ops

FULL_SIZE = (16_384, 2560, 151_936)  # a batch of responses on Qwen3-4B's vocabulary
SIZES = {
    "cpu": [(1024, 512, 8192), (2048, 512, 8192), (1024, 512, 32_768), (512, 2560, 50_257)],
    "other": [(n, 2560, 151_936) for n in (1024, 4096, 16_384, 32_768)],
}


class Inputs(NamedTuple):
    """Arrays, or shapes and dtypes of arrays."""

    student: jax.Array  # [N, D]
    w_student: jax.Array  # [V, D]
    teacher: jax.Array  # [N, D]
    w_teacher: jax.Array  # [V, D]
    weights: jax.Array  # [N] float32
    ids: jax.Array  # [N] int32


def inputs_of(size, dtype, *, abstract: bool = False) -> Inputs:
    n, depth, vocab = size
    shapes = ((n, depth), (vocab, depth), (n, depth), (vocab, depth), (n,), (n,))
    dtypes = (dtype,) * 4 + (jnp.float32, jnp.int32)
    if abstract:
        return Inputs(*(jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)))
    keys = jax.random.split(jax.random.key(0), 4)
    scales = (1.0, 3.0 * depth**-0.5) * 2  # logits with standard deviation 3
    arrays = [scale * jax.random.normal(key, shape) for key, shape, scale in zip(keys, shapes, scales)]
    return Inputs(*(x.astype(dtype) for x in arrays), jnp.full(n, 1 / n), jnp.arange(n, dtype=jnp.int32) % vocab)


# ---- the rows: Inputs -> ((total, per token), gradients) ------------------------------------------


def loss_form(divergence: str, **settings) -> Callable:
    def run(inputs: Inputs):
        def loss(h, w):
            return ops.linear_divergence_loss(
                h, w, inputs.teacher, inputs.w_teacher, inputs.weights,
                ids=inputs.ids, divergence=divergence, **settings,
            )  # fmt: skip

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(inputs.student, inputs.w_student)

    return run


def token_form(divergence: str, **settings) -> Callable:
    def run(inputs: Inputs):
        def loss(h, w):
            out = ops.linear_divergence(
                h, w, inputs.teacher, inputs.w_teacher, ids=inputs.ids, divergence=divergence, **settings
            )
            return jnp.sum(inputs.weights * out.value), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(inputs.student, inputs.w_student)

    return run


def authors_top64(inputs: Inputs):
    """Full logits of both sides, the teacher's top 64, both renormalised over them, half forward and half reverse."""

    def logits(h, w):
        return jax.lax.dot_general(h, w, (((1,), (1,)), ((), ())))  # in the compute dtype, as autocast does

    def loss(h, w):
        top, index = jax.lax.top_k(logits(inputs.teacher, inputs.w_teacher), 64)
        picked = jnp.take_along_axis(logits(h, w), index, axis=-1)
        s, t = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (picked, top))
        value = 0.5 * jnp.sum(jnp.exp(t) * (t - s), -1) + 0.5 * jnp.sum(jnp.exp(s) * (s - t), -1)
        return jnp.sum(inputs.weights * value), value

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(inputs.student, inputs.w_student)


def rows_of(divergence: str) -> dict[str, Callable]:
    return {
        "dense": loss_form(divergence, implementation="reference"),
        "chunked, loss form": loss_form(divergence, implementation="chunked"),
        "chunked, per token": token_form(divergence, implementation="chunked"),
        "chunked, per token, nothing kept": token_form(divergence, implementation="chunked", save_logits_bytes=0),
        "pallas, loss form": loss_form(divergence, implementation="pallas"),
        "top-64 of the teacher": authors_top64,
    }


class Row(NamedTuple):
    """run: () -> None, one call to the end, or None with the reason in `note`."""

    run: Callable | None
    temporaries: int | None = None
    total: float | None = None
    note: str = ""


def jax_row(run: Callable, inputs: Inputs) -> Row:
    try:
        compiled = jax.jit(run).lower(inputs).compile()
    except NotImplementedError as error:
        return Row(None, note=str(error))
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes if memory else None
    if isinstance(inputs.student, jax.ShapeDtypeStruct):
        return Row(None, temporaries)
    try:
        (total, _), _ = jax.block_until_ready(compiled(inputs))
    except jax.errors.JaxRuntimeError as error:
        return Row(None, temporaries, note=str(error).splitlines()[0][:90])
    return Row(lambda: jax.block_until_ready(compiled(inputs)), temporaries, float(total))


# ---- torch and Liger ------------------------------------------------------------------------------


def torch_rows(inputs: Inputs, divergence: str) -> dict[str, Row]:
    """Plain dense torch, and Liger's fused linear JSD (its ends are the two KLs) where there is a CUDA device."""
    try:
        import torch
    except ImportError:
        return {name: Row(None, note="torch cannot be imported") for name in ("torch dense", "liger")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd(0.5)": 0.5}.get(divergence)
    if beta is None:
        reason = f"written for forward_kl, reverse_kl and jsd(0.5), not {divergence}"
        return {name: Row(None, note=reason) for name in ("torch dense", "liger")}
    h, w, teacher, w_teacher, weights, _ = _to_torch(inputs, device)
    h.requires_grad_(), w.requires_grad_()

    def dense():
        with torch.no_grad():
            t = torch.log_softmax((teacher @ w_teacher.T).float(), dim=-1)
        s = torch.log_softmax((h @ w.T).float(), dim=-1)
        return torch.sum(weights * _torch_divergence(torch, s, t, beta))

    rows = {"torch dense": torch_row(torch, dense, (h, w))}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_jsd
    except ImportError:
        return rows | {"liger": Row(None, note="liger_kernel cannot be imported")}
    if device == "cpu":
        return rows | {"liger": Row(None, note="Liger's kernels need a CUDA device")}

    def liger():
        return liger_fused_linear_jsd(h, w, teacher, w_teacher, jsd_beta=beta)  # the mean over tokens

    return rows | {"liger": torch_row(torch, liger, (h, w))}


def _to_torch(inputs: Inputs, device: str):
    """The same values in torch, through the host: only what is timed later happens on the device."""
    import torch

    def convert(x):
        copied = torch.from_numpy(np.array(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x))
        return copied.to(device, torch.bfloat16 if x.dtype == jnp.bfloat16 else copied.dtype)

    return [convert(x) for x in inputs]


def _torch_divergence(torch, s, t, beta: float):
    kl = lambda p, q: torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)  # noqa: E731
    if beta == 0.0:
        return kl(t, s)
    if beta == 1.0:
        return kl(s, t)
    m = torch.logsumexp(torch.stack([s + np.log(1 - beta), t + np.log(beta)]), dim=0)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def torch_row(torch, loss: Callable, leaves) -> Row:
    cuda = leaves[0].is_cuda

    def run():
        for leaf in leaves:
            leaf.grad = None
        total = loss()
        total.backward()
        if cuda:
            torch.cuda.synchronize()
        return total.item()

    try:
        before = 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        total = run()
        gradients = sum(leaf.grad.numel() * leaf.grad.element_size() for leaf in leaves)
        peak = torch.cuda.max_memory_allocated() - before - gradients if cuda else None
        return Row(run, peak, total)
    except RuntimeError as error:  # out of memory among others
        return Row(None, note=str(error).splitlines()[0][:90])


# ---- the tables -----------------------------------------------------------------------------------


def measure(rows: dict[str, Row], repeats: int) -> dict[str, float]:
    """Median seconds of each row that runs; one call of every row before the next repetition."""
    seconds = {name: [] for name, row in rows.items() if row.run}
    for _ in range(repeats):
        for name, times in seconds.items():
            begun = time.perf_counter()
            rows[name].run()
            times.append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(size, rows: dict[str, Row], seconds: dict[str, float], title: str) -> None:
    print(f"\n{' x '.join(f'{n:,}' for n in size)}, {title}")
    print(f"{'':<34}{'ms':>9}{'to dense':>10}{'temporaries MiB':>17}{'loss':>11}")
    for name, row in rows.items():
        time_ms = f"{1e3 * seconds[name]:.0f}" if name in seconds else ""
        ratio = f"{seconds[name] / seconds['dense']:.2f}" if name in seconds and "dense" in seconds else ""
        memory = "" if row.temporaries is None else f"{row.temporaries / 2**20:,.0f}"
        total = "" if row.total is None else f"{row.total:.5f}"
        print(f"{name:<34}{time_ms:>9}{ratio:>10}{memory:>17}{total:>11}  {row.note}".rstrip(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", help="tokens x width x vocabulary, such as 1024x512x8192")
    parser.add_argument("--divergence", default="reverse_kl")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", nargs="+", help="only rows whose name holds one of these words")
    parser.add_argument("--memory", action="store_true", help="compile only, in bfloat16 at the full size")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    wanted = lambda name: not arguments.rows or any(word in name for word in arguments.rows)  # noqa: E731
    sizes = SIZES["cpu" if cpu else "other"]
    if arguments.sizes:
        sizes = [tuple(int(part) for part in size.split("x")) for size in arguments.sizes]
    elif arguments.memory:
        sizes = [FULL_SIZE]
    dtype = arguments.dtype or ("float32" if cpu and not arguments.memory else "bfloat16")
    title = f"{dtype}, {arguments.divergence}, {device.device_kind}"
    for size in sizes:
        inputs = inputs_of(size, jnp.dtype(dtype), abstract=arguments.memory)
        functions = {name: run for name, run in rows_of(arguments.divergence).items() if wanted(name)}
        rows = {name: jax_row(run, inputs) for name, run in functions.items()}
        if not arguments.memory and any(wanted(name) for name in ("torch dense", "liger")):
            rows |= torch_rows(inputs, arguments.divergence)
        seconds = measure(rows, arguments.repeats)
        how = "compiled only" if arguments.memory else f"median of {arguments.repeats}"
        show(size, rows, seconds, f"{title}, {how}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
