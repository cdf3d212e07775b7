"""What a run writes and prints: metrics.jsonl, TensorBoard, curves.png, samples, the step line.

In:   the settings, one dict of metrics per step; None where a number does not exist.
Out:  files in the run's folder out_dir/NAME, which is made here; one line per step on the terminal.
"""

import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from configs.load import ROOT, UserError

# What a policy that has stopped learning looks like; the numbers of a step that make it so.
COLLAPSE = {
    "entropy near zero": lambda m: m.get("entropy", 1.0) < 0.002,
    "all rewards equal": lambda m: m.get("reward") in (0.0, 1.0),
    "responses at the length limit": lambda m: m.get("cut_off", 0.0) > 0.5,
}
LINE = """accuracy pass_at_k majority_at_k reward response_tokens cut_off entropy v_loss explained_var drift_mean
    drift_max tokens_per_second""".split()

# What may differ where a run goes on: how long, how fast, how often. Anything else would make another run of it.
MAY_CHANGE = """steps policy_lr critic_lr policy_lr_final lr_decay_steps eval_every eval_samples eval_data save_every
    keep_checkpoints max_restarts on_nonfinite drift_limit phase_timeout gpu_memory gpu_memory_utilization out_dir
    name versions trust_remote_code""".split()


class Log:
    def __init__(self, cfg):
        """Makes or finds the run's folder. Raises UserError, and changes nothing, where it is another run's."""
        self.dir, self.tensorboard = Path(cfg.out_dir) / cfg.name, None
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 does not end a run
        cfg.versions = installed()
        config, settings = self.dir / "config.json", json.loads(json.dumps(vars(cfg)))
        try:
            # an empty metrics.jsonl is what a crash leaves that came before the settings
            found = {path.name for path in self.dir.glob("*") if path.stat().st_size}
            self.new = not found
            if "config.json" not in found and found - {"samples", "logs", "config.tmp"}:
                raise UserError(f"{self.dir} exists and is no run: choose another --name, or move it away")
            before = json.loads(config.read_text()) if config.exists() else settings
            changed = {name for name in settings if before.get(name) != settings[name]}.difference(MAY_CHANGE)
            if changed:
                values = ", ".join(f"{name}={before.get(name)!r}" for name in sorted(changed))
                raise UserError(f"{self.dir} is a run with {values}: choose another --name")
            for folder in ("samples", "logs"):
                (self.dir / folder).mkdir(parents=True, exist_ok=True)
            self.metrics = open(self.dir / "metrics.jsonl", "a", encoding="utf-8")
            fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.dir / "config.tmp").write_text(json.dumps(settings, indent=2))
            os.replace(self.dir / "config.tmp", config)
        except BlockingIOError:
            raise UserError(f"{self.dir}: another process is at work in it") from None
        except OSError as error:
            raise UserError(f"cannot write to {self.dir}: {error.strerror}; choose an --out_dir") from None

    def cut(self, step):
        """Forget what came after `step`, which will be made again: metrics.jsonl is cut, TensorBoard written anew."""
        from torch.utils.tensorboard import SummaryWriter

        rows = [row for row in self.rows() if 0 < step >= row["step"]]
        self.metrics.truncate(sum(len(json.dumps(row) + "\n") for row in rows))
        shutil.rmtree(self.dir / "tensorboard", ignore_errors=True)
        self.tensorboard = SummaryWriter(str(self.dir / "tensorboard"))
        for row in rows:
            self.scalars(row)

    def rows(self):
        """What metrics.jsonl holds; a line that a crash cut short is left out."""
        with open(self.metrics.name, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def best(self, steps):
        """The one of `steps` with the best mean accuracy in evaluation, None where none was evaluated."""
        rows = [row for row in self.rows() if row["step"] in steps and row.get("eval")]
        scores = {row["step"]: [result["accuracy"] for result in row["eval"].values()] for row in rows}
        return max(scores, key=lambda step: sum(scores[step]) / len(scores[step]), default=None)

    def discard(self):
        """Remove the folder of a run that has not begun, unless something was in it before."""
        if self.new:
            shutil.rmtree(self.dir)
            if not os.listdir(self.dir.parent):
                self.dir.parent.rmdir()

    def say(self, text):
        print(printable(text), flush=True)

    def step(self, metrics):
        """One step into every log, and its line on the terminal, after a line for each data set of an evaluation."""
        self.metrics.write(json.dumps(metrics, allow_nan=False) + "\n")
        self.metrics.flush()
        self.scalars(metrics)
        for name, result in metrics.get("eval", {}).items():
            self.say(metrics_line(f"  {name}:", result))
        self.say(metrics_line(f"step {metrics['step']}", metrics))

    def scalars(self, metrics):
        for name, value in flatten(metrics | {"step": None}).items():
            self.tensorboard.add_scalar(name, value, metrics["step"])
        self.tensorboard.flush()

    def lines(self, name, rows):
        """samples/NAME.jsonl: JSON lines of responses, or the records of questions."""
        with open(self.dir / "samples" / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(row if type(row) is str else json.dumps(row) + "\n" for row in rows)

    def show(self, question, sample):
        """One response on the terminal."""
        self.say(f"  question: {question.question}\n  response: {sample.text[:2000]}")
        self.say(f"  reward:   {sample.reward:.0f} ({sample.finish_reason}; the answer is {question.answer})")

    def curves(self):
        """Draws curves.png anew, in a process of its own: a month of plotting stays out of this one's memory, and Ctrl-C
        on the terminal does not reach it. A picture that fails ends no run."""
        subprocess.run([sys.executable, ROOT / "tools/plot.py", self.dir], process_group=0)


def installed():
    """Every package of this environment, with its version."""
    return sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()})


def sample_line(sample, question):
    """A response as a line of samples/: with its question, token ids and reward. Workers write theirs: 8,192 take 3 s."""
    row = vars(sample) | {"response": sample.text} | question._asdict()
    shown = {name: value for name, value in row.items() if name not in ("logprobs", "text", "line")}
    return json.dumps(shown, default=lambda ids: ids.tolist()) + "\n"


def metrics_line(name, metrics):
    """The metrics of a step or of a set in one line, under the names of metrics.jsonl; what was not measured is left out."""
    shown = {f"eval[{data}]": result["accuracy"] for data, result in metrics.get("eval", {}).items()}
    shown |= {metric: metrics[metric] for metric in LINE if metrics.get(metric) is not None}
    parts = [f"{key} {value:,.0f}" if value >= 100 else f"{key} {value:.3g}" for key, value in shown.items()]
    parts += [f"{phase} {value:.1f}s" for phase, value in metrics.get("seconds", {}).items() if value >= 0.05]
    parts += [f"COLLAPSE? {cause}" for cause, seen in COLLAPSE.items() if seen(metrics)]
    return "  ".join([name, *parts])


def flatten(metrics, prefix=""):
    """{"eval": {"a": 1}, "b": None} → {"eval/a": 1}."""
    flat = {}
    for name, value in metrics.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return {name: value for name, value in flat.items() if value is not None}


def printable(text):
    """Control characters and terminal escapes made visible, so that a model's output cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
