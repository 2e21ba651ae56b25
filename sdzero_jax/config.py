"""The whole configuration of a run: the modules' own dataclasses, composed.

Only the pipeline, the command line and `configs/` see a `Config`; every module receives the part
it owns. Leaves out parsing and help (`settings`).
"""

import dataclasses
import importlib.util
import pathlib
from typing import Annotated

from sdzero_jax import settings
from sdzero_jax.batches import DistillLayout
from sdzero_jax.checkpoint import CheckpointConfig
from sdzero_jax.collect import CollectConfig
from sdzero_jax.errors import UserError, nearest
from sdzero_jax.evaluate import EvaluateConfig
from sdzero_jax.health import HealthConfig
from sdzero_jax.losses import get_divergence
from sdzero_jax.methods import SrtData
from sdzero_jax.models import DecoderConfig
from sdzero_jax.objectives import CrossEntropy, SelfDistillation
from sdzero_jax.optimizer import OptimizerConfig
from sdzero_jax.problems import ProblemsConfig
from sdzero_jax.prompts import PHRASES
from sdzero_jax.rollouts import SamplingConfig
from sdzero_jax.sampler import SamplerConfig
from sdzero_jax.sharding import MeshConfig
from sdzero_jax.tasks import TaskConfig
from sdzero_jax.teacher import TeacherConfig


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
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_fraction=0.05)
    checkpoint: CheckpointConfig = CheckpointConfig(every=25, keep_best=0)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Phase 2: on-policy self-distillation."""

    questions: Annotated[int, "training questions"] = 1024
    passes: Annotated[int, "rollouts per question and round, one at a time"] = 2
    rounds: Annotated[int, "rounds; the teacher becomes the student between two of them"] = 1
    round_scale: Annotated[float, "factor on the learning rate from one round to the next"] = 0.5
    batch_size: Annotated[int, "rollouts per step"] = 16
    prefetch: Annotated[bool, "sample a batch while the one before is trained on, from parameters one step old"] = False
    validate_every: Annotated[int, "steps between accuracy checks on validation questions; 0 is never"] = 32
    validation_questions: Annotated[int, "validation questions of such a check"] = 128
    sampling: SamplingConfig = SamplingConfig()
    layout: DistillLayout = DistillLayout()
    objective: SelfDistillation = SelfDistillation()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=32)


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
    mesh: MeshConfig = MeshConfig()
    sampler: SamplerConfig = SamplerConfig()
    base: BaseConfig = BaseConfig()
    collect: CollectConfig = CollectConfig()
    srt: SrtConfig = SrtConfig()
    distill: DistillConfig = DistillConfig()
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
        "distill.questions": config.distill.questions,
        "distill.passes": config.distill.passes,
        "distill.rounds": config.distill.rounds,
        "distill.batch_size": config.distill.batch_size,
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
            for stage in ("base", "srt", "distill")
            for name in ("every", "keep_latest")
        },
    }
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"{name} is {value}; wanted at least 1")
    if config.base.steps < 0:
        raise UserError(f"base.steps is {config.base.steps}; wanted 0 (random weights) or more")
    if config.base.pretrained and not config.problems.train:
        raise UserError("base.pretrained is set, but not problems.train: an embedded task has a tokenizer of its own")
    if not 0 < config.problems.validation_share < 1:
        raise UserError(f"problems.validation_share is {config.problems.validation_share}; wanted between 0 and 1")
    if config.phrases not in PHRASES:
        raise UserError(f"unknown phrases={config.phrases!r}{nearest(config.phrases, PHRASES)}")
    if config.distill.sampling.max_new_tokens > config.distill.layout.max_response:
        raise UserError(
            f"distill.sampling.max_new_tokens={config.distill.sampling.max_new_tokens} exceeds "
            f"distill.layout.max_response={config.distill.layout.max_response}; raise the latter"
        )
    objective = config.distill.objective
    if objective.importance_cap and objective.temperature != 1.0:
        raise UserError(
            f"distill.objective.importance_cap={objective.importance_cap} compares log-probs at temperature 1, "
            f"but distill.objective.temperature={objective.temperature}; set one of them back"
        )
    config.distill.teacher.validate()
    get_divergence(config.distill.objective.divergence)


def load_config(path: str) -> Config:
    """The Config of a file with `get_config()`, by its path."""
    file = pathlib.Path(path)
    if not file.is_file():
        known = [str(p) for p in sorted(pathlib.Path("configs").glob("*.py")) if p.name != "__init__.py"]
        raise UserError(f"no config file {path!r}{nearest(path, known)}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config is a .py file with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a config file raises is the user's to mend
        raise UserError(f"config {path} cannot be used: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise UserError(f"config {path}: get_config() returned {type(config).__name__}, wanted Config")
    return config
