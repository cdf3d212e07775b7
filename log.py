"""What a run writes and prints: metrics.jsonl, TensorBoard, curves.png, samples, progress bars, the step line.

In:   the settings, one dict of metrics per step; None where a number does not exist.
Out:  files in the run's folder runs/NAME, which is made here; one line per step on the terminal.
"""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

from configs.load import UserError


class Log:
    def __init__(self, cfg):
        """Makes the run's folder. Raises UserError where it exists or cannot be made."""
        self.dir, self.wandb = Path(cfg.out_dir) / cfg.name, None
        try:
            (self.dir / "samples").mkdir(parents=True)
            (self.dir / "config.json").write_text(json.dumps(vars(cfg), indent=2))
        except FileExistsError:
            raise UserError(f"{self.dir} exists already: choose another --name, or move it away") from None
        except OSError as error:
            raise UserError(
                f"cannot write to {self.dir}: {error.strerror}; choose another --out_dir"
            ) from None
        if cfg.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "wandb=True, but wandb is not installed: pip install wandb, or leave it out"
                ) from None
            self.wandb = wandb.init(project="orz", name=cfg.name, dir=str(self.dir), config=vars(cfg))
        from torch.utils.tensorboard import SummaryWriter

        self.metrics = open(self.dir / "metrics.jsonl", "a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(self.dir / "tensorboard"))

    def say(self, text):
        print(printable(text), flush=True)

    def step(self, metrics):
        """One step into every log, and its line on the terminal."""
        seconds = sum(value for name, value in metrics["seconds"].items() if name != "eval")
        if "tokens" in metrics:
            metrics["tokens_per_second"] = metrics["tokens"] / seconds
        metrics = finite(metrics)
        self.metrics.write(json.dumps(metrics) + "\n")
        self.metrics.flush()
        flat = {
            name: value for name, value in flatten(metrics).items() if value is not None and name != "step"
        }
        for name, value in flat.items():
            self.tensorboard.add_scalar(name, value, metrics["step"])
        if self.wandb:
            self.wandb.log(flat, step=metrics["step"])
        self.say(step_line(metrics))

    def samples(self, name, prompts, samples):
        """samples/NAME.jsonl: every response with its question, token ids and reward."""
        with open(self.dir / "samples" / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for sample in samples:
                question = prompts[sample.question].question
                row = {
                    "question": question.question,
                    "answer": question.answer,
                    "response": sample.text,
                    "reward": sample.reward,
                    "finish_reason": sample.finish_reason,
                    "prompt_ids": sample.prompt_ids.tolist(),
                    "response_ids": sample.response_ids.tolist(),
                }
                file.write(json.dumps(row) + "\n")

    def show(self, prompts, sample):
        """One response on the terminal."""
        question = prompts[sample.question].question
        self.say(f"  question: {question.question}\n  response: {sample.text[:2000]}")
        self.say(
            f"  reward:   {sample.reward:.0f} (reference {question.answer}, finish reason {sample.finish_reason})"
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
        """Draw curves.png anew from metrics.jsonl: reward and length on top, as in ORZ's Figure 2."""
        draw_curves(self.dir / "metrics.jsonl", self.dir / "curves.png")

    def close(self):
        self.metrics.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def step_line(metrics):
    """The step in one line; what was not measured is left out."""

    def show(label, key, form):
        value = metrics.get(key)
        return [] if value is None else [f"{label} {value:{form}}"]

    parts = [f"step {metrics['step']}"]
    parts += [f"eval[{name}] {100 * e['accuracy']:.1f}%" for name, e in metrics.get("eval", {}).items()]
    parts += (
        show("reward", "reward", ".3f")
        + show("length", "response_tokens", ".1f")
        + show("cut", "cut_off", ".1%")
    )
    parts += (
        show("entropy", "entropy", ".3f")
        + show("v_loss", "v_loss", ".4f")
        + show("expl.var", "explained_var", ".2f")
    )
    parts += show("drift mean", "drift_mean", ".1e") + show("max", "drift_max", ".1e")
    parts += show("tokens/s", "tokens_per_second", ",.0f")
    parts += [f"{name} {value:.1f}s" for name, value in metrics.get("seconds", {}).items() if value >= 0.05]
    return "  ".join(parts)


def draw_curves(metrics_file, png):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in open(metrics_file, encoding="utf-8")]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True)

    def curve(axis, points, label, **style):
        points = [(step, value) for step, value in points if value is not None]
        if points:
            axis.plot(*zip(*points), label=label, **style)

    def metric(key):
        return [(row["step"], row.get(key)) for row in rows]

    curve(axes[0, 0], metric("reward"), "training reward")
    for name in dict.fromkeys(name for row in rows for name in row.get("eval", {})):
        scores = [(row["step"], row["eval"][name]["accuracy"]) for row in rows if name in row.get("eval", {})]
        curve(axes[0, 0], scores, f"held-out accuracy: {name}", marker="o")
    curve(axes[0, 1], metric("response_tokens"), "all")
    curve(axes[0, 1], metric("response_tokens_right"), "right", alpha=0.6)
    curve(axes[0, 1], metric("response_tokens_wrong"), "wrong", alpha=0.6)
    curve(axes[1, 0], metric("entropy"), "entropy of the policy (nats per token)")
    curve(axes[1, 1], metric("explained_var"), "explained variance of the critic")
    axes[0, 0].set_ylim(0, 1)
    axes[0, 1].set_ylim(bottom=0)
    for axis, title in zip(axes.flat, ("Reward", "Response length (tokens)", "Entropy", "Critic")):
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(f"{png}.tmp", format="png", dpi=110)
    plt.close(figure)
    os.replace(f"{png}.tmp", png)


def flatten(metrics, prefix=""):
    """{"eval": {"a": 1}} → {"eval/a": 1}."""
    flat = {}
    for name, value in metrics.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat


def finite(value):
    """NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text):
    """Control characters and terminal escapes made visible, so that a model's output cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
