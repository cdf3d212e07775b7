"""Questions: ORZ's formats and plain JSONL in, token ids of prompts out, and the order in which steps use them.

[[{"from": "human", "value": Q}, {"from": "assistant", "ground_truth": {"value": A}}], …]    ORZ's training lists
[{"prompt": [{"from": "user", "value": Q}], "final_answer": A, "choices": {…}}, …]           ORZ's evaluation lists
{"question": Q, "answer": A}  one a line, "choices" here too                                 JSONL
"""

import json
import os
import re
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configs.load import UserError

# Of architectures whose logits are not hidden states times a matrix, or whose attention is not softmax(q·k) v.
NOT_PLAIN = ("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale")


# Texts, and for multiple choice {letter: content}; a Prompt is a Question's token ids, int32.
Question = namedtuple("Question", "question answer choices", defaults=[None])
Prompt = namedtuple("Prompt", "ids question")


def load_questions(path):
    """All questions of a file. Raises UserError naming file, place and what was expected there."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data file {path!r} cannot be read as UTF-8 text: {error}") from None
    if text.lstrip().startswith("["):
        items = enumerate(read_json(text, path, 1), 1)
    else:
        lines = enumerate(text.split("\n"), 1)
        items = [(number, read_json(line, path, number)) for number, line in lines if line.strip()]
    questions = [to_question(item, f"{path}, item {place}") for place, item in items]
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def read_json(text, path, line):
    """The value of a JSON text that begins in this line of the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line}: broken or truncated JSON: {getattr(error, 'msg', error)}") from None


def to_question(item, place):
    """One entry of a file, in whichever format, as a Question; `place` is named where it is none."""
    match item:
        case [{"value": question}, {"ground_truth": {"value": answer}}]:
            choices = None
        case {"prompt": [{"value": question}], "final_answer": answer}:
            choices = item.get("choices")
        case {"question": question, "answer": answer}:
            choices = item.get("choices")
        case _:
            formats = "two messages, {prompt, final_answer} or {question, answer}, as data/load.py shows them"
            raise UserError(f"{place}: expected {formats}")
    for name, text in (("question", question), ("answer", answer)):
        # surrogates are halves of characters, which no tokenizer takes
        if not isinstance(text, str) or not text.strip() or re.search(r"[\ud800-\udfff]", text):
            raise UserError(f"{place}: the {name} must be a text, whole and not empty, not {text!r:.80}")
    texts = isinstance(choices, dict) and all(isinstance(choice, str) for choice in choices.values())
    if choices is not None and not (texts and answer in choices):
        raise UserError(f"{place}: the answer {answer!r} is none of the choices (texts) {choices!r:.80}")
    return Question(question, answer, choices)


def chat_template(tokenizer, template):
    """The prompt template as the tokenizer's own, exported with it: after its begin token where it has one, as ORZ does."""
    if template == "chat":
        return tokenizer.chat_template
    parts = ((tokenizer.bos_token or "") + template).split("{question}")
    literals = [json.dumps(part, ensure_ascii=False) for part in parts]
    return "{{ " + " + messages[-1]['content'] + ".join(literals) + " }}"


def encode_prompts(questions, tokenizer, max_prompt_tokens):
    """The questions as Prompts, and how many were dropped for being longer than max_prompt_tokens."""
    chats = [[{"role": "user", "content": question.question}] for question in questions]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    # Without special tokens: some tokenizers would begin a second time, some would end the prompt with an end token.
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [Prompt(np.array(ids, np.int32), question) for ids, question in zip(rows, questions)]
    kept = [prompt for prompt in prompts if len(prompt.ids) <= max_prompt_tokens]
    return kept, len(prompts) - len(kept)


def local_model(name, setting):
    """The folder of a model: itself, or a hub name's, fetched to this machine's cache."""
    if not os.path.isdir(name) and name.count("/") == 1 and name[0] not in "./":
        from huggingface_hub import snapshot_download

        try:  # *.j*: json, and jinja, as newer chat templates are
            name = snapshot_download(name, allow_patterns="*.j* *.safetensors *.txt *.model *.py".split())
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{setting}={name!r}: the hub did not give it: {reason}") from error
    files = os.listdir(name) if os.path.isdir(name) else []
    if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
        raise UserError(f"{setting}={name!r}: no hub name, nor a folder of config.json and *.safetensors")
    return name


def read_tasks(cfg, data, log):
    """The questions of all files as prompts; over-long ones are dropped, counted and reported.

    data: path → Questions. Returns a namespace with train (Prompts), eval (set name → Prompts), tokenizer, hidden_size.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=cfg.trust_remote_code)
    config = AutoConfig.from_pretrained(cfg.model, trust_remote_code=cfg.trust_remote_code).get_text_config()
    for name in NOT_PLAIN:
        if getattr(config, name, None) not in (None, 1):
            raise UserError(f"{cfg.model}: its {name}={getattr(config, name)} is not supported: see model.py")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{cfg.model}: {len(tokenizer)} tokens, but vocab_size={config.vocab_size}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{cfg.model}: its tokenizer names no end token (eos_token): no response could end")
    if cfg.prompt_template == "chat" and not tokenizer.chat_template:
        raise UserError(f"prompt_template=chat, but {cfg.model} has no chat template: give a text instead")
    tokenizer.chat_template = chat_template(tokenizer, cfg.prompt_template)
    kept = {}
    for path, questions in data.items():
        kept[path], dropped = encode_prompts(questions, tokenizer, cfg.max_prompt_tokens)
        report = f"{path}: {dropped} of {len(questions)} prompts are over max_prompt_tokens={cfg.max_prompt_tokens}"
        if not kept[path]:
            raise UserError(f"{report}: raise it")
        if dropped:
            log.say(f"{report} and are left out")
    train = [prompt for path in cfg.train_data for prompt in kept[path]]
    sets = {Path(path).stem: kept[path] for path in cfg.eval_data}
    return SimpleNamespace(train=train, eval=sets, tokenizer=tokenizer, hidden_size=config.hidden_size)


def step_questions(num_questions, prompts_per_step, seed, step):
    """Which questions step 0, 1, 2, … uses: each epoch is a permutation of its own, and steps run on through them."""
    start = step * prompts_per_step
    epochs = range(start // num_questions, (start + prompts_per_step - 1) // num_questions + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(num_questions) for epoch in epochs]
    return np.concatenate(orders)[start % num_questions :][:prompts_per_step]
