"""Task files with judges, rewards and questions of the user's, and what may go wrong in them; the examples; W&B."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import QUICK, run

import launch
import reward
from configs.load import ROOT, UserError, load
from data.load import load_questions, task_questions
from log import Log

QUESTION = {"question": "1+1?", "answer": "2", "choices": None, "level": 3}
RIGHT = r"thoughts </think> <answer>\boxed{2}</answer>"
WRONG = r"thoughts </think> <answer>\boxed{3}</answer>"


def needs(package):
    """A mark that skips a test where an optional package is missing."""
    reason = f"{package} is not installed: make extras"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


def grader_of(folder, text, memory_gb=8.0):
    """A Grader with one process and a task file of this text."""
    path = folder / "mine.py"
    path.write_text(text)
    return reward.Grader(1, reward.TaskFile(str(path), text, memory_gb))


def example(name):
    path = ROOT / "examples" / name
    return reward.Grader(1, reward.TaskFile(str(path), path.read_text(), 8.0))


def judged(grader, response=RIGHT, question=QUESTION, finish_reason="stop", with_reward=True):
    return grader.judge(response, question, finish_reason, with_reward).result(300)


# ---- What a task file decides ------------------------------------------------------------------------------------


def test_without_a_task_file_the_rule_decides():
    """Without a task file the reward is the rule's verdict, as 1.0 or 0.0."""
    grader = reward.Grader(1)
    assert judged(grader) == (True, 1.0, "by_number", "")
    assert judged(grader, WRONG) == (False, 0.0, "by_number", "")
    assert judged(grader, finish_reason="length") == (False, 0.0, "cut_off", "")


def test_what_a_task_file_leaves_out_stays_the_rules(tmp_path):
    """A task file without is_correct keeps the rule's verdict; one without reward gives 1.0 or 0.0."""
    only_reward = grader_of(
        tmp_path, "def reward(response, question, correct, finish_reason):\n    return 3 if correct else -1\n"
    )
    assert judged(only_reward) == (True, 3.0, "by_number", "")
    assert judged(only_reward, WRONG) == (False, -1.0, "by_number", "")
    only_verdict = grader_of(
        tmp_path, "def is_correct(response, question):\n    return question['level'] == 3\n"
    )
    assert judged(only_verdict, "anything") == (True, 1.0, "by_task", "")
    assert judged(only_verdict, "anything", QUESTION | {"level": 4}) == (False, 0.0, "by_task", "")


def test_reward_gets_all_that_it_may_need(tmp_path):
    text = """
def is_correct(response, question):
    return response == "yes"

def reward(response, question, correct, finish_reason):
    known = {"question": "1+1?", "answer": "2", "choices": None, "level": 3}
    return 10.0 * (question == known) + 2 * correct + (finish_reason == "length") + len(response) / 10
"""
    grader = grader_of(tmp_path, text)
    assert judged(grader, "yes") == (True, 12.3, "by_task", "")
    assert judged(grader, "no") == (False, 10.2, "by_task", "")
    assert judged(grader, "no", finish_reason="length") == (False, 11.2, "cut_off", "")


def test_a_response_that_was_cut_off_is_never_correct(tmp_path):
    grader = grader_of(tmp_path, "def is_correct(response, question):\n    return True\n")
    assert judged(grader, finish_reason="length") == (False, 0.0, "cut_off", "")
    assert judged(grader) == (True, 1.0, "by_task", "")


def test_evaluation_does_not_ask_for_the_reward(tmp_path):
    """Fails if evaluation asks for the reward: a reward of NaN would count as a task_error there, too."""
    text = "def reward(response, question, correct, finish_reason):\n    return float('nan')\n"
    assert judged(grader_of(tmp_path, text), with_reward=False) == (True, 1.0, "by_number", "")


@pytest.mark.parametrize("value, number", [("10**9", 1e9), ("True", 1.0), ("-0.5", -0.5), ("2", 2.0)])
def test_numbers_are_taken_as_they_are(tmp_path, value, number):
    """Any finite number is a reward: large ones, negative ones, integers and True."""
    text = f"def reward(response, question, correct, finish_reason):\n    return {value}\n"
    assert judged(grader_of(tmp_path, text)) == (True, number, "by_number", "")


# ---- What goes wrong in one --------------------------------------------------------------------------------------

BAD_REWARDS = {
    "float('nan')": "reward returned nan: it must be finite, at most 1e+12",
    "-float('inf')": "reward returned -inf: it must be finite, at most 1e+12",
    "10**400": "reward returned 10000",
    "'1.0'": "reward returned '1.0', not a number",
    "None": "reward returned None, not a number",
    "[1]": "reward returned [1], not a number",
    "1j": "reward returned 1j, not a number",
    "1 / 0": "ZeroDivisionError: division by zero",
    "question['hint']": "KeyError: 'hint'",
    "int('1\\n2')": "ValueError: invalid literal",
    "exit('bye')": "SystemExit: bye",
}


@pytest.mark.parametrize("value", BAD_REWARDS)
def test_a_reward_of_no_use_is_an_error_with_file_and_line(tmp_path, value):
    """Fails if a reward of NaN or text ends the run or is trained on, or if the next response is not judged as
    usual."""
    text = f"""
def reward(response, question, correct, finish_reason):
    if response == "fine":
        return 0.5
    return {value}
"""
    grader = grader_of(tmp_path, text)
    verdict = judged(grader)
    assert verdict[:3] == (True, 0.0, "task_error")
    # For a bad value that was returned, the error names the function's first line.
    is_value = value in list(BAD_REWARDS)[:7]
    assert verdict.error.startswith(f"{tmp_path}/mine.py:{2 if is_value else 5}: {BAD_REWARDS[value]}")
    assert "\n" not in verdict.error
    assert judged(grader, "fine") == (False, 0.5, "no_answer", "")


@pytest.mark.parametrize("value", ["None", "'yes'", "0.5", "float('nan')", "response.nothing", "[]"])
def test_a_verdict_of_no_use_is_an_error(tmp_path, value):
    """Fails if None, from a forgotten return, counts as a verdict: the run would train on rewards of 0 without a
    message."""
    text = f"""
def is_correct(response, question):
    return {value}

def reward(response, question, correct, finish_reason):
    return 7.0
"""
    verdict = judged(grader_of(tmp_path, text))
    assert verdict[:3] == (False, 0.0, "task_error") and f"{tmp_path}/mine.py:" in verdict.error


def test_an_error_in_another_file_is_named_where_the_task_file_called_it(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("def judge(text):\n    raise OSError('no such thing')\n")
    text = "import helper_of_mine\n\n\ndef is_correct(response, question):\n    return helper_of_mine.judge(response)\n"
    assert judged(grader_of(tmp_path, text)).error == f"{tmp_path}/mine.py:5: OSError: no such thing"


def test_hanging_is_counted_and_the_next_response_is_judged(tmp_path):
    """Fails if one response on which a judge never returns stops the grading: all GPUs would wait for it."""
    text = """
def is_correct(response, question):
    while response == "hang":
        pass
    return True

def reward(response, question, correct, finish_reason):
    while response == "slow reward":
        pass
    return 2.0
"""
    grader = grader_of(tmp_path, text)
    assert judged(grader, "hang") == (False, 0.0, "timed_out", "")
    assert judged(grader, "slow reward") == (True, 0.0, "timed_out", "")
    assert judged(grader, "other") == (True, 2.0, "by_task", "")


def test_sleeping_meets_the_backstop(tmp_path, monkeypatch):
    """A judge that sleeps uses no CPU time, so that only the limit on wall time (the backstop) ends it."""
    text = (
        "import time\n\n\ndef is_correct(response, question):\n    time.sleep(9999 * (response == 'sleep'))\n"
    )
    grader = grader_of(tmp_path, text + "    return True\n")
    monkeypatch.setattr(reward, "WALL_SECONDS", 2.0)
    assert judged(grader, "sleep") == (False, 0.0, "backstop", "")
    monkeypatch.setattr(reward, "WALL_SECONDS", 60.0)
    assert judged(grader, "other") == (True, 1.0, "by_task", "")


def test_a_process_that_dies_is_replaced(tmp_path):
    text = "import os\n\n\ndef is_correct(response, question):\n    return os._exit(1) if response == 'die' else True\n"
    grader = grader_of(tmp_path, text)
    assert judged(grader, "die") == (False, 0.0, "crashed", "")
    assert judged(grader, "other") == (True, 1.0, "by_task", "")


def test_printing_and_reading_do_not_disturb_the_replies(tmp_path):
    """Fails if what a task file prints is taken for a reply, or if what it reads is the next request."""
    text = """
import os, subprocess, sys
print("loading", flush=True)

def is_correct(response, question):
    print("[true, 1]")
    os.write(1, b"[true, 2]")
    subprocess.run(["echo", "[true, 3]"])
    print("to the log", file=sys.stderr)
    return sys.stdin.read() == ""
"""
    grader = grader_of(tmp_path, text)
    futures = [grader.judge(RIGHT, QUESTION, "stop", True) for _ in range(20)]
    assert {future.result(300) for future in futures} == {(True, 1.0, "by_task", "")}


def test_imports_do_not_count_and_torch_fits(tmp_path):
    """A task file may import torch, which takes seconds and more address space than a grading process has without a
    task file."""
    text = """
import torch
import time
while time.process_time() < 2.5:
    pass

def reward(response, question, correct, finish_reason):
    return torch.tensor(0.25) if torch.get_num_threads() == 1 and not torch.cuda.is_available() else None
"""
    assert judged(grader_of(tmp_path, text)) == (True, 0.25, "by_number", "")


def test_too_much_memory_is_an_error(tmp_path):
    text = "def is_correct(response, question):\n    return len(bytes(1 << 30)) > 0\n"
    assert judged(grader_of(tmp_path, text, memory_gb=1.0)).error.endswith("mine.py:2: MemoryError")
    assert judged(grader_of(tmp_path, text, memory_gb=8.0)) == (True, 1.0, "by_task", "")


def test_a_file_that_is_edited_keeps_its_meaning_for_the_run(tmp_path):
    """Fails if a process that is replaced loads the edited file, and so gives other rewards than its neighbours."""
    text = "import os\n\n\ndef is_correct(response, question):\n    return os._exit(1) if response == 'die' else True\n"
    grader = grader_of(tmp_path, text)
    (tmp_path / "mine.py").write_text("def is_correct(response, question):\n    return False\n")
    assert judged(grader, "die").outcome == "crashed"
    assert judged(grader, "other") == (True, 1.0, "by_task", "")


REFUSED = {
    "x = 1\n": "1: defines none of is_correct, reward, questions",
    "x = 1\n\ndef is_correct(response, question)\n    return True\n": "3: SyntaxError: expected ':'",
    "import nothing_of_this_name\n": "1: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "\ndef is_correct(response):\n    return True\n": "2: is_correct must be a function of (response, question)",
    "\n\nreward = 1.0\n": "1: reward must be a function of (response, question, correct, finish_reason)",
    "import sys\nsys.exit(3)\n": "2: SystemExit: 3",
    "import os\nos._exit(3)\n": "1: loading it ended with the outcome crashed; limits: 600 s and task_memory_gb=8 GiB of address space",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_file_of_no_use_is_refused_before_ray(tmp_path, capfd, text):
    """Fails if a useless task file is noticed only after minutes of starting, by another process's traceback, or if a
    refusal leaves a folder behind."""
    path = tmp_path / "mine.py"
    path.write_text(text)
    arguments = [f"--out_dir={tmp_path}/runs", f"--task={path}"]
    assert launch.main([str(ROOT / "configs/tiny.py"), *arguments]) == 2
    assert capfd.readouterr().err == f"error: task file {path}:{REFUSED[text]}\n"
    assert not (tmp_path / "runs").exists()


def test_a_file_that_does_not_exist_is_refused(capfd):
    assert launch.main([str(ROOT / "configs/tiny.py"), "--task=nowhere.py"]) == 2
    assert capfd.readouterr().err == "error: task='nowhere.py': there is no such file\n"


# ---- Questions ---------------------------------------------------------------------------------------------------

MAKER = """
def questions(split):
    for i in range({"train": 3, "eval": 0}[split]):
        yield {"question": f"{i} + 1?", "answer": str(i + 1), "level": i}
"""


def test_questions_are_written_once_and_read_again(tmp_path):
    """Fails if a run that is continued asks a generator without a seed again, and so gets other questions than it
    began with."""
    grader = grader_of(tmp_path, MAKER)
    (path,) = task_questions(grader, "train", tmp_path / "questions")
    assert task_questions(grader, "eval", tmp_path / "questions") == []
    questions = load_questions(path)
    expected = {"question": "2 + 1?", "answer": "3", "choices": None, "level": 2}
    assert len(questions) == 3 and questions[2].as_dict() == expected
    other = grader_of(tmp_path, "import random\n" + MAKER.replace("str(i + 1)", "str(random.random())"))
    assert load_questions(*task_questions(other, "train", tmp_path / "questions")) == questions


@pytest.mark.parametrize(
    "body, message",
    [
        ("return None", "mine.py:1: questions('train') returned None, not an iterable of dicts"),
        ("yield {'question': 'a'}\n    1 / 0", "mine.py:3: ZeroDivisionError: division by zero"),
        (
            "yield {'question': 'a', 'answer': {1}}",
            "mine.py:1: question 1 of 'train' cannot be written as JSON",
        ),
        (
            "yield {'question': 'a', 'answer': 5}",
            "mine.py: questions('train'), item 1: the answer must be a text",
        ),
        ("yield 'a question'", "mine.py:1: question 1 of 'train' is 'a question', not a dict"),
        ("raise SystemExit", "mine.py:2: SystemExit"),
        ("import os\n    os._exit(1)", "mine.py: questions('train') had the outcome crashed"),
    ],
)
def test_questions_that_cannot_be_used(tmp_path, body, message):
    grader = grader_of(tmp_path, f"def questions(split):\n    {body}\n")
    with pytest.raises(UserError) as caught:
        task_questions(grader, "train", tmp_path / "questions")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "questions/train.jsonl").exists()


def test_further_fields_of_a_file_reach_the_task(tmp_path):
    lines = [
        {"question": "one?", "answer": "1", "level": 5, "choices": {"1": "one"}},
        {"prompt": [{"from": "user", "value": "2?"}], "final_answer": "2", "answer": "not this", "id": [7]},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = (question.as_dict() for question in load_questions(str(tmp_path / "q.jsonl")))
    assert first == {"question": "one?", "answer": "1", "level": 5, "choices": {"1": "one"}}
    assert second == {"question": "2?", "answer": "2", "choices": None, "id": [7]}


def test_another_task_file_is_another_run(tmp_path):
    """A task file is compared by content: the same file elsewhere is the same run. config.json keeps its hash, and
    task.py its text."""

    def begin(name, text):
        path = tmp_path / name
        path.write_text(text)
        cfg = load([str(ROOT / "configs/tiny.py"), f"--out_dir={tmp_path}", "--name=a", f"--task={path}"])
        cfg.critic_model = cfg.model
        cfg.content = launch.run_content(cfg)
        Log(cfg).metrics.close()

    begin("mine.py", MAKER)
    begin("moved.py", MAKER)
    assert (tmp_path / "a/task.py").read_text() == MAKER
    with pytest.raises(UserError, match="is a run with another task: choose another --name"):
        begin("mine.py", MAKER + "# a comment\n")
    assert (tmp_path / "a/task.py").read_text() == MAKER


# ---- A whole run -------------------------------------------------------------------------------------------------

ADDITION = """
import random
from reward import extract_answer

def questions(split):
    for _ in range({"train": 64, "eval": 8}[split]):  # Without a seed: a run that goes on must not ask again.
        a, b = random.randint(100, 999), random.randint(100, 999)
        yield {"question": f"{a}+{b}", "answer": str(a + b), "last_digit": (a + b) % 10}

def is_correct(response, question):
    return extract_answer(response).endswith(str(question["last_digit"]))

def reward(response, question, correct, finish_reason):
    if len(response) % 2:
        return "odd"
    return 5.0 if correct else 1.0
"""


def test_a_run_with_a_task_file(tmp_path):
    """A whole run, from questions to rewards, through Ray and the Workers. When it is continued, it reads the
    questions that it wrote."""
    (tmp_path / "mine.py").write_text(ADDITION)
    arguments = [f"--task={tmp_path}/mine.py", "--name=a", *QUICK, "--eval_every=1", "--eval_samples=1"]
    code, out, err = run(tmp_path, *arguments)
    assert code == 0, out + err
    error = (
        f"task_error (the response gets reward 0): {tmp_path}/mine.py:13: reward returned 'odd', not a number"
    )
    assert out.count("task_error") == 1 and error in out
    folder = tmp_path / "a"
    assert len(load_questions(str(folder / "questions/train.jsonl"))) == 64
    lines = [json.loads(line) for line in (folder / "samples/step_1.jsonl").read_text().splitlines()]
    assert len(lines) == 64 and all(line["extra"]["last_digit"] == int(line["answer"][-1]) for line in lines)
    for line in lines:
        odd = len(line["response"]) % 2 == 1
        assert line["reward"] == (0.0 if odd else 5.0 if line["correct"] else 1.0)
        assert (line["graded"] == "task_error") == odd == bool(line["error"])
        assert not line["correct"] or line["finish_reason"] == "stop"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["task_error"] == sum(bool(line["error"]) for line in lines) / 64 > 0
    assert rows[1]["reward"] == pytest.approx(sum(line["reward"] for line in lines) / 64)
    assert all(row["eval"]["eval"]["task_error"] == 0 for row in rows)
    before = (folder / "questions/train.jsonl").read_text()
    code, out, err = run(tmp_path, *arguments, "--steps=3")
    assert code == 0 and "from step 3 of 3" in out, out + err
    assert (folder / "questions/train.jsonl").read_text() == before


# ---- Examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    """Fails if an example has 40 lines of code or more: users read an example before they copy it."""
    from count_lines import measure

    assert len(measure(path.read_text())[0]) < 40


def test_format_bonus():
    """A right answer gets 1, and a response in the required format, unless it was cut off, 0.2 more."""
    grader = example("format_bonus.py")
    assert judged(grader).reward == 1.2 and judged(grader, WRONG).reward == 0.2
    assert judged(grader, RIGHT.removeprefix("thoughts")).reward == 1.0
    assert judged(grader, "2").reward == judged(grader, WRONG, finish_reason="length").reward == 0.0


def answer(text):
    return rf"so </think> <answer>\boxed{{{text}}}</answer>"


COUNTDOWN = {"question": "", "answer": "9", "choices": None, "numbers": [1, 2, 3]}


@pytest.mark.parametrize("text", ["(1+2)*3", "3 * (2 + 1)", "(4-1)/(1/3)", "10 - 1"])
def test_countdown_right(text):
    numbers = sorted(int(number) for number in re.findall(r"\d+", text))
    assert judged(example("countdown.py"), answer(text), COUNTDOWN | {"numbers": numbers}).correct


WRONG_EXPRESSIONS = [
    "9",
    "3*3",
    "(1+2)*3+0",
    "1+2+3",
    "(1+2)*3.0",
    "3**2*1",
    "1/0+2*3",
    "(1+2)*True*3",
    "",
    "(1+2)*3 = 9",
]
HOSTILE_EXPRESSIONS = [
    "__import__('os').system('touch MARK')",
    "[print(1) for x in (1, 2, 3)]",
    "9**9**9**9",
    "(" * 5000,
    "-" * 5000 + "1",
    "1" * 5000,
    "1+" * 5000 + "1",
    "lambda: 9",
    "f'{1+2}'",
    "\x00",
    "x := 9",
]


def test_countdown_wrong_and_hostile(tmp_path):
    """Nothing in an answer is run, and none of these answers is counted as an error of the task."""
    grader = example("countdown.py")
    for text in WRONG_EXPRESSIONS + HOSTILE_EXPRESSIONS:
        verdict = judged(grader, answer(text.replace("MARK", f"{tmp_path}/mark")), COUNTDOWN)
        assert verdict.correct is False and verdict.outcome == "by_task", text
    assert not (tmp_path / "mark").exists()


def test_countdown_has_solutions(tmp_path):
    """The questions can be solved: among all expressions of their three numbers, one gives the answer."""
    (path,) = task_questions(example("countdown.py"), "eval", tmp_path / "questions")
    questions = [question for question in load_questions(path) if len(question.extra["numbers"]) == 3]
    assert len(questions) > 50
    grader = example("countdown.py")
    for question in questions[:5]:
        expressions = all_expressions(question.extra["numbers"])
        solved = [text for text in expressions if eval(text) == int(question.answer)]
        assert judged(grader, answer(solved[0]), question.as_dict()).correct


def test_countdown_with_few_questions_holds_some_out(tmp_path):
    """With two small numbers there are only hundreds of questions. Fails if held-out questions are also trained on."""
    text = (ROOT / "examples/countdown.py").read_text()
    text = text.replace("COUNTS = [3, 4]", "COUNTS = [2]").replace("LARGEST = 50", "LARGEST = 20")
    grader = grader_of(tmp_path, text)
    texts = {}
    for split in ("train", "eval"):
        (path,) = task_questions(grader, split, tmp_path / "questions")
        questions = load_questions(path)
        assert all(len(question.extra["numbers"]) == 2 for question in questions)
        texts[split] = {question.question for question in questions}
    assert len(texts["train"]) > 200 and len(texts["eval"]) > 100 and not texts["train"] & texts["eval"]


def all_expressions(numbers):
    import itertools

    for a, b, c in itertools.permutations(numbers):
        for first, second in itertools.product("+-*", repeat=2):
            yield f"({a}{first}{b}){second}{c}"


@needs("reasoning_gym")
def test_reasoning_gym(tmp_path):
    """The right answer gets 1. An almost right one, for which chain_sum's own score is above 0, gets 0, and so does a
    right one without tags."""
    grader = example("reasoning_gym_task.py")
    (path,) = task_questions(grader, "eval", tmp_path / "questions")
    question = load_questions(path)[7]
    assert judged(grader, answer(question.answer), question.as_dict())[:2] == (True, 1.0)
    assert judged(grader, answer(question.answer + "9"), question.as_dict())[:2] == (False, 0.0)
    assert judged(grader, question.answer, question.as_dict())[:2] == (False, 0.0)
    train = {
        question.question
        for question in load_questions(*task_questions(grader, "train", tmp_path / "questions"))
    }
    held_out = {question.question for question in load_questions(path)}
    assert len(held_out) > 100 and len(train) > 5000 and not train & held_out


RUNS_CODE = """
import os, sys, reasoning_gym
from reasoning_gym.factory import DATASETS
for name in sorted(set(DATASETS) - {"composite"}):
    dataset = reasoning_gym.create_dataset(name, size=1, seed=1)
    entry = dataset[0]
    for code in ("__import__('os').mkdir('%s')", "[__import__('os').mkdir('%s')]"):
        try:
            dataset.score_answer(code % name, entry)
        except Exception:
            pass
"""


@needs("reasoning_gym")
def test_reasoning_gym_runs_no_answers(tmp_path):
    """Every judge of the package is given Python code as an answer. The example must refuse the tasks whose judges run
    it, and two others for the reasons in its table."""
    subprocess.run([sys.executable, "-c", RUNS_CODE], cwd=tmp_path, check=True, timeout=600)
    run_answers = {path.name for path in tmp_path.iterdir()}
    text = (ROOT / "examples/reasoning_gym_task.py").read_text()
    (refused,) = re.findall(r"REFUSED = ({.*?\n})", text, re.DOTALL)
    names = {name for group in eval(refused).values() for name in group.split()}
    assert len(run_answers) == 9
    assert names == run_answers | {"composite", "game_of_life_halting"}
    with pytest.raises(
        UserError, match="puzzle24 is refused: given an answer of the model, its judge calls sympy's"
    ):
        grader_of(tmp_path, text.replace('TASK = "chain_sum"', 'TASK = "puzzle24"'))


# ---- Weights & Biases --------------------------------------------------------------------------------------------


def test_wandb_is_asked_for_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python then raises ImportError for `import wandb`.
    arguments = [f"--out_dir={tmp_path}/runs", "--wandb=True"]
    assert launch.main([str(ROOT / "configs/tiny.py"), *arguments]) == 2
    expected = f"error: wandb=True needs the package wandb: {sys.executable} -m pip install wandb\n"
    assert capfd.readouterr().err == expected
    assert not (tmp_path / "runs").exists()


@needs("wandb")
def test_wandb_without_a_login_is_one_line(tmp_path):
    """Fails if wandb asks for a key on the terminal, or if the error comes only after Ray and all Workers have
    started."""
    environment = os.environ | {"HOME": str(tmp_path / "home"), "WANDB_MODE": "online"}
    environment.pop("WANDB_API_KEY", None)
    command = [sys.executable, "launch.py", "configs/tiny.py", f"--out_dir={tmp_path}/runs", "--wandb=True"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    way_out = "run `wandb login`, or set WANDB_MODE=offline"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        f"error: wandb=True: nobody is logged in; {way_out}",
    )
    assert not (tmp_path / "runs").exists()


LOGGED = """
import json, sys
from configs.load import load
from log import Log

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run = Log(load(["configs/tiny.py", f"--out_dir={folder}", "--name=a", "--wandb=True"]))
run.check_wandb()
run.cut(first - 1)
for step in range(first, last + 1):
    row = {"step": step, "reward": step / 10, "clip": None, "eval": {"set": {"accuracy": 0.5}}}
    run.metrics.write(json.dumps(row) + "\\n")
    run.metrics.flush()
    run.scalars(row)
run.wandb.finish()
"""


def leveldb_records(log):
    """The records of a LevelDB log. It consists of blocks of 32 KiB, which hold parts of records; the first block is
    shorter by the 7 bytes that name the format."""
    record, start, block_end = b"", 0, 2**15 - 7
    while start + 7 <= len(log):
        if block_end - start < 7:  # No header fits into the rest of this block.
            start, block_end = block_end, block_end + 2**15
            continue
        length, kind = int.from_bytes(log[start + 4 : start + 6], "little"), log[start + 6]
        record += log[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def sent_to_wandb(folder):
    """The rows of all files that wandb wrote in offline mode, and the ids of the runs that they belong to."""
    from wandb.proto import wandb_internal_pb2

    rows, ids = [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in leveldb_records(path.read_bytes()[7:]):  # after 7 bytes that name the format
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
    return rows, ids


@needs("wandb")
def test_wandb_goes_on_with_the_same_run(tmp_path):
    """A run that is resumed from step 3 makes steps 3 and 4 again. W&B must get every step once, all under one run
    id."""
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
    for first, last in ((1, 4), (3, 6)):
        command = [sys.executable, "-c", LOGGED, str(tmp_path), str(first), str(last)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    rows, ids = sent_to_wandb(tmp_path / "a")
    assert ids == {json.loads((tmp_path / "a/wandb.json").read_text())["id"]}
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isclose(row["reward"], row["step"] / 10) for row in rows)
    assert all(row["eval/set/accuracy"] == 0.5 and "clip" not in row for row in rows)
    home = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert home == []  # Nothing is written outside the run's folder.
    assert Path(tmp_path / "a/wandb").is_dir()
