"""Real questions, a real tokenizer and the maths grader on a CPU: a rehearsal of a run on a real model.

A Qwen3-shaped model of random weights is first trained to recite a few GSM8K solutions, so that there
is something to revise; then every stage runs as it would with a pretrained model. It learns nothing
that carries over to other questions.

Command:   python run.py configs/gsm8k_tiny.py
Hardware:  2 CPU cores, 4 GB of memory; the hub for the tokenizer, or problems.tokenizer=FOLDER
Expected:  about 5 minutes; the figures mean nothing but that everything works together
"""

from configs.sdzero_qwen3_4b_math import train_as
from sdzero_jax.batches import DistillLayout
from sdzero_jax.checkpoint import CheckpointConfig
from sdzero_jax.collect import CollectConfig
from sdzero_jax.config import BaseConfig, Config, DistillConfig, LocalisationConfig, SrtConfig
from sdzero_jax.evaluate import EvaluateConfig
from sdzero_jax.health import HealthConfig
from sdzero_jax.methods import SrtData
from sdzero_jax.models import DecoderConfig
from sdzero_jax.optimizer import OptimizerConfig
from sdzero_jax.problems import ProblemsConfig
from sdzero_jax.rollouts import SamplingConfig
from sdzero_jax.sampler import SamplerConfig

QUESTIONS = "tests/data/questions/gsm8k_train.jsonl.gz"
PROMPT, RESPONSE = 80, 96  # tokens


def get_config() -> Config:
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=RESPONSE)
    distill = DistillConfig(
        questions=4,
        passes=2,
        batch_size=2,
        validate_every=2,
        validation_questions=4,
        sampling=sampling,
        layout=DistillLayout(max_prompt=PROMPT, max_response=RESPONSE),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        checkpoint=CheckpointConfig(every=2),
    )
    return Config(
        name="gsm8k_tiny",
        run_dir="runs/gsm8k_tiny",
        phrases="qwen3",
        model=DecoderConfig(
            vocab_size=151_936,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=192,
            rope_theta=5_000_000.0,
            initializer_range=0.05,
            tie_embeddings=True,
            max_position=512,
        ),
        problems=ProblemsConfig(
            train=QUESTIONS,
            validation=QUESTIONS,
            test=QUESTIONS,
            overlap="allow",  # it is asked what it has learnt to recite
            tokenizer="Qwen/Qwen3-4B-Instruct-2507",  # the tokenizer only: 16 MB
            max_prompt_tokens=PROMPT,
        ),
        sampler=SamplerConfig(slots=8, prompt_multiple=PROMPT),
        base=BaseConfig(
            steps=80,
            batch_size=2,
            questions=4,
            max_length=PROMPT + RESPONSE,
            optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_fraction=0.05),
            checkpoint=CheckpointConfig(every=40, keep_best=0),
        ),
        collect=CollectConfig(questions=4, responses=2, chunk=2, sampling=sampling),
        srt=SrtConfig(
            epochs=2,
            batch_size=2,
            data=SrtData(max_length=PROMPT + 2 * RESPONSE + 16),
            optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        distill=distill,
        train=train_as(distill),
        evaluate=EvaluateConfig(questions=4, k=2, chunk=4, sampling=sampling),
        localisation=LocalisationConfig(questions=4, examples=4),
        health=HealthConfig(keep_rate_stop=0.0, questions=4),
    )
