"""The house rules that imports can show: layers, what must stay light, what must stay empty."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# A file imports only from lower layers; a sub-package is one room and may import sideways inside.
LAYERS = [
    ("kernels", "errors"),
    ("hosts",),
    ("files", "progress", "signals", "locks"),
    ("stores",),
    ("masked", "losses", "prompts", "examples", "metrics", "statistics", "chunks", "health", "settings", "topology"),
    ("ops", "sharding", "optimizer", "tokenizer", "verifiers"),
    ("data",),
    ("models", "tasks", "batches"),
    ("sampler", "objectives", "teacher", "graders"),
    ("rollouts", "train_step", "checkpoint", "problems", "ledger"),
    ("collect", "sources", "train", "evaluate", "analysis", "exchange"),
    ("methods", "presets"),
    ("config",),
    ("runs", "memory"),
    ("training",),
    ("pipeline", "doctor"),
    ("compare",),
    ("configs",),
    ("run",),
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# Rooms that GPU images must be able to import: nothing at module level beside these.
LIGHT = ("kernels", "losses", "ops", "models", "sampler", "objectives", "train_step")
LIGHT_PACKAGES = {"jax", "flax", "optax", "numpy", "safetensors", "ml_dtypes", "sdzero_jax", "kernels"}


def sources():
    for path in sorted(ROOT.glob("**/*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] in ("sdzero_jax", "kernels", "configs") or parts == ("run.py",):
            yield path, room_of(parts)


def room_of(parts):
    names = [part.removesuffix(".py") for part in parts]
    return names[1] if names[0] == "sdzero_jax" else names[0]


def imports(path, module_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if module_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module in ("sdzero_jax", "kernels", "configs"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "sdzero_jax" and len(parts) > 1:
            yield parts[1]
        elif parts[0] in ("kernels", "configs"):
            yield parts[0]


def test_every_room_has_a_layer():
    assert {room for _, room in sources()} - {"__init__"} <= LAYER.keys()


def test_imports_go_down_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path, room in sources()
        if room != "__init__"
        for other in rooms_imported(path)
        if other != room and LAYER[other] >= LAYER[room]
    ]
    assert not wrong, wrong


def test_only_ops_imports_kernels_and_only_two_files_import_optax():
    for path, room in sources():
        names = {name.split(".")[0] for name in imports(path)}
        assert "kernels" not in names or room in ("ops", "kernels"), path
        assert "optax" not in names or room in ("optimizer", "train_step"), path


def test_light_rooms_import_nothing_that_a_gpu_image_lacks():
    for path, room in sources():
        if room in LIGHT:
            roots = {name.split(".")[0] for name in imports(path, module_level_only=True)}
            foreign = roots - LIGHT_PACKAGES - set(sys.stdlib_module_names)
            assert not foreign, f"{path.relative_to(ROOT)}: {foreign}"


def test_inits_that_must_be_empty_are_empty():
    """Hugging Face has a package named `kernels` that transformers probes; workers import the other."""
    for name in ("kernels", "sdzero_jax"):
        assert (ROOT / name / "__init__.py").read_text().strip() == ""


def test_the_demo_imports_neither_transformers_nor_tfds_nor_torch():
    code = (
        "import sys; from sdzero_jax import pipeline, runs; from sdzero_jax.config import load_config; "
        "runs.Run(load_config('configs/demo.py')).problems; "
        "print([m for m in ('transformers', 'tensorflow_datasets', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_verifier_side_modules_do_not_load_jax():
    code = "import sys; from sdzero_jax import examples, prompts, statistics, files, tasks; print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
