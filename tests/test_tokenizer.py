"""Hugging Face tokenizers of both families: golden ids, pieces, end tokens, fingerprints, token layout."""

import json
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from model_folders import DATA, TEMPLATES, model_folders

from sdzero_jax.batches import DistillLayout, distill_batch
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Rollout, Verdict
from sdzero_jax.prompts import MATH_INSTRUCTION, PHRASES, code_instruction, instructed
from sdzero_jax.tokenizer import HFTokenizer

FAMILIES = sorted(TEMPLATES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return model_folders(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {family: HFTokenizer(folders / family) for family in FAMILIES}


def golden(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("row", golden("chat_golden.jsonl"), ids=lambda row: row["model"])
def test_golden_chats_to_the_id(tokenizers, row):
    tokenizer = tokenizers["qwen3" if row["model"].startswith("qwen3") else "olmo3"]
    ids = tokenizer.encode_messages(row["messages"], add_generation_prompt=row["add_generation_prompt"])
    assert ids == row["ids"]


@pytest.mark.parametrize("row", golden("encode_golden.jsonl"), ids=lambda row: row["tokenizer"])
def test_golden_encodings_to_the_id(tokenizers, row):
    tokenizer = tokenizers[row["tokenizer"]]
    assert tokenizer.encode(row["text"]) == row["ids"]
    assert tokenizer.decode(row["ids"]) == row["decoded"]


@pytest.mark.parametrize("system", [None, "You are a careful mathematician."])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_the_golden_chats(tokenizers, folders, family, system):
    tokenizer = HFTokenizer(folders / family, system=system) if system else tokenizers[family]
    problem = r"Find the value of $x$ such that $\sqrt{x - 2} = 8$."
    wanted = [
        row
        for row in golden("chat_golden.jsonl")
        if row["model"].startswith(family[:4])
        and row["messages"][-1]["content"] == f"{problem} {MATH_INSTRUCTION}"
        and (row["messages"][0]["content"] == system if system else len(row["messages"]) == 1)
    ]
    assert len(wanted) == 1
    assert tokenizer.encode_prompt(instructed(problem, MATH_INSTRUCTION)) == wanted[0]["ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_demonstrations_from_pieces_are_the_golden_conversation(tokenizers, family):
    """prompt + answer + end_id is what the template writes, up to the newline after Qwen3's end token."""
    tokenizer = tokenizers[family]
    rows = [r for r in golden("chat_golden.jsonl") if r["model"].startswith(family[:4]) and len(r["messages"]) == 2]
    row = next(r for r in rows if r["messages"][-1]["role"] == "assistant")
    question, answer = (message["content"] for message in row["messages"])
    pieces = [*tokenizer.encode_prompt(question), *tokenizer.encode(answer), tokenizer.end_id]
    assert row["ids"][: len(pieces)] == pieces
    assert len(row["ids"]) - len(pieces) == {"qwen3": 1, "olmo3": 0}[family]


def test_end_tokens_and_sizes_of_the_families(tokenizers):
    qwen3, olmo3 = tokenizers["qwen3"], tokenizers["olmo3"]
    assert (qwen3.stop_ids, qwen3.end_id, qwen3.pad_id) == ((151645, 151643), 151645, 151643)
    assert (olmo3.stop_ids, olmo3.end_id, olmo3.pad_id) == ((100265, 100257), 100257, 100277)
    assert (qwen3.vocab_size, olmo3.vocab_size) == (151669, 100278)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_drops_one_end_token_and_keeps_other_specials(tokenizers, family):
    tokenizer = tokenizers[family]
    ids = tokenizer.encode("a<|im_start|>b.\n\n")
    for stop in tokenizer.stop_ids:
        assert tokenizer.decode([*ids, stop]) == "a<|im_start|>b.\n\n"
    assert tokenizer.decode([*ids, tokenizer.end_id, ids[0]]).count("<|") == 2  # an end inside is kept
    assert tokenizer.decode(np.asarray(ids)) == "a<|im_start|>b.\n\n"
    assert tokenizer.decode([]) == ""


def test_a_piece_is_not_what_joined_text_would_be(tokenizers):
    """In Qwen3's vocabulary "." and the phrase's "\\n\\n" merge in joined text: pieces stay as sampled."""
    tokenizer = tokenizers["qwen3"]
    phrase = PHRASES["qwen3"].text(0.0)
    assert tokenizer.encode("The end.") + tokenizer.encode(phrase) != tokenizer.encode("The end." + phrase)


def test_hybrid_qwen3_does_not_think_unless_asked(folders, tmp_path):
    folder = tmp_path / "hybrid"
    shutil.copytree(folders / "qwen3", folder)
    (folder / "chat_template.jinja").unlink()  # tokenizer_config.json holds the hybrid template
    plain, thinking = HFTokenizer(folder), HFTokenizer(folder, enable_thinking=True)
    empty_block = "<think>\n\n</think>\n\n"
    assert plain.decode(plain.encode_prompt("2+2?")).endswith(f"<|im_start|>assistant\n{empty_block}")
    assert thinking.decode(thinking.encode_prompt("2+2?")).endswith("<|im_start|>assistant\n")
    assert plain.fingerprint() != thinking.fingerprint()


def test_fingerprints_follow_vocabulary_template_and_system(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders / "olmo3", folder)
    first = HFTokenizer(folder).fingerprint()
    assert first == HFTokenizer(folders / "olmo3").fingerprint()
    seen = {first, HFTokenizer(folder, system="Be brief.").fingerprint()}
    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(rules, indent=1), encoding="utf-8")
    assert HFTokenizer(folder).fingerprint() == first  # white space of the file does not count
    rules["added_tokens"][-1]["content"] = "<|padding|>"
    (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<|padding|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    seen.add(HFTokenizer(folder).fingerprint())
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("helpful", "kind"))
    seen.add(HFTokenizer(folder).fingerprint())
    assert len(seen) == 4


def broken(folders, tmp_path, **changes):
    """A copy of the Qwen3 folder with files replaced (None: removed)."""
    folder = tmp_path / "broken"
    shutil.copytree(folders / "qwen3", folder)
    for name, text in changes.items():
        file = folder / name.replace("__", ".")
        file.unlink() if text is None else file.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer__json": None}, "tokenizer.json: no such file"),
        ({"tokenizer__json": "{}"}, "tokenizer.json cannot be read"),
        ({"generation_config__json": None}, "generation_config.json: no such file"),
        ({"generation_config__json": "{}"}, "151645, which is not among"),
        ({"generation_config__json": '{"eos_token_id": [151645, 151936]}'}, "wanted ids below 151669"),
        ({"generation_config__json": '{"eos_token_id": 151643}'}, "151645, which is not among"),
        ({"generation_config__json": "[]"}, "generation_config.json holds a JSON list; wanted an object"),
        ({"generation_config__json": '{"eos_token_id": 0.5}'}, "generation_config.json: eos_token_id is [0.5]"),
        ({"tokenizer_config__json": "[]"}, "tokenizer_config.json holds a JSON list; wanted an object"),
        ({"tokenizer_config__json": "{"}, "not valid JSON"),
        ({"tokenizer_config__json": '{"eos_token": "<eos>"}'}, "eos_token is '<eos>'"),
        (
            {"tokenizer_config__json": '{"eos_token": "<|im_end|>"}', "chat_template__jinja": None},
            "no chat template",
        ),
    ],
)
def test_unusable_folders_are_refused_in_one_line(folders, tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        HFTokenizer(broken(folders, tmp_path, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_conversation_that_the_template_refuses_is_one_line(folders, tmp_path):
    folder = broken(folders, tmp_path, chat_template__jinja="{{ raise_exception('no user turn') }}")
    with pytest.raises(UserError, match="no user turn"):
        HFTokenizer(folder).encode_prompt("x")


def test_importing_loads_no_hugging_face_library():
    code = (
        "import sys; import sdzero_jax.tokenizer; "
        "print([m for m in ('transformers', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    root = pathlib.Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Instructions


def test_the_answer_instruction_stands_exactly_once():
    assert MATH_INSTRUCTION == "Please reason step by step, and put your final answer within \\boxed{}."
    once = instructed("What is 2+2?\n", MATH_INSTRUCTION)
    assert once == "What is 2+2? " + MATH_INSTRUCTION
    assert instructed(once, MATH_INSTRUCTION) == once
    assert instructed(f"{MATH_INSTRUCTION} What is 2+2?", MATH_INSTRUCTION) == once


def test_code_instructions():
    assert code_instruction("python") == (
        "Write a Python program that reads standard input and writes standard output. "
        "Put the final program in one ```python block."
    )
    assert "a C++ program" in code_instruction("cpp") and "one ```cpp block" in code_instruction("cpp")
    assert "standard input" not in code_instruction("python", "function")
    with pytest.raises(UserError, match="did you mean 'python'"):
        code_instruction("pyhton")


# Layout: student and teacher sequences through real tokenizers


def random_rollouts(tokenizer, count, seed):
    """Responses of random ids (special ones among them), about half of them ended by a stop token."""
    rng = random.Random(seed)
    rollouts = []
    for index in range(count):
        prompt = tokenizer.encode_prompt(instructed(f"What is {rng.random()}?", MATH_INSTRUCTION))
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        finish = rng.choice(["stop", "length"])
        ids = [i for i in ids if i not in tokenizer.stop_ids] or [0]
        ids += [rng.choice(tokenizer.stop_ids)] if finish == "stop" else []
        verdict = Verdict.of(rng.choice(["correct", "wrong", "unparseable"]))
        question = Question(f"q-{index}", "", ("1",), "math")
        logprobs = tuple(-rng.random() for _ in ids)
        rollouts.append(Rollout(question, tuple(prompt), tuple(ids), logprobs, finish, verdict, 0, logprobs))
    return rollouts


def predicted(batch, side, row):
    """The ids that one side's gathered positions predict: what stands right after each of them."""
    mask = batch["mask"][row] > 0
    return batch[f"{side}_tokens"][row][batch[f"{side}_index"][row][mask] + 1]


@pytest.mark.parametrize("keep_first_eos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_student_and_teacher_predict_identical_ids(tokenizers, family, keep_first_eos):
    tokenizer, phrases = tokenizers[family], PHRASES[family]
    rollouts = random_rollouts(tokenizer, 1000, seed=7)
    layout = DistillLayout(max_prompt=128, max_response=40, keep_first_eos=keep_first_eos)
    batch, counts = distill_batch(
        rollouts, lambda reward: tokenizer.encode(phrases.text(reward)), tokenizer.stop_ids, layout
    )
    assert not any(counts.values())
    ended = 0
    for row, rollout in enumerate(rollouts):
        response = list(rollout.response_ids)
        assert predicted(batch, "gen", row).tolist() == predicted(batch, "rev", row).tolist() == response
        # The teacher's sequence, written out by hand from the rule.
        stop = rollout.finish_reason == "stop"
        ended += stop
        first = response[:-1] if stop and not keep_first_eos else response
        phrase = tokenizer.encode(phrases.text(rollout.verdict.reward))
        wanted = [*rollout.prompt_ids, *first, *phrase, *response]
        assert batch["rev_tokens"][row][: len(wanted)].tolist() == wanted
        assert not batch["rev_segment_ids"][row][len(wanted) :].any()
    assert 300 < ended < 700


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_the_phrase_changes_the_teacher_only_at_the_phrase(tokenizers, family):
    tokenizer = tokenizers[family]
    rollouts = random_rollouts(tokenizer, 50, seed=8)
    layout = DistillLayout(max_prompt=128, max_response=40)
    names = ("paper", family)  # they differ in P_0 only
    batches = []
    for name in names:
        ids = {reward: tokenizer.encode(PHRASES[name].text(reward)) for reward in (0.0, 1.0)}
        batches.append((distill_batch(rollouts, ids.__getitem__, tokenizer.stop_ids, layout)[0], ids))
    (one, ids_one), (two, ids_two) = batches
    assert ids_one[1.0] == ids_two[1.0] and ids_one[0.0] != ids_two[0.0]
    for key in one:
        if not key.startswith("rev_"):
            np.testing.assert_array_equal(one[key], two[key])
    for row, rollout in enumerate(rollouts):
        reward = rollout.verdict.reward
        head = len(rollout.prompt_ids) + len(rollout.response_ids) - (rollout.finish_reason == "stop")
        rows = []
        for batch, ids in batches:
            length = int(batch["rev_segment_ids"][row].sum())
            tokens = batch["rev_tokens"][row][:length].tolist()
            assert tokens[head : head + len(ids[reward])] == ids[reward]
            rows.append(tokens[:head] + tokens[head + len(ids[reward]) :])
        assert rows[0] == rows[1]
        shift = len(ids_two[reward]) - len(ids_one[reward])
        mask = one["mask"][row] > 0
        np.testing.assert_array_equal(two["rev_index"][row][mask], one["rev_index"][row][mask] + shift)
