"""Health gates: when a run warns and when it stops, as pure functions of its figures."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """Limits; a value of 0 turns a gate off."""

    keep_rate_warn: Annotated[float, "warn when the reviser keeps fewer of the right answers than this"] = 0.8
    keep_rate_stop: Annotated[float, "stop before distillation or a synchronisation below this"] = 0.6
    min_mean_tokens: Annotated[float, "stop when a batch of responses is shorter than this: collapse"] = 0.0
    questions: Annotated[int, "validation questions that the keep rate is measured on"] = 128


def judge_keep_rate(config: HealthConfig, keep_rate: float | None) -> tuple[Literal["ok", "warn", "stop"], str]:
    """The gate's verdict on a reviser, with a line that says why; None: the model has no right answer to keep."""
    if keep_rate is None:
        verdict = "stop" if config.keep_rate_stop else "warn" if config.keep_rate_warn else "ok"
        return verdict, f"no keep rate: none of {config.questions} answers is right (health.questions)"
    if keep_rate < config.keep_rate_stop:
        return "stop", f"keep rate {keep_rate:.3f} is below {config.keep_rate_stop} (health.keep_rate_stop)"
    if keep_rate < config.keep_rate_warn:
        return "warn", f"keep rate {keep_rate:.3f} is below {config.keep_rate_warn} (health.keep_rate_warn)"
    return "ok", f"keep rate {keep_rate:.3f}"


def length_collapse(config: HealthConfig, figures: Mapping[str, float]) -> str | None:
    """A reason to stop when responses have become shorter than any answer can be."""
    tokens = figures.get("mean_tokens")
    if tokens is None or tokens >= config.min_mean_tokens:
        return None
    return f"responses collapsed to {tokens:.1f} tokens (health.min_mean_tokens is {config.min_mean_tokens})"
