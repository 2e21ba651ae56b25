"""Presets, config.json files of both forms, and safetensors in and out: bit-exact, checked, whole or not at all."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import twins
from safetensors.numpy import load_file, save_file
from twins import DATA, TWINS, same_bits, tiny, weights

from sdzero_jax.errors import UserError
from sdzero_jax.models import (
    PRESETS,
    LanguageModel,
    convert,
    from_config,
    load_pretrained,
    save_pretrained,
    to_hf_config,
)
from sdzero_jax.sharding import MeshConfig

# ------------------------------------------------------------------------------------------ config.json


def config_files():
    """Published config.json files by preset: those of the repository, and those in SDZERO_DATA/models."""
    folders = [DATA / "configs", *([Path(os.environ["SDZERO_DATA"]) / "models"] if "SDZERO_DATA" in os.environ else [])]
    found = [file for folder in folders for file in sorted(folder.glob("*.config.json"))]
    return {file: file.name.removesuffix(".config.json").replace("-", "_").replace("olmo_3", "olmo3") for file in found}


@pytest.mark.parametrize("file, preset", config_files().items(), ids=lambda x: getattr(x, "name", x))
def test_presets_are_the_published_configs(file, preset):
    text = file.read_text()
    model = from_config(json.loads(text))
    assert model.config == PRESETS[preset]()
    assert to_hf_config(model) == json.loads(text)  # written back as read
    rewritten = to_hf_config(LanguageModel(model.config))
    assert from_config(rewritten).config == model.config


# Exact totals as the hub counts them (a tied table once), and the model cards' billions without embeddings.
COUNTS = {
    "qwen3_0_6b": (596_049_920, 0.44),
    "qwen3_1_7b": (1_720_574_976, 1.4),
    "qwen3_4b": (4_022_468_096, 3.6),
    "qwen3_4b_instruct_2507": (4_022_468_096, 3.6),
    "qwen3_8b": (8_190_735_360, 6.95),
    "qwen3_14b": (14_768_307_200, 13.2),
    "qwen3_32b": (32_762_123_264, 31.2),
    "olmo3_7b_instruct": (7_298_011_136, None),
    "olmo3_7b_think": (7_298_011_136, None),
    "olmo3_32b_think": (32_233_522_176, None),
    "olmo3_1_32b_instruct": (32_233_522_176, None),
    "olmo3_1_32b_think": (32_233_522_176, None),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_number_of_parameters(preset):
    model = LanguageModel(PRESETS[preset]())
    total, body = COUNTS[preset]
    sizes = {path: math.prod(leaf.shape) for path, leaf in convert._leaves(model.param_shapes())}
    assert sum(sizes.values()) == total
    if body:
        inside = sum(size for path, size in sizes.items() if path[0] not in ("embedding", "unembedding"))
        assert inside / 1e9 == pytest.approx(body, abs=0.05 if body != 0.44 else 0.005)
    assert from_config(to_hf_config(model)).config == model.config
    assert PRESETS[preset](remat="full").remat == "full"


def test_presets_of_one_shape_differ_where_they_should():
    plain, instruct = PRESETS["qwen3_4b"](), PRESETS["qwen3_4b_instruct_2507"]()
    assert (plain.rope_theta, plain.max_position) == (1e6, 40_960)
    assert dataclasses.replace(plain, rope_theta=5e6, rope_theta_sliding=5e6, max_position=262_144) == instruct
    assert PRESETS["olmo3_32b_think"]().num_kv_heads == 8 and PRESETS["olmo3_7b_think"]().num_kv_heads == 32


def test_legacy_and_new_rope_parameters_mean_the_same():
    legacy = json.loads((DATA / "configs" / "olmo-3-7b-instruct.config.json").read_text())
    yarn = {**legacy["rope_scaling"], "rope_theta": 500_000}
    base = {key: value for key, value in legacy.items() if not key.startswith("rope")}
    plain = {"rope_type": "default", "rope_theta": 500_000}
    per_type = {**base, "rope_parameters": {"full_attention": yarn, "sliding_attention": plain}}
    flat = {**base, "rope_parameters": yarn}
    want = from_config(legacy).config
    assert from_config(per_type).config == from_config(flat).config == want
    other = {
        **base,
        "rope_parameters": {"full_attention": yarn, "sliding_attention": {**plain, "rope_theta": 1e4}},
    }
    assert from_config(other).config == dataclasses.replace(want, rope_theta_sliding=1e4)
    without_types = {key: value for key, value in legacy.items() if key != "layer_types"}
    assert from_config(without_types).config == want
    old_name = {**legacy, "rope_scaling": {**legacy["rope_scaling"], "type": "yarn"}}
    del old_name["rope_scaling"]["rope_type"]
    assert from_config(old_name).config == want


def test_qwen3_with_yarn_and_with_late_sliding_layers():
    hf = json.loads((DATA / "configs" / "qwen3-4b-instruct-2507.config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    config = from_config({**hf, "rope_scaling": scaling}).config
    assert (config.yarn_factor, config.yarn_original_length) == (4.0, 32_768)
    late = {**hf, "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 30}
    config = from_config(late).config
    assert config.layer_pattern == ("full",) * 30 + ("sliding",) * 6 and config.sliding_window == 128


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="qwen2"), "model_type 'qwen2' is not supported; did you mean 'qwen3'"),
        (dict(model_type="llama"), "model_type 'llama' is not supported; choose from olmo3, qwen3"),
        (dict(model_type=None), "model_type None is not supported"),
        (dict(model_type="qwen3_moe"), "'qwen3_moe' is a mixture of experts; only dense olmo3 and qwen3"),
        (dict(num_experts=128), "num_experts=128"),
        (dict(architectures=["Qwen3ForSequenceClassification"]), "'Qwen3ForSequenceClassification' is not supported"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(hidden_size="2560"), "hidden_size='2560' is not a whole number"),
        (dict(num_attention_heads=0), "num_attention_heads=0"),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type 'linear'"),
        (dict(rope_parameters={"rope_type": "longrope"}), "rope_type 'longrope'"),
        (dict(rope_scaling={"rope_type": "yarn"}), "yarn RoPE needs factor"),
        (
            dict(layer_types=["sliding_attention"] * 36, rope_scaling={"rope_type": "yarn", "factor": 2.0}),
            "sliding layers and yarn",
        ),
        (dict(layer_types=["sliding_attention"] * 36, sliding_window=None), "sliding layers, but no sliding_window"),
        (dict(hidden_act="gelu", quantization_config={"bits": 4}), "hidden_act='gelu'.*quantization_config"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_type 'llama3' of full_attention"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 8.0, "truncate": False}), "truncate=false"),
        (
            dict(rope_scaling={"rope_type": "yarn", "factr": 8.0}),
            "'factr' of full_attention.*did you mean 'factor'",
        ),
        (dict(layer_types=["chunked_attention"] * 36), "layer type 'chunked_attention' is not supported"),
        (dict(layer_types=["full_attention"] * 3), "lists 3 layer_types for 36 layers"),
        (dict(vocab_size=None), "lacks vocab_size"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message):
    hf = json.loads((DATA / "configs" / "qwen3-4b-instruct-2507.config.json").read_text())
    with pytest.raises(UserError, match=message) as caught:
        from_config({**hf, **change})
    assert "\n" not in str(caught.value)


def test_olmo3_with_yarn_on_sliding_layers_is_refused():
    hf = json.loads((DATA / "goldens" / "olmo3" / "config.json").read_text())
    hf["rope_parameters"]["sliding_attention"] = hf["rope_parameters"]["full_attention"]
    with pytest.raises(UserError, match="'yarn' on Olmo-3's sliding layers"):
        from_config(hf)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", TWINS)
def test_round_trip_is_bit_exact_in_the_stored_dtype(tmp_path, monkeypatch, name, shards):
    stored = load_file(DATA / "goldens" / name / "model.safetensors")
    stored = {key: value.astype(ml_dtypes.bfloat16) for key, value in stored.items()}
    source = tmp_path / "source"
    source.mkdir()
    save_file(stored, source / "model.safetensors")
    config_text = (DATA / "goldens" / name / "config.json").read_text().replace("float32", "bfloat16")
    (source / "config.json").write_text(config_text)
    if shards:
        monkeypatch.setattr(convert, "_FILE_BYTES", 10_000)
    model, params = load_pretrained(source, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    target = tmp_path / "target"
    save_pretrained(target, model, params)
    save_pretrained(target, model, params)  # an earlier export is replaced
    files = sorted(path.name for path in tmp_path.glob("target/*.safetensors"))
    assert (len(files) > 2 and "index" not in files[0]) if shards else files == ["model.safetensors"]
    written = {}
    for file in files:
        written.update(load_file(target / file))
    assert written.keys() == stored.keys()
    for key, value in stored.items():
        assert written[key].dtype == value.dtype and written[key].tobytes() == value.tobytes(), key
    assert (target / "config.json").read_text() == config_text  # byte for byte
    again, params_again = load_pretrained(target, dtype=None)
    assert again == model
    assert same_bits(params, params_again)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "source",
        "target",
    ]  # no temporary folder left
    wide, wide_params = load_pretrained(target)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide_params)} == {jnp.dtype("float32")}
    save_pretrained(tmp_path / "narrow", wide, wide_params, dtype="bfloat16")
    _, narrow = load_pretrained(tmp_path / "narrow", dtype=None)
    assert same_bits(params, narrow)


def test_what_does_not_fit_is_reported_together(tmp_path):
    tensors = load_file(DATA / "goldens" / "qwen3_untied" / "model.safetensors")
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"]
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    tensors["model.norm.weight"] = np.ones(21, np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text((DATA / "goldens" / "qwen3_untied" / "config.json").read_text())
    with pytest.raises(UserError) as caught:
        load_pretrained(tmp_path)
    message = str(caught.value)
    for part in (
        "unmapped: model.layers.9.mlp.up_proj.weight;",
        "doubled: lm_head.weight;",
        "missing: model.layers.1.self_attn.k_norm.weight;",
        "misshapen: model.norm.weight (21,), wanted (20,)",
    ):
        assert part in message
    assert "\n" not in message


def copy_of(name, folder):
    """A model folder that a test may damage."""
    shutil.copytree(DATA / "goldens" / name, folder)
    (folder / "golden.safetensors").unlink()
    return folder


def no_config(folder):
    (folder / "config.json").unlink()


def config_is(text):
    return lambda folder: (folder / "config.json").write_text(text)


def config_of(name):
    return lambda folder: shutil.copyfile(DATA / "goldens" / name / "config.json", folder / "config.json")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def shard_absent(folder):
    (folder / convert._INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))


def bad_index(folder):
    (folder / convert._INDEX_FILE).write_text("[1, 2]")


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(folder):
    (folder / "model.safetensors").write_bytes(b"\x10cut short")


def empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")


def lfs_pointer(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 8044982000\n"
    (folder / "model.safetensors").write_text(pointer)


def integers(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (no_config, r"is not a model folder: it has no config\.json"),
        (config_is("{"), r"config\.json is not valid JSON"),
        (config_is("\xff"), "not valid JSON"),
        (config_is("[1]"), "holds an object, this one a list"),
        (config_is('{"model_type": "gemma3"}'), "model_type 'gemma3' is not supported"),
        (config_of("olmo3"), "do not fit its config.json; unmapped: .*missing: .*misshapen: "),
        (no_weights, "lacks safetensors files"),
        (shard_absent, r"lacks model-00001-of-00002\.safetensors"),
        (bad_index, "is not a safetensors index"),
        (truncated, "not a whole safetensors file"),
        (cut_header, "not a whole safetensors file"),
        (empty_file, "not a whole safetensors file"),
        (lfs_pointer, "git-lfs pointer; run `git lfs pull`"),
        (integers, r"not in a floating-point type: model\.norm\.weight I8"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, damage, message):
    folder = copy_of("qwen3_untied", tmp_path / "model")
    load_pretrained(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dtype="bfloat61"), "dtype 'bfloat61' is not one for parameters; did you mean 'bfloat16'"),
        (dict(dtype="int8"), "dtype 'int8' is not one for parameters"),
        (dict(dtype=jnp.float64), "dtype 'float64' is not one.*did you mean"),
        (dict(mesh=MeshConfig()), "mesh is a MeshConfig; wanted a jax.sharding.Mesh"),
        (dict(mesh=jax.make_mesh((1,), ("model",))), "mesh axis 'model' is not known; choose from data, fsdp, tensor"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(DATA / "goldens" / "qwen3_tied", **arguments)


# ---------------------------------------------------------------------------------- blocks and memory


@pytest.mark.parametrize(
    "path, shape, in_axes",
    [
        (("layers", "block_0", "attention", "query"), (6, 4, 8), 1),
        (("layers", "block_0", "attention", "out"), (4, 8, 6), 2),
        (("layers", "block_0", "mlp", "up"), (6, 520), 1),
        (("layers", "block_0", "attention", "query_norm"), (4, 8), 0),
        (("embedding",), (10, 6), 0),
    ],
)
def test_a_block_is_read_from_the_slice_that_holds_it(path, shape, in_axes):
    """Any block of any leaf, however the mesh cuts it, and no more of the tensor than the block."""
    entry = convert.Entry("name", path, None, shape, in_axes)
    rng = np.random.default_rng(0)
    ours = rng.standard_normal(shape).astype(np.float32)
    tensor = entry.to_hf(ours)

    class Slices:
        def __getitem__(self, index):
            self.got = tensor[index]
            return self.got

    for _ in range(40):
        bounds = [np.sort(rng.choice(size + 1, 2, replace=False)) for size in shape]
        index = tuple(slice(0, n) if rng.random() < 0.5 else slice(*map(int, b)) for n, b in zip(shape, bounds))
        out = np.full(ours[index].shape, np.nan, np.float32)
        slices = Slices()
        entry.read(slices, index, out)
        np.testing.assert_array_equal(out, ours[index])
        if entry.hf_index(index) is not None:
            assert slices.got.size == out.size
    assert entry.hf_index(tuple(slice(0, n) for n in shape)) is not None


def test_blocks_are_read_once_and_taken_without_a_copy():
    """Two holders of one block share a read; a CPU device holds the very memory that was filled."""
    filled = []

    def read(index):
        filled.append(convert._aligned_empty((8, 8), np.dtype("float32")))
        filled[-1][...] = 3.0
        return filled[-1]

    array = convert._place(read, (8, 8), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert len(filled) == 1
    assert array.unsafe_buffer_pointer() == filled[0].ctypes.data
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(array)[0, 0] == 4.0
    assert filled[0][0, 0] == 3.0  # a step that donates the array leaves what others may share alone


def test_leaves_of_several_stored_types_are_widened(tmp_path):
    folder = copy_of("qwen3_untied", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = tensors[name].astype(ml_dtypes.bfloat16)
    save_file({**tensors, name: wanted}, folder / "model.safetensors")
    up = load_pretrained(folder, dtype=None)[1]["layers"]["block_0"]["mlp"]["up"]
    assert up.dtype == jnp.float32
    np.testing.assert_array_equal(up[0], wanted.astype(np.float32).T)
    np.testing.assert_array_equal(up[1], tensors["model.layers.1.mlp.up_proj.weight"].T)


# -------------------------------------------------------------------------------------------- exports


def test_an_export_carries_tokenizer_and_record(tmp_path):
    model = tiny()
    params = weights(model)
    sides = tmp_path / "sides"
    sides.mkdir()
    wanted = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "generation_config.json": '{"eos_token_id": [1]}'}
    wanted["chat_template.jinja"] = "{{ messages }}"
    for name, text in {**wanted, "README.md": "not this"}.items():
        (sides / name).write_text(text)
    out = tmp_path / "out"
    for _ in range(2):  # and again over itself
        save_pretrained(out, model, params, tokenizer_from=sides, record={"source": {"name": "a/b"}})
    assert {name: (out / name).read_text() for name in wanted} == wanted
    assert json.loads((out / "sdzero_export.json").read_text()) == {"source": {"name": "a/b"}}
    assert not (out / "README.md").exists()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    with pytest.raises(UserError, match="has no tokenizer files"):
        save_pretrained(tmp_path / "other", model, params, tokenizer_from=DATA / "goldens" / "olmo3")
    assert not (tmp_path / "other").exists()


def test_an_export_can_be_read_by_whom_the_umask_lets(tmp_path, monkeypatch):
    model = tiny()
    monkeypatch.setattr(convert, "_FILE_BYTES", 2000)  # several files
    before = os.umask(0o027)
    try:
        save_pretrained(tmp_path / "out", model, weights(model))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert sum(name.endswith(".safetensors") for name in modes) > 1


def test_config_names_the_type_the_weights_are_stored_in(tmp_path):
    """transformers 5 reads weights in the type that config.json names: a wrong one would round them."""
    model, params = twins.twin("olmo3")
    for name in ("bfloat16", "float32"):
        save_pretrained(tmp_path / name, model, params, dtype=name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["dtype"] == name and "torch_dtype" not in config


def test_an_export_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    model = tiny()
    params = weights(model)
    save_pretrained(tmp_path / "out", model, params)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(convert, "_FILE_BYTES", 2000)
    written = []

    def fails(tensors, file, metadata):
        if len(written) == 2:
            raise OSError("No space left on device")
        written.append(file)
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(convert, "save_file", fails)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(tmp_path / "out", model, weights(model, seed=1))
    assert len(written) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_folder_that_was_not_exported_here_is_not_replaced(tmp_path):
    """Not even one that holds nothing but a model: it may be the only copy of a download."""
    folder = copy_of("qwen3_tied", tmp_path / "download")
    model, params = load_pretrained(folder)
    with pytest.raises(UserError, match=r"not exported here \(config\.json, model\.safetensors\)"):
        save_pretrained(folder, model, params)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        save_pretrained(tmp_path / "file", model, params)


def test_export_refuses_strangers(tmp_path):
    model = tiny()
    params = weights(model)
    wrong = {**params, "final_norm": jnp.ones(3), "extra": jnp.ones(1)}
    del wrong["embedding"]
    with pytest.raises(UserError, match=r"unknown: extra; missing: embedding; misshapen: final_norm \(3,\)"):
        save_pretrained(tmp_path / "x", model, wrong)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        save_pretrained(tmp_path, model, params)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="has no Hugging Face form"):
        save_pretrained(tmp_path / "x", tiny(qk_norm="none"), weights(tiny(qk_norm="none")))
