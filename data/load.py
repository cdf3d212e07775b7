"""Questions: ORZ's formats and plain JSONL in, token ids of prompts out, and the order in which steps use them.

[[{"from": "human", "value": Q}, {"from": "assistant", "ground_truth": {"value": A}}], …]    ORZ's training lists
[{"prompt": [{"from": "user", "value": Q}], "final_answer": A, "choices": {…}}, …]           ORZ's evaluation lists
{"question": Q, "answer": A}  one a line                                                     JSONL
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configs.load import UserError


@dataclass(frozen=True)
class Question:
    question: str
    answer: str
    choices: dict | None = None  # letter → content, for multiple choice


@dataclass(frozen=True)
class Prompt:
    ids: np.ndarray  # int32
    question: Question


def load_questions(path):
    """All questions of a file. Raises UserError naming file, place and what was expected there."""
    if not os.path.isfile(path):
        raise UserError(f"data file {path!r} does not exist")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if text.lstrip().startswith("["):
        try:
            items = [(f"item {i}", item) for i, item in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: broken or truncated JSON: {error.msg}") from None
    else:
        items = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    items.append((f"line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: broken or truncated JSON: {error.msg}") from None
    if not items:
        raise UserError(f"{path}: holds no questions")
    return [read_item(item, f"{path}, {place}") for place, item in items]


def read_item(item, place):
    choices = None
    try:
        if isinstance(item, list):
            expected = "two messages, the question and {'ground_truth': {'value': answer}}"
            ask, reply = item
            question, answer = ask["value"], reply["ground_truth"]["value"]
        elif "prompt" in item:
            expected = "{'prompt': [{'value': question}], 'final_answer': answer}"
            (ask,) = item["prompt"]
            question, answer, choices = ask["value"], item["final_answer"], item.get("choices")
        else:
            expected = "{'question': text, 'answer': text}"
            question, answer, choices = item["question"], item["answer"], item.get("choices")
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{place}: expected {expected}") from None
    for name, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{place}: the {name} must be a text that is not empty, not {value!r}")
    return Question(question, answer, choices)


def read_tasks(cfg, data, log):
    """The questions of all files as prompts; over-long ones are dropped, counted and reported.

    data: path → Questions. Returns a namespace with train (Prompts), eval (set name → Prompts), tokenizer, hidden_size.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
    config = AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
    kept = {}
    for path, questions in data.items():
        prompts = [
            Prompt(encode(question, tokenizer, cfg.prompt_template), question) for question in questions
        ]
        kept[path] = [prompt for prompt in prompts if len(prompt.ids) <= cfg.max_prompt_tokens]
        dropped = f"{len(questions) - len(kept[path])} of {len(questions)} prompts are over"
        if not kept[path]:
            raise UserError(f"{path}: {dropped} max_prompt_tokens={cfg.max_prompt_tokens}; raise it")
        if len(kept[path]) < len(questions):
            log.say(f"{path}: {dropped} max_prompt_tokens={cfg.max_prompt_tokens} and are left out")
    return SimpleNamespace(
        train=[prompt for path in cfg.train_data for prompt in kept[path]],
        eval={Path(path).stem: kept[path] for path in cfg.eval_data},
        tokenizer=tokenizer,
        hidden_size=config.hidden_size,
    )


def encode(question, tokenizer, template):
    """The prompt's token ids, int32, after the tokenizer's begin token where it has one."""
    if template == "chat":
        messages = [{"role": "user", "content": question.question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        # replace, not format: questions are full of braces
        ids = tokenizer(template.replace("{question}", question.question))["input_ids"]
    return np.array(ids, np.int32)


def step_questions(num_questions, prompts_per_step, seed, step):
    """Which questions step 0, 1, 2, … uses: each epoch is a permutation of its own, steps run on through them."""
    places = np.arange(step * prompts_per_step, (step + 1) * prompts_per_step)
    epochs = places // num_questions
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(num_questions)
        for epoch in set(epochs.tolist())
    }
    return np.array([orders[epoch][place % num_questions] for epoch, place in zip(epochs.tolist(), places)])
