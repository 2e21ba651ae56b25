"""The whole configuration of a run: the modules' own dataclasses, composed.

Only the pipeline, the command line and `configs/` see a `Config`; every module receives the part
it owns. Leaves out parsing and help (`settings`).
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Sequence
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
    microbatches: Annotated[int, "parts that a batch is cut into, to save memory; the result is the same"] = 1
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
    collected: Annotated[
        Literal["auto", "reuse", "skip"],
        "questions that an earlier stage collected from: reuse them, skip them, or auto: of real questions skip them "
        "where enough are left",
    ] = "auto"
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
    for name, value in settings.flatten(config).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_range(name, number)
    for name, folder in {"run_dir": config.run_dir, "base.cache_dir": config.base.cache_dir}.items():
        if not folder:
            raise UserError(f"{name} is empty; wanted a directory")
    if config.base.pretrained and not config.problems.train:
        raise UserError("base.pretrained is set, but not problems.train: an embedded task has a tokenizer of its own")
    if config.phrases not in PHRASES:
        raise UserError(f"unknown phrases={config.phrases!r}{nearest(config.phrases, PHRASES)}")
    if config.srt.batch_size % config.srt.microbatches:
        raise UserError(
            f"srt.microbatches={config.srt.microbatches} does not divide srt.batch_size={config.srt.batch_size}"
        )
    _validate_on_policy("distill", config.distill)
    _validate_on_policy("train", config.train)
    if not find_method(config.distill.method).on_policy:
        raise UserError(f"distill.method={config.distill.method} samples nothing on-policy; set train.method instead")


# Interval -> the settings whose numbers lie in it, by the last part of their names, or the last two where the last
# means different things. Where an interval has no end, numbers are below _END: whole ones fit 32 bits.
_END = 2**31
_ANY = "(-inf, inf)"
_INTERVALS = {
    "[1, inf)": "questions batch_size epochs microbatches passes rounds samples updates responses revisions chunk k "
    "max_length max_prompt max_response max_teacher_tokens max_prompt_tokens max_new_tokens validation_questions every "
    "keep_latest slots block prefill_tokens prompt_multiple pairs capacity patience min_operations max_operations "
    "numbers largest batch_sizes max_chars memory_mb compile_memory_mb processes open_files output_bytes file_bytes "
    "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size sliding_window max_position "
    "yarn_factor yarn_original_length",
    "[0, inf)": "steps sync_steps validate_every expected_tokens keep_best examples rank top_k sampling.temperature "
    "learning_rate weight_decay clip_norm weights token_clip importance_cap guidance clip_high kl_weight workers "
    "memory_mib float_digits min_mean_tokens yarn_attention_factor hosts.count replay.max_length",
    "(0, inf)": "objective.temperature round_scale epsilon alpha rms_norm_eps initializer_range yarn_beta_fast "
    "yarn_beta_slow",
    "(0, 1000]": "time_scale wall_factor memory_scale",
    "(0, 1000000]": "deadline start_timeout time_s compile_s",  # seconds, which timers take
    "(1, inf)": "rope_theta rope_theta_sliding",
    "[0, 1]": "warmup_start final_fraction clip_low decay keep_rate_warn keep_rate_stop copy_after_ok copy_after_wrong "
    "garbled_share misconception_share right_share slip kind_shares",
    "[0, 1)": "warmup_fraction beta1 beta2 min_p held_out",
    "(0, 1]": "top_p ema_rate",
    "(0, 1)": "validation_share",
    "[-1, inf)": "hosts.index mesh.data mesh.fsdp mesh.tensor",  # -1: what is found, or left
    "[0, 4294967295]": "seed",
    "[0, 1000000000000000]": "budget",
}


def _check_range(path: str, value: float) -> None:
    """Refuses a number outside its setting's interval."""
    interval = _interval(path)
    low, high = (float(end) for end in interval[1:-1].split(","))
    if endless := high == inf:
        high = _END
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if above and below:  # NaN is neither
        return
    wanted = f"a number in {interval}"
    if endless:
        least = f"more than {low:g}" if interval[0] == "(" else f"at least {low:g}"
        wanted = f"less than {high}" if value >= high else least
    raise UserError(f"{path} is {value}; wanted {wanted}")


def _interval(path: str) -> str:
    """The interval of a setting that holds a number; any finite one where the table does not have it."""
    parts = path.split(".")
    ends = (".".join(parts[-2:]), parts[-1])
    found = (interval for end in ends for interval, names in _INTERVALS.items() if end in names.split())
    return next(found, _ANY)


def rows_per_step(config: SrtConfig | DistillConfig) -> int:
    """Rows of a batch: a question has several only where it is sampled."""
    sampled = isinstance(config, DistillConfig) and find_method(config.method, config.weights).on_policy
    return config.batch_size * (config.samples if sampled else 1)


def microbatches_that_fit(rows: int, devices: int, most: int) -> int:
    """The largest number of parts of a batch, at most `most`, whose rows divide over the devices as the batch's do.

    A part with fewer rows would be copied to every device, and take more memory than the whole batch.
    """
    own = rows // devices
    return max(parts for parts in range(1, min(own, most) + 1) if own % parts == 0)


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
    if rows_per_step(config) % config.microbatches:
        rows = f"{path}.batch_size x {path}.samples" if method.on_policy else f"{path}.batch_size"
        raise UserError(f"{path}.microbatches={config.microbatches} does not divide {rows} = {rows_per_step(config)}")
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
    policy, taught = method.uses("policy_gradient"), method.uses("self_distillation")
    if policy and config.samples == 1 and (config.advantage.baseline or method.baseline) == "group":
        raise UserError(
            f"{path}.samples=1 makes every advantage of {path}.method={config.method} 0, as its baseline is the "
            f"question's own samples; raise {path}.samples, or set {path}.advantage.baseline=batch"
        )
    if config.advantage.drop_uniform and method.on_policy and not policy:
        raise UserError(
            f"{path}.advantage.drop_uniform=true changes nothing with {path}.method={config.method}, which has no "
            "advantages; set it to false"
        )
    if policy and config.samples == 1 and config.advantage.drop_uniform:
        raise UserError(
            f"{path}.advantage.drop_uniform=true leaves out every question with {path}.samples=1; raise the latter"
        )
    if policy:
        _check_policy_sampling(path, config)
    if policy and config.policy.kl_weight > 0:
        schedule = config.teacher.schedule
        if schedule == "live":
            raise UserError(
                f"{path}.policy.kl_weight={config.policy.kl_weight} with {path}.teacher.schedule=live weighs the KL of "
                f"the student to itself, which is 0; set {path}.teacher.schedule=frozen or ema"
            )
        if schedule.startswith("sync") and not taught:
            raise UserError(
                f"{path}.teacher.schedule={schedule} moves nothing with {path}.method={config.method}: only "
                f"self-distillation synchronises; set {path}.teacher.schedule=frozen or ema for {path}.policy.kl_weight"
            )
    if taught and objective.guidance > 0 and method.context != "revision":
        raise UserError(
            f"{path}.objective.guidance={objective.guidance} changes nothing with {path}.method={config.method}, whose "
            "teacher reads the same under both phrases; set guidance=0"
        )


def _check_policy_sampling(path: str, config: DistillConfig) -> None:
    """Refuses samples of another distribution than the one whose gradient is taken."""
    sampling = config.sampling
    if sampling.temperature == 0.0:
        raise UserError(
            f"{path}.sampling.temperature=0 draws the same sample again and again, and {path}.method={config.method} "
            "learns from their differences; wanted more than 0"
        )
    for name, whole in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if (value := getattr(sampling, name)) != whole:
            raise UserError(
                f"{path}.sampling.{name}={value} draws from a part of the vocabulary, but {path}.method="
                f"{config.method} is a gradient over all of it; set {path}.sampling.{name}={whole:g}"
            )


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
    except (Exception, SystemExit) as error:  # whatever a config file raises is the user's to mend
        raise UserError(f"config {path} cannot be used: {type(error).__name__}: {error}") from None
    if not isinstance(made, wanted):
        raise UserError(f"config {path}: {function}() returned {type(made).__name__}, wanted {wanted.__name__}")
    return made
