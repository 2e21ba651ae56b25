"""The whole configuration of a run: the modules' own dataclasses, composed.

Only the pipeline, the command line and `configs/` see a `Config`; every module receives the part
it owns. Leaves out parsing and help (`settings`).
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence
from math import inf
from typing import Annotated, Literal, TypeVar

from sdzero_jax import presets, settings
from sdzero_jax.batches import DistillLayout
from sdzero_jax.checkpoint import CheckpointConfig
from sdzero_jax.collect import CollectConfig
from sdzero_jax.errors import UserError, nearest
from sdzero_jax.evaluate import EvaluateConfig
from sdzero_jax.health import HealthConfig
from sdzero_jax.hosts import HostsConfig
from sdzero_jax.losses import get_divergence
from sdzero_jax.methods import SrtData, find_method
from sdzero_jax.models import DecoderConfig
from sdzero_jax.models.lora import LoraConfig
from sdzero_jax.objectives import CrossEntropy, PolicyGradient, SelfDistillation
from sdzero_jax.optimizer import OptimizerConfig
from sdzero_jax.problems import ProblemsConfig
from sdzero_jax.prompts import PHRASES
from sdzero_jax.rollouts import SamplingConfig
from sdzero_jax.sampler import SamplerConfig
from sdzero_jax.sharding import MeshConfig
from sdzero_jax.sources import AdvantageConfig, ReplayConfig
from sdzero_jax.tasks import TaskConfig
from sdzero_jax.teacher import TeacherConfig
from sdzero_jax.train_step import NO_LORA

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The model to start from: pretrained, or trained here from random weights.

    An embedded task brings its corpus; with real questions the model is trained on reference solutions.
    """

    pretrained: Annotated[str, "Hugging Face folder, gs:// path or hub id to start from; empty: train one"] = ""
    steps: Annotated[int, "training steps; 0 leaves the weights random"] = 1000
    batch_size: Annotated[int, "reference solutions per step"] = 32
    max_length: Annotated[int, "longest question with solution, in tokens; longer ones are dropped"] = 512
    questions: Annotated[int, "training questions whose solutions are read"] = 1024
    cache_dir: Annotated[str, "trained base models are kept here, by a hash of their settings"] = "runs/.cache"
    objective: CrossEntropy = CrossEntropy()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_fraction=0.05)
    checkpoint: CheckpointConfig = CheckpointConfig(every=250, keep_best=0)


@dataclasses.dataclass(frozen=True)
class SrtConfig:
    """Phase 1, training: self-revision."""

    epochs: Annotated[int, "passes over the (balanced) traces"] = 4
    batch_size: Annotated[int, "traces per step"] = 64
    data: SrtData = SrtData()
    objective: CrossEntropy = CrossEntropy()
    lora: LoraConfig = NO_LORA
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_fraction=0.05)
    checkpoint: CheckpointConfig = CheckpointConfig(every=25, keep_best=0)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """On-policy training; by default phase 2, self-distillation from the reviser."""

    method: Annotated[str, "a name of sdzero_jax.methods.METHODS"] = "sdzero"
    weights: Annotated[tuple[float, ...], "weights of the method's terms in place of its own"] = ()
    questions: Annotated[int, "training questions"] = 1024
    passes: Annotated[int, "rollouts per question and round, one at a time"] = 2
    rounds: Annotated[int, "rounds; the teacher becomes the student between two of them"] = 1
    round_scale: Annotated[float, "factor on the learning rate from one round to the next"] = 0.5
    batch_size: Annotated[int, "questions per step"] = 16
    samples: Annotated[int, "responses per question of a step"] = 1
    updates: Annotated[int, "steps with the same responses"] = 1
    microbatches: Annotated[int, "parts that a batch is cut into, to save memory; the result is the same"] = 1
    budget: Annotated[int, "sampled tokens after which a round ends; 0: passes over the questions decide"] = 0
    expected_tokens: Annotated[float, "mean response length, from which a budget plans its number of steps"] = 0.0
    prefetch: Annotated[bool, "sample a batch while the one before is trained on, from parameters one step old"] = False
    validate_every: Annotated[int, "steps between accuracy checks on validation questions; 0 is never"] = 32
    validation_questions: Annotated[int, "validation questions of such a check"] = 128
    sampling: SamplingConfig = SamplingConfig()
    layout: DistillLayout = DistillLayout()
    objective: SelfDistillation = SelfDistillation()
    policy: PolicyGradient = PolicyGradient()
    cross_entropy: Annotated[CrossEntropy, "of replayed revisions, and of SFT and RFT"] = CrossEntropy()
    advantage: AdvantageConfig = AdvantageConfig()
    replay: ReplayConfig = ReplayConfig()
    teacher: TeacherConfig = TeacherConfig()
    lora: LoraConfig = NO_LORA
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=32)


@dataclasses.dataclass(frozen=True)
class TrainConfig(DistillConfig):
    """Any method alone, from any of the pipeline's models: the stage `train`."""

    method: Annotated[str, "a name of sdzero_jax.methods.METHODS"] = "grpo"
    start: Annotated[Literal["base", "srt", "distill"], "stage whose model is trained"] = "base"
    samples: Annotated[int, "responses per question; of RFT, over its whole sampling"] = 4
    epochs: Annotated[int, "SFT and RFT: passes over the sequences"] = 4
    max_length: Annotated[int, "SFT and RFT: longest question with response; longer ones are dropped"] = 256
    chunk: Annotated[int, "RFT: questions sampled between two writes"] = 256


@dataclasses.dataclass(frozen=True)
class LocalisationConfig:
    """Where the reviser puts its divergence, measured before distillation."""

    questions: Annotated[int, "validation questions, one response each"] = 256
    examples: Annotated[int, "responses shown token by token in the report"] = 12


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment, from the base model to the report."""

    model: DecoderConfig
    name: Annotated[str, "what the report calls the run"] = "demo"
    run_dir: Annotated[str, "everything the run writes, but for cached base models"] = "runs/demo"
    seed: Annotated[int, "root of all random numbers but the task's"] = 0
    phrases: Annotated[str, "preset of control phrases"] = "embedded"
    task: TaskConfig = TaskConfig()
    problems: ProblemsConfig = ProblemsConfig()
    hosts: HostsConfig = HostsConfig()
    mesh: MeshConfig = MeshConfig()
    sampler: SamplerConfig = SamplerConfig()
    base: BaseConfig = BaseConfig()
    collect: CollectConfig = CollectConfig()
    srt: SrtConfig = SrtConfig()
    distill: DistillConfig = DistillConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    localisation: LocalisationConfig = LocalisationConfig()
    health: HealthConfig = HealthConfig()


def validate(config: Config) -> None:
    """Refuses settings that cannot work together, before anything is computed or written."""
    settings.check(config)
    positive = {
        "base.batch_size": config.base.batch_size,
        "base.questions": config.base.questions,
        "srt.epochs": config.srt.epochs,
        "srt.batch_size": config.srt.batch_size,
        **{
            f"{stage}.{name}": getattr(getattr(config, stage), name)
            for stage in ("distill", "train")
            for name in ("questions", "passes", "rounds", "batch_size", "samples", "updates", "microbatches")
        },
        "train.epochs": config.train.epochs,
        "train.chunk": config.train.chunk,
        "collect.questions": config.collect.questions,
        "collect.responses": config.collect.responses,
        "collect.revisions": config.collect.revisions,
        "collect.chunk": config.collect.chunk,
        "evaluate.questions": config.evaluate.questions,
        "evaluate.k": config.evaluate.k,
        "evaluate.chunk": config.evaluate.chunk,
        "sampler.slots": config.sampler.slots,
        "sampler.block": config.sampler.block,
        "sampler.prefill_tokens": config.sampler.prefill_tokens,
        "sampler.prompt_multiple": config.sampler.prompt_multiple,
        "health.questions": config.health.questions,
        **{
            f"{stage}.checkpoint.{name}": getattr(getattr(config, stage).checkpoint, name)
            for stage in ("base", "srt", "distill", "train")
            for name in ("every", "keep_latest")
        },
    }
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"{name} is {value}; wanted at least 1")
    for name, low, high, value in _ranges(config):
        if not low <= value <= high:  # refuses NaN too
            raise UserError(f"{name} is {value}; wanted {low} or more" + (f", up to {high}" if high < inf else ""))
    for name, folder in {"run_dir": config.run_dir, "base.cache_dir": config.base.cache_dir}.items():
        if not folder:
            raise UserError(f"{name} is empty; wanted a directory")
    if config.base.steps < 0:
        raise UserError(f"base.steps is {config.base.steps}; wanted 0 (random weights) or more")
    if config.base.pretrained and not config.problems.train:
        raise UserError("base.pretrained is set, but not problems.train: an embedded task has a tokenizer of its own")
    if not 0 < config.problems.validation_share < 1:
        raise UserError(f"problems.validation_share is {config.problems.validation_share}; wanted between 0 and 1")
    if config.phrases not in PHRASES:
        raise UserError(f"unknown phrases={config.phrases!r}{nearest(config.phrases, PHRASES)}")
    _validate_on_policy("distill", config.distill)
    _validate_on_policy("train", config.train)
    if not find_method(config.distill.method).on_policy:
        raise UserError(f"distill.method={config.distill.method} samples nothing on-policy; set train.method instead")


def _ranges(config: Config) -> Iterator[tuple[str, float, float, float]]:
    """(setting, smallest, largest, value) of numbers that may not be any."""
    bounds = {
        "learning_rate": (0.0, inf), "epsilon": (0.0, inf), "weight_decay": (0.0, inf), "clip_norm": (0.0, inf),
        "warmup_fraction": (0.0, 1.0), "warmup_start": (0.0, 1.0), "final_fraction": (0.0, 1.0),
        "beta1": (0.0, 1.0), "beta2": (0.0, 1.0),
    }  # fmt: skip
    for stage in ("base", "srt", "distill", "train"):
        for name, (low, high) in bounds.items():
            yield f"{stage}.optimizer.{name}", low, high, getattr(getattr(config, stage).optimizer, name)
    for name, owner in {"seed": config, "task.seed": config.task, "problems.seed": config.problems}.items():
        yield name, 0, 2**32 - 1, owner.seed
    health = config.health
    yield "health.keep_rate_warn", 0.0, 1.0, health.keep_rate_warn
    yield "health.keep_rate_stop", 0.0, 1.0, health.keep_rate_stop
    yield "health.min_mean_tokens", 0.0, inf, health.min_mean_tokens


def _validate_on_policy(path: str, config: DistillConfig) -> None:
    method = find_method(config.method, config.weights)
    if config.sampling.max_new_tokens > config.layout.max_response and method.on_policy:
        raise UserError(
            f"{path}.sampling.max_new_tokens={config.sampling.max_new_tokens} exceeds "
            f"{path}.layout.max_response={config.layout.max_response}; raise the latter"
        )
    objective = config.objective
    if objective.importance_cap and objective.temperature != 1.0:
        raise UserError(
            f"{path}.objective.importance_cap={objective.importance_cap} compares log-probs at temperature 1, "
            f"but {path}.objective.temperature={objective.temperature}; set one of them back"
        )
    if config.batch_size * config.samples % config.microbatches:
        raise UserError(
            f"{path}.microbatches={config.microbatches} does not divide {path}.batch_size x {path}.samples = "
            f"{config.batch_size * config.samples}"
        )
    if method.uses("replay") and config.replay.pairs % config.microbatches:
        raise UserError(
            f"{path}.microbatches={config.microbatches} does not divide {path}.replay.pairs={config.replay.pairs}"
        )
    if config.budget and config.expected_tokens <= 0:
        raise UserError(f"{path}.budget={config.budget} needs {path}.expected_tokens > 0, to plan the number of steps")
    config.teacher.validate()
    if config.teacher.schedule == "sync_on_plateau" and not config.validate_every:
        raise UserError(f"{path}.teacher.schedule=sync_on_plateau needs {path}.validate_every >= 1")
    get_divergence(objective.divergence)


def override(config: Config, assignments: Sequence[str]) -> Config:
    """The config with every "a.b=c" applied in order; "preset=NAME" stands for that preset's settings."""
    return settings.override(config, presets.expand(assignments))


def load_config(path: str) -> Config:
    """The Config of a file with `get_config()`, by its path."""
    return load_from(path, "get_config", Config)


def load_from(path: str, function: str, wanted: type[T]) -> T:
    """What `function` of the Python file at `path` returns; UserError for whatever is wrong with the file."""
    file = pathlib.Path(path)
    if not file.is_file():
        known = [str(p) for p in sorted(pathlib.Path("configs").glob("*.py")) if p.name != "__init__.py"]
        raise UserError(f"no config file {path!r}{nearest(path, known)}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config is a .py file with {function}()")
    module = importlib.util.module_from_spec(spec)
    commands = {"get_config": f"python run.py {path}", "get_comparison": f"python run.py compare {path}"}
    try:
        spec.loader.exec_module(module)
        for other, command in commands.items():
            if not hasattr(module, function) and hasattr(module, other):
                raise UserError(f"{path} has no {function}() but {other}(): {command}")
        made = getattr(module, function)()
    except UserError:
        raise
    except Exception as error:  # whatever a config file raises is the user's to mend
        raise UserError(f"config {path} cannot be used: {type(error).__name__}: {error}") from None
    if not isinstance(made, wanted):
        raise UserError(f"config {path}: {function}() returned {type(made).__name__}, wanted {wanted.__name__}")
    return made
