"""Draw the curves of a run, or of several into one picture: python tools/plot.py RUN [RUN …] [--out=curves.png]

In:   RUN/metrics.jsonl of each.   Out: curves.png in the folder of the first.
A run calls it after every evaluation but that of step 0.
"""

import os
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # For a script in tools/, Python looks for modules there only.

from log import flatten, read_rows  # noqa: E402

PANELS = {  # title → a pattern of its metrics' names; the first two are ORZ's Figure 2, where both climb together
    "Reward": "reward|eval/.*/accuracy",
    "Response length (tokens)": "response_tokens.*",
    "Evaluation: any of k, and the most frequent, right": "eval/.*/(pass|majority)_at_k",
    "Entropy of the policy (nats per token)": "entropy.*",
    "Critic": "v_loss|explained_var",
    "Responses (share)": "cut_off|repetition|think_format",
}


def draw(runs, out):
    """Draw the panels into the file `out`. runs: name → flat rows of metrics. An old picture is replaced atomically."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (title, pattern) in zip(axes.flat, PANELS.items()):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        for run, rows in runs.items():
            for name in names_of(rows, pattern):
                label = name if len(runs) == 1 else f"{run}: {name}"
                draw_curve(axis, rows, name, label)
        if axis.lines:
            axis.legend(fontsize=8)
    for share in (axes[0, 2], axes[1, 2]):
        share.set_ylim(-0.02, 1.02)
    axes[0, 1].set_ylim(bottom=0)
    # The rewards of a task file, and with them the critic's loss, may leave 0 to 1.
    lowest, highest = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(min(lowest, -0.02), max(highest, 1.02))
    highest = axes[1, 1].get_ylim()[1]
    # The explained variance of an untrained critic can be far below 0.
    axes[1, 1].set_ylim(-1, max(highest, 1))
    figure.savefig(f"{out}.tmp", format="png", dpi=110)
    os.replace(f"{out}.tmp", out)


def names_of(rows, pattern):
    """The metrics in the rows whose whole name matches the pattern, in the order in which they first occur."""
    names = []
    for row in rows:
        for name in row:
            if name not in names and re.fullmatch(pattern, name):
                names.append(name)
    return names


def draw_curve(axis, rows, name, label):
    """One metric over the steps at which it was measured."""
    measured = [row for row in rows if name in row]
    steps = [row["step"] for row in measured]
    values = [row[name] for row in measured]
    axis.plot(steps, values, ".-", label=label.replace("$", r"\$"))  # Matplotlib takes $…$ for mathematics.


def main(arguments):
    folders, out = [], None
    for argument in arguments:
        if argument.startswith("--out="):
            out = argument.removeprefix("--out=")
        else:
            folders.append(Path(argument))
    if not folders:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    missing = [str(folder) for folder in folders if not (folder / "metrics.jsonl").exists()]
    if missing:
        print(f"error: there is no metrics.jsonl in {', '.join(missing)}", file=sys.stderr)
        return 2
    runs = {}
    for folder in folders:
        name = str(folder) if folder.name in runs else folder.name
        rows, num_broken = read_rows(folder / "metrics.jsonl")
        if num_broken:
            print(f"{folder}/metrics.jsonl: {num_broken} broken lines are left out", file=sys.stderr)
        runs[name] = [flatten(row) for row in rows]
    draw(runs, out or folders[0] / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
