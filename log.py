"""What a run writes and prints: metrics.jsonl, TensorBoard, curves.png, samples, progress bars, the step line.

In:   the settings, one dict of metrics per step; None where a number does not exist.
Out:  files in the run's folder out_dir/NAME, which is made here; one line per step on the terminal.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

from configs.load import UserError

LINE = "reward response_tokens cut_off entropy v_loss explained_var drift_mean drift_max tokens_per_second".split()
PANELS = {  # title → the metrics in it, by pattern; the first row is ORZ's Figure 2: both climb together
    "Reward": "reward|eval/.*/accuracy",
    "Response length (tokens)": "response_tokens.*",
    "Entropy of the policy (nats per token)": "entropy.*",
    "Critic": "v_loss|explained_var",
}


class Log:
    def __init__(self, cfg):
        """Makes the run's folder. Raises UserError, and leaves nothing behind, where it exists or cannot be made."""
        self.dir, self.wandb = Path(cfg.out_dir) / cfg.name, None
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 does not end a run
        if cfg.wandb and not importlib.util.find_spec("wandb"):
            raise UserError("wandb=True, but wandb is not installed: pip install wandb, or leave it out")
        is_new = not self.dir.exists()
        try:
            self.dir.mkdir(parents=True)
            (self.dir / "samples").mkdir()
            (self.dir / "config.json").write_text(json.dumps(vars(cfg), indent=2))
            self.metrics = open(self.dir / "metrics.jsonl", "a", encoding="utf-8")
        except FileExistsError:
            raise UserError(f"{self.dir} exists already: choose another --name, or move it away") from None
        except OSError as error:
            if is_new:
                shutil.rmtree(self.dir, ignore_errors=True)
            raise UserError(f"cannot write to {self.dir}: {error.strerror}; choose an --out_dir") from None
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(self.dir / "tensorboard"), flush_secs=10)
        if cfg.wandb:
            import wandb

            self.wandb = wandb.init(project="orz", name=cfg.name, dir=str(self.dir), config=vars(cfg))

    def say(self, text):
        print(printable(text), flush=True)

    def step(self, metrics):
        """One step into every log, and its line on the terminal."""
        if "tokens" in metrics:
            seconds = sum(value for phase, value in metrics["seconds"].items() if phase != "eval")
            metrics = metrics | {"tokens_per_second": metrics["tokens"] / seconds}
        self.metrics.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
        self.metrics.flush()
        scalars = flatten(metrics)
        step = scalars.pop("step")
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(scalars, step=step)
        self.say(step_line(metrics))

    def samples(self, name, prompts, samples):
        """samples/NAME.jsonl: every response with its question, token ids and reward."""
        with open(self.dir / "samples" / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for sample in samples:
                row = vars(prompts[sample.question].question) | vars(sample) | {"response": sample.text}
                row["question"] = prompts[sample.question].question.question  # its text, for its number
                del row["logprobs"], row["text"]
                file.write(json.dumps(row, default=lambda ids: ids.tolist()) + "\n")

    def show(self, prompts, sample):
        """One response on the terminal."""
        question = prompts[sample.question].question
        self.say(f"  question: {question.question}\n  response: {sample.text[:2000]}")
        self.say(
            f"  reward:   {sample.reward:.0f} (answer {question.answer}, finish reason {sample.finish_reason})"
        )

    @contextlib.contextmanager
    def progress(self, what, total):
        """A bar while something of `total` parts is at work, on an interactive terminal; yields update(done) or None."""
        if not total or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)

    def curves(self):
        """Draws curves.png anew from metrics.jsonl; the old one stays until the new one is whole."""
        from matplotlib.figure import Figure

        with open(self.dir / "metrics.jsonl", encoding="utf-8") as file:
            rows = [flatten(json.loads(line)) for line in file]
        figure = Figure(figsize=(10, 6.5), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        for axis, (title, pattern) in zip(axes.flat, PANELS.items()):
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            for name in dict.fromkeys(name for row in rows for name in row if re.fullmatch(pattern, name)):
                points = [(row["step"], row[name]) for row in rows if name in row]
                axis.plot(*zip(*points), ".-", label=name.replace("$", r"\$"))  # a name is no mathematics
            if axis.lines:
                axis.legend(fontsize=8)
        axes[0, 0].set_ylim(0, 1)
        axes[0, 1].set_ylim(bottom=0)
        axes[1, 1].set_ylim(-1, 1)  # an untrained critic explains less than nothing, far less at times
        figure.savefig(self.dir / "curves.tmp", format="png", dpi=110)
        os.replace(self.dir / "curves.tmp", self.dir / "curves.png")

    def close(self):
        self.metrics.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def step_line(metrics):
    """The step in one line, under the names of metrics.jsonl; what was not measured is left out."""
    shown = {f"eval[{name}]": result["accuracy"] for name, result in metrics.get("eval", {}).items()}
    shown |= {name: metrics[name] for name in LINE if metrics.get(name) is not None}
    parts = [f"{key} {value:,.0f}" if value >= 100 else f"{key} {value:.3g}" for key, value in shown.items()]
    parts += [f"{phase} {value:.1f}s" for phase, value in metrics["seconds"].items() if value >= 0.05]
    return "  ".join([f"step {metrics['step']}", *parts])


def flatten(metrics, prefix=""):
    """{"eval": {"a": 1}, "b": None} → {"eval/a": 1}."""
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif value is not None:
            flat[prefix + name] = value
    return flat


def finite(value):
    """NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text):
    """Control characters and terminal escapes made visible, so that a model's output cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
