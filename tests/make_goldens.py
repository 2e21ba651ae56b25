"""Writes tests/data/goldens from transformers in torch: tiny random twins, fixed seeds.

Run it with the packages of requirements-oracle.txt (torch 2.13, transformers 5.23), from anywhere:

    python tests/make_goldens.py

Each folder holds a Hugging Face model (config.json, model.safetensors) and golden.safetensors:
tokens [B, T], logits [B, T, V], loss (mean negative log-likelihood of the next token), its
gradient grad.NAME for every parameter, prompt [B, P] and greedy continuation generated [B, N].
"""

import sys
from pathlib import Path

# transformers probes a package called `kernels`; ours, at the repository's root, must stay unseen.
ROOT = Path(__file__).resolve().parents[1]
sys.path = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import Olmo3Config, Olmo3ForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

DATA = Path(__file__).parent / "data" / "goldens"
NO_SPECIAL = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None, use_cache=True)


def qwen3_tied() -> Qwen3ForCausalLM:
    """GQA 4:1, tied embeddings, heads x head_dim (32) unlike the width (24)."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=40,
            rope_parameters={"rope_type": "default", "rope_theta": 5_000_000.0},
            tie_word_embeddings=True,
            max_position_embeddings=512,
            **NO_SPECIAL,
        )
    )


def qwen3_untied() -> Qwen3ForCausalLM:
    """GQA 1:1, untied embeddings."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=12,
            intermediate_size=32,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            max_position_embeddings=512,
            **NO_SPECIAL,
        )
    )


def olmo3() -> Olmo3ForCausalLM:
    """Two groups of three sliding layers and a full one; sequences beyond window and YaRN's original."""
    return Olmo3ForCausalLM(
        Olmo3Config(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            sliding_window=16,
            max_position_embeddings=256,
            rope_parameters={
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10_000.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 32,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "attention_factor": 1.2079441541679836,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            **NO_SPECIAL,
        )
    )


TWINS = {
    "qwen3_tied": (qwen3_tied, 48, 8, 24),
    "qwen3_untied": (qwen3_untied, 48, 8, 24),
    "olmo3": (olmo3, 208, 12, 48),
}


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that attention is far from uniform: a wrong mask or angle shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_((1.0 if "norm" in name else 0.0) + 0.2 * noise)
        else:
            weight.copy_(noise * (0.4 if "embed" in name else 1.3 * weight.shape[1] ** -0.5))


def golden(model: torch.nn.Module, batch: int, length: int, prompt_length: int, new: int, seed: int) -> dict:
    """The tensors of golden.safetensors, from float32 eager attention."""
    model = model.eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    prompt = tokens[:, :prompt_length].contiguous()
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new)
    with torch.no_grad():
        top = model(input_ids=ids[:, :-1], use_cache=False).logits[:, prompt_length - 1 :].topk(2).values
    tensors = {f"grad.{name}": weight.grad for name, weight in model.named_parameters()}
    tensors.update(tokens=tokens.int(), logits=logits.detach(), loss=loss.detach().reshape(1))
    tensors.update(prompt=prompt.int(), generated=ids[:, prompt_length:].int().contiguous())
    tensors["greedy_margin"] = (top[..., 0] - top[..., 1]).min().reshape(1)
    return tensors


def main() -> None:
    for seed, (name, (build, length, prompt_length, new)) in enumerate(TWINS.items()):
        model = build()
        randomise(model, seed)
        tensors = golden(model, 2, length, prompt_length, new, seed + 100)
        folder = DATA / name
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file(tensors, folder / "golden.safetensors")
        size = sum(file.stat().st_size for file in folder.iterdir())
        margin, loss = tensors["greedy_margin"].item(), tensors["loss"].item()
        print(f"{name}: {size / 1e3:.0f} kB, loss {loss:.4f}, smallest greedy margin {margin:.5f}")
        assert margin > 1e-3, "a greedy choice is too close to call; take another seed"


if __name__ == "__main__":
    main()
