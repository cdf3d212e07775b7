"""Evaluation: avg@k, pass@k and majority@k by hand, and --eval_only as a whole run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from test_launch import ROOT, metrics, run

import launch
import reward
from data.load import Prompt, Question
from packing import Sample


def sample(answer, reward, reason="stop", length=2, graded="by_number"):
    text = f"<think></think> <answer> \\boxed{{{answer}}} </answer>" if answer else "I give up"
    ids = np.zeros(length, np.int32)
    line = f'"{answer}"\n'
    logprobs = np.zeros(length, np.float32)
    return Sample(0, ids, ids, logprobs, text, reason, reward > 0, float(reward), graded, {}, line)


class Log:
    """Keeps what the evaluation writes and shows."""

    def __init__(self):
        self.written, self.shown = {}, []

    def lines(self, name, rows):
        self.written[name] = list(rows)

    def show(self, question, sample):
        self.shown.append((question.question, sample.text))


def evaluate(groups_by_set, k):
    """launch.evaluate on given responses."""
    prompts, answers = {}, {}
    for name, groups in groups_by_set.items():
        prompts[name] = [Prompt(None, Question(f"{name} {i}", "42")) for i in range(len(groups))]
        answers[f"{name} 0"] = [sample for group in groups for sample in group]

    def answer(asked, num_samples, step):
        assert (num_samples, step) == (k, 7)
        return answers[asked[0].question.question]

    log, workers = Log(), SimpleNamespace(evaluate=answer)
    cfg, tasks = SimpleNamespace(eval_samples=k), SimpleNamespace(eval=prompts)
    return launch.evaluate(cfg, workers, tasks, log, step=7), log


@pytest.mark.parametrize(
    "group, expected",
    [
        ([("42", 1), ("42", 1), ("41", 0), ("40", 0)], (0.5, 1, 1)),
        ([("41", 0), ("42", 1), ("41", 0), ("40", 0)], (0.25, 1, 0)),
        ([("41", 0), ("42", 1), ("42", 1), ("41", 0)], (0.5, 1, 0)),  # a tie: the one that came first
        ([("", 0), ("", 0), ("", 0), ("42", 1)], (0.25, 1, 1)),
        ([("", 0), ("", 0), ("", 0), ("", 0)], (0, 0, 0)),
        ([("42", 0, "length"), ("42", 0, "length"), ("42", 1), ("41", 0)], (0.25, 1, 1)),
    ],
)
def test_scores_of_a_question(group, expected):
    """Responses without an answer win the vote; a right answer that was once cut off counts as wrong."""
    results, log = evaluate({"math": [[sample(*response) for response in group]]}, 4)
    result = results["math"]
    assert (result["accuracy"], result["pass_at_k"], result["majority_at_k"]) == expected
    assert result["cut_off"] == sum(len(response) > 2 for response in group) / 4
    assert list(results) == ["math"]  # one set is the whole


def test_sets_and_questions_are_kept_apart():
    """k is off by one and questions run into each other; "overall" weighs sets by their size; a record lost."""
    right, wrong = sample("42", 1.0, length=4), sample("41", 0.0)
    results, log = evaluate({"a": [[right, wrong], [wrong, wrong], [right, right]], "b": [[wrong, wrong]]}, 2)
    assert [results[name]["accuracy"] for name in ("a", "b", "overall")] == [0.5, 0, 0.25]
    assert [results[name]["pass_at_k"] for name in ("a", "b", "overall")] == [2 / 3, 0, 1 / 3]
    assert [results[name]["response_tokens"] for name in ("a", "b", "overall")] == [3, 2, 2.5]
    deviation = np.std([0.5, 0, 1]) / 2**0.5
    assert (
        results["a"]["accuracy_stderr"] == pytest.approx(deviation) and results["b"]["accuracy_stderr"] == 0
    )
    records = log.written["eval_a_7_questions"]
    assert [(r["question"], r["accuracy"], r["response_tokens"]) for r in records] == [
        ("a 0", 0.5, 3),
        ("a 1", 0, 2),
        ("a 2", 1, 4),
    ]
    assert len(log.written["eval_a_7"]) == 6 and len(log.written["eval_b_7_questions"]) == 1
    assert [question for question, _ in log.shown] == ["a 0", "a 1", "b 0"]


def test_what_was_not_graded_is_reported():
    """A grader that gives up on every answer looks like a policy that learns nothing."""
    outcomes = "by_value cut_off no_answer no_answer refused timed_out backstop crashed".split()
    samples = [sample("42", 0.0, graded=outcome) for outcome in outcomes]
    metrics = launch.response_metrics(samples)
    shares = {"cut_off": 1, "no_answer": 2, "refused": 1, "timed_out": 1, "backstop": 1, "crashed": 1}
    assert metrics == metrics | {outcome: count / 8 for outcome, count in shares.items()}


@pytest.mark.soak
def test_a_model_alone(tmp_path):
    """--eval_only wants training data, trains, keeps a learner in memory, or measures differently than training."""
    lines = (ROOT / "data/tiny/eval.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:40]), ("second", lines[40:60])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    config = tmp_path / "mine.py"
    config.write_text((ROOT / "configs/tiny.py").read_text().replace("train.jsonl", "nowhere.jsonl"))
    sets = f"--eval_data={tmp_path}/first.jsonl,{tmp_path}/second.jsonl"
    code, out, err = run(tmp_path, "--eval_only=True", sets, "--eval_samples=4", config=str(config))
    assert code == 0, out + err
    assert "0 parameters learn" in out
    folder = tmp_path / "mine_eval_only"
    assert not {"policy", "critic", "checkpoints"} & {path.name for path in folder.iterdir()}
    (alone,) = metrics(folder)
    for name, size in (("first", 40), ("second", 20)):
        records = (folder / f"samples/eval_{name}_0_questions.jsonl").read_text().splitlines()
        mean = sum(json.loads(record)["accuracy"] for record in records) / size
        assert len(records) == size and mean == pytest.approx(alone["eval"][name]["accuracy"])
        assert any(line.split()[:2] == [name, f"{mean:.1%}"] for line in out.splitlines())
    assert "  overall  " in out and "  pass@k  " in out and "  majority@k  " in out
    code, out, err = run(tmp_path, sets, "--eval_samples=4", "--steps=1", "--prompts_per_step=8")
    assert code == 0, out + err
    assert metrics(tmp_path / "tiny")[0]["eval"] == alone["eval"]  # before the first step of training


def test_metrics_of_lengths_and_reflection():
    """The spread of right and wrong lengths mixed up, wrong responses that reflect counted, a word that is not counted."""
    words = reward.response_stats("Wait, however, recheck, retry, alternatively, wait, no")
    assert sum(words[word] for word in reward.REFLECTION) == 6
    samples = [
        sample("42", 1, length=10),
        sample("42", 1, length=30),
        sample("42", 1, length=20),
        sample("41", 0, length=100),
    ]
    for one, waits in zip(samples, [0, 2, 1, 5]):
        one.stats = {"wait": float(waits), "repetition": 0.5}
    metrics = launch.response_metrics(samples)
    assert metrics["response_tokens"] == 40
    assert metrics["response_tokens_std"] == pytest.approx(np.std([10, 20, 30, 100]))
    assert metrics["response_tokens_right_std"] == pytest.approx(np.std([10, 20, 30]))
    assert metrics["response_tokens_wrong_std"] == 0
    assert metrics["reflection"] == 2 and metrics["wait"] == 2
    assert metrics["response_tokens_right_reflecting"] == 25
    metrics = launch.response_metrics(samples[3:])
    assert (
        metrics["response_tokens_right_std"] is None and metrics["response_tokens_right_reflecting"] is None
    )


def test_metrics_of_groups():
    """A question counts as solved by another one's response, or a group of equal wrong answers is not counted as equal."""
    correct = np.array([1, 0, 0, 0, 1, 1], bool)
    batch = SimpleNamespace(correct=correct, rewards=correct.astype(np.float32))
    assert launch.group_metrics(batch, 2) == {"pass_at_n": pytest.approx(2 / 3), "equal_groups": 2 / 3}
    batch.rewards = np.array([1, 0.5, 0, 0, 1, 1], np.float32)
    assert launch.group_metrics(batch, 3) == {"pass_at_n": 1.0, "equal_groups": 0.0}
