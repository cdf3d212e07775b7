"""Questions: every format loads whole, a bad entry is named, prompts follow the template, no question is lost."""

import gzip
import json
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import BASE, ROOT, UserError, read_file
from data.load import (
    Question,
    chat_template,
    check_references,
    encode_prompts,
    load_questions,
    read_tasks,
    report_overlap,
    step_questions,
)
from reward import Grader

ORZ_DATA = Path(os.environ.get("ORZ_DATA", ROOT.parent / "shared" / "data"))
ORZ_FILES = {  # file → questions in it
    "orz_math_57k_sample.json": 1785,
    "orz_math_72k_sample.json": 2725,
    "aime2024.json": 30,
    "math500.json": 500,
    "gpqa_diamond.json": 198,
}

DIALOGUE = [{"from": "human", "value": "1+1?"}, {"from": "assistant", "ground_truth": {"value": "2"}}]
EVALUATION = {"prompt": [{"from": "user", "value": "What is $\\{1\\}$?"}], "final_answer": "a set"}
CHOICE = {
    "prompt": [{"from": "user", "value": "A. x\nB. y"}],
    "final_answer": "B",
    "choices": {"A": "x", "B": "y"},
}
PLAIN = {"question": "ε – 世界?", "answer": "0"}


def written(tmp_path, content):
    path = tmp_path / "set.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# ---- Reading -------------------------------------------------------------------------------------------------------


def test_each_format(tmp_path):
    """Fails if a format loses a field, or if a line separator inside a text cuts a JSONL line in two."""
    load = lambda content: load_questions(written(tmp_path, content))  # noqa: E731
    assert load(json.dumps([DIALOGUE, DIALOGUE])) == [Question("1+1?", "2")] * 2
    expected = [Question("What is $\\{1\\}$?", "a set"), Question("A. x\nB. y", "B", {"A": "x", "B": "y"})]
    assert load("\n " + json.dumps([EVALUATION, CHOICE], indent=4)) == expected
    lines = [
        json.dumps(PLAIN, ensure_ascii=False),
        "",
        json.dumps({"question": "p\u2028q", "answer": "1"}, ensure_ascii=False),
    ]
    assert load("\r\n".join(lines)) == [Question("ε – 世界?", "0"), Question("p\u2028q", "1")]
    # Windows writes a byte order mark first.
    assert load(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode()) == [Question("ε – 世界?", "0")]


@pytest.mark.skipif(not ORZ_DATA.is_dir(), reason=f"no folder {ORZ_DATA}; ORZ_DATA names another")
@pytest.mark.parametrize("name", ORZ_FILES)
def test_orz_files_load_whole(name):
    """Fails if questions of the paper's own files are lost."""
    questions = load_questions(str(ORZ_DATA / name))
    entries = json.loads((ORZ_DATA / name).read_text(encoding="utf-8"))
    assert len(questions) == len(entries) == ORZ_FILES[name]
    for question, entry in zip(questions, entries):
        text = json.dumps(entry)
        assert json.dumps(question.question) in text and json.dumps(question.answer) in text
        assert (question.choices is not None) == (name == "gpqa_diamond.json")


def dialogues(bad):
    return json.dumps([DIALOGUE, bad])


BROKEN = {
    "empty file": ("", "no questions"),
    "empty list": ("[]", "no questions"),
    "blank lines": ("\n\n  \n", "no questions"),
    "truncated list": (json.dumps([DIALOGUE, DIALOGUE], indent=1)[:-20], ":22: broken or truncated JSON"),
    "truncated line": (json.dumps(PLAIN) + "\n" + json.dumps(PLAIN)[:-3], ":2: broken or truncated JSON"),
    "no JSON": (json.dumps(PLAIN) + "\nhello", ":2: broken or truncated JSON"),
    "deep": ("[" * 100_000, "JSON"),
    "long number": (json.dumps(PLAIN) + '\n{"question": ' + "1" * 5000 + "}", ":2: broken"),
    "UTF-16": (json.dumps(PLAIN).encode("utf-16"), "cannot be read as UTF-8 text"),
    "Latin-1": ('{"question": "é", "answer": "1"}'.encode("latin-1"), "in position 14"),
    "one message": (dialogues(DIALOGUE[:1]), "item 2: expected two messages"),
    "three messages": (dialogues(DIALOGUE + DIALOGUE[:1]), "item 2: expected two messages"),
    "swapped messages": (dialogues(DIALOGUE[::-1]), "item 2: expected"),
    "two prompts": (json.dumps([EVALUATION | {"prompt": EVALUATION["prompt"] * 2}]), "item 1: expected"),
    "no answer": (json.dumps(PLAIN) + '\n\n{"question": "1"}', "item 3: expected"),
    "a number": (json.dumps(PLAIN) + "\n3", "item 2: expected"),
    "empty answer": (
        json.dumps(PLAIN) + '\n{"question": "1", "answer": " "}',
        "item 2: the answer must be a text",
    ),
    "empty question": (dialogues([{"value": ""}, DIALOGUE[1]]), "item 2: the question must be a text"),
    "answer no text": (
        json.dumps(PLAIN | {"answer": 42}),
        "item 1: the answer must be a text of whole characters and not empty, but it is 42",
    ),
    "half character": ('{"question": "\\ud800", "answer": "1"}', "item 1: the question must be a text"),
    "answer no choice": (
        json.dumps([CHOICE | {"final_answer": "C"}]),
        "item 1: the answer 'C' is none of the choices",
    ),
    "choices no texts": (
        json.dumps([CHOICE | {"choices": {"A": 1, "B": 2}}]),
        "or they are no dict of texts",
    ),
    "choices no letters": (json.dumps([CHOICE | {"choices": ["A", "B"]}]), "none of the choices"),
    "choices beside the question": (
        json.dumps(PLAIN | {"answer": "B", "choices": {"A": "Mars", "B": "Jupiter"}}),
        "item 1: the choices are not in the question, which is all that the model sees; `data/prepare.py convert`",
    ),
    "other names": (
        json.dumps({"problem": "1", "solution": "2"}),
        "not {problem, solution}; `data/prepare.py convert`",
    ),
    "pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9", "is a Git LFS pointer"),
    "pretty": (
        json.dumps(PLAIN, indent=2),
        "is one JSON value over several lines, not a question on each line: python",
    ),
    "parquet": (b"PAR1\xfe\x00PAR1", "is a Parquet file, not JSON: python data/prepare.py convert"),
    "gzip": (gzip.compress(b"{}"), "is compressed (gzip), not JSON: python data/prepare.py convert"),
    "csv": (
        "question,answer\n1+1,2\n",
        ":1: broken or truncated JSON, or not JSON at all; `data/prepare.py convert` reads CSV",
    ),
    "zip": (b"PK\x03\x04\x00", "is a zip archive, not JSON: unpack it first"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_with_its_place(name, tmp_path):
    """Fails if one bad line of 57,000 ends in a KeyError, is skipped, or becomes a question that no answer can
    solve."""
    content, expected = BROKEN[name]
    with pytest.raises(UserError) as error:
        load_questions(written(tmp_path, content))
    assert "set.json" in str(error.value) and expected in str(error.value), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name, reason", [("missing.json", "No such file"), ("", "Is a directory")])
def test_no_file(name, reason, tmp_path):
    """Fails if a missing file, or a folder in place of a file, ends in a traceback."""
    with pytest.raises(UserError, match=reason):
        load_questions(str(tmp_path / name))


def test_a_hub_data_set_is_named(monkeypatch, tmp_path):
    """Fails if the name of a hub data set, such as openai/gsm8k, ends in "No such file" without the command that
    converts it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="if it is a Hugging Face data set: python data/prepare.py convert openai/gsm8k"
    ):
        load_questions("openai/gsm8k")


def test_pickles_are_never_loaded(tmp_path):
    """A pickle can run code when it is loaded, so no data file is read as one, whatever its name."""
    import pickle

    path = tmp_path / "set.pkl"
    path.write_bytes(pickle.dumps([DIALOGUE]))
    with pytest.raises(UserError, match="as UTF-8"):
        load_questions(str(path))


# ---- Data that can be read but cannot work -------------------------------------------------------------------------

UNREADABLE = ["Mia has 3*6=<<3*6=18>>18 pens.\n#### 18", "So $x = \\boxed{4}$ is left.", "['18']", "**18"]
READABLE = ["18", "\\frac{1}{2}", "(-\\infty, 3)", "x = 4", "Paris", "B", "1,200", "\\text{yes}"]


@pytest.fixture(scope="module")
def grader():
    return Grader(1)


def checked(answers, grader):
    """What is said about a file with these references."""
    said = []
    questions = [Question(f"{i}?", answer) for i, answer in enumerate(answers)]
    check_references({"set.jsonl": questions}, grader, said.append)
    return said


@pytest.mark.parametrize("answer", UNREADABLE)
def test_references_that_no_answer_can_equal_are_refused(answer, grader):
    """Fails if a file with references that cannot be read, such as GSM8K's whole solutions, is accepted: every reward
    would be 0, and the run would go on to its end."""
    with pytest.raises(UserError) as error:
        checked([answer], grader)
    message = str(error.value)
    assert message.startswith("set.jsonl: 1 of 1 references cannot be read as answers, such as ")
    assert repr(answer)[:30] in message and "\n" not in message
    assert ("--extract=####" in message) == ("####" in answer) and ("--extract=boxed" in message) == (
        "boxed" in answer
    )


@pytest.mark.parametrize("answer", READABLE)
def test_good_references_pass(answer, grader):
    assert checked([answer], grader) == []


def test_a_few_unreadable_references_are_counted(grader):
    """Fails if one unreadable reference in a hundred refuses a file, or if nobody is told of the ones that can only
    give 0."""
    assert checked([*READABLE, UNREADABLE[0]], grader)[0].startswith(
        "set.jsonl: 1 of 9 references cannot be read"
    )
    assert checked([UNREADABLE[0]] + ["1"] * 99, grader)  # one of two different references is not over half


@pytest.mark.skipif(not ORZ_DATA.is_dir(), reason=f"no folder {ORZ_DATA}; ORZ_DATA names another")
def test_orz_references_can_be_read(grader):
    """Fails if the paper's own files are refused, or if so many references are tried that a start takes minutes."""
    said = []
    data = {name: load_questions(str(ORZ_DATA / name)) for name in ORZ_FILES}
    check_references(data, grader, said.append)
    for line in said:
        unread, tried = map(int, re.search(r": (\d+) of (\d+) references", line).groups())
        assert tried <= 1000 and unread <= 0.02 * tried


def test_what_is_held_out_and_trained_on_is_said():
    """Fails if nobody is told that evaluation questions are also trained on, which would raise the accuracy."""
    said = []
    a, b, c = (Question(text, "1") for text in "abc")
    cfg = SimpleNamespace(train_data=["t", "both"], eval_data=["e", "both", "clean"])
    report_overlap(
        cfg,
        {"t": [a, b], "both": [c], "e": [b, b, Question("d", "1")], "clean": [Question("d", "1")]},
        said.append,
    )
    assert said == [
        "e: 2 of its 3 questions are in train_data, too",
        "both: is in train_data and in eval_data, so that its questions are trained on",
    ]


# ---- Prompts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer whose tokens are characters, and which puts a begin and an end token around every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(10, 127)]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *characters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    around = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def test_prompt_is_the_template_after_one_begin_token(tokenizer):
    """Fails if braces in a question are read as format fields, or if a prompt has two begin tokens or an end token at
    its end, after which the policy would have to continue."""
    # This tokenizer does put both around every text.
    assert tokenizer("a")["input_ids"] == [0, tokenizer("a", add_special_tokens=False)["input_ids"][0], 1]
    template = read_file(BASE)["prompt_template"]
    question = Question("What is {x} in $\\frac{1}{2}$, {question}, {0}, %s?", "1")
    tokenizer.chat_template = chat_template(tokenizer, template)
    (prompt,), dropped = encode_prompts([question], tokenizer, 2048)
    before, after = template.split("{question}")
    assert tokenizer.decode(prompt.ids) == "<s>" + before + question.question + after
    assert dropped == 0 and prompt.question is question and prompt.ids.dtype == np.int32
    assert (prompt.ids == 0).sum() == 1 and (prompt.ids == 1).sum() == 0


def test_chat_prompt_is_the_models_own(tokenizer):
    """Fails if the tokenizer puts a begin token before the one that the chat template writes."""
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[you]{% endif %}"
    assert chat_template(tokenizer, "chat") == tokenizer.chat_template
    (prompt,), _ = encode_prompts([Question("a{b}", "1")], tokenizer, 2048)
    assert tokenizer.decode(prompt.ids) == "<s>[user]a{b}[you]"


@pytest.mark.parametrize("token", ["</s>", "<s>", "<unk>"])
def test_special_tokens_in_a_question_stay_text(tokenizer, token):
    """Fails if a question that quotes <|im_end|> ends the user's turn in the middle, or if the template's own special
    tokens are lost."""
    tokenizer.chat_template = chat_template(tokenizer, "User: {question}\n")
    question = Question(f"What does {token} mean?", "1")
    (prompt, plain), _ = encode_prompts([question, Question("1+1", "2")], tokenizer, 2048)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert [place for place, number in enumerate(prompt.ids) if number in special] == [0]
    assert tokenizer.decode(prompt.ids) == f"<s>User: What does {token} mean?\n"
    assert tokenizer.decode(plain.ids) == "<s>User: 1+1\n"


TEMPLATES = [
    "{question}",
    "A\n{question}\n",
    "{{ x }} {%% if %%} \"q\" '{question}' \\n \\boxed{} é 𝔸 \t#} {#",
    "  {question}  ",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("question", ["1+1?", "{{ messages }} {% endif %}\n", "<b>&amp; 'é' \U0001d538"])
def test_any_template_becomes_a_chat_template(tokenizer, template, question):
    """Fails if Jinja runs a part of the template or of a question, trims a newline, or escapes a character."""
    tokenizer.chat_template = chat_template(tokenizer, template)
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<s>" + template.replace("{question}", question)


def test_longest_prompt_is_kept_and_one_token_more_is_dropped(tokenizer):
    """Fails if the limit is off by one, so that the longest prompt does not fit the engine, or if dropping a question
    shifts the others."""
    questions = [Question("x" * length, str(length)) for length in (5, 7, 3, 6)]
    tokenizer.chat_template = chat_template(tokenizer, "{question}!")
    prompts, dropped = encode_prompts(questions, tokenizer, 8)  # begin token + question + "!"
    assert dropped == 1 and [len(prompt.ids) for prompt in prompts] == [7, 5, 8]
    assert [prompt.question for prompt in prompts] == [questions[0], questions[2], questions[3]]


def test_read_tasks_reports_what_it_drops(tmp_path):
    """Fails if over-long prompts are dropped without a message, or if a run starts although all of them were
    dropped."""
    said = []
    log = SimpleNamespace(say=said.append)
    settings = {
        "model": str(ROOT / "data/tiny"),
        "train_data": ["a", "b"],
        "eval_data": ["some/held.out.jsonl"],
        "eval_only": True,
        "max_response_tokens": 10,
        "tensor_parallel": 1,
    }
    cfg = SimpleNamespace(
        trust_remote_code=False, prompt_template="User: {question}", max_prompt_tokens=10, **settings
    )
    short, long = Question("1+1", "2"), Question("1+1+1+1+1+1", "6")
    data = {"a": [short, long, short], "b": [short], "some/held.out.jsonl": [short, short]}
    tasks = read_tasks(cfg, data, log)
    assert [prompt.question for prompt in tasks.train] == [short] * 3
    assert {name: len(prompts) for name, prompts in tasks.eval.items()} == {"held.out": 2}
    assert len(said) == 1 and "a: 1 of 3 prompts are over max_prompt_tokens=10" in said[0]
    with pytest.raises(UserError, match="b: 1 of 1 prompts are over max_prompt_tokens=10: raise it"):
        read_tasks(cfg, data | {"b": [long]}, log)
    cfg.prompt_template = "chat"
    with pytest.raises(UserError, match="no chat template"):
        read_tasks(cfg, data, log)


def test_the_demo_is_measured_on_what_it_has_not_seen(tmp_path, monkeypatch):
    """Fails if a file of the demo was edited by hand, or if a held-out sum is trained on in either order of its
    numbers."""
    import data.make_tiny as make_tiny

    monkeypatch.setattr(make_tiny, "OUT", tmp_path)
    held_out = make_tiny.make_questions()
    pairs = {}
    for name in ("train", "eval"):
        text = (ROOT / f"data/tiny/{name}.jsonl").read_text()
        assert (tmp_path / f"{name}.jsonl").read_text() == text
        questions = [json.loads(line) for line in text.splitlines()]
        pairs[name] = {frozenset(row["question"].split("+")) for row in questions}
        assert all(sum(map(int, row["question"].split("+"))) == int(row["answer"]) for row in questions)
    assert not pairs["train"] & pairs["eval"]
    documents = make_tiny.write_documents(random.Random(0), False, 5000)
    pretrained = {frozenset(map(int, re.findall(r"\d+", prompt))) for prompt, _ in documents}
    assert len(pretrained) > 4000 and not pretrained & held_out


def test_the_recurrence_is_measured_on_what_it_has_not_seen(tmp_path):
    """Like the demo's test: the reference answers follow the rule, and no document of pre-training has a question of
    the two files."""
    import data.make_recurrence as make_recurrence

    make_recurrence.write_questions(tmp_path)
    seen = set()
    for name, count in (("train", 512), ("eval", 128)):
        text = (ROOT / f"data/recurrence/{name}.jsonl").read_text()
        assert (tmp_path / f"{name}.jsonl").read_text() == text
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == count
        for row in rows:
            num_steps, x = map(int, re.findall(r"\d+", row["question"]))
            for _ in range(num_steps):
                x = (21 * x + 7) % 100
            assert int(row["answer"]) == x
            seen.add(row["question"])
    assert len(seen) == 512 + 128
    rng, questions = random.Random(0), make_recurrence.split_questions()["pretrain"]
    for kind in make_recurrence.DOCUMENTS:
        documents = [make_recurrence.write_document(rng, kind, questions) for _ in range(1000)]
        asked = {re.search("User: (.*)\n", prompt)[1] for prompt, _ in documents}
        assert len(asked) > 200 and not asked & seen


def test_a_check_of_the_recurrence_is_right_more_often_than_work():
    """Fails if an answer with checked steps is not right more often than one without, or if a check that never agrees
    gives an answer all the same: longer answers would then gain nothing."""
    import data.make_recurrence as make_recurrence

    rng, num_right = random.Random(0), {}
    for kind in ("work", "check"):
        answers = [getattr(make_recurrence, kind)(14, 37, rng)[1] for _ in range(2000)]
        assert (None in answers) == (kind == "check")
        num_right[kind] = answers.count(make_recurrence.answer_to(14, 37))
    assert 700 < num_right["work"] < 1000 and 1300 < num_right["check"] < 1600


# ---- Order ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # on a busy machine an example may take long
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_every_epoch_has_every_question_once(num_questions, prompts_per_step, seed):
    """Fails if the tail of an epoch is dropped, or if the steps around it repeat questions (NeMo-RL#2519)."""
    num_steps = -(-3 * num_questions // prompts_per_step)
    steps = [step_questions(num_questions, prompts_per_step, seed, step) for step in range(num_steps)]
    assert all(len(step) == prompts_per_step for step in steps)
    stream = np.concatenate(steps)
    for epoch in range(3):
        part = stream[epoch * num_questions : (epoch + 1) * num_questions]
        assert sorted(part) == list(range(num_questions))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    """Fails if a resumed run sees other questions than an uninterrupted one, or if every epoch has the same order."""
    np.random.seed(0)
    first = [step_questions(1000, 250, 1, step) for step in range(8)]
    # Called in another order, the steps are the same: there is no cursor and no hidden state.
    again = [step_questions(1000, 250, 1, step) for step in reversed(range(8))][::-1]
    assert all((a == b).all() for a, b in zip(first, again))
    assert (np.concatenate(first[:4]) != np.concatenate(first[4:])).any()
    assert (first[0] != step_questions(1000, 250, 2, 0)).any()
    # The order does not depend on the size of a step.
    assert (np.concatenate(first) == step_questions(1000, 2000, 1, 0)).all()
    late = step_questions(57_000, 128, 1, 10**7)
    assert len(set(late.tolist())) == 128
