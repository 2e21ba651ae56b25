"""A run directory: its config, the parts that stages share, stage results and their hashes, forks.

A stage ends with `done.json`, which records a hash of everything its result depends on; the base
model lies in a cache that runs share. What stages do is in `pipeline`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
from typing import Any

import jax

from sdzero_jax import hosts, settings, sharding, stores
from sdzero_jax.checkpoint import load_params
from sdzero_jax.config import BaseConfig, Config, DistillConfig, SrtConfig, microbatches_that_fit, rows_per_step
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question
from sdzero_jax.files import check_writable, read_json, write_json_atomic
from sdzero_jax.locks import exclusive
from sdzero_jax.methods import find_method
from sdzero_jax.models import RUNTIME_FIELDS, LanguageModel, load_pretrained, read_model
from sdzero_jax.problems import Problems, ProblemsConfig, RealProblems, TaskProblems, open_tokenizer
from sdzero_jax.progress import say
from sdzero_jax.prompts import control_phrases
from sdzero_jax.rollouts import Domain, check_sampling
from sdzero_jax.sampler import Sampler
from sdzero_jax.tasks import Task, make_task

# Settings that say where files lie and where a run runs: they may change from one call to the next.
PLACES = ("run_dir", "base.cache_dir", "problems.data_dir", "hosts.coordinator", "hosts.count", "hosts.index")

# The stage that each one needs, and with it everything before.
BEFORE: dict[str, str | None] = {
    "base": None,
    "collect": "base",
    "srt": "collect",
    "distill": "srt",
    "train": "base",  # or what train.start says
    "evaluate": "distill",
    "localise": "srt",
}

# Section of a training loop -> the objective or batch without which no method reads it.
READ_WITH = {
    "objective": "self_distillation",
    "policy": "policy_gradient",
    "cross_entropy": "cross_entropy",
    "replay": "replay",
}


class Run:
    """A run directory with its config, and what stages share; parts are built when first used."""

    def __init__(self, config: Config, shared: pathlib.Path | None = None):
        """With `shared`, stages lie there under their hashes, so that runs share those that are equal."""
        self.config, self.shared = config, shared
        self.directory, self._cache = stores.local(config.run_dir), stores.local(config.base.cache_dir)
        self._locks = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        if not self.shared:
            self.lock(self.directory)
            write_json_atomic(self.directory / "config.json", self.record())
            stores.push(self.directory)
        _cache_programs(self.config.base.cache_dir)
        return self

    def __exit__(self, *exception) -> None:
        self._locks.close()

    def record(self) -> dict[str, Any]:
        """The config as a run directory keeps it."""
        return json.loads(json.dumps(dataclasses.asdict(self.config)))

    def lock(self, directory: pathlib.Path) -> None:
        """Keeps other processes out of a directory until this one ends, however it ends."""
        self._locks.enter_context(exclusive(directory))

    @functools.cached_property
    def mesh(self):
        return sharding.make_mesh(self.config.mesh)

    @functools.cached_property
    def task(self) -> Task:
        """The embedded task; only for runs without real questions."""
        return make_task(self.config.task)

    @functools.cached_property
    def problems(self) -> Problems:
        """The run's questions and verdicts; the processes that grade end with the run."""
        config = self.config
        if not config.problems.train:
            return TaskProblems(self.task)
        problems = RealProblems(config.problems, open_tokenizer(config.problems, config.base.pretrained))
        self._locks.callback(problems.close)
        return problems

    @functools.cached_property
    def model(self) -> LanguageModel:
        rows, size = self.config.model.vocab_size, self.problems.tokenizer.vocab_size
        real = bool(self.config.problems.train)  # a real model's table may be padded beyond its tokenizer's ids
        if rows < size or (rows > size and not real):
            raise UserError(
                f"model.vocab_size={rows}, but the tokenizer of {self.problems.name} has {size} tokens; "
                f"set model.vocab_size={size}"
            )
        return LanguageModel(self.config.model)

    @functools.cached_property
    def domain(self) -> Domain:
        return Domain(
            tokenizer=self.problems.tokenizer,
            phrases=control_phrases(self.config.phrases),
            verify=self.problems.verify,
            stated=self.problems.stated,
        )

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """What a reviser was trained to read; recorded with parameters, compared before distillation."""
        return {
            "phrases": dataclasses.asdict(self.domain.phrases),
            "tokenizer": self.domain.tokenizer.fingerprint(),
        }

    def sampler(self, slots: int | None = None) -> Sampler:
        """The run's sampler, with room for its longest context in each of `slots`, shared by all hosts."""
        config = self.config.sampler
        slots = -(-(slots or config.slots) // hosts.count())
        mesh = sharding.host_mesh(self.mesh)
        if config.weights == "tensor":
            mesh = sharding.rollout_mesh(mesh, self.config.model.num_kv_heads)
        parts = sharding.batch_devices(mesh)
        return Sampler(
            self.model,
            slots=-(-slots // parts) * parts,
            max_len=max(self.contexts.values()),
            stop_ids=self.domain.tokenizer.stop_ids,
            block=config.block,
            prefill_tokens=config.prefill_tokens,
            prompt_multiple=config.prompt_multiple,
            cache_dtype=config.cache_dtype or None,
            mesh=mesh,
        )

    def training_questions(self, stage: str) -> tuple[list[Question], int]:
        """Questions of an on-policy stage, or of its samples, and how many of them `collect` had before it."""
        config = getattr(self.config, stage)
        collected = self.config.collect.questions if "collect" in self.chain(stage) else 0
        if config.collected == "skip" or (config.collected == "auto" and self.config.problems.train):
            try:
                return self.problems.questions("train", collected + config.questions)[collected:], 0
            except UserError:  # fewer than both need
                if config.collected == "skip":
                    raise
        return self.problems.questions("train", config.questions), min(collected, config.questions)

    @property
    def contexts(self) -> dict[str, int]:
        """Stage -> tokens of the longest context that it samples: prompt, response, phrase and revision."""
        contexts = {}
        for stage in ("collect", "distill", "train", "evaluate"):
            new = getattr(self.config, stage).sampling.max_new_tokens
            revision = 0 if stage in ("distill", "train") else self.domain.longest_phrase + new
            contexts[stage] = self.problems.max_prompt_tokens + new + revision
        return contexts

    def abstract_params(self):
        """Shapes and shardings of the parameters, to restore into."""
        shapes = self.model.param_shapes()
        shardings = sharding.shardings_for(self.mesh, self.model.param_axes(), shapes)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
        )

    def key(self, stage: str) -> str:
        """Hash of everything a stage's result depends on."""
        config = self.config
        if stage == "base":
            base = dataclasses.replace(config.base, cache_dir="")  # where it lies does not change it
            asked = self._questions() or (config.task,)
            # A pretrained one depends on no questions; the seed stays, for the stages that build on this hash.
            return settings.digest(config.model, *(() if base.pretrained else asked), base, config.seed)
        own = {
            "collect": (config.collect, config.phrases),
            "srt": (config.srt,),
            "distill": self._loop("distill"),
            "train": (*self._loop("train"), config.phrases),
            "evaluate": (config.evaluate,),
            "localise": (
                config.localisation,
                config.distill.layout,
                config.distill.sampling,
                config.distill.objective.divergence,
            ),
        }
        asked = self._questions(tested=stage == "evaluate")
        return settings.digest(self.key(self.before(stage)), *own[stage], config.sampler, *asked)

    def evaluation_key(self, stage: str) -> str:
        """Hash of everything that the figures of one stage's model depend on."""
        config, asked = self.config, self._questions(tested=True)
        return settings.digest(self.key(stage), config.evaluate, config.sampler, config.phrases, *asked)

    def _questions(self, tested: bool = False) -> tuple[ProblemsConfig, ...]:
        """The settings of real questions that a result depends on; none for an embedded task, which the base has.

        Without `tested` the test set is left out, unless it decides which training questions are dropped.
        """
        problems = dataclasses.replace(self.config.problems, data_dir="")
        if not tested and problems.overlap != "drop":
            problems = dataclasses.replace(problems, test="")
        return (problems,) if problems.train else ()

    def _loop(self, stage: str) -> tuple[Any, ...]:
        """What a training loop's result depends on: its settings, the gates, and how these and validation sample.

        What its method does not read is left out.
        """
        config, health = getattr(self.config, stage), self.config.health
        method = find_method(config.method)
        unread = [name for name, needed in READ_WITH.items() if not method.uses(needed)]
        own = dataclasses.replace(config, **{name: type(getattr(config, name))() for name in unread})
        if method.uses("self_distillation"):  # only these methods have a reviser, whose keep rate is gated
            return own, health, self.config.evaluate.sampling
        validates = method.on_policy and config.validate_every
        return own, health.min_mean_tokens, self.config.evaluate.sampling if validates else None

    def before(self, stage: str) -> str | None:
        """The stage that this one needs."""
        return self.config.train.start if stage == "train" else BEFORE[stage]

    def chain(self, stage: str) -> list[str]:
        """The stage and all that it needs, first one first."""
        before = self.before(stage)
        return [*(self.chain(before) if before else ()), stage]

    def folder(self, stage: str) -> pathlib.Path:
        """Where a stage writes; base models are shared between runs through the cache."""
        if stage == "base":
            return self._cache / f"base-{self.key('base')}"
        if self.shared:
            return self.shared / f"{stage}-{self.key(stage)}"
        return self.directory / stage

    def result(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded, None when it has not finished."""
        path = self.folder(stage) / "done.json"
        return hosts.from_first(lambda: read_json(path) if path.exists() else None)

    def params(self, stage: str, name: str | None = None):
        """Final parameters of a finished stage; a pretrained base is read where it lies."""
        result = self.need(stage)
        name = name or (f"round_{result['rounds']}/params" if "rounds" in result else "params")
        if stage == "base" and self.config.base.pretrained:
            return self.pretrained(), self.provenance
        params, metadata = load_params(self.folder(stage) / name, self.abstract_params())
        return params, metadata

    def pretrained(self):
        """Parameters of `base.pretrained`, placed on the mesh; UserError when it is another model."""
        self.check_pretrained()
        return load_pretrained(self.config.base.pretrained, mesh=self.mesh, dtype=self.config.model.param_dtype)[1]

    def check_pretrained(self) -> None:
        """UserError when `base.pretrained` is another model than the config's; reads its config.json alone."""
        path, config = self.config.base.pretrained, self.config.model
        model = read_model(path).config
        free = [*RUNTIME_FIELDS, "max_position", "initializer_range"]
        if "sliding" not in (*model.layer_pattern, *config.layer_pattern):
            free += ["sliding_window", "rope_theta_sliding"]
        same = {name: getattr(config, name) for name in free}
        changed = settings.differences(dataclasses.replace(model, **same), config)
        if changed:
            raise UserError(f"{path} is another model than the config's (file -> config): {'; '.join(changed)}")

    def need(self, stage: str) -> dict[str, Any]:
        result = self.result(stage)
        if result is None:
            raise UserError(f"stage {stage} has not finished in {self.directory}; run it first, or the whole pipeline")
        return result


def _cache_programs(cache_dir: str) -> None:
    """Keeps compiled programs on disk, so that a run that goes on does not compile again."""
    directory = pathlib.Path(BaseConfig().cache_dir if stores.is_url(cache_dir) else cache_dir) / "programs"
    if jax.config.jax_compilation_cache_dir is None:  # else the user's own choice stands
        jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def open_run(config: Config, stage: str | None = None, fork: bool = False) -> Run:
    """The run of a config, to be entered with `with`; nothing is written before that.

    Everything that can be refused is refused here: what does not fit together, and a stage whose
    predecessors have not finished.

    A directory of another config is refused with the differences; with `fork` its stages that do
    not depend on them are copied to a new directory, where the run goes on.
    """
    run = Run(config)
    check_fit(run, stage)
    directory = run.directory
    recorded = hosts.from_first(lambda: read_json(path) if (path := directory / "config.json").exists() else None)
    if stage and run.before(stage):
        run.need(run.before(stage))
    if recorded is not None:
        changed = settings.differences(recorded, dataclasses.asdict(config), ignore=PLACES)
        if changed and not fork:
            if not hosts.from_first(lambda: any((directory / own).exists() for own in BEFORE)):
                return run  # it ended before its first stage began: there is nothing to lose
            shown = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise UserError(
                f"{directory} holds a run with other settings ({shown}); add --fork to go on in a new "
                "directory from the stages that do not change, or set run_dir="
            )
        if changed and stores.is_url(config.run_dir):
            raise UserError(f"--fork copies local folders, and run_dir={config.run_dir} is none; set another run_dir=")
        if changed:
            return Run(_fork(config, directory))
    return run


def check_fit(run: Run, stage: str | None = None) -> None:
    """Refuses settings that do not fit the task, the model's context or the devices; `train`'s when it is asked for.

    And a folder for base models that cannot be written.
    """
    config, model, problems = run.config, run.model, run.problems
    if config.base.pretrained:
        run.check_pretrained()
    if not stores.is_url(config.base.cache_dir):
        hosts.from_first(lambda: check_writable(config.base.cache_dir, "set another base.cache_dir="))
    for name in ("collect", "distill", "train", "evaluate"):
        check_sampling(getattr(config, name).sampling, f"{name}.sampling")
    for name, longest in run.contexts.items():
        if longest > model.config.max_position:
            new = getattr(config, name).sampling.max_new_tokens
            raise UserError(
                f"{name}.sampling.max_new_tokens={new} needs contexts of {longest} tokens, "
                f"but model.max_position={model.config.max_position}; lower the former or raise the latter"
            )
    loops = ("distill", *(["train"] if stage == "train" else []))
    for name in loops:
        layout = getattr(config, name).layout
        if layout.max_prompt < problems.max_prompt_tokens:
            raise UserError(
                f"{name}.layout.max_prompt={layout.max_prompt}, but prompts of {problems.name} have up to "
                f"{problems.max_prompt_tokens} tokens; raise the former"
            )
    if hosts.count() > 1 and (ahead := [name for name in loops if getattr(config, name).prefetch]):
        raise UserError(f"{ahead[0]}.prefetch=true samples in a thread, which several hosts cannot do in step")
    parts = sharding.batch_devices(run.mesh)
    sizes = {"srt.batch_size": config.srt.batch_size}
    for name in loops:
        loop = getattr(config, name)
        sizes[f"{name}.batch_size"] = loop.batch_size
        if _replays(loop):
            sizes[f"{name}.replay.pairs"] = loop.replay.pairs
    for name, split in _asked(config, stage).items():
        section, _, field = name.partition(".")
        try:
            if split == "train" and section in loops:
                run.training_questions(section)
            else:
                problems.questions(split, getattr(getattr(config, section), field))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    if config.problems.train:
        sizes["base.batch_size"] = config.base.batch_size
    else:
        shapes = run.task.corpus_shapes().items()
        sizes |= {f"the corpus batch of {kind} attempts": shape.batch for kind, shape in shapes}
    for name, size in sizes.items():
        if size % parts:
            raise UserError(
                f"{name} is {size}, which does not divide over {parts} devices (mesh data x fsdp); "
                f"nearest: {max(parts, round(size / parts) * parts)}"
            )
    for name in ("srt", *loops):
        _check_microbatches(name, getattr(config, name), parts)


def _check_microbatches(section: str, config: SrtConfig | DistillConfig, devices: int) -> None:
    """Refuses parts of a batch that leave devices without rows."""
    batches = {f"{section}.batch_size": rows_per_step(config)}
    if _replays(config):
        batches[f"{section}.replay.pairs"] = config.replay.pairs
    for name, rows in batches.items():
        fits = microbatches_that_fit(rows, devices, config.microbatches)
        if fits < config.microbatches:
            raise UserError(
                f"{section}.microbatches={config.microbatches} cuts the {rows} rows of {name} into parts that do not "
                f"divide over {devices} devices (mesh data x fsdp); nearest: {fits}"
            )


def _replays(config: SrtConfig | DistillConfig) -> bool:
    return isinstance(config, DistillConfig) and find_method(config.method, config.weights).uses("replay")


def _asked(config: Config, stage: str | None) -> dict[str, str]:
    """Setting that says how many questions -> the split that it takes them from."""
    asked = {
        "collect.questions": "train",
        "health.questions": "validation",
        "evaluate.questions": config.evaluate.split,
    }
    loops = ("train",) if stage == "train" else ("distill",)
    asked |= {f"{loop}.questions": "train" for loop in loops}
    asked |= {f"{loop}.validation_questions": "validation" for loop in loops}
    return asked if stage == "train" else asked | {"localisation.questions": "validation"}


def _fork(config: Config, directory: pathlib.Path) -> Config:
    """Copies the finished stages whose hash is unchanged to a new run directory."""
    return dataclasses.replace(config, run_dir=hosts.from_first(lambda: _copy_unchanged(config, directory)))


def _copy_unchanged(config: Config, directory: pathlib.Path) -> str:
    for number in itertools.count(1):
        target = directory.with_name(f"{directory.name}-fork{number}")
        if not target.exists():
            break
        before = target / "config.json"
        if before.exists() and not settings.differences(read_json(before), dataclasses.asdict(config), ignore=PLACES):
            say(f"fork: going on in {target}")  # so that the same command goes on here too
            return str(target)
    run = Run(dataclasses.replace(config, run_dir=str(target)))
    reused = []
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for stage in BEFORE:
        done = directory / stage / "done.json"
        if done.exists() and read_json(done)["key"] == run.key(stage):
            shutil.copytree(directory / stage, temporary / stage)
            reused.append(stage)
    write_json_atomic(temporary / "config.json", run.record())
    temporary.rename(target)
    say(f"fork: {target} goes on from {', '.join(reused) or 'the start'}")
    return str(target)
