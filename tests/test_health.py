"""Health gates: limits, their lines, and gates that are off."""

import pytest

from sdzero_jax.health import HealthConfig, judge_keep_rate, length_collapse


@pytest.mark.parametrize(
    "keep_rate, verdict, line",
    [
        (0.59, "stop", "keep rate 0.590 is below 0.6 (health.keep_rate_stop)"),
        (0.6, "warn", "keep rate 0.600 is below 0.8 (health.keep_rate_warn)"),
        (0.79, "warn", "keep rate 0.790 is below 0.8 (health.keep_rate_warn)"),
        (0.8, "ok", "keep rate 0.800"),
        (None, "stop", "no keep rate: none of 128 answers is right (health.questions)"),
    ],
)
def test_a_reviser_below_the_limits_warns_or_stops(keep_rate, verdict, line):
    assert judge_keep_rate(HealthConfig(), keep_rate) == (verdict, line)


def test_short_responses_are_a_collapse():
    config = HealthConfig(min_mean_tokens=8.0)
    assert length_collapse(config, {"mean_tokens": 8.0}) is None
    assert length_collapse(config, {}) is None
    assert length_collapse(config, {"mean_tokens": 7.9}) == (
        "responses collapsed to 7.9 tokens (health.min_mean_tokens is 8.0)"
    )


def test_a_limit_of_zero_turns_a_gate_off():
    config = HealthConfig(keep_rate_warn=0.0, keep_rate_stop=0.0)
    assert judge_keep_rate(config, 0.0)[0] == judge_keep_rate(config, None)[0] == "ok"
    assert length_collapse(config, {"mean_tokens": 0.0}) is None
