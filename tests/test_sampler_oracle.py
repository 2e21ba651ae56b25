"""Greedy decoding by the sampler, token by token as transformers generates it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import tiny, tiny_olmo, weights

from sdzero_jax.models import save_pretrained
from sdzero_jax.sampler import Request, Sampler

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.oracle, pytest.mark.slow]
NEW = 210
TWINS = {
    "qwen3": lambda: tiny(num_layers=4, max_position=512),
    # The window of 16 and YaRN's original 32 positions are both crossed.
    "olmo3": lambda: tiny_olmo(num_layers=8, sliding_window=16, yarn_original_length=32, max_position=256),
}


@pytest.mark.parametrize("family", TWINS)
def test_greedy_ids_equal_generate_and_our_own_full_forward(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = TWINS[family]()
    params = weights(model)
    save_pretrained(tmp_path / "twin", model, params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40, size).tolist() for size in (1, 3, 17, 33, 40)]
    requests = [
        Request(id=str(i), prompt=prompt, max_new_tokens=NEW, temperature=0.0) for i, prompt in enumerate(prompts)
    ]
    sampler = Sampler(model, slots=3, max_len=256, stop_ids=())  # so that two of the five refill a slot
    done = {c.request_id: c for c in sampler.generate(params, requests, seed=0)}
    forward = jax.jit(lambda tokens: model.unembed(params, model.apply(params, tokens)[0])[0])
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW,
                min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        assert list(done[str(i)].ids) == out[0, len(prompt) :].tolist()
        row = [*prompt, *done[str(i)].ids]
        logits = forward(jnp.asarray([row + [0] * (256 - len(row))]))[len(prompt) - 1 : len(row) - 1]
        assert np.argmax(logits, -1).tolist() == list(done[str(i)].ids)
        want = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.array(done[str(i)].ids)[:, None], 1)[:, 0]
        np.testing.assert_allclose(done[str(i)].logprobs, want, atol=1e-4)
