"""The memory budget: parts computed by hand, the whole against the compiler, what the doctor proposes."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdzero_jax import doctor, memory, sharding, topology
from sdzero_jax.batches import DistillLayout
from sdzero_jax.collect import CollectConfig
from sdzero_jax.config import Config, DistillConfig, SrtConfig, load_config
from sdzero_jax.errors import UserError
from sdzero_jax.evaluate import EvaluateConfig
from sdzero_jax.methods import SrtData
from sdzero_jax.models import DecoderConfig, LanguageModel
from sdzero_jax.rollouts import SamplingConfig
from sdzero_jax.sampler import SamplerConfig
from sdzero_jax.settings import override
from sdzero_jax.sharding import MeshConfig
from sdzero_jax.teacher import TeacherConfig, initial_teacher

GIB = 2**30
# Parameters by hand. Embedding 32 x 8 (tied); a layer: q 8 x 4 x 4, k and v 8 x 2 x 4, out 4 x 4 x 8,
# QK-norms 2 x 4, MLP 3 x 8 x 16, norms 2 x 8; the final norm 8.
LAYER = 128 + 2 * 64 + 128 + 2 * 4 + 3 * 128 + 16
PARAMETERS = 256 + 2 * LAYER + 8
MODEL = DecoderConfig(
    vocab_size=32, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=16,
    tie_embeddings=True, compute_dtype="bfloat16", remat="full",
)  # fmt: skip
TINY = Config(
    model=MODEL,
    phrases="embedded",
    sampler=SamplerConfig(slots=2, block=5, prefill_tokens=4),
    collect=CollectConfig(sampling=SamplingConfig(max_new_tokens=6)),
    evaluate=EvaluateConfig(sampling=SamplingConfig(max_new_tokens=6)),
    srt=SrtConfig(batch_size=2, data=SrtData(max_length=10)),
    distill=DistillConfig(
        batch_size=2,
        sampling=SamplingConfig(max_new_tokens=6),
        layout=DistillLayout(max_prompt=4, max_response=6),
        validate_every=0,
    ),
)


def estimate(config=TINY, mesh=(1, 1, 1)):
    return memory.estimate(config, memory.abstract_mesh(MeshConfig(*mesh), int(np.prod(mesh))))


def test_the_state_of_a_tiny_model_by_hand():
    state, srt = estimate().distill.state, estimate().srt
    assert state["parameters"] == 4 * PARAMETERS
    assert state["optimizer state"] == 8 * PARAMETERS + 2 * 4  # two step counters
    norms = 2 * (2 * 4 + 16) + 8
    assert state["teacher"] == 2 * (PARAMETERS - norms) + 4 * norms
    assert srt.state == state | {"teacher": 0}


def test_the_phases_of_a_tiny_model_by_hand():
    phases = estimate().distill.phases
    backward = phases["layers' backward pass"]
    # Two layers keep their input: 2 rows x 10 tokens x 8 x 2 bytes each.
    assert backward["activations kept"] == 2 * 2 * 10 * 8 * 2
    assert backward["gradients"] == 4 * PARAMETERS
    assert backward["weights in the compute dtype"] == 2 * 2 * LAYER
    assert phases["logits"]["unembedding's gradient (float32)"] == 4 * 32 * 8
    # Room for a prompt, a response, the phrase and a revision, and a block of 5 steps.
    length = 4 + 6 + memory.phrase_tokens(TINY) + 6
    # Keys and values of 2 layers x 2 rows x 2 heads x 4, in 2 bytes; and where they lie.
    bookkeeping = 4 * (2 * 5 + 2 + 1)  # positions of the block, lengths, columns in use
    assert phases["sampling"]["KV cache"] == 2 * 2 * 2 * (length + 5) * 2 * 4 * 2 + bookkeeping


def test_devices_share_what_is_cut_and_nothing_else():
    one, cut = estimate().distill, estimate(mesh=(1, 2, 2)).distill
    assert cut.phases["logits"]["unembedding's gradient (float32)"] == 4 * 32 * 8 / 2  # over tensor, not fsdp
    assert cut.phases["sampling"]["KV cache"] == pytest.approx(one.phases["sampling"]["KV cache"] / 4, rel=0.02)
    kept = "activations kept"
    assert cut.phases["logits"][kept] == one.phases["logits"][kept] / 2  # rows over fsdp, width whole
    replicas = estimate(mesh=(2, 1, 1)).distill
    assert replicas.state == one.state


def test_an_uneven_share_of_rows_counts_as_the_largest():
    three = override(TINY, ["distill.batch_size=3", "sampler.slots=4"])
    assert estimate(three, (1, 2, 1)).distill.phases["logits"]["activations kept"] == 2 * 2 * 10 * 8 * 2


@pytest.mark.parametrize("schedule, bytes_per_parameter", [("live", 0), ("ema", 4)])
def test_the_teacher_by_schedule(schedule, bytes_per_parameter):
    config = override(TINY, [f"distill.teacher.schedule={schedule}"])
    assert estimate(config).distill.state["teacher"] == bytes_per_parameter * PARAMETERS


def test_what_remat_policies_keep_by_hand():
    tokens, item = 2 * 10, 2
    kept = {
        remat: memory.residuals(dataclasses.replace(MODEL, remat=remat), 2, 10) / (tokens * item * 2)
        for remat in ("full", "dots", "none", "offload")
    }
    assert kept["full"] == 8
    # Products that are not batched: q 16, k 8, v 8, out 8, gate 16, up 16, and the block's input; what
    # follows from one more elementwise step is not kept, the last product (down) is needed by nobody.
    assert kept["dots"] == 8 + 16 + 8 + 8 + 8 + 16 + 16
    assert kept["offload"] == 0
    assert kept["none"] > 2 * kept["dots"]


def test_the_batch_is_the_runs():
    config = load_config("configs/demo.py")
    srt, student, teacher = memory.lengths(config)
    batch = memory.batch_of(config, "distill")["distill"]
    assert batch["gen_tokens"].shape == (16, student) == (16, 45)
    assert batch["rev_tokens"].shape == (16, teacher)
    batch = memory.batch_of(config, "srt")["srt"]
    assert batch["tokens"].shape == (config.srt.batch_size, srt) == (64, config.srt.data.max_length)
    assert batch["index"].shape == (64, srt - 1)


@pytest.fixture(scope="module")
def demo():
    """stage -> (estimate, the compiler's count) of the demo's two train steps, optimised as they run."""
    config = load_config("configs/demo.py")
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    estimated = memory.estimate(config, mesh)
    return {
        stage: (
            getattr(estimated, stage),
            memory.count(memory.train_step(config, mesh, stage), memory.batch_of(config, stage)),
        )
        for stage in memory.STAGES
    }


@pytest.mark.parametrize("stage", memory.STAGES)
def test_the_demos_state_is_what_the_compiler_takes_as_arguments(demo, stage):
    estimated, counted = demo[stage]
    read = memory.batch_of(load_config("configs/demo.py"), stage)[stage]
    if stage == "distill":  # these are carried in the batch, but no part of this objective
        del read["reward"], read["ends"], read["sampling_logprobs"]
    batch = sum(leaf.nbytes for leaf in read.values())
    assert sum(estimated.state.values()) + 4 + batch == counted["arguments"]  # 4: the step's number
    assert counted["aliased"] == sum(estimated.state.values()) + 4, "the whole state is updated in place"


@pytest.mark.parametrize("stage", memory.STAGES)
def test_the_demos_peak_is_the_compilers_within_15_percent(demo, stage):
    estimated, counted = demo[stage]
    assert estimated.train_step == pytest.approx(counted["peak"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("stage", memory.STAGES)
def test_a_batch_in_parts_saves_what_the_compiler_says_it_does(demo, stage):
    """A quarter of the rows at once, and a float32 sum of the parts' gradients beside each part's own."""
    config = override(load_config("configs/demo.py"), [f"{stage}.microbatches=4"])
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    counted = memory.count(memory.train_step(config, mesh, stage), memory.batch_of(config, stage))
    estimated = getattr(memory.estimate(config, mesh), stage)
    assert counted["peak"] < demo[stage][1]["peak"]
    assert estimated.train_step == pytest.approx(counted["peak"], rel=0.15)


def test_the_sum_of_the_parts_gradients_is_counted_in_both_stages():
    name, whole = "sum of the parts' gradients (float32)", estimate()
    config = override(TINY, ["srt.microbatches=2", "distill.microbatches=2"])
    cut, kept = estimate(config), "activations kept"
    for stage in (cut.srt, cut.distill):
        assert {parts[name] for phase, parts in stage.phases.items() if name in parts} == {4 * PARAMETERS}
    assert whole.srt.phases["logits"][name] == 0
    assert cut.distill.phases["logits"][kept] == whole.distill.phases["logits"][kept] / 2


def test_srt_by_hand():
    # Two layers keep their input of 4 rows x 20 tokens x 8 x 2 bytes; targets are all tokens but the first.
    config = override(TINY, ["srt.batch_size=4", "srt.data.max_length=20"])
    phases = estimate(config).srt.phases
    assert phases["layers' backward pass"]["activations kept"] == 2 * 4 * 20 * 8 * 2
    assert phases["logits"]["hidden states of the targets"] == 3 * 4 * 19 * 8 * 2
    # 5 of 16, 6 of (4 + 2) x 4 and 6 of 8, in 2 bytes.
    assert phases["layers' backward pass"]["one layer's activations"] == 4 * 20 * 2 * (5 * 16 + 6 * 24 + 6 * 8)
    # Logits, log-probs and gradient; one unembedding is gathered where distillation gathers two.
    assert phases["logits"]["logit tiles"] == 3 * 4 * 19 * 32 * 4
    gathered = [
        getattr(estimate(config, (1, 2, 1)), stage).phases["logits"]["gathered unembeddings"] for stage in memory.STAGES
    ]
    assert gathered == [2 * 32 * 8, 2 * 2 * 32 * 8]


def test_every_host_samples_with_weights_of_its_own():
    mesh = memory.abstract_mesh(MeshConfig(1, 8, 1), 8)
    config = override(TINY, ["sampler.slots=8"])
    weights = "weights in the compute dtype"
    sampling = lambda config, per_host: memory.estimate(config, mesh, per_host).distill.phases["sampling"]  # noqa: E731
    gathered = override(config, ["sampler.weights=gathered"])
    # Cut along fsdp: over 8 devices of one host, or over 2 of each of four.
    assert sampling(gathered, 0)[weights] == sampling(gathered, 8)[weights] == 2 * PARAMETERS / 8
    assert sampling(gathered, 2)[weights] == 2 * PARAMETERS / 2
    # Cut along tensor, by the two heads of keys at most; with one device a host, it holds all.
    assert sampling(config, 0)[weights] == sampling(config, 2)[weights]
    assert sampling(config, 1)[weights] == 2 * PARAMETERS
    # The slots are shared out: 2 a host with half of the heads, or 1 a device.
    cache = "KV cache"
    assert sampling(config, 2)[cache] == sampling(config, 0)[cache]


def test_adapters_take_the_place_of_the_state_and_of_the_gradients():
    config = override(load_config("configs/demo.py"), ["distill.lora.rank=4", "srt.lora.rank=4"])
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    estimated = memory.estimate(config, mesh)
    model = config.model
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    adapters = 4 * model.num_layers * (
        2 * (model.hidden_size + heads) + 2 * (model.hidden_size + kv_heads)
        + 3 * (model.hidden_size + model.intermediate_size)
    )  # fmt: skip
    assert estimated.distill.state["teacher"] == 4 * adapters
    for stage, copies in {"srt": 3, "distill": 4}.items():
        counted = memory.count(memory.train_step(config, mesh, stage), memory.batch_of(config, stage))
        assert getattr(estimated, stage).state["optimizer state"] == 8 * adapters + 2 * 4
        assert counted["aliased"] == copies * 4 * adapters + 2 * 4 + 4, "the frozen parameters are read only"
        assert getattr(estimated, stage).train_step == pytest.approx(counted["peak"], rel=0.15)
    frozen = estimated.srt.state["parameters"] - 4 * adapters
    assert estimated.srt.phases["held-out loss"]["parameters with the adapters merged"] == frozen
    # Merged, they are sampled with: as they are where one device computes in their dtype, else beside a copy.

    def merged(*changes):
        phase = memory.estimate(override(config, changes), mesh).distill.phases["sampling"]
        return phase.get("parameters with the adapters merged")

    assert merged() is None and merged("model.compute_dtype=bfloat16") == frozen
    assert merged("model.compute_dtype=bfloat16", "distill.lora.rank=0") is None


# ------------------------------------------------------------------------------------------------- remat


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_policies_change_memory_and_not_gradients(remat):
    """Hidden states times fixed numbers; `offload` moves the layers' inputs to the host and back."""
    rng = np.random.default_rng(0)
    model = dataclasses.replace(MODEL, compute_dtype="float32", norm_position="post", qk_norm="projection")
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), LanguageModel(model).param_shapes()
    )
    tokens, factors = rng.integers(0, 32, (2, 10)), rng.standard_normal((2, 10, 8)).astype(np.float32)

    def gradient(policy):
        language = LanguageModel(dataclasses.replace(model, remat=policy))
        gradient = jax.grad(lambda params: jnp.sum(factors * language.apply(params, tokens)[0]))
        return jax.jit(gradient)(params), str(jax.make_jaxpr(gradient)(params))

    (want, _), (got, program) = gradient("none"), gradient(remat)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert np.abs(a).max() > 1e-3
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())
    assert ("<host>[2,2,10,8]" in program) == (remat == "offload"), "two layers' inputs lie in the host's memory"


def test_the_blocks_of_a_pattern_share_a_loop_body_and_its_workspace():
    work = lambda pattern: estimate(  # noqa: E731
        dataclasses.replace(TINY, model=dataclasses.replace(MODEL, layer_pattern=pattern))
    ).distill.phases["layers' backward pass"]["one layer's activations"]
    # Three of 16, two of (4 + 2) x 4 and two of 8, in 2 bytes, for 2 rows of 10 tokens.
    assert work(("sliding", "full")) - work(("full",)) == 2 * 10 * 2 * (3 * 16 + 2 * 24 + 2 * 8)


def test_offload_needs_a_host_memory(monkeypatch):
    class Device:
        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    model = LanguageModel(dataclasses.replace(MODEL, remat="offload"))
    with pytest.raises(UserError, match=r"needs devices with a pinned_host memory.*nearest that needs none: full"):
        model.apply(model.param_shapes(), np.zeros((1, 2), np.int32))


OLMO_LIKE = {"norm_position": "post", "qk_norm": "projection", "attention_bias": True}


@pytest.mark.slow
@pytest.mark.parametrize("family", [{}, OLMO_LIKE])
def test_a_teacher_in_the_compute_dtype_is_the_reviser_to_the_bit(family):
    model = LanguageModel(dataclasses.replace(MODEL, initializer_range=0.3, **family))
    reviser = model.init(jax.random.key(0))
    reviser = jax.tree.map(lambda leaf: leaf * (1 + jax.random.normal(jax.random.key(1), leaf.shape) / 7), reviser)
    teacher = initial_teacher(TeacherConfig(), reviser, "bfloat16")
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(teacher)}
    assert kinds == {"bfloat16", "float32"}, "norms' scales stay as they are"
    tokens = np.arange(12).reshape(1, 12)
    run = jax.jit(lambda params: model.apply(params, tokens)[0])
    np.testing.assert_array_equal(run(teacher), run(reviser))


# ---------------------------------------------------------------------------------------- what to change


def test_what_fits_needs_no_advice_and_what_does_not_names_the_setting():
    config = override(TINY, ["distill.batch_size=8", "model.remat=none", "sampler.slots=8"])
    whole = estimate(config).peak
    fits = memory.suggest(config, (1, 1, 1), whole - 1)
    assert fits == "set model.remat=dots"
    full = estimate(override(config, ["model.remat=full"])).peak
    assert memory.suggest(config, (1, 1, 1), full) == "set model.remat=full"
    assert memory.suggest(config, (1, 1, 1), full - 1).startswith("set ")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 8])
def test_as_many_slots_as_fit_and_not_one_more(rows):
    config = override(TINY, [f"distill.batch_size={rows}"])
    mesh = memory.abstract_mesh(MeshConfig(1, 1, 1), 1)
    needs = lambda slots: (  # noqa: E731
        sum((e := memory.estimate(override(config, [f"sampler.slots={slots}"]), mesh).distill).state.values())
        + sum(e.phases["sampling"].values())
    )
    limit = needs(5) + 1
    assert memory.slots_that_fit(config, mesh, limit) == 5
    assert needs(5) <= limit < needs(6)
    assert memory.slots_that_fit(config, mesh, needs(1) - 1) == 0


def test_a_batch_is_cut_into_parts_before_anything_that_changes_results():
    config = override(TINY, ["distill.batch_size=8", "model.remat=full", "sampler.slots=1"])
    one = estimate(override(config, ["distill.microbatches=8"])).peak
    assert one < estimate(config).peak
    assert memory.suggest(config, (1, 1, 1), one) == "set distill.microbatches=8"
    cut = override(config, ["distill.microbatches=8"])
    assert "microbatches" not in memory.suggest(cut, (1, 1, 1), one - 1)


def test_srt_is_cut_into_parts_and_its_traces_shortened_last():
    settings = ["srt.batch_size=8", "srt.data.max_length=64", "model.remat=full", "sampler.slots=1"]
    config = override(TINY, [*settings, "sampler.cache_dtype=int8", "srt.optimizer.mu_dtype=bfloat16"])
    config = override(config, ["distill.microbatches=2", "distill.optimizer.mu_dtype=bfloat16"])
    assert estimate(config).peak_stage == "srt"
    parts = override(config, ["srt.microbatches=8"])
    peak = estimate(parts).peak
    assert memory.suggest(config, (1, 1, 1), peak) == "set srt.microbatches=8"
    assert memory.suggest(parts, (1, 1, 1), peak - 1) == "set model.remat=offload"
    offloaded = override(parts, ["model.remat=offload"])
    advice = memory.suggest(offloaded, (1, 1, 1), estimate(offloaded).peak - 1)
    assert advice == "set srt.data.max_length=10 (longer traces are dropped and counted)"


def test_a_row_too_wide_for_a_device_is_cut_along_tensor():
    config = override(TINY, ["srt.data.max_length=4000", "srt.batch_size=4", "distill.batch_size=4", "sampler.slots=1"])
    config = override(config, ["model.remat=offload", "model.intermediate_size=256"])
    change = "mesh.data=1 mesh.fsdp=2 mesh.tensor=2 srt.microbatches=2 distill.microbatches=2"
    peak = estimate(override(config, change.split()), (1, 2, 2)).peak
    assert peak < 0.7 * estimate(config, (1, 4, 1)).peak
    assert memory.suggest(config, (1, 4, 1), peak) == f"set {change}"


def test_a_state_that_is_too_large_asks_for_devices():
    state = sum(estimate().distill.state.values())
    assert "4 such devices would do" in memory.suggest(TINY, (1, 1, 1), state * 0.7)
    assert "no number of such devices" in memory.suggest(TINY, (1, 1, 1), 1.0)


def test_replicas_are_given_up_before_results_change():
    config = override(TINY, ["mesh.data=2", "mesh.fsdp=1"])
    limit = estimate(config, (2, 1, 1)).peak * 0.9
    assert memory.suggest(config, (2, 1, 1), limit) == "set mesh.data=1 mesh.fsdp=2"


# -------------------------------------------------------------------------------------------- the doctor


@pytest.mark.slow
def test_the_doctor_says_what_fits_a_slice_that_is_not_there():
    config = load_config("configs/sdzero_qwen3_4b_math.py")
    text = "\n".join(doctor.examine(config, "", slice_name="v5p:2x2x4"))
    assert "fsdp 16" in text and "16 chips of v5p:2x2x4" in text and "of 95.00: fits" in text
    small = "\n".join(doctor.examine(config, "", slice_name="v5e:2x2"))
    assert "does not fit; no setting is enough on 4; adapters would do: set model.param_dtype=bfloat16" in small


@pytest.mark.parametrize(
    "name, hardware, smaller, advice",
    [
        ("sdzero_qwen3_4b_math", "v5p:2x2x1", "v6e:2x4", "set srt.microbatches=2"),
        ("sdzero_qwen3_4b_math", "v6e:4x4", "v6e:2x4", "set srt.microbatches=2"),
        ("sdzero_qwen3_4b_code", "v6e:4x4", "v6e:2x4", "set srt.microbatches=2"),
        ("sdzero_olmo3_7b_math", "v5p:2x2x2", "v6e:4x4", "set model.remat=offload"),
        ("sdzero_olmo3_7b_code", "v5p:2x2x2", "v5p:2x2x1", "set srt.microbatches=4"),
        ("lora_qwen3_4b_math", "1x24", "1x16", "no setting is enough on 1"),
        ("lora_qwen3_1_7b_math", "1x24", "1x16", "set sampler.cache_dtype=int8"),
        ("lora_qwen3_4b_math_80gb", "1x80", "1x40", "set sampler.slots=8"),
    ],
)
def test_real_settings_fit_their_smallest_hardware_and_nothing_smaller(name, hardware, smaller, advice):
    """Both phases and the sampler, with the config's own settings, as its header says."""
    config = load_config(f"configs/{name}.py")

    def verdict(hardware):
        where = {"slice_name": hardware} if ":" in hardware else {"gpus": hardware}
        return next(line for line in doctor.examine(config, "", **where) if line.startswith("  total"))

    assert verdict(hardware).endswith(": fits")
    assert f"does not fit; {advice}" in verdict(smaller)


@pytest.mark.parametrize(
    "name", ["sdzero_qwen3_4b_math", "sdzero_qwen3_4b_code", "sdzero_olmo3_7b_math", "sdzero_olmo3_7b_code"]
)
def test_the_slice_in_a_configs_header_fits_it(name):
    text = pathlib.Path(f"configs/{name}.py").read_text()
    slice_ = topology.parse(re.search(r"--topology (\S+)", text)[1])
    config = memory.fit_to(load_config(f"configs/{name}.py"), slice_.chips)
    assert config.mesh == load_config(f"configs/{name}.py").mesh, "its command needs no other settings there"
    mesh = memory.abstract_mesh(config.mesh, slice_.chips)
    assert memory.estimate(config, mesh, slice_.chips_per_host).peak <= slice_.memory


def test_compiling_gives_a_line_per_train_step_and_goes_on_when_one_does_not_fit(monkeypatch):
    def count_for(slice_, path, overrides, stage):
        if stage == "srt":
            raise UserError("Used 3G of 2G hbm")
        return {"arguments": GIB, "peak": 2 * GIB}

    monkeypatch.setattr(topology, "child_environment", lambda slice_: {})
    monkeypatch.setattr(memory, "count_for", count_for)
    lines = doctor.examine(load_config("configs/demo.py"), "", slice_name="v6e:2x2", compile_it=True)
    assert lines[-2].startswith("  SRT's train step: Used 3G of 2G hbm; estimated ")
    assert (
        lines[-1].startswith("  distillation's train step, by the compiler") and "2.000 (arguments 1.000)" in lines[-1]
    )


def test_slices_of_more_than_four_chips_have_several_hosts():
    assert [topology.parse(name).chips_per_host for name in ("v5p:1x1x1", "v6e:2x2", "v6e:2x4", "v5p:2x2x4")] == [
        1,
        4,
        4,
        4,
    ]
    config = load_config("configs/sdzero_olmo3_7b_math.py")
    text = "\n".join(doctor.examine(config, "", slice_name="v5p:2x2x4"))
    mesh = memory.abstract_mesh(config.mesh, 16)
    weights = memory.estimate(config, mesh, 4).distill.phases["sampling"]["weights in the compute dtype"]
    assert weights > 1.9 * memory.estimate(config, mesh).distill.phases["sampling"]["weights in the compute dtype"]
    assert f"{weights / GIB:.3f}" in text


@pytest.mark.parametrize("gpus", ["24", "0x24", "1x", "1x24GiB"])
def test_gpus_are_a_number_and_a_size(gpus):
    with pytest.raises(UserError, match="such as 1x24 or 8x80"):
        doctor.examine(load_config("configs/demo.py"), "", gpus=gpus)


def test_gpus_that_are_not_there_are_estimated_only():
    with pytest.raises(UserError, match="leave out --topology and --compile"):
        doctor.examine(load_config("configs/demo.py"), "", gpus="1x24", compile_it=True)


@pytest.mark.parametrize("name", ["sdzero_qwen3_4b_math", "sdzero_olmo3_7b_math"])
def test_the_real_models_have_the_published_sizes(name):
    parameters = {"sdzero_qwen3_4b_math": 4_022_468_096, "sdzero_olmo3_7b_math": 7_298_011_136}[name]
    whole = memory.estimate(load_config(f"configs/{name}.py"), memory.abstract_mesh(MeshConfig(1, 1, 1), 1))
    assert whole.srt.state["parameters"] == whole.distill.state["parameters"] == 4 * parameters


def test_a_mesh_is_refitted_to_a_slice_and_the_batch_to_its_parts():
    config = load_config("configs/sdzero_qwen3_4b_math.py")
    fitted = memory.fit_to(config, 64)
    assert (fitted.mesh, fitted.distill.batch_size, fitted.srt.batch_size) == (MeshConfig(4, 16, 1), 64, 64)
    asked = dataclasses.replace(config, mesh=MeshConfig(-1, 2, 2))
    assert memory.fit_to(asked, 8).mesh == MeshConfig(2, 2, 2)
    # Eight rows one by one on a device are two by two on four of them; 16 have a row each, in one part.
    adapters = load_config("configs/lora_qwen3_4b_math.py")
    parts = {count: memory.fit_to(adapters, count).distill.microbatches for count in (1, 4, 16)}
    assert parts == {1: 8, 4: 2, 16: 1}


def test_memory_of_a_device_is_what_it_says():
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 123}

    assert doctor.device_memory([Device()]) == 123
    assert doctor.device_memory(jax.devices()) > GIB / 4  # a CPU: this machine's


def test_a_program_too_large_is_one_line():
    class Step:
        def lower(self, batch):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 3G of 2G hbm.\n\nTotal usage:\n  ...")

    with pytest.raises(UserError, match=r"Used 3G of 2G hbm\.$"):
        memory.count(Step(), {})


# ------------------------------------------------------------------------------- for TPUs not attached


@pytest.mark.oracle
@pytest.mark.parametrize(
    "stage, setting",
    [
        # A compile takes minutes: between them, these two have both stages, full and offload, one part and two.
        ("distill", "model.remat=offload"), ("srt", "srt.microbatches=2"),
    ],
)  # fmt: skip
def test_the_estimate_is_the_tpu_compilers_within_15_percent(stage, setting):
    if topology.libtpu_path() is None:
        pytest.skip("no libtpu: make tpu-compiler")
    # Qwen3-4B with an eighth of its layers and a quarter of its rows, of a quarter of the length.
    overrides = [
        "model.num_layers=4", "distill.layout.max_response=4096", "distill.sampling.max_new_tokens=4096",
        "distill.batch_size=4", "srt.batch_size=8", "srt.data.max_length=8464", setting,
    ]  # fmt: skip
    path, slice_ = "configs/sdzero_qwen3_4b_math.py", topology.parse("v6e:2x2")
    counted = memory.count_for(slice_, path, overrides, stage)
    config = memory.fit_to(override(load_config(path), overrides), slice_.chips)
    estimate = memory.estimate(config, memory.abstract_mesh(config.mesh, slice_.chips))
    estimated = getattr(estimate, stage)
    assert estimated.train_step == pytest.approx(counted["peak"], rel=0.15)
    assert counted["aliased"] == pytest.approx(sum(estimated.state.values()), rel=0.01)
