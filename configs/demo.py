"""The whole method on the embedded chain task, from random weights, on a CPU.

Command:   python run.py            (or: python run.py configs/demo.py)
Hardware:  2 CPU cores, 2 GB of memory
Expected:  see docs/RESULTS.md; 5 to 10 minutes, of which training the base takes half
"""

from sdzero_jax.batches import DistillLayout
from sdzero_jax.checkpoint import CheckpointConfig
from sdzero_jax.collect import CollectConfig
from sdzero_jax.config import BaseConfig, Config, DistillConfig, SrtConfig, TrainConfig
from sdzero_jax.evaluate import EvaluateConfig
from sdzero_jax.health import HealthConfig
from sdzero_jax.methods import SrtData
from sdzero_jax.models import DecoderConfig
from sdzero_jax.optimizer import OptimizerConfig
from sdzero_jax.rollouts import SamplingConfig
from sdzero_jax.sampler import SamplerConfig
from sdzero_jax.sources import ReplayConfig
from sdzero_jax.tasks import ChainConfig, TaskConfig


def get_config() -> Config:
    # Two solutions and a control phrase fit in 72 tokens; one solution has 20 to 28.
    two_solutions = SamplingConfig(temperature=1.0, max_new_tokens=72)
    # Distillation reads one solution: a teacher shown several attempts was never trained on that.
    one_solution = SamplingConfig(temperature=1.0, max_new_tokens=30)
    layout = DistillLayout(max_prompt=15, max_response=30)
    gentle = OptimizerConfig(
        learning_rate=4e-4, schedule="cosine", warmup_fraction=0.3, final_fraction=0.1, clip_norm=0.1
    )
    return Config(
        model=DecoderConfig(
            vocab_size=20,
            hidden_size=96,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            intermediate_size=240,
            max_position=256,
        ),
        # 40 rows of three attempts instead of 42: divisible over 8 devices.
        task=TaskConfig(chain=ChainConfig(batch_sizes=(128, 64, 40))),
        sampler=SamplerConfig(slots=256, prompt_multiple=32),
        base=BaseConfig(
            optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_fraction=0.05),
            checkpoint=CheckpointConfig(every=100, keep_best=0),
        ),
        collect=CollectConfig(questions=1024, chunk=256, sampling=two_solutions),
        srt=SrtConfig(
            data=SrtData(max_length=96),
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_fraction=0.05),
        ),
        distill=DistillConfig(
            questions=1024,
            passes=2,
            rounds=2,
            batch_size=16,
            sampling=one_solution,
            layout=layout,
            optimizer=gentle,
        ),
        # Any other method, after the demo: python run.py train configs/demo.py train.method=grpo train.samples=4 --fork
        train=TrainConfig(
            expected_tokens=24.0,
            validate_every=32,
            sampling=one_solution,
            layout=layout,
            replay=ReplayConfig(max_length=96),
            optimizer=gentle,
            max_length=48,
        ),
        evaluate=EvaluateConfig(questions=512, k=4, sampling=two_solutions),
        health=HealthConfig(min_mean_tokens=12.0),
    )
