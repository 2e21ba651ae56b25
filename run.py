"""Command line of sdzero_jax: subcommands and exit statuses, no logic.

python run.py                            the demo: the whole method on the embedded task
python run.py configs/NAME.py a.b=c      the whole pipeline of a config, with settings overridden
python run.py STAGE configs/NAME.py ...  one stage: base, collect, srt, distill, evaluate, localise
python run.py train configs/NAME.py ...  any method alone: train.method=grpo, rft, sdft, ...
python run.py compare configs/NAME.py    methods side by side at equal sampled tokens, over seeds
python run.py report RUN [RUN ...]       writes the report of runs or comparisons again; two runs: their difference
python run.py doctor [configs/NAME.py]   what is installed, which devices there are, what runs where
python run.py verify FILE                grades a JSON-lines file of responses: mathematics or programs
python run.py data prepare NAME          a named problem set, from the hub or from a folder (--from DIR)
python run.py convert FROM TO            weights: Hugging Face folder or hub id <-> Orbax checkpoint

Exit status: 0 done, 2 bad input, 1 a fault or a health gate, 130 / 143 stopped by a signal after
a save. The same command goes on where it stopped.
"""

import argparse
import itertools
import os
import pathlib
import sys
import traceback

DEMO = "configs/demo.py"
STAGES = ("base", "collect", "srt", "distill", "train", "evaluate", "localise")
COMMANDS = ("demo", "pipeline", *STAGES, "compare", "report", "doctor", "verify", "data", "convert")


_LESS_MEMORY = (
    "what was saved stays. Raise srt.microbatches, distill.microbatches or train.microbatches (a row per device at "
    "least), set model.remat=full or offload, or lower base.batch_size or sampler.slots, and add --fork; "
    "`python run.py doctor CONFIG` says what takes how much"
)


def main(argv: list[str]) -> int:
    """Runs one subcommand and returns the exit status."""
    from sdzero_jax import hosts
    from sdzero_jax.errors import Fault, HealthStop, Stopped, UserError, full_disk, no_backend, out_of_memory

    try:
        return dispatch(argv)
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return hosts.leave(2)
    except HealthStop as stop:
        print(f"stopped: {_one_line(stop)}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"stopped: {_one_line(stop)}; the same command goes on from there", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last save", file=sys.stderr)
        return hosts.leave(130)
    except Exception as error:
        detail = _one_line(error)[:200]
        if no_backend(error):
            asked = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: " if "JAX_PLATFORMS" in os.environ else ""
            wanted = "cpu, cuda (requirements-cuda.txt) or tpu (requirements-tpu.txt), or leave it out"
            reason = f" ({detail})" if detail else ""
            print(f"error: {asked}jax finds no such device here; wanted {wanted}{reason}", file=sys.stderr)
            return hosts.leave(2)
        if isinstance(error, Fault):
            print(f"stopped: {_one_line(error)}", file=sys.stderr)
        elif full_disk(error):
            again = "free some space, and the same command goes on from the last save"
            print(f"stopped: the disk is full ({detail}); {again}", file=sys.stderr)
        elif hosts.lost(error):
            again = "the same command, on all hosts, goes on from the last save"
            print(f"stopped: another process of this run is gone ({detail}); {again}", file=sys.stderr)
        elif out_of_memory(error):
            print(f"stopped: out of device memory ({detail}); {_LESS_MEMORY}", file=sys.stderr)
        elif hosts.count() > 1:
            traceback.print_exc()
        else:
            raise
        return hosts.leave(1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def dispatch(argv: list[str]) -> int:
    """Completes the command line (demo is the default, a config alone means its pipeline) and runs it."""
    from sdzero_jax.errors import UserError, nearest

    first = next((word for word in argv if not word.startswith("-")), None)
    if first is None or "=" in first:
        argv = argv if {"-h", "--help"} & set(argv) else ["demo", *argv]
    elif first.endswith(".py"):
        argv = ["pipeline", *argv]
    elif first not in COMMANDS and pathlib.Path(f"{first}.py").is_file():
        raise UserError(f"unknown subcommand {first!r}; did you mean the config {first}.py?")
    elif first not in COMMANDS:
        raise UserError(f"unknown subcommand {first!r}{nearest(first, COMMANDS)}")
    arguments = parser().parse_args(_options_last(argv))
    return arguments.function(arguments)


def _options_last(argv: list[str]) -> list[str]:
    """Options behind the settings: argparse does not take a setting that follows an option (`--fork seed=1`)."""
    if argv[0] not in ("demo", "pipeline", *STAGES, "compare", "doctor"):
        return argv
    positional, options, words = [], [], iter(argv)
    for word in words:
        (options if word.startswith("-") else positional).append(word)
        if word in ("--topology", "--gpus"):
            options += itertools.islice(words, 1)  # its value
    return positional + options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        from sdzero_jax.errors import UserError

        _, _, unknown = message.partition("unrecognized arguments: --")
        name = unknown.partition(" ")[0].partition("=")[0]
        hint = f"; settings are written without --: {name}=VALUE" if "." in name else ""
        raise UserError(f"{message}{hint} (python {self.prog} --help)")


class _Help(argparse.Action):
    """--help of a config command: the usage, then every setting with its default and meaning."""

    def __call__(self, parser, namespace, values, option_string=None):
        from sdzero_jax import settings
        from sdzero_jax.config import load_config

        path = getattr(namespace, "config", None) or DEMO
        parser.print_help()
        print(f"\nsettings, as {path} has them:")
        print("\n".join(settings.describe(load_config(path))))
        parser.exit()


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, parser_class=_Parser, metavar="COMMAND")
    texts = {
        "demo": "the whole method on the embedded task",
        "pipeline": "every stage of a config, then the report",
        "base": "train the embedded task's base model (cached)",
        "collect": "sample and grade first attempts and revisions",
        "srt": "train the base model to revise (self-revision training)",
        "distill": "distil the reviser into the generator, on-policy",
        "train": "any method alone, from the base or a later model, and its figures",
        "evaluate": "avg@k, pass@k, generate-then-revise of every model of the run",
        "localise": "does the reviser's divergence find the first error?",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text, add_help=False)
        if name == "demo":
            command.set_defaults(config=DEMO)
        else:
            command.add_argument("config", nargs="?", default=DEMO, help=f"config file (default {DEMO})")
        command.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings to change; preset=NAME: many")
        command.add_argument("--fork", action="store_true", help="with changed settings, go on in a new run directory")
        command.add_argument("-h", "--help", action=_Help, nargs=0, help="show this and every setting")
        command.set_defaults(function=run_stages, stage=name if name in STAGES else None)
    compare = commands.add_parser("compare", help="methods side by side at equal sampled tokens")
    compare.add_argument("config", help="file with get_comparison()")
    compare.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings; seeds=, budget=, only=, directory=")
    compare.add_argument("--tune", action="store_true", help="try every entry's grid on validation questions instead")
    compare.set_defaults(function=compare_methods)
    report = commands.add_parser("report", help="write the report of runs or comparisons again")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or folder of a comparison")
    report.set_defaults(function=write_reports)
    doctor = commands.add_parser("doctor", help="versions, devices, memory, what runs where")
    doctor.add_argument("config", nargs="?", default=DEMO)
    doctor.add_argument("overrides", nargs="*", metavar="a.b=c")
    doctor.add_argument("--topology", metavar="NAME", help="a TPU slice that need not be attached, such as v5p:2x2x4")
    doctor.add_argument("--gpus", metavar="NxGIB", help="GPUs that need not be attached, such as 1x24")
    doctor.add_argument("--compile", action="store_true", help="compare with the compiler's own count (minutes)")
    doctor.set_defaults(function=examine)
    verify = commands.add_parser("verify", help="grade a JSON-lines file of responses")
    verify.add_argument("file", help="one JSON object a line, with a response and a gold answer, or tests")
    verify.add_argument("--output", help="write every record with its verdict to this file")
    verify.add_argument("--response-field", help="name of the response's field (default: found by itself)")
    verify.add_argument("--gold-field", help="name of the gold answer's field (default: found by itself)")
    verify.set_defaults(function=verify_file)
    data = commands.add_parser("data", help="prepare named problem sets")
    actions = data.add_subparsers(required=True, parser_class=_Parser, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="fetch or read a named set and write it as ArrayRecord files")
    prepare.add_argument("name", help="gsm8k, math500, mbpp, ...; an unknown one lists them all")
    prepare.add_argument("--from", dest="source_dir", metavar="DIR", help="read the set's files from this folder")
    prepare.add_argument("--to", dest="data_dir", metavar="DIR", default="data", help="where prepared sets live")
    prepare.add_argument("--revision", help="commit, branch or tag of the hub's repository (default main)")
    prepare.add_argument("--force", action="store_true", help="prepare again what is there")
    prepare.set_defaults(function=prepare_data)
    weights = commands.add_parser("convert", help="weights between Hugging Face and Orbax")
    weights.add_argument("source", metavar="FROM", help="Hugging Face folder, hub id, gs:// path or Orbax checkpoint")
    weights.add_argument("target", metavar="TO", help="folder to write")
    weights.add_argument("--to", choices=("hf", "orbax"), help="form to write (default: the other one than FROM's)")
    weights.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    weights.add_argument("--config", help="config file of the run that FROM comes from, where FROM does not say it")
    weights.add_argument("--tokenizer", help="folder or hub id whose tokenizer files go along (default: FROM's)")
    weights.set_defaults(function=convert_weights)
    return top


def _config(arguments):
    """The config of a command line, overridden and checked."""
    from sdzero_jax.config import load_config, override, validate

    path, overrides = _split(arguments)
    config = override(load_config(path), overrides)
    validate(config)
    return config


def _split(arguments) -> tuple[str, list[str]]:
    """The config's path and its overrides; overrides without a config are the demo's."""
    path, overrides = arguments.config, list(arguments.overrides)
    return (DEMO, [path, *overrides]) if "=" in path and not path.endswith(".py") else (path, overrides)


def run_stages(arguments) -> int:
    """One stage or all of them."""
    config = _config(arguments)
    from sdzero_jax import hosts, pipeline, runs, signals

    hosts.initialize(config.hosts)
    signals.install()  # after it: jax takes SIGTERM for itself
    with runs.open_run(config, arguments.stage, arguments.fork) as run:
        if arguments.stage:
            result = pipeline.run_stage(run, arguments.stage)
            if arguments.stage == "evaluate":
                hosts.show(pipeline.table(result["models"]))
            if arguments.stage == "localise":
                hosts.show(pipeline.localised(result["summary"]))
            if arguments.stage == "train":
                hosts.show(pipeline.table({run.config.train.method: pipeline.evaluate_stage(run, "train")}))
        else:
            hosts.show(pipeline.table(pipeline.run_all(run)))
            hosts.show(f"\nreport: {run.directory / 'report' / 'report.html'}")
    return 0


def compare_methods(arguments) -> int:
    from sdzero_jax import compare, hosts, signals

    comparison = asked = compare.load_comparison(arguments.config, arguments.overrides)
    if arguments.tune:
        comparison = compare.tuning(asked)
    hosts.initialize(comparison.config.hosts)
    signals.install()  # after it: jax takes SIGTERM for itself
    summary = compare.compare(comparison)
    hosts.show(compare.table(summary))
    if arguments.tune:
        hosts.show(f"\nbest of each grid:\n{compare.tuned(asked, summary)}")
    hosts.show(f"\nreport: {comparison.folder / 'report' / 'comparison.html'}")
    return 0


def write_reports(arguments) -> int:
    from sdzero_jax import analysis, stores

    # Of a run on a store: in its mirror here, the store stays as it is.
    print("\n".join(analysis.write_reports([stores.local(run) for run in arguments.runs])))
    return 0


def examine(arguments) -> int:
    config = _config(arguments)
    from sdzero_jax import doctor

    path, overrides = _split(arguments)
    print("\n".join(doctor.examine(config, path, overrides, arguments.topology, arguments.compile, arguments.gpus)))
    return 0


def verify_file(arguments) -> int:
    """Prints a summary by outcome; status 1 when the grader itself failed on some line."""
    from sdzero_jax.verifiers.grade_file import grade_file

    summary = grade_file(
        arguments.file,
        output=arguments.output,
        response_field=arguments.response_field,
        gold_field=arguments.gold_field,
    )
    print("\n".join(summary.lines()))
    return 1 if summary.failed else 0


def prepare_data(arguments) -> int:
    from sdzero_jax.data import prepare_set

    record = prepare_set(
        arguments.name,
        data_dir=arguments.data_dir,
        source_dir=arguments.source_dir,
        revision=arguments.revision,
        force=arguments.force,
    )
    counts = ", ".join(f"{count} {split}" for split, count in record["questions"].items())
    print(f"{record['directory']}: {counts}; licence {record['licence']}")
    return 0


def convert_weights(arguments) -> int:
    from sdzero_jax.exchange import convert

    model = None
    if arguments.config:
        from sdzero_jax.config import load_config

        model = load_config(arguments.config).model
    done = convert(
        arguments.source,
        arguments.target,
        to=arguments.to,
        dtype=arguments.dtype,
        config=model,
        tokenizer=arguments.tokenizer,
    )
    commit = f", commit {done.source['revision']}" if done.source.get("revision") else ""
    print(f"{done.path}: {done.form}, {done.parameters:,} parameters, {done.dtype}, from {done.source['name']}{commit}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
