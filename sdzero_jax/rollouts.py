"""Questions -> sampled responses -> verdicts: Rollouts, as functions and as an iterator.

Revisions are rollouts whose prompt is the reviser's context x | y | d P_r d.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import grain

from sdzero_jax.batches import reviser_context
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Rollout, Verdict
from sdzero_jax.prompts import ControlPhrases
from sdzero_jax.sampler import Completion, Request, Sampler
from sdzero_jax.tokenizer import Tokenizer

Verify = Callable[[Sequence[Question], Sequence[str]], list[Verdict]]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn."""

    temperature: Annotated[float, "0 is greedy"] = 1.0
    top_p: Annotated[float, "smallest set of tokens that reaches this probability; 1 keeps all"] = 1.0
    top_k: Annotated[int, "most likely tokens kept; 0 keeps all"] = 0
    min_p: Annotated[float, "tokens below this share of the largest probability go; 0 keeps all"] = 0.0
    max_new_tokens: Annotated[int, "longest response, in tokens"] = 64


def check_sampling(config: SamplingConfig, path: str) -> None:
    """Refuses impossible sampling settings; `path` is where they stand in the config."""
    ranges = {
        "temperature": (config.temperature >= 0, ">= 0"),
        "top_p": (0 < config.top_p <= 1, "in (0, 1]"),
        "top_k": (config.top_k >= 0, ">= 0"),
        "min_p": (0 <= config.min_p < 1, "in [0, 1)"),
        "max_new_tokens": (config.max_new_tokens >= 1, ">= 1"),
    }
    for name, (good, wanted) in ranges.items():
        if not good:
            raise UserError(f"{path}.{name} is {getattr(config, name)}; wanted {wanted}")


@dataclasses.dataclass(frozen=True)
class Domain:
    """What turns questions into ids and responses into verdicts, bound together."""

    tokenizer: Tokenizer
    phrases: ControlPhrases
    verify: Verify

    def phrase_ids(self, reward: float) -> list[int]:
        """Ids of d P_r d as a piece of its own."""
        return self.tokenizer.encode(self.phrases.text(reward))


def sample_responses(
    domain: Domain,
    sampler: Sampler,
    params: Any,
    questions: Sequence[Question],
    config: SamplingConfig,
    *,
    label: str,
    seed: int,
    n: int = 1,
) -> list[Rollout]:
    """Samples n responses per question and grades them; question-major order.

    `label` makes request ids unique to a stage and step, and with them the random numbers.
    """
    prompts = [tuple(domain.tokenizer.encode_prompt(question.prompt)) for question in questions]
    return _sample(domain, sampler, params, questions, prompts, config, label, seed, n)


def sample_revisions(
    domain: Domain,
    sampler: Sampler,
    params: Any,
    rollouts: Sequence[Rollout],
    config: SamplingConfig,
    *,
    label: str,
    seed: int,
    n: int = 1,
    keep_first_eos: bool = False,
) -> list[Rollout]:
    """Samples n revisions of each rollout under the control phrase of its reward, and grades them.

    Rollouts without a verdict have no phrase; the caller leaves them out.
    """
    questions = [rollout.question for rollout in rollouts]
    prompts = [
        reviser_context(rollout, domain.phrase_ids(rollout.verdict.reward), domain.tokenizer.stop_ids, keep_first_eos)
        for rollout in rollouts
    ]
    return _sample(domain, sampler, params, questions, prompts, config, label, seed, n)


def _sample(domain, sampler, params, questions, prompts, config, label, seed, n) -> list[Rollout]:
    requests = [
        Request(
            id=f"{label}/{index:06d}/{question.id}",
            prompt=prompt,
            n=n,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
        )
        for index, (question, prompt) in enumerate(zip(questions, prompts))
    ]
    completions: dict[tuple[str, int], Completion] = {
        (c.request_id, c.sample_index): c for c in sampler.generate(params, requests, seed=seed)
    }
    order = [(row, index) for row in range(len(requests)) for index in range(n)]
    drawn = [completions[requests[row].id, index] for row, index in order]
    texts = [domain.tokenizer.decode(completion.ids) for completion in drawn]
    verdicts = domain.verify([questions[row] for row, _ in order], texts)
    return [
        Rollout(
            question=questions[row],
            prompt_ids=tuple(prompts[row]),
            response_ids=completion.ids,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            verdict=verdict,
            sample_index=index,
        )
        for (row, index), completion, verdict in zip(order, drawn, verdicts)
    ]


class RolloutIterator:
    """On-policy rollouts, a batch of questions at a time; the parameters come with every call.

    `get_state` / `set_state` are exact: the position in the question order and the number of
    batches drawn, which keys the random numbers.
    """

    def __init__(
        self,
        questions: grain.DatasetIterator,
        domain: Domain,
        sampler: Sampler,
        config: SamplingConfig,
        *,
        label: str,
        seed: int,
        n: int = 1,
    ):
        self._questions, self._domain, self._sampler, self._config = questions, domain, sampler, config
        self._label, self._seed, self._n = label, seed, n
        self._drawn = 0

    def next(self, params: Any) -> list[Rollout]:
        """The next batch of questions, sampled from `params` and graded."""
        questions = next(self._questions)
        rollouts = sample_responses(
            self._domain, self._sampler, params, questions, self._config,
            label=f"{self._label}/{self._drawn:06d}", seed=self._seed, n=self._n,
        )  # fmt: skip
        self._drawn += 1
        return rollouts

    def get_state(self) -> dict[str, Any]:
        return {"questions": self._questions.get_state(), "drawn": self._drawn}

    def set_state(self, state: dict[str, Any]) -> None:
        self._questions.set_state(state["questions"])
        self._drawn = state["drawn"]
