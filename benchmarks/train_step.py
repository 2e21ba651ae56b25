"""One phase-2 train step on the CPU, beside the same step in torch: float32, same weights, same batch.

python benchmarks/train_step.py [--repeats 9] [--quick]     needs torch and transformers (requirements-oracle.txt)

Both sides do a whole step: student forward, teacher forward without gradients, reverse KL over the whole
vocabulary at the response tokens only, backward, clipping by the global norm, AdamW. torch is given its
advantages: no attention mask (the rows are full, so sdpa takes its causal path), hidden states gathered
before the unembedding, the fused AdamW, and the faster of its eager and sdpa attention. Before timing, the
losses and gradient norms of the first steps must agree; then steps are interleaved and medians compared.
Leaves out sampling, transfers of the batch and checkpoints.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

THREADS = 2
LEARNING_RATE, CLIP_NORM, WEIGHT_DECAY = 1e-4, 1.0, 0.01


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of the model and the batch; the teacher reads prompt, response, phrase, response."""

    layers: int = 6
    width: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 1536
    vocab: int = 8192
    rows: int = 4
    prompt: int = 64
    response: int = 256
    phrase: int = 24

    @property
    def student(self) -> int:
        return self.prompt + self.response

    @property
    def teacher(self) -> int:
        return self.prompt + 2 * self.response + self.phrase


QUICK = Size(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=512, prompt=8, response=32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--remat", default="dots", help="of our model: dots, none or full")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between steps: idle threads go to sleep")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"error: {error.name} cannot be imported; wanted requirements-oracle.txt installed", file=sys.stderr)
        return 2
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        ours, weights = jax_steps(size, Path(folder), arguments.remat)
        steps = {"jax": ours}
        for attention in ("sdpa", "eager"):
            steps[f"torch {attention}"] = torch_step(size, weights, attention)
        check_agreement(steps)
        seconds = time_interleaved(steps, arguments.repeats, arguments.pause)
    report(size, seconds, arguments.repeats)
    return 0


def batch_of(size: Size):
    """A batch as `batches.distill_batch` lays it out, every row full."""
    import numpy as np

    rng = np.random.default_rng(0)
    draw = lambda width: rng.integers(0, size.vocab, size=(size.rows, width), dtype=np.int32)  # noqa: E731
    prompt, response, phrase = draw(size.prompt), draw(size.response), draw(size.phrase)
    sides = {
        "gen": np.concatenate([prompt, response], 1),
        "rev": np.concatenate([prompt, response, phrase, response], 1),
    }
    batch = {"target_ids": response}
    batch |= {name: np.ones(response.shape, np.float32) for name in ("mask", "logprobs")}
    batch["reward"] = np.zeros(size.rows, np.float32)
    for side, tokens in sides.items():
        length = tokens.shape[1]
        batch[f"{side}_tokens"] = tokens
        batch[f"{side}_positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
        batch[f"{side}_segment_ids"] = np.ones(tokens.shape, np.int32)
        first = length - size.response - 1
        index = first + np.arange(size.response, dtype=np.int32)
        batch[f"{side}_index"] = np.broadcast_to(index, response.shape).copy()
    return batch


def jax_steps(size: Size, folder: Path, remat: str = "dots"):
    """(function that runs one step of ours and returns (loss, gradient norm), folders of the weights)."""
    import jax

    from sdzero_jax import objectives, sharding
    from sdzero_jax.models import DecoderConfig, LanguageModel, save_pretrained
    from sdzero_jax.optimizer import OptimizerConfig, make_optimizer
    from sdzero_jax.teacher import TeacherConfig
    from sdzero_jax.train_step import init_state, make_train_step

    model = LanguageModel(
        DecoderConfig(
            vocab_size=size.vocab,
            hidden_size=size.width,
            num_layers=size.layers,
            num_heads=size.heads,
            num_kv_heads=size.kv_heads,
            head_dim=size.head_dim,
            intermediate_size=size.intermediate,
            rope_theta=1e6,
            rope_theta_sliding=1e6,
            tie_embeddings=True,
            remat=remat,
        )
    )
    student, reviser = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    weights = {"student": folder / "student", "teacher": folder / "teacher"}
    for name, params in (("student", student), ("teacher", reviser)):
        save_pretrained(weights[name], model, params)
    config = OptimizerConfig(
        learning_rate=LEARNING_RATE,
        warmup_fraction=0.0,
        beta2=0.999,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )
    optimizer, objective = make_optimizer(config, 1000), objectives.SelfDistillation()
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    state = init_state(model, student, optimizer, mesh, teacher_config=TeacherConfig(), reviser_params=reviser)

    def loss_fn(params, teacher, batch):
        return objectives.self_distillation(objective, model, params, teacher, batch)

    step = make_train_step(loss_fn, model, optimizer, mesh, teacher_config=TeacherConfig())
    held, batch = [state], batch_of(size)

    def run():
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(held[0])
        return tuple(float(metrics[name][0]) for name in ("loss", "grad_norm"))

    return run, weights


def torch_step(size: Size, weights, attention: str):
    """The same step in torch and transformers."""
    import torch
    from transformers import Qwen3ForCausalLM

    def load(folder):
        return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)

    student, teacher = load(weights["student"]).train(), load(weights["teacher"]).eval().requires_grad_(False)
    matrices = [p for p in student.parameters() if p.ndim >= 2]
    vectors = [p for p in student.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )
    batch = {name: torch.from_numpy(array) for name, array in batch_of(size).items()}
    first = {side: int(batch[f"{side}_index"][0, 0]) for side in ("gen", "rev")}

    def log_probs(model, side):
        hidden = model.model(input_ids=batch[f"{side}_tokens"], use_cache=False).last_hidden_state
        return torch.log_softmax(model.lm_head(hidden[:, first[side] : first[side] + size.response]), dim=-1)

    def run():
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            t = log_probs(teacher, "rev")
        s = log_probs(student, "gen")
        loss = torch.nn.functional.kl_div(t, s, reduction="sum", log_target=True) / batch["mask"].sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
        optimizer.step()
        return loss.item(), norm.item()

    return run


def check_agreement(steps, count: int = 3) -> None:
    """Losses and gradient norms of the first steps agree to 1e-4, so that all sides do the same work."""
    results = {name: [run() for _ in range(count)] for name, run in steps.items()}
    want = results["jax"]
    for name, got in results.items():
        for mine, theirs in zip(want, got):
            for a, b in zip(mine, theirs):
                if abs(a - b) > 1e-4 * max(1.0, abs(b)):
                    raise AssertionError(f"jax and {name} disagree: {want} against {got}")
    print(f"losses of the first {count} steps: {', '.join(f'{loss:.6f}' for loss, _ in want)}; all sides agree")


def time_interleaved(steps, repeats: int, pause: float) -> dict[str, list[float]]:
    seconds = {name: [] for name in steps}
    for _ in range(repeats):
        for name, run in steps.items():
            time.sleep(pause)
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def report(size: Size, seconds: dict[str, list[float]], repeats: int) -> None:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(value for name, value in medians.items() if name != "jax")
    print(f"{size}; student {size.student} and teacher {size.teacher} tokens; median of {repeats}")
    print(f"{'side':<14}{'median s':>10}{'fastest s':>11}{'slowest s':>11}{'to best torch':>15}")
    for name, times in seconds.items():
        print(f"{name:<14}{medians[name]:>10.3f}{min(times):>11.3f}{max(times):>11.3f}{medians[name] / best:>15.3f}")


if __name__ == "__main__":
    raise SystemExit(main())
