"""Questions: ORZ's formats and plain JSONL in, token ids of prompts out, and the order in which steps use them.

[[{"from": "human", "value": Q}, {"from": "assistant", "ground_truth": {"value": A}}], …]    ORZ's training lists
[{"prompt": [{"from": "user", "value": Q}], "final_answer": A, "choices": {…}}, …]           ORZ's evaluation lists
{"question": Q, "answer": A}  one a line, "choices" here too                                 JSONL

Further fields of an entry are kept for a task file (own_task.py). Its function `questions` may take the place of files.
"""

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from configs.load import UserError
from data.models import LFS_POINTER, read_models


class Question(NamedTuple):
    """A question with its reference answer; `choices` is {letter: content} for a multiple-choice question, else None."""

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


# First bytes of a file in another format → the format. For CONVERTIBLE a message names `data/prepare.py convert`.
CONVERTIBLE = {b"PAR1": "a Parquet file", b"\x1f\x8b": "compressed (gzip)", b"BZh": "compressed (bzip2)"}
CONVERTIBLE |= {b"\xfd7zXZ": "compressed (xz)", b"ARROW1": "an Arrow file"}
CONVERTIBLE |= {b"\xff\xff\xff\xff": "an Arrow file"}  # a stream, as the package datasets saves its tables
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "compressed (zstd)"}

# Usual names of these columns in other people's data; data/prepare.py convert takes the first that exists.
QUESTION_NAMES = ("question", "problem", "prompt", "query", "instruction", "input")
ANSWER_NAMES = (
    "answer",
    "final_answer",
    "ground_truth",
    "expected_answer",
    "solution",
    "target",
    "label",
    "output",
)


def load_questions(path):
    """All Questions of a file. Raises UserError naming the file, the place and what was expected there."""
    text = read_text(path)
    questions = []
    if text.lstrip().startswith("["):
        for number, item in enumerate(read_json(text, path, line=1), 1):
            questions.append(to_question(item, f"{path}, item {number}"))
    else:
        check_lines(text, path)
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                item = read_json(line, path, line=number)
                questions.append(to_question(item, f"{path}, item {number}"))
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def read_text(path):
    """The text of a data file. Raises UserError for another format, with its name and the command that converts it."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        is_hub_name = path.count("/") == 1 and path[0] not in "./" and not Path(path).suffix
        hint = f"; if it is a Hugging Face data set: {convert_command(path)}" if is_hub_name else ""
        raise UserError(f"data file {path!r} cannot be read: {error.strerror}{hint}") from None
    if content.startswith(LFS_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer, not the file: run `git lfs pull` there")
    for start, kind in CONVERTIBLE.items():
        if content.startswith(start):
            raise UserError(f"{path}: is {kind}, not JSON: {convert_command(path)}")
    for start, kind in ARCHIVES.items():
        if content.startswith(start):
            raise UserError(f"{path}: is {kind}, not JSON: unpack it first")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path!r} cannot be read as UTF-8 text: {error}") from None


def convert_command(path):
    return f"python data/prepare.py convert {shlex.quote(path)}"


def check_lines(text, path):
    """Raises UserError if the text does not begin with {, or is one JSON value over several lines: it is not JSON lines."""
    if text.strip() and text.lstrip()[0] != "{":
        reason = "broken or truncated JSON, or not JSON at all; `data/prepare.py convert` reads CSV, too"
        raise UserError(f"{path}:1: {reason}")
    first_line = text.strip().partition("\n")[0]
    if is_json(text) and not is_json(first_line):
        reason = "is one JSON value over several lines, not a question on each line"
        raise UserError(f"{path}: {reason}: {convert_command(path)}")


def is_json(text):
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_json(text, path, line):
    """The value of a JSON text that begins in this line of the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", error)
        raise UserError(f"{path}:{line}: broken or truncated JSON: {reason}") from None


def to_question(item, place):
    """An entry of a file as a Question. Raises UserError, which names `place`, if it has none of the three formats."""
    extra = {}
    match item:
        case [{"value": question}, {"ground_truth": {"value": answer}}]:
            choices = None
        case {"prompt": [{"value": question}], "final_answer": answer, **extra}:
            choices = extra.pop("choices", None)
        case {"question": question, "answer": answer, **extra}:
            choices = extra.pop("choices", None)
        case _:
            formats = "two messages, {prompt, final_answer} or {question, answer}"
            found = f", not {{{', '.join(map(str, item))}}}" if isinstance(item, dict) else ""
            raise UserError(
                f"{place}: expected {formats}{found:.80}; `data/prepare.py convert` reads other forms"
            )
    check_text("question", question, place)
    check_text("answer", answer, place)
    if choices is not None:
        check_choices(question, choices, answer, place)
    return Question(question, answer, choices, extra or None)


def check_text(name, text, place):
    # Surrogates are halves of characters, which no tokenizer accepts.
    if not isinstance(text, str) or not text.strip() or re.search(r"[\ud800-\udfff]", text):
        raise UserError(
            f"{place}: the {name} must be a text of whole characters and not empty, but it is {text!r:.80}"
        )


def check_choices(question, choices, answer, place):
    texts = isinstance(choices, dict) and all(isinstance(choice, str) for choice in choices.values())
    if not texts or answer not in choices:
        raise UserError(
            f"{place}: the answer {answer!r} is none of the choices, or they are no dict of texts: {choices!r:.80}"
        )
    if not shows(question, choices):
        reason = "the choices are not in the question, which is all that the model sees"
        raise UserError(f"{place}: {reason}; `data/prepare.py convert` writes them into it")


def shows(question, choices):
    """Whether a question contains the text of every choice, whatever white space it has."""
    words = " ".join(question.split())
    return all(" ".join(choice.split()) in words for choice in choices.values())


# ---- Checks of the data ------------------------------------------------------------------------------------------

MOST_TRIED = 1000  # references of each file


def check_references(data, grader, say):
    """Ask grading processes whether they can read the references. A response can equal one that they cannot read only if
    both are spelled the same.

    data: path → Questions; a fixed choice of each file's references is tried. Says how many cannot be read, and raises
    UserError where these are more than half.
    """
    for path, questions in data.items():
        answers = sorted({question.answer for question in questions})
        rng = np.random.default_rng(0)
        tried = [answers[i] for i in rng.permutation(len(answers))[:MOST_TRIED]]
        replies = [grader.readable(answer) for answer in tried]
        unread = [answer for answer, reply in zip(tried, replies) if not reply.result()[0]]
        if not unread:
            continue
        report = f"{path}: {len(unread)} of {len(tried)} references cannot be read as answers, such as {unread[0]!r:.100}"
        if 2 * len(unread) > len(tried):
            raise UserError(f"{report}: hardly any response could be right; {way_out(path, unread)}")
        say(f"{report}: there a response is right only if its answer is spelled the same")


def way_out(path, unread):
    """What to do about these references, which cannot be read."""
    for marker, name in (("####", "####"), ("\\boxed", "boxed")):
        marked = [answer for answer in unread if marker in answer]
        if 2 * len(marked) >= len(unread):
            return f"{convert_command(path)} --extract={name} takes the answers out of the solutions"
    return "give only the answers, as they would stand in \\boxed{}"


def report_overlap(cfg, data, say):
    """Say which held-out questions are trained on as well: the accuracy on these may come from memory."""
    trained = {question.question for path in cfg.train_data for question in data[path]}
    for path in cfg.eval_data:
        common = sum(question.question in trained for question in data[path])
        if path in cfg.train_data:
            say(f"{path}: is in train_data and in eval_data, so that its questions are trained on")
        elif common:
            say(f"{path}: {common} of its {len(data[path])} questions are in train_data, too")


def task_questions(grader, split, folder):
    """The task file's questions of a split, as a list of the JSONL file that holds them: `folder`/`split`.jsonl.

    If that file exists already, the run is being continued, and the task file is not asked again. The list is empty if there
    are no questions. Raises UserError if the task file fails or gives something that is not a question.
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
    texts = [render(question, tokenizer) for question in questions]
    # The template holds the special tokens that are needed. Some tokenizers would add a second begin token or an end token.
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = []
    for ids, text, question in zip(rows, texts, questions):
        if any(token in question.question for token in tokenizer.all_special_tokens):
            ids = encode_quoted(question.question, text, tokenizer)
        if len(ids) <= max_prompt_tokens:
            kept.append(Prompt(np.array(ids, np.int32), question))
    return kept, len(questions) - len(kept)


def render(question, tokenizer):
    """The text of a prompt: the question in the chat template."""
    chat = [{"role": "user", "content": question.question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def encode_quoted(question, text, tokenizer):
    """Token ids of a prompt's text, whose question contains the text of a special token: there it is encoded as plain text.

    The question and what stands before and after it are encoded separately, because a tokenizer recognises special tokens
    either in all of a text or in none of it.
    """
    question = question.strip()  # as some templates do
    before, _, after = text.partition(question)
    ids = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
    ids += tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids + (tokenizer(after, add_special_tokens=False)["input_ids"] if after else [])


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
    """Which questions step 0, 1, 2, … uses, as indices [prompts_per_step].

    Each epoch is a permutation of its own, drawn from (seed, epoch). The epochs are laid end to end, and each step takes the
    next prompts_per_step of them, so that one step may use questions of several epochs.
    """
    first = step * prompts_per_step
    last = first + prompts_per_step - 1
    orders = []
    for epoch in range(first // num_questions, last // num_questions + 1):
        rng = np.random.default_rng([seed, epoch])
        orders.append(rng.permutation(num_questions))
    start = first % num_questions
    return np.concatenate(orders)[start : start + prompts_per_step]
