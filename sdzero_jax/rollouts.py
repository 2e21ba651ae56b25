"""Questions -> sampled responses -> verdicts: Rollouts, as functions and as an iterator.

Revisions are rollouts whose prompt is the reviser's context x | y | d P_r d. Responses are graded in a
thread while others are decoded, and a response that is to be revised goes on in the slot where it was
sampled. None of that changes a token: those depend on seed, request id and parameters alone. A signal ends
sampling at once (Stopped): what was sampled is dropped, and made again when the run goes on.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import grain
import jax
import jax.numpy as jnp

from sdzero_jax import hosts, signals
from sdzero_jax.batches import reviser_context
from sdzero_jax.errors import Stopped, UserError
from sdzero_jax.examples import Question, Rollout, Verdict
from sdzero_jax.progress import Progress
from sdzero_jax.prompts import ControlPhrases
from sdzero_jax.sampler import Request, Sampler
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
    stated: Callable[[Question, str], str | None] | None = None  # the answer of a response, for majority votes

    def phrase_ids(self, reward: float) -> list[int]:
        """Ids of d P_r d as a piece of its own."""
        return self.tokenizer.encode(self.phrases.text(reward))

    @property
    def longest_phrase(self) -> int:
        """Tokens of the longer d P_r d."""
        return max(len(self.phrase_ids(reward)) for reward in (0.0, 1.0))


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
    stoppable: bool = True,
) -> list[Rollout]:
    """Samples n responses per question and grades them; question-major order.

    `label` makes request ids unique to a stage and step, and with them the random numbers. Not `stoppable`,
    it looks at no signal.
    """
    attempts = _attempts(domain, questions, config, label, n)
    return _in_order(attempts, _sample(domain, sampler, params, attempts, seed, stoppable=stoppable))


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
    jobs = [
        _revision(domain, rollout, config, f"{label}/{index:06d}", n, keep_first_eos)
        for index, rollout in enumerate(rollouts)
    ]
    return _in_order(jobs, _sample(domain, sampler, params, jobs, seed))


def sample_and_revise(
    domain: Domain,
    sampler: Sampler,
    params: Any,
    questions: Sequence[Question],
    config: SamplingConfig,
    *,
    label: str,
    seed: int,
    n: int = 1,
    revisions: int = 1,
    revise: Sequence[float] = (0.0, 1.0),
) -> tuple[list[Rollout], list[list[Rollout]]]:
    """Samples n responses per question and, as they are graded, revisions of those whose reward is in `revise`.

    Returns:
      The responses, question-major, and for each the list of its revisions (empty if it is not revised).
    """
    attempts = _attempts(domain, questions, config, f"{label}/init", n)
    place = {job.request.id: row * n for row, job in enumerate(attempts)}

    def follow(rollout: Rollout, key) -> "_Job | None":
        if key[0] not in place or rollout.verdict.reward not in revise:
            return None
        number = place[key[0]] + rollout.sample_index
        return _revision(domain, rollout, config, f"{label}/revision/{number:06d}", revisions, prefix=key)

    sampled = _sample(domain, sampler, params, attempts, seed, follow)
    drawn = _in_order(attempts, sampled)
    revised: list[list[Rollout]] = [[] for _ in drawn]
    for (name, _), rollout in sorted(sampled.items()):
        if name not in place:
            revised[int(name.removeprefix(f"{label}/revision/").split("/")[0])].append(rollout)
    return drawn, revised


@dataclasses.dataclass(frozen=True)
class _Job:
    """A request and the question that it answers."""

    request: Request
    question: Question


def _attempts(domain: Domain, questions, config: SamplingConfig, label: str, n: int) -> list[_Job]:
    return [
        _job(question, domain.tokenizer.encode_prompt(question.prompt), config, f"{label}/{index:06d}", n)
        for index, question in enumerate(questions)
    ]


def _revision(domain, rollout, config, label: str, n: int, keep_first_eos: bool = False, prefix=None) -> _Job:
    phrase = domain.phrase_ids(rollout.verdict.reward)
    prompt = reviser_context(rollout, phrase, domain.tokenizer.stop_ids, keep_first_eos)
    return _job(rollout.question, prompt, config, label, n, prefix)


def _job(question: Question, prompt: Sequence[int], config: SamplingConfig, label: str, n: int, prefix=None) -> _Job:
    settings = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")}
    return _Job(Request(id=f"{label}/{question.id}", prompt=tuple(prompt), n=n, prefix=prefix, **settings), question)


def _in_order(jobs: Sequence[_Job], sampled) -> list[Rollout]:
    return [sampled[job.request.id, index] for job in jobs for index in range(job.request.n)]


def _sample(domain: Domain, sampler: Sampler, params, jobs: Sequence[_Job], seed: int, follow=None, stoppable=True):
    """Samples and grades all jobs, and those that `follow` makes of a graded rollout: key -> Rollout.

    `follow(rollout, key)` is asked about every rollout and may return one more job. Every host samples and
    grades its share, and gets the rollouts of all; a signal to one of them stops all.
    """
    jobs = hosts.share(jobs)
    asked = {job.request.id: job for job in jobs}
    session = sampler.session(params, seed=seed)
    hold = follow is not None
    session.submit([dataclasses.replace(job.request, hold=hold) for job in jobs])
    rollouts: dict[tuple[str, int], Rollout] = {}
    grading: set[concurrent.futures.Future] = set()
    meter, stop = _Meter(session), None
    with concurrent.futures.ThreadPoolExecutor(1) as grader, meter:
        while session.busy or grading:
            if stoppable and (stop := signals.pending()):
                grader.shutdown(cancel_futures=True)
                break
            if session.busy and (done := session.step()):
                grading.add(grader.submit(_grade, domain, [(asked[c.request_id], c) for c in done]))
            if not session.busy and grading:
                # Not for ever: signals are looked at between.
                concurrent.futures.wait(grading, timeout=1.0, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in [future for future in grading if future.done()]:
                grading.remove(future)
                for key, rollout in future.result():
                    rollouts[key] = rollout
                    job = follow(rollout, key) if hold else None
                    if job:
                        asked[job.request.id] = job
                        session.submit([job.request])
                    session.release(key)
                meter.show(rollouts)
    return _of_all_hosts(rollouts, stop)


def _of_all_hosts(rollouts: dict[tuple[str, int], Rollout], stop: int | None) -> dict[tuple[str, int], Rollout]:
    """The rollouts of all hosts; Stopped when one of them heard of a signal before it was done."""
    if hosts.count() == 1 and not stop:
        return rollouts
    shares = hosts.gather([stop, list(rollouts), [] if stop else rollouts_to_json(list(rollouts.values()))])
    if stop := next((first for first, *_ in shares if first), None):
        raise Stopped(stop, "sampling was cut short")
    return {
        (name, index): rollout
        for _, keys, records in shares
        for (name, index), rollout in zip(keys, rollouts_from_json(records), strict=True)
    }


def _grade(domain: Domain, done) -> list[tuple[tuple[str, int], Rollout]]:
    """(key, Rollout) of finished completions."""
    texts = [domain.tokenizer.decode(completion.ids) for _, completion in done]
    verdicts = domain.verify([job.question for job, _ in done], texts)
    return [
        (
            (completion.request_id, completion.sample_index),
            Rollout(
                question=job.question,
                prompt_ids=tuple(job.request.prompt),
                response_ids=completion.ids,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                verdict=verdict,
                sample_index=completion.sample_index,
                sampling_logprobs=completion.sampling_logprobs,
            ),
        )
        for (job, completion), verdict in zip(done, verdicts)
    ]


class _Meter:
    """A progress bar for sampling that takes long: samples, tokens per second, live slots, length, reward."""

    def __init__(self, session):
        self._session, self._begun = session, time.perf_counter()
        self._bar = Progress("sampling", session.pending, unit="sample", delay=10.0)

    def show(self, rollouts) -> None:
        rewards = [rollout.verdict.reward for rollout in rollouts.values() if rollout.verdict.reward is not None]
        tokens = sum(len(rollout.response_ids) for rollout in rollouts.values())
        self._bar.advance_to(
            len(rollouts),
            len(rollouts) + self._session.pending,
            {
                "tok/s": self._session.statistics.decoded / (time.perf_counter() - self._begun),
                "live": self._session.live,
                "mean_tokens": tokens / max(len(rollouts), 1),
                "reward": sum(rewards) / max(len(rewards), 1),
            },
        )

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()


def rollouts_to_json(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Rollouts as plain values, for the state of an iterator."""
    return [dataclasses.asdict(rollout) for rollout in rollouts]


_TUPLES = ("prompt_ids", "response_ids", "logprobs", "sampling_logprobs")


def rollouts_from_json(records: Sequence[dict[str, Any]]) -> list[Rollout]:
    """What `rollouts_to_json` wrote."""
    return [
        Rollout(
            **record
            | {"question": Question(**record["question"] | {"gold": tuple(record["question"]["gold"])})}
            | {name: tuple(record[name]) for name in _TUPLES}
            | {"verdict": Verdict(**record["verdict"])}
        )
        for record in records
    ]


class RolloutIterator:
    """Rollouts, a batch of questions at a time; the parameters come with every call.

    Strictly on-policy unless `prefetch`: then a batch is sampled in a thread while the one before it is
    trained on, with a copy of the parameters of that time, and is one step old when it is used.

    `get_state` / `set_state` are exact: the position in the question order, the number of batches drawn,
    which keys the random numbers, and with prefetch the batch that was drawn ahead.
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
        prefetch: bool = False,
    ):
        self._questions, self._domain, self._sampler, self._config = questions, domain, sampler, config
        self._label, self._seed, self._n = label, seed, n
        self._drawn = 0  # batches whose questions have been drawn
        self._thread = concurrent.futures.ThreadPoolExecutor(1) if prefetch else None
        self._ahead: tuple[Any, concurrent.futures.Future] | None = None  # state before its questions, rollouts

    def next(self, params: Any) -> list[Rollout]:
        """The next batch of questions, graded; sampled from `params`, with prefetch from those of the call before."""
        if self._thread is None:
            return self._sample_next(params)
        rollouts = self._ahead[1].result() if self._ahead else self._sample_next(params)
        before = self._questions.get_state()
        try:
            drawn = self._draw()
        except StopIteration:
            self._ahead = None
            return rollouts
        copied = jax.tree.map(jnp.copy, params)  # the train step gives up the originals
        # What is sampled ahead belongs to this step's checkpoint: a signal waits for it.
        self._ahead = before, self._thread.submit(self._sample, copied, *drawn, stoppable=False)
        return rollouts

    def _sample_next(self, params) -> list[Rollout]:
        before = self._questions.get_state()
        try:
            return self._sample(params, *self._draw())
        except Stopped:
            self._questions.set_state(before)
            self._drawn -= 1
            raise

    def _draw(self) -> tuple[Sequence[Question], str]:
        questions = next(self._questions)
        self._drawn += 1
        return questions, f"{self._label}/{self._drawn - 1:06d}"

    def _sample(self, params, questions, label: str, stoppable: bool = True) -> list[Rollout]:
        return sample_responses(
            self._domain, self._sampler, params, questions, self._config,
            label=label, seed=self._seed, n=self._n, stoppable=stoppable,
        )  # fmt: skip

    def get_state(self) -> dict[str, Any]:
        if self._ahead is None:
            return {"questions": self._questions.get_state(), "drawn": self._drawn, "ahead": None}
        before, rollouts = self._ahead
        ahead = rollouts_to_json(rollouts.result())
        return {"questions": before, "drawn": self._drawn - 1, "ahead": ahead}

    def set_state(self, state: dict[str, Any]) -> None:
        self._questions.set_state(state["questions"])
        self._drawn = state["drawn"]
        self._ahead = None
        if state.get("ahead") is None:
            return
        before = self._questions.get_state()
        self._draw()
        rollouts = rollouts_from_json(state["ahead"])
        self._ahead = before, concurrent.futures.Future()
        self._ahead[1].set_result(rollouts)
