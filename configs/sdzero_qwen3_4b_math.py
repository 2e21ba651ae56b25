"""SD-Zero on Qwen3-4B-Instruct-2507 with competition mathematics, responses of up to 16,384 tokens.

Command:   python run.py configs/sdzero_qwen3_4b_math.py
Before:    python run.py data prepare openr1_math_220k; python run.py data prepare math500;
           python run.py doctor configs/sdzero_qwen3_4b_math.py --topology v6e:4x4
Hardware:  16 chips: a v6e:4x4 (SRT takes 16.0 of 31.25 GiB per chip, by the estimate). The smallest: a v5p:2x2x1 with
           mesh.fsdp=4 (63.8 of 95); a v6e:2x4 with mesh.fsdp=8 srt.microbatches=2 (22.0), where the compiler finds
           room without the latter too (29.4, by the estimate 31.9)
Expected:  not run yet. The paper (arXiv:2604.12002) has the figures that this setting is after
"""

import dataclasses

from sdzero_jax.batches import DistillLayout
from sdzero_jax.collect import CollectConfig
from sdzero_jax.config import BaseConfig, Config, DistillConfig, SrtConfig, TrainConfig
from sdzero_jax.evaluate import EvaluateConfig
from sdzero_jax.methods import SrtData
from sdzero_jax.models import PRESETS
from sdzero_jax.optimizer import OptimizerConfig
from sdzero_jax.problems import ProblemsConfig
from sdzero_jax.rollouts import SamplingConfig
from sdzero_jax.sampler import SamplerConfig
from sdzero_jax.sharding import mesh_preset

DEVICES = 16
SAMPLES = 4  # of the stage `train`, responses per question
PROMPT, RESPONSE = 1024, 16_384  # tokens


def train_as(distill: DistillConfig) -> TrainConfig:
    """Another method alone (GRPO unless told otherwise), with phase 2's questions, lengths and rows at once."""
    own = {field.name: getattr(distill, field.name) for field in dataclasses.fields(distill)}
    own |= {"method": "grpo", "samples": SAMPLES, "microbatches": distill.microbatches * SAMPLES}
    return TrainConfig(**own, max_length=distill.layout.max_prompt + distill.layout.max_response)


def get_config() -> Config:
    sampling = SamplingConfig(temperature=0.7, max_new_tokens=RESPONSE)
    distill = DistillConfig(
        questions=9000,
        passes=1,
        batch_size=DEVICES,
        sampling=sampling,
        layout=DistillLayout(max_prompt=PROMPT, max_response=RESPONSE, max_teacher_tokens=PROMPT + 2 * RESPONSE + 64),
        optimizer=OptimizerConfig(learning_rate=5e-6),
    )
    return Config(
        name="sdzero_qwen3_4b_math",
        run_dir="runs/sdzero_qwen3_4b_math",
        phrases="qwen3",
        model=PRESETS["qwen3_4b_instruct_2507"](compute_dtype="bfloat16", remat="full"),
        mesh=mesh_preset(DEVICES),
        base=BaseConfig(pretrained="Qwen/Qwen3-4B-Instruct-2507", steps=0),
        problems=ProblemsConfig(
            train="openr1_math_220k:train", test="math500:test", max_prompt_tokens=PROMPT, overlap="drop"
        ),
        sampler=SamplerConfig(slots=DEVICES),
        collect=CollectConfig(questions=6000, revisions=3, sampling=sampling),
        srt=SrtConfig(
            epochs=3,
            batch_size=DEVICES,
            # x | y_init | d P_r d | y_rev
            data=SrtData(max_length=PROMPT + 2 * RESPONSE + 64),
            optimizer=OptimizerConfig(learning_rate=5e-6, schedule="cosine", weight_decay=1e-4),
        ),
        distill=distill,
        train=train_as(distill),
        evaluate=EvaluateConfig(questions=500, k=8, chunk=32, sampling=sampling),
    )
