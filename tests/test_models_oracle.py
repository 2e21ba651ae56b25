"""Random twins built live in transformers (torch): several shapes of both families, forward and backward."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdzero_jax.models import (
    PRESETS,
    DecoderConfig,
    LanguageModel,
    convert,
    from_config,
    load_pretrained,
    save_pretrained,
    to_hf_config,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle
DATA = Path(__file__).parent / "data"
COMMON = dict(vocab_size=53, initializer_range=0.3, pad_token_id=None, bos_token_id=None, eos_token_id=None)


def hf_config(family, **fields):
    """A transformers config; transformers is imported late since it probes for packages."""
    import transformers

    cls = {"qwen3": transformers.Qwen3Config, "olmo3": transformers.Olmo3Config}[family]
    return cls(**{**COMMON, **fields})


def build(config, seed):
    import transformers

    cls = {"qwen3": transformers.Qwen3ForCausalLM, "olmo3": transformers.Olmo3ForCausalLM}[config.model_type]
    torch.manual_seed(seed)
    model = cls(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_((1.0 if "norm" in name else 0.0) + 0.2 * torch.randn(weight.shape))
    model.set_attn_implementation("eager")
    return model


def plain(theta):
    return {"rope_type": "default", "rope_theta": theta}


def yarn(theta, **fields):
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        **fields,
    }


QWEN = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
            intermediate_size=28, rope_parameters=plain(1e4))  # fmt: skip
OLMO = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=28, sliding_window=7, max_position_embeddings=64,
            rope_parameters={"full_attention": yarn(1e4), "sliding_attention": plain(1e4)})  # fmt: skip
OLMO_LONG = {
    **OLMO,
    "num_hidden_layers": 8,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "full_attention": yarn(1e4, factor=8.0, original_max_position_embeddings=32),
        "sliding_attention": plain(1e4),
    },
}
CASES = {
    "qwen3": ("qwen3", QWEN),
    "qwen3_tied_mqa": ("qwen3", {**QWEN, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3_bias": ("qwen3", {**QWEN, "attention_bias": True}),
    "qwen3_yarn": ("qwen3", {**QWEN, "rope_parameters": yarn(5e6), "max_position_embeddings": 64}),
    "qwen3_late_sliding": (
        "qwen3",
        {**QWEN, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5,
         "max_window_layers": 1},
    ),
    "qwen3_epsilon": ("qwen3", {**QWEN, "rms_norm_eps": 1e-2}),
    "olmo3": ("olmo3", OLMO),
    "olmo3_gqa_tied": ("olmo3", {**OLMO, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "olmo3_two_thetas": (
        "olmo3",
        {**OLMO, "rope_parameters": {"full_attention": yarn(1e5, beta_fast=8.0, attention_factor=1.1),
                                     "sliding_attention": plain(1e3)}},
    ),
    "olmo3_no_yarn": ("olmo3", {**OLMO, "rope_parameters": {k: plain(1e4) for k in OLMO["rope_parameters"]}}),
    # Long: past the window and past YaRN's original length many times over.
    "qwen3_deep_4_to_1": (
        "qwen3", {**QWEN, "num_hidden_layers": 9, "num_attention_heads": 8, "tie_word_embeddings": True}
    ),
    "qwen3_deep_1_to_1": ("qwen3", {**QWEN, "num_hidden_layers": 8, "num_key_value_heads": 4}),
    "qwen3_long_yarn": (
        "qwen3",
        {**QWEN, "num_hidden_layers": 8, "max_position_embeddings": 256,
         "rope_parameters": yarn(1e4, factor=8.0, original_max_position_embeddings=32)},
    ),
    "olmo3_long_4_to_1": ("olmo3", {**OLMO_LONG, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "olmo3_long_1_to_1_tied": (
        "olmo3", {**OLMO_LONG, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4,
                  "tie_word_embeddings": True}
    ),
    "olmo3_long_head_dim": ("olmo3", {**OLMO_LONG, "head_dim": 12, "num_key_value_heads": 1}),
    "olmo3_bias": ("olmo3", {**OLMO, "attention_bias": True}),
    "olmo3_uneven_layers": (
        "olmo3",
        {**OLMO, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_of_live_twins(case, tmp_path):
    family, fields = CASES[case]
    theirs = build(hf_config(family, **fields), seed=3)
    theirs.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path)
    length = 208 if "long" in case else 40
    tokens = np.random.default_rng(0).integers(0, COMMON["vocab_size"], (2, length))
    logits = theirs(input_ids=torch.tensor(tokens), use_cache=False).logits
    probe = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32) / tokens.size
    (torch.log_softmax(logits, -1) * torch.tensor(probe)).sum().backward()

    def loss(params):
        logits = model.unembed(params, model.apply(params, tokens)[0])
        return jnp.sum(jax.nn.log_softmax(logits) * probe), logits

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(got, logits.detach().numpy(), atol=1e-4)
    leaves, named = dict(convert._leaves(grads)), dict(theirs.named_parameters())
    for entry in convert.conversion_table(model):
        leaf = leaves[entry.path] if entry.group is None else leaves[entry.path][entry.group]
        want = named[entry.name].grad.numpy()
        scale = np.abs(want).max()
        np.testing.assert_allclose(entry.to_hf(np.asarray(leaf)) / scale, want / scale, atol=1e-4, err_msg=entry.name)


@pytest.mark.parametrize("kind", ["qwen3", "olmo3"])
def test_an_export_from_nothing_opens_in_transformers(kind, tmp_path):
    """config.json written by us (not copied) means the same to transformers."""
    import transformers

    olmo = dict(norm_position="post", qk_norm="projection", layer_pattern=("sliding", "full"),
                sliding_window=6, rope_theta_sliding=3e3, yarn_factor=4.0, yarn_original_length=16,
                head_dim=8)  # fmt: skip
    dials = olmo if kind == "olmo3" else dict(head_dim=6)
    config = DecoderConfig(vocab_size=53, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1,
                           intermediate_size=20, max_position=64, rope_theta=7e3, **dials)  # fmt: skip
    model = LanguageModel(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape).astype(np.float32), model.param_shapes())
    save_pretrained(tmp_path / "out", model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    tokens = rng.integers(0, 53, (2, 40))
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    got = model.unembed(params, model.apply(params, tokens)[0])
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("case", ["qwen3_deep_4_to_1", "qwen3_bias", "olmo3_long_4_to_1", "olmo3_two_thetas"])
def test_there_and_back_again_opens_in_transformers_with_the_same_logits(case, tmp_path):
    """transformers -> our parameters -> transformers: the very same model, its tokenizer with it."""
    import transformers
    from safetensors.numpy import load_file

    family, fields = CASES[case]
    theirs = build(hf_config(family, **fields), seed=5).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "first")
    for file in (DATA / "tokenizers" / family).iterdir():
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        (tmp_path / "first" / file.name.removesuffix(".gz")).write_bytes(text)
    model, params = load_pretrained(tmp_path / "first", dtype=None)
    save_pretrained(tmp_path / "second", model, params, tokenizer_from=tmp_path / "first")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype == "bfloat16" for name in before)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    # Both are read from folders: `.to(bfloat16)` rounds the rotary frequencies of the model in memory too.
    read = transformers.AutoModelForCausalLM.from_pretrained
    theirs, again = (read(tmp_path / name).eval() for name in ("first", "second"))
    assert again.dtype == torch.bfloat16
    assert again.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
    tokens = torch.tensor(np.random.default_rng(0).integers(0, COMMON["vocab_size"], (2, 40)))
    with torch.no_grad():
        want = theirs(input_ids=tokens, use_cache=False).logits
        assert torch.equal(again(input_ids=tokens, use_cache=False).logits, want)
    old, new = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert old("Two plus two: 2 + 2 = 4.").input_ids == new("Two plus two: 2 + 2 = 4.").input_ids


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_mean_the_same_to_transformers(preset):
    """config.json made from a preset: every tensor name and shape, without weights."""
    import transformers

    model = LanguageModel(PRESETS[preset]())
    config = transformers.AutoConfig.for_model(**to_hf_config(model))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    want = {name: tuple(weight.shape) for name, weight in theirs.named_parameters()}
    assert {entry.name: entry.hf_shape for entry in convert.conversion_table(model)} == want


@pytest.mark.parametrize("file", ["qwen3-4b-instruct-2507.config.json", "olmo-3-7b-instruct.config.json"])
def test_published_configs_name_the_tensors_that_transformers_names(file):
    """Every tensor name and shape of the full-size models, without their weights."""
    import transformers

    hf = json.loads((DATA / "configs" / file).read_text())
    model = from_config(hf)
    config = transformers.AutoConfig.for_model(**hf)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    want = {name: tuple(weight.shape) for name, weight in theirs.named_parameters()}
    assert {entry.name: entry.hf_shape for entry in convert.conversion_table(model)} == want


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_rotary_frequencies_of_the_published_olmo3(layer_type):
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

    from sdzero_jax.models import decoder

    model = LanguageModel(PRESETS["olmo3_7b_instruct"]())
    rotary = Olmo3RotaryEmbedding(hf_config("olmo3", **{**to_hf_config(model), **COMMON}))
    frequencies, scale = decoder.rope_frequencies(model.config, layer_type.removesuffix("_attention"))
    np.testing.assert_allclose(getattr(rotary, f"{layer_type}_inv_freq").numpy(), frequencies, rtol=2e-6)
    assert getattr(rotary, f"{layer_type}_attention_scaling") == pytest.approx(scale, rel=1e-12)
