"""Evaluation: avg@k, pass@k and majority@k by hand, being right versus being rewarded, and --eval_only as a whole run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
from test_launch import ROOT, metrics, run

import equality
import launch
import reward
from configs.load import load
from data.load import Prompt, Question, load_questions, read_tasks
from packing import Batch, Sample

# (reward of a wrong response, of a right one): by default, with partial credit, a penalty, a bonus, and the wrong way round.
REWARDS = [(0.0, 1.0), (0.3, 1.1), (-0.5, 0.3), (1.1, 1.1), (0.3, -0.5)]


def sample(answer, reward, reason="stop", length=2, graded="by_number"):
    text = f"<think></think> <answer> \\boxed{{{answer}}} </answer>" if answer else "I give up"
    ids = np.zeros(length, np.int32)
    line = f'"{answer}"\n'
    logprobs = np.zeros(length, np.float32)
    return Sample(0, ids, ids, logprobs, text, reason, reward > 0, float(reward), graded, {}, line)


class Log:
    """A log that keeps what the evaluation writes and shows."""

    def __init__(self):
        self.written, self.shown = {}, []

    def lines(self, name, rows):
        self.written[name] = list(rows)

    def show(self, question, sample):
        self.shown.append((question.question, sample.text))


def evaluate(groups_by_set, k):
    """The results of launch.evaluate on given responses, and the log."""
    prompts, answers = {}, {}
    for name, groups in groups_by_set.items():
        prompts[name] = [Prompt(None, Question(f"{name} {i}", "42")) for i in range(len(groups))]
        answers[f"{name} 0"] = [sample for group in groups for sample in group]

    def answer(asked, num_samples, step):
        assert (num_samples, step) == (k, 7)
        return answers[asked[0].question.question]

    log, workers = Log(), SimpleNamespace(evaluate=answer)
    cfg, tasks = SimpleNamespace(eval_samples=k, report_samples=0), SimpleNamespace(eval=prompts)
    return launch.evaluate(cfg, workers, tasks, log, step=7), log


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize(
    "group, expected",
    [
        ([("42", 1), ("42", 1), ("41", 0), ("40", 0)], (0.5, 1, 1)),
        ([("41", 0), ("42", 1), ("41", 0), ("40", 0)], (0.25, 1, 0)),
        # In a tie the first answer wins the vote.
        ([("41", 0), ("42", 1), ("42", 1), ("41", 0)], (0.5, 1, 0)),
        ([("", 0), ("", 0), ("", 0), ("42", 1)], (0.25, 1, 1)),
        ([("", 0), ("", 0), ("", 0), ("", 0)], (0, 0, 0)),
        ([("42", 0, "length"), ("42", 0, "length"), ("42", 1), ("41", 0)], (0.25, 1, 1)),
    ],
)
def test_scores_of_a_question(group, expected, rewards):
    """Fails if responses without an answer win the vote, if an answer counts as wrong in the vote because it was once
    cut off, or if the reward decides what is right."""
    samples = [sample(*response) for response in group]
    for response in samples:
        response.reward = rewards[response.correct]
    results, log = evaluate({"math": [samples]}, 4)
    result = results["math"]
    assert (result["accuracy"], result["pass_at_k"], result["majority_at_k"]) == expected
    assert result["cut_off"] == sum(len(response) > 2 for response in group) / 4
    assert list(results) == ["math"]  # a single set needs no "overall"


def test_sets_and_questions_are_kept_apart():
    """Fails if responses of one question count for the next, if "overall" weighs sets by their size, or if a record is
    lost."""
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
    """A grader that gives up on every answer looks like a policy that learns nothing: its outcomes must be among the
    metrics."""
    outcomes = "by_value cut_off no_answer no_answer refused timed_out backstop crashed".split()
    samples = [sample("42", 0.0, graded=outcome) for outcome in outcomes]
    metrics = launch.response_metrics(samples)
    shares = {"cut_off": 1, "no_answer": 2, "refused": 1, "timed_out": 1, "backstop": 1, "crashed": 1}
    assert metrics == metrics | {outcome: count / 8 for outcome, count in shares.items()}


@pytest.mark.parametrize("rewards", REWARDS)
def test_metrics_go_by_the_verdict(rewards):
    """Fails if a penalty for length or partial credit changes the accuracy, or mixes the lengths of right and wrong
    responses."""
    right = [sample("42", 1, length=length) for length in (4, 6)]
    wrong = [sample("41", 0, length=length) for length in (3, 8, 10)]
    for response in right + wrong:
        response.reward = rewards[response.correct]
    found = launch.response_metrics([wrong[0], right[0], wrong[1], right[1], wrong[2]])
    assert (found["accuracy"], found["response_tokens"]) == (0.4, 6.2)
    assert (found["response_tokens_right"], found["response_tokens_wrong"]) == (5.0, 7.0)
    assert found["reward"] == pytest.approx((2 * rewards[True] + 3 * rewards[False]) / 5)
    smallest, largest = sorted([rewards[False], rewards[True]])
    assert (found["reward_min"], found["reward_max"]) == (smallest, largest)
    batch = Batch(right + wrong)
    assert batch.correct.tolist() == [True, True, False, False, False]
    assert batch.rewards == pytest.approx([rewards[True]] * 2 + [rewards[False]] * 3)
    assert Sample(0, *[np.zeros(1, np.int32)] * 3, "", "stop").correct is False  # until it is graded


LIMIT = 38  # tokens; answers with their work take 36 to 40, the end token included


def graded_samples():
    """In a rank: what a Worker generates for the demo's questions, where only an end token or the limit ends a
    response."""
    import torch

    import rollout
    import workers

    cfg = load([str(ROOT / "configs/tiny.py"), "--stop=", f"--max_response_tokens={LIMIT}", "--name=unused"])
    (data,) = cfg.eval_data
    tasks = read_tasks(cfg, {data: load_questions(data), cfg.train_data[0]: load_questions(data)[:1]}, None)
    worker = workers.Worker(cfg, rank=0)
    worker.rollout = rollout.Rollout(cfg, cfg.model, torch.float32, torch.device("cpu"))
    worker.gpu_owner = "rollout"
    worker.grader = reward.Grader(1)
    prompts = list(enumerate(tasks.eval["eval"][:64]))
    request = workers.Request(prompts, 16, seed=1, temperature=1.0, top_p=1.0, max_tokens=LIMIT)
    samples, _ = worker.generate(request)
    answers = [prompt.question.answer for _, prompt in prompts]
    return samples, [answers[response.prompt_index] for response in samples]


def test_only_a_response_that_ended_by_itself_is_correct(tmp_path):
    """A response whose answer is right may have ended by itself or have been cut off. By ORZ's rule only the first is
    correct."""
    ((samples, answers),) = ranks.run_ranks("test_evaluate", "graded_samples", 1, tmp_path)
    seen = set()
    for response, answer in zip(samples, answers, strict=True):
        has_answer = equality.is_equal(reward.extract_answer(response.text), answer)
        is_whole = response.finish_reason == "stop"
        assert response.correct is (has_answer and is_whole), response
        assert response.reward == float(response.correct)
        assert json.loads(response.line)["correct"] is response.correct
        seen.add((response.finish_reason, has_answer))
    assert seen == {("stop", True), ("stop", False), ("length", True), ("length", False)}


@pytest.mark.soak
def test_a_model_alone(tmp_path):
    """Fails if --eval_only needs training data, trains, saves networks, or measures differently than training does."""
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
    """Fails if the spreads of right and wrong lengths are mixed up, if wrong responses count as right ones that
    reflect, or if a word is not counted."""
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
    """Fails if a question counts as solved by another one's response, or if a group of equal wrong answers does not
    count as equal."""
    correct = np.array([1, 0, 0, 0, 1, 1], bool)
    batch = SimpleNamespace(correct=correct, rewards=correct.astype(np.float32))
    assert launch.group_metrics(batch, 2) == {"pass_at_n": pytest.approx(2 / 3), "equal_groups": 2 / 3}
    batch.rewards = np.array([1, 0.5, 0, 0, 1, 1], np.float32)
    assert launch.group_metrics(batch, 3) == {"pass_at_n": 1.0, "equal_groups": 0.0}
