"""Questions: ORZ's formats and plain JSONL in, token ids of prompts out, and the order in which steps use them.

[[{"from": "human", "value": Q}, {"from": "assistant", "ground_truth": {"value": A}}], …]    ORZ's training lists
[{"prompt": [{"from": "user", "value": Q}], "final_answer": A, "choices": {…}}, …]           ORZ's evaluation lists
{"question": Q, "answer": A}  one a line, "choices" here too                                 JSONL

Further fields of an entry are kept for a task file (own_task.py). Its function `questions` may take the place of files.
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from configs.load import UserError
from data.models import read_models


class Question(NamedTuple):
    """A question with its reference answer; choices is {letter: content} where it is multiple choice."""

    question: str
    answer: str
    choices: dict | None = None
    extra: dict | None = None  # all further fields

    def as_dict(self):
        """The question as the functions of a task file get it: all fields in one dict."""
        fields = {"question": self.question, "answer": self.answer, "choices": self.choices}
        return (self.extra or {}) | fields


class Prompt(NamedTuple):
    """A Question as the model sees it."""

    ids: np.ndarray  # token ids, int32 [length of the prompt]
    question: Question


# ---- Reading -----------------------------------------------------------------------------------------------------


def load_questions(path):
    """All Questions of a file. Raises UserError naming the file, the place and what was expected there."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data file {path!r} cannot be read as UTF-8 text: {error}") from None
    questions = []
    if text.lstrip().startswith("["):
        for number, item in enumerate(read_json(text, path, line=1), 1):
            questions.append(to_question(item, f"{path}, item {number}"))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                item = read_json(line, path, line=number)
                questions.append(to_question(item, f"{path}, item {number}"))
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def read_json(text, path, line):
    """The value of a JSON text that begins in this line of the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", error)
        raise UserError(f"{path}:{line}: broken or truncated JSON: {reason}") from None


def to_question(item, place):
    """An entry of a file, in whichever format, as a Question. Raises UserError, which names `place`, if it is none."""
    extra = {}
    match item:
        case [{"value": question}, {"ground_truth": {"value": answer}}]:
            choices = None
        case {"prompt": [{"value": question}], "final_answer": answer, **extra}:
            choices = extra.pop("choices", None)
        case {"question": question, "answer": answer, **extra}:
            choices = extra.pop("choices", None)
        case _:
            formats = "two messages, {prompt, final_answer} or {question, answer}, as data/load.py shows them"
            raise UserError(f"{place}: expected {formats}")
    check_text("question", question, place)
    check_text("answer", answer, place)
    if choices is not None:
        check_choices(choices, answer, place)
    return Question(question, answer, choices, extra or None)


def check_text(name, text, place):
    # Surrogates are halves of characters, which no tokenizer takes.
    if not isinstance(text, str) or not text.strip() or re.search(r"[\ud800-\udfff]", text):
        raise UserError(f"{place}: the {name} must be a text, whole and not empty, not {text!r:.80}")


def check_choices(choices, answer, place):
    texts = isinstance(choices, dict) and all(isinstance(choice, str) for choice in choices.values())
    if not texts or answer not in choices:
        raise UserError(f"{place}: the answer {answer!r} is none of the choices (texts) {choices!r:.80}")


def task_questions(grader, split, folder):
    """The task file's questions of a split, as a list of the JSONL file that holds them: `folder`/`split`.jsonl.

    Where that file is there already, it is a run that goes on, and nothing is asked. The list is empty where there are no
    questions. Raises UserError where the task file fails or gives what is no question.
    """
    path = Path(folder, f"{split}.jsonl")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = f"{path}.part"
        if grader.write_questions(split, part):
            try:
                load_questions(part)
            except UserError as error:
                place = f"task file {grader.task.path}: questions({split!r})"
                raise UserError(str(error).replace(part, place)) from None
        os.replace(part, path)
    return [str(path)] if path.stat().st_size else []


# ---- Prompts -----------------------------------------------------------------------------------------------------


def chat_template(tokenizer, template):
    """The setting prompt_template as a chat template of the tokenizer, which is exported with the trained model.

    "chat" keeps the tokenizer's own. Otherwise the text comes after the begin token, where there is one, as in ORZ.
    """
    if template == "chat":
        return tokenizer.chat_template
    begin_token = tokenizer.bos_token or ""
    parts = (begin_token + template).split("{question}")
    literals = [json.dumps(part, ensure_ascii=False) for part in parts]
    return "{{ " + " + messages[-1]['content'] + ".join(literals) + " }}"


def encode_prompts(questions, tokenizer, max_prompt_tokens):
    """The questions as Prompts, and how many were dropped for being longer than max_prompt_tokens."""
    chats = [[{"role": "user", "content": question.question}] for question in questions]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    # Without special tokens: some tokenizers would begin a second time, some would end the prompt with an end token.
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = []
    for ids, question in zip(rows, questions):
        if len(ids) <= max_prompt_tokens:
            kept.append(Prompt(np.array(ids, np.int32), question))
    return kept, len(questions) - len(kept)


def read_tasks(cfg, data, log):
    """The questions of all files as prompts; over-long ones are dropped, counted and reported.

    data: path → Questions. Returns a namespace with train (Prompts), eval (set name → Prompts), tokenizer, hidden_size.
    """
    tokenizer, config = read_models(cfg, log)
    tokenizer.chat_template = chat_template(tokenizer, cfg.prompt_template)
    prompts = {}
    for path, questions in data.items():
        prompts[path], dropped = encode_prompts(questions, tokenizer, cfg.max_prompt_tokens)
        limit = f"max_prompt_tokens={cfg.max_prompt_tokens}"
        report = f"{path}: {dropped} of {len(questions)} prompts are over {limit}"
        if not prompts[path]:
            raise UserError(f"{report}: raise it")
        if dropped:
            log.say(f"{report} and are left out")
    train = []
    for path in cfg.train_data:
        train += prompts[path]
    hidden_size = config.get_text_config().hidden_size
    eval_sets = {Path(path).stem: prompts[path] for path in cfg.eval_data}
    return SimpleNamespace(train=train, eval=eval_sets, tokenizer=tokenizer, hidden_size=hidden_size)


# ---- Order -------------------------------------------------------------------------------------------------------


def step_questions(num_questions, prompts_per_step, seed, step):
    """Which questions step 0, 1, 2, … uses, as indices.

    Each epoch is a permutation of its own, from (seed, epoch). The epochs stand end to end, and steps take
    prompts_per_step from one place to the next, so that a step may lie in several epochs.
    """
    first = step * prompts_per_step
    last = first + prompts_per_step - 1
    orders = []
    for epoch in range(first // num_questions, last // num_questions + 1):
        rng = np.random.default_rng([seed, epoch])
        orders.append(rng.permutation(num_questions))
    start = first % num_questions
    return np.concatenate(orders)[start : start + prompts_per_step]
