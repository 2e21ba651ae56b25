"""Host memory of `load_pretrained` at real size: a random checkpoint, loaded in a child process.

    python benchmarks/load_memory.py [PRESET] [--dtype float32] [--devices 4] [--layers 8] [--folder DIR]

Writes a Hugging Face folder of the preset's shape (bfloat16, random bits; default qwen3_4b_instruct_2507,
8 GB), loads it and deletes it. Prints the peak of RssAnon (memory that the process owns, sampled every
5 ms) and of RSS (which counts pages of the mapped files that happen to be in memory) beside the bound: what
the host's devices hold + the largest stacked leaf + 1 GiB. Exit status 1 when RssAnon exceeds it. Linux only.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GB, GIB = 1e9, 2**30


def write_checkpoint(folder: pathlib.Path, preset: str, layers: int | None) -> int:
    """A random bfloat16 checkpoint in files of about 1 GB; returns its bytes."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from sdzero_jax.models import PRESETS, LanguageModel, convert, to_hf_config

    dials = {} if layers is None else {"num_layers": layers}
    model = LanguageModel(PRESETS[preset](**dials))
    table = convert.conversion_table(model)
    total = sum(2 * int(np.prod(entry.hf_shape)) for entry in table)
    free = shutil.disk_usage(folder).free
    if free < 1.2 * total:
        raise SystemExit(f"{folder} has {free / GB:.1f} GB free, the checkpoint needs {total / GB:.1f}")
    bits = np.random.default_rng(0).integers(0x3C00, 0x3D00, 1 << 20, np.uint16)  # 0.008 to 0.03
    weight_map: dict[str, str] = {}
    held, size = {}, 0

    def flush() -> None:
        nonlocal held, size
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
        held, size = {}, 0

    for entry in table:
        tensor = np.resize(bits, entry.hf_shape).view(ml_dtypes.bfloat16)
        held[entry.name], size = tensor, size + tensor.nbytes
        if size > GB:
            flush()
    if held:
        flush()
    (folder / "config.json").write_text(json.dumps(to_hf_config(model)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def child(folder: str, dtype: str | None, devices: int) -> None:
    """Loads the folder over `devices` CPU devices and prints the peaks as JSON."""
    import jax

    from sdzero_jax.models import load_pretrained
    from sdzero_jax.sharding import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(fsdp=-1)) if devices > 1 else None
    jax.block_until_ready(jax.device_put(1.0))
    before, peak, done = status("RssAnon"), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    _, params = load_pretrained(folder, mesh=mesh, dtype=dtype)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    leaves = jax.tree.leaves(params)
    result = {
        "seconds": seconds,
        "before": before,
        "peak_anon": max(peak, status("RssAnon")),
        "after": status("RssAnon"),
        "peak_rss": status("VmHWM"),
        "shards": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
        "largest_leaf": max(leaf.nbytes for leaf in leaves),
        "torch": "torch" in sys.modules,
    }
    print(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="qwen3_4b_instruct_2507")
    parser.add_argument("--dtype", default="stored", help="dtype of the parameters (default: as stored, bfloat16)")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices that the parameters are cut over")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's")
    parser.add_argument("--folder", help="an existing folder on a disk with room (default: the temporary folder's)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = None if arguments.dtype == "stored" else arguments.dtype
    if arguments.child:
        child(arguments.child, dtype, arguments.devices)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="load_memory-") as folder:
        size = write_checkpoint(pathlib.Path(folder), arguments.preset, arguments.layers)
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
        command = [sys.executable, __file__, "--child", folder, "--dtype", arguments.dtype]
        done = subprocess.run(
            [*command, "--devices", str(arguments.devices)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"the loading process ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    bound = result["shards"] + result["largest_leaf"] + GIB
    layers = "" if arguments.layers is None else f", {arguments.layers} layers"
    print(
        f"{arguments.preset}{layers}: {size / GB:.2f} GB on disk, as {arguments.dtype} on {arguments.devices} device(s)"
    )
    print(f"loaded in {result['seconds']:.1f} s; torch imported: {result['torch']}")
    rows = ("shards", "largest_leaf", "before", "peak_anon", "after", "peak_rss")
    print("".join(f"{name:<14}{result[name] / GB:7.2f} GB\n" for name in rows), end="")
    print(f"{'bound':<14}{bound / GB:7.2f} GB: {'kept' if result['peak_anon'] <= bound else 'EXCEEDED'}")
    return 0 if result["peak_anon"] <= bound else 1


if __name__ == "__main__":
    raise SystemExit(main())
