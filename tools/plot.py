"""Draw the curves of a run, or of several into one picture: python tools/plot.py RUN [RUN …] [--out=curves.png]

In:   RUN/metrics.jsonl of each.   Out: curves.png in the folder of the first.
A run calls it after every evaluation but that of step 0.
"""

import os
import re
import sys
from itertools import chain, cycle
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # For a script in tools/, Python looks for modules there only.

from log import flatten, read_rows  # noqa: E402
from tools.runs import are_runs, run_names  # noqa: E402

PANELS = {  # title → a pattern of its metrics' names; the first two are ORZ's Figure 2, where both climb together
    "Reward": "reward|eval/.*/accuracy",
    "Response length (tokens)": "response_tokens(_right|_wrong)?",
    "pass@k and majority@k in evaluation": "eval/.*/(pass|majority)_at_k",
    "Entropy of the policy (nats per token)": "entropy.*",
    "Critic": "v_loss|explained_var",
    "Responses (share)": "cut_off|repetition|think_format",
}
LINE_STYLES = ("-", "--", ":", "-.")


def draw(runs, out):
    """Draw the panels into the file `out`. runs: name → flat rows of metrics. An old picture is replaced atomically.

    Of a single run each metric has a colour. Of several runs each run has a colour, and each metric a line style.
    """
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (title, pattern) in zip(axes.flat, PANELS.items()):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(runs) == 1:
            draw_run(axis, *runs.values(), pattern)
        else:
            draw_runs(axis, runs, pattern)
    if len(runs) > 1:
        colours = [Line2D([], [], color=f"C{n}", label=as_text(run)) for n, run in enumerate(runs)]
        figure.legend(handles=colours, loc="outside upper center", ncols=4)
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


def draw_run(axis, rows, pattern):
    """The metrics of one run whose names match the pattern."""
    for name in names_of(rows, pattern):
        draw_curve(axis, rows, name, label=as_text(name))
    if axis.lines:
        axis.legend(fontsize=8)


def draw_runs(axis, runs, pattern):
    """The same of several runs. The legend says which line style is which metric."""
    names = names_of(chain.from_iterable(runs.values()), pattern)
    styles = dict(zip(names, cycle(LINE_STYLES)))
    for n, (run, rows) in enumerate(runs.items()):
        for name, style in styles.items():
            label = as_text(f"{run}: {name}")
            draw_curve(axis, rows, name, label=label, color=f"C{n}", linestyle=style)
    if names:
        legend = [
            Line2D([], [], color="black", linestyle=styles[name], label=as_text(name)) for name in names
        ]
        axis.legend(handles=legend, fontsize=8)


def names_of(rows, pattern):
    """The metrics in the rows whose whole name matches the pattern, in the order in which they first occur."""
    names = []
    for row in rows:
        for name in row:
            if name not in names and re.fullmatch(pattern, name):
                names.append(name)
    return names


def draw_curve(axis, rows, name, **style):
    """One metric over the steps at which it was measured."""
    measured = [row for row in rows if name in row]
    steps = [row["step"] for row in measured]
    values = [row[name] for row in measured]
    axis.plot(steps, values, marker=".", **style)


def as_text(label):
    """Matplotlib takes $…$ for mathematics."""
    return label.replace("$", r"\$")


def main(arguments):
    folders, out = [], None
    for argument in arguments:
        if argument.startswith("--out="):
            out = argument.removeprefix("--out=")
        else:
            folders.append(Path(argument))
    if not are_runs(folders, usage=__doc__.splitlines()[0]):
        return 2
    runs = {}
    for name, folder in zip(run_names(folders), folders):
        rows, num_broken = read_rows(folder / "metrics.jsonl")
        if num_broken:
            print(f"{folder}/metrics.jsonl: {num_broken} broken lines are left out", file=sys.stderr)
        runs[name] = [flatten(row) for row in rows]
    draw(runs, out or folders[0] / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
