"""evaluate.py: avg@k, pass@k and majority@k by hand, and a whole evaluation of the demo's model."""

import json
import os
import subprocess
import sys

import pytest
from test_launch import DEADLINE, ROOT

import evaluate


def row(answer, reward, reason="stop"):
    response = f"<think></think> <answer> \\boxed{{{answer}}} </answer>" if answer else "I give up"
    said = {"question": "6*7", "answer": "42", "response": response, "response_ids": [1, 2]}
    return said | {"reward": reward, "finish_reason": reason}


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([row("42", 1.0), row("42", 1.0), row("41", 0.0), row("40", 0.0)], (0.5, 1.0, 1.0, "42", 0.0)),
        ([row("41", 0.0), row("42", 1.0), row("41", 0.0), row("40", 0.0)], (0.25, 1.0, 0.0, "41", 0.0)),
        ([row("", 0.0), row("", 0.0), row("", 0.0), row("42", 1.0)], (0.25, 1.0, 1.0, "42", 0.0)),
        ([row("", 0.0)] * 4, (0.0, 0.0, 0.0, "", 0.0)),
        ([row("42", 0.0, "length")] * 3 + [row("42", 1.0)], (0.25, 1.0, 1.0, "42", 0.75)),
    ],
)
def test_votes(tmp_path, rows, expected):
    """Responses without an answer win the vote; a right answer that was once cut off counts as wrong; k is off by one."""
    both = rows + [row("7", 0.0)] * 4
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    first, second = evaluate.per_question(tmp_path / "samples.jsonl", 4)
    assert (
        first["avg"],
        first["pass"],
        first["majority"],
        first["majority_answer"],
        first["cut_off"],
    ) == expected
    assert (second["avg"], second["pass"], second["majority"], second["response_tokens"]) == (0, 0, 0, 2)


@pytest.mark.soak
def test_a_whole_evaluation(tmp_path):
    """Two sets at once: their table, a record for each question, and the accuracy that training would have reported."""
    lines = (ROOT / "data/tiny/eval.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:40]), ("second", lines[40:60])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    command = [sys.executable, "evaluate.py", "configs/tiny.py", f"--out_dir={tmp_path}", "--eval_samples=4"]
    command.append(f"--eval_data={tmp_path}/first.jsonl,{tmp_path}/second.jsonl")
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "tiny_eval/questions.jsonl").read_text().splitlines()]
    assert [record["set"] for record in records] == ["first"] * 40 + ["second"] * 20
    measured = json.loads((tmp_path / "tiny_eval/metrics.jsonl").read_text())["eval"]
    for name in ("first", "second"):
        mine = [record["avg"] for record in records if record["set"] == name]
        assert sum(mine) / len(mine) == pytest.approx(measured[name]["accuracy"])
        assert name in done.stdout and f"{100 * measured[name]['accuracy']:.1f}%" in done.stdout
    assert "mean over sets" in done.stdout and "pass@4" in done.stdout
