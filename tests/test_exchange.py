"""`run.py convert`: there and back again with the same bits, and nothing overwritten or half written."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from twins import DATA, same_bits, tiny, weights

import run
from sdzero_jax import exchange
from sdzero_jax.checkpoint import save_params
from sdzero_jax.errors import UserError
from sdzero_jax.exchange import convert
from sdzero_jax.models import DecoderConfig, load_pretrained

ROOT = pathlib.Path(__file__).parents[1]
SIDES = {"tokenizer.json": '{"a": 1}', "tokenizer_config.json": "{}", "generation_config.json": "{}"}


@pytest.fixture(params=["qwen3_tied", "qwen3_untied", "olmo3"])
def source(request, tmp_path):
    """A bfloat16 model folder with tokenizer files."""
    folder = tmp_path / "source"
    folder.mkdir()
    golden = DATA / "goldens" / request.param
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(golden / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((golden / "config.json").read_text().replace("float32", "bfloat16"))
    for name, text in SIDES.items():
        (folder / name).write_text(text)
    return folder


def bits(folder):
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in load_file(folder / "model.safetensors").items()}


def refused(message, *arguments, **keywords):
    with pytest.raises(UserError, match=message) as caught:
        convert(*map(str, arguments), **keywords)
    assert "\n" not in str(caught.value)


def test_there_and_back_again_with_the_same_bits(source, tmp_path):
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    out = convert(str(source), str(orbax))
    assert (out.form, out.dtype, out.source) == ("orbax", "bfloat16", {"name": str(source), "revision": None})
    assert out.parameters == sum(t.size for t in load_file(source / "model.safetensors").values())
    out = convert(str(orbax), str(back))
    assert (out.form, out.dtype, out.source["name"]) == ("hf", "bfloat16", str(source))
    assert bits(back) == bits(source)
    for name in ("config.json", *SIDES):
        assert (back / name).read_text() == (source / name).read_text(), name
    assert json.loads((back / "sdzero_export.json").read_text())["source"]["name"] == str(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "orbax", "source"]
    # Over themselves: an earlier conversion is replaced.
    convert(str(source), str(orbax))
    convert(str(orbax), str(back))
    assert bits(back) == bits(source)


def test_the_model_is_recorded_and_read_back(tmp_path):
    folder, orbax = DATA / "goldens" / "olmo3", tmp_path / "orbax"
    convert(str(folder), str(orbax))
    model, _ = load_pretrained(folder)
    record = json.loads((orbax / "convert.json").read_text())
    assert DecoderConfig(**record["model"]) == model.config
    again, source = exchange._model_of(orbax, None)
    assert again == model and again.hf_config == (folder / "config.json").read_text()
    assert source == {"name": str(folder), "revision": None}


def test_types_are_changed_on_request(tmp_path):
    source = DATA / "goldens" / "qwen3_untied"
    convert(str(source), str(tmp_path / "narrow"), to="hf", dtype="bfloat16")
    _, want = load_pretrained(source, dtype="bfloat16")
    _, got = load_pretrained(tmp_path / "narrow", dtype=None)
    convert(str(source), str(tmp_path / "wide"))
    convert(str(tmp_path / "wide"), str(tmp_path / "narrower"), to="orbax", dtype="bfloat16")
    assert convert(str(tmp_path / "narrower"), str(tmp_path / "third")).dtype == "bfloat16"
    assert convert(str(tmp_path / "wide"), str(tmp_path / "fourth"), dtype="bfloat16").dtype == "bfloat16"
    for other in (got, *(load_pretrained(tmp_path / name, dtype=None)[1] for name in ("third", "fourth"))):
        assert same_bits(want, other)


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def trained(tmp_path):
    """A run directory with a finished stage, as the pipeline writes it."""
    model = tiny(tie_embeddings=True)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights(model))
    directory = tmp_path / "run"
    save_params(directory / "srt" / "params", params, {"phrases": {}, "tokenizer": "abc"})
    (directory / "config.json").write_text(json.dumps({"name": "x", "model": dataclasses.asdict(model.config)}))
    return directory, model, params


@pytest.mark.parametrize("inside", ["srt/params", "srt"])
def test_parameters_of_a_run_become_a_hugging_face_folder(trained, tmp_path, inside):
    directory, model, params = trained
    sides = tmp_path / "sides"
    sides.mkdir()
    for name, text in SIDES.items():
        (sides / name).write_text(text)
    done = convert(str(directory / inside), str(tmp_path / "out"), tokenizer=str(sides))
    assert (done.form, done.dtype) == ("hf", "bfloat16")
    again, got = load_pretrained(tmp_path / "out", dtype=None)
    same = {name: getattr(model.config, name) for name in ("initializer_range",)}
    assert dataclasses.replace(again.config, **same) == model.config
    assert same_bits(params, got)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == SIDES["tokenizer.json"]


def test_parameters_that_do_not_say_their_model_need_it_given(trained, tmp_path):
    directory, model, _ = trained
    (directory / "config.json").unlink()
    refused("does not say which model it is; add --config", directory / "srt", tmp_path / "out")
    wrong = dataclasses.replace(model.config, num_layers=3)
    refused(r"key is \(2, 16, 2, 8\), wanted \(3, 16, 2, 8\)", directory / "srt", tmp_path / "out", config=wrong)
    untied = dataclasses.replace(model.config, tie_embeddings=False)
    refused("missing unembedding", directory / "srt", tmp_path / "out", config=untied)
    assert not (tmp_path / "out").exists()
    assert convert(str(directory / "srt"), str(tmp_path / "out"), config=model.config).form == "hf"


def test_a_recorded_model_with_an_unknown_setting_is_refused(trained, tmp_path):
    directory, model, _ = trained
    fields = dataclasses.asdict(model.config) | {"hiden_size": 16}
    (directory / "config.json").write_text(json.dumps({"model": fields}))
    refused("unknown model setting 'hiden_size'; did you mean 'hidden_size'", directory / "srt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ what is refused


def test_files_of_others_are_not_overwritten(source, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    refused(r"not converted here \(mine\.txt\)", source, notes)
    refused(r"not exported here \(mine\.txt\)", source, notes, to="hf")
    refused("is the source itself", source, source, to="hf")
    other = shutil.copytree(source, tmp_path / "other")
    refused("not exported here", source, other, to="hf", dtype="float16")
    (tmp_path / "file").write_text("")
    refused("is a file; give a folder", source, tmp_path / "file")
    refused("is a file; give a folder", source, tmp_path / "file", to="hf")
    assert [path.name for path in notes.iterdir()] == ["mine.txt"]
    assert bits(other) == bits(source)


def test_a_run_is_not_overwritten_by_a_conversion(trained, tmp_path):
    directory, *_ = trained
    files = lambda: {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}  # noqa: E731
    before = files()
    refused("not converted here", DATA / "goldens" / "olmo3", directory / "srt" / "params")
    assert files() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(to="orbx"), "--to 'orbx' is not known; did you mean 'orbax'"),
        (dict(dtype="bf16"), "dtype 'bf16' is not one for parameters"),
        (dict(target="gs://bucket/x"), "written to a local folder"),
        (dict(source="nowhere"), "nowhere: no such folder"),
        (dict(tokenizer="nowhere"), "nowhere: no such folder"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, arguments, message):
    given = {"source": str(DATA / "goldens" / "olmo3"), "target": str(tmp_path / "out")} | arguments
    with pytest.raises(UserError, match=message):
        convert(given.pop("source"), given.pop("target"), **given)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_folder_without_one_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    golden, orbax, bare = DATA / "goldens" / "olmo3", tmp_path / "orbax", tmp_path / "bare"
    convert(str(golden), str(orbax))
    bare.mkdir()
    (bare / "generation_config.json").write_text("{}")
    for reader in ("load_pretrained", "_load_orbax"):
        monkeypatch.setattr(exchange, reader, lambda *_, **__: pytest.fail("weights were read"))
    for source, to in ((golden, "orbax"), (golden, "hf"), (orbax, "orbax"), (orbax, "hf")):
        refused("bare has no tokenizer files", source, tmp_path / "out", to=to, tokenizer=str(bare))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "orbax"]


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    orbax = tmp_path / "orbax"
    convert(str(DATA / "goldens" / "qwen3_tied"), str(orbax))
    shutil.rmtree(orbax / "0" / "state")
    (orbax / "0" / "state").mkdir()
    refused("cannot be read as parameters", orbax, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    orbax, source = tmp_path / "orbax", DATA / "goldens" / "qwen3_tied"
    convert(str(source), str(orbax))
    before = sorted(path.relative_to(orbax) for path in orbax.rglob("*"))

    def fails(directory, params, metadata):
        save_params(directory, params, metadata)
        raise OSError("No space left on device")

    monkeypatch.setattr(exchange, "save_params", fails)
    with pytest.raises(OSError, match="No space"):
        convert(str(DATA / "goldens" / "olmo3"), str(orbax))
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]
    assert sorted(path.relative_to(orbax) for path in orbax.rglob("*")) == before
    monkeypatch.undo()
    convert(str(orbax), str(tmp_path / "back"))
    np.testing.assert_equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors"))


# ------------------------------------------------------------------------------------------ command line


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    golden = str(DATA / "goldens" / "qwen3_tied")
    assert run.main(["convert", golden, "out", "--dtype", "bfloat16"]) == 0
    assert "out: orbax, " in capsys.readouterr().out
    assert run.main(["convert", "out", "back"]) == 0
    assert f"back: hf, 16,080 parameters, bfloat16, from {golden}" in capsys.readouterr().out
    for command, words in (
        ("convert out", "the following arguments are required: TO"),
        ("convert out there --to safetensors", "invalid choice: 'safetensors'"),
        ("convert nowhere there", "nowhere: no such folder"),
        ("convert out there --config configs/none.py", "no config file"),
        ("convret out there", "did you mean 'convert'"),
    ):
        assert run.main(command.split()) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err
    assert not (tmp_path / "there").exists()
