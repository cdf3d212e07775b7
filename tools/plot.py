"""Draw the curves of a run, or of several into one picture: python tools/plot.py RUN [RUN …] [--out=curves.png]

In:   RUN/metrics.jsonl of each.   Out: curves.png in the folder of the first.
launch.py calls it after every evaluation but that of step 0.
"""

import json
import os
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Run as a script, Python looks for modules in tools/ only.

from log import flatten  # noqa: E402

PANELS = {  # title → the metrics in it, by pattern; the first row is ORZ's Figure 2: both climb together
    "Reward": "reward|eval/.*/accuracy",
    "Response length (tokens)": "response_tokens.*",
    "Evaluation: any of k, and the most frequent, right": "eval/.*/(pass|majority)_at_k",
    "Entropy of the policy (nats per token)": "entropy.*",
    "Critic": "v_loss|explained_var",
    "Responses (share)": "cut_off|repetition|think_format",
}


def draw(runs, out):
    """runs: names → rows of metrics. The old picture stays until the new one is whole."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (title, pattern) in zip(axes.flat, PANELS.items()):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        for run, rows in runs.items():
            for name in dict.fromkeys(name for row in rows for name in row if re.fullmatch(pattern, name)):
                points = [(row["step"], row[name]) for row in rows if name in row]
                label = name if len(runs) == 1 else f"{run}: {name}"
                axis.plot(*zip(*points), ".-", label=label.replace("$", r"\$"))  # a name is no mathematics
        if axis.lines:
            axis.legend(fontsize=8)
    for share in (axes[0, 0], axes[0, 2], axes[1, 2]):
        share.set_ylim(-0.02, 1.02)
    axes[0, 1].set_ylim(bottom=0)
    axes[1, 1].set_ylim(-1, 1)  # an untrained critic explains less than nothing, far less at times
    figure.savefig(f"{out}.tmp", format="png", dpi=110)
    os.replace(f"{out}.tmp", out)


def main(arguments):
    folders = [Path(argument) for argument in arguments if not argument.startswith("--out=")]
    out = next((a.removeprefix("--out=") for a in arguments if a.startswith("--out=")), None)
    missing = [folder for folder in folders if not (folder / "metrics.jsonl").exists()]
    if missing or not folders:
        print(
            f"error: no metrics.jsonl in {missing}" if folders else __doc__.splitlines()[0], file=sys.stderr
        )
        return 2
    runs = {}
    for folder in folders:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        name = str(folder) if folder.name in runs else folder.name
        runs[name] = [flatten(json.loads(line)) for line in lines if line.endswith("\n")]
    draw(runs, out or folders[0] / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
