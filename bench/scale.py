"""The driver of a step of ORZ-32B's size, with Workers that sleep: what does the controller cost at 8, 32 and 128 Workers?

python bench/scale.py [--steps=4] [--step_seconds=60] [--workers=8,32,128]     writes bench/results/scale.json

In:   launch.train as it is, with the settings of configs/orz_32b.py: 8,192 responses of up to 8,000 tokens a step (mean
      2,200, four characters a token), through launch.Workers and Ray's object store, packing.Batch, packing, GAE, and the log
      with its samples files. Each Worker is a Ray actor on this machine that imports numpy and not torch: it makes
      responses of those lengths and sleeps for the time of its phase (the shares that docs/smollm2/metrics.jsonl
      recorded, of a step of step_seconds). No network is involved: all processes share one object store.
Out:  per step, of the driver's process: CPU seconds, and the goal (2% of the step); bytes and objects put into Ray's object
      store; peak memory of driver and Workers; CPU seconds of Ray's own processes. Then where the driver's time goes, from
      one more step under cProfile (which makes Python code slower, and is not counted).

Where memory allows no 128 Workers (80 MiB each, and 4 GiB for the rest), 64 take their place, and the result says so.
"""

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from pieces import RESPONSES, ROOT, lengths_like_orz, machine, spread, write

import launch
import workers as worker_module
from configs.load import load
from data.load import Prompt, Question

GOAL = 0.02  # of a step
HIDDEN = 5120  # Qwen2.5-32B's
TEXT = "Let me check: $\\frac{1}{2} + \\frac{1}{3} = \\frac{5}{6}$, so wait, the sum is not 1.\n"
TOP = 25  # rows of the profile


def recorded_seconds(step_seconds):
    """Seconds of each phase: the shares of the SmolLM2 run's steps, of a step of step_seconds."""
    rows = [json.loads(line) for line in (ROOT / "docs/smollm2/metrics.jsonl").read_text().splitlines()]
    phases = ("generate", "values", "critic", "policy", "sync")
    total = {name: sum(row["seconds"][name] for row in rows if row["step"]) for name in phases}
    return {name: seconds * step_seconds / sum(total.values()) for name, seconds in total.items()}


def stand_in(seconds, lengths, stats, text):
    """The class that takes workers.Worker's place: same methods, numpy only."""

    class StandIn:
        def __init__(self, cfg, rank):
            import sys
            import types

            self.cfg, self.rank = cfg, rank
            # Objects cross processes by name: here packing, which would import torch, is two empty classes.
            lean = types.ModuleType("packing")
            for name in ("Sample", "Batch"):
                setattr(lean, name, type(name, (), {"__module__": "packing"}))
            sys.modules["packing"] = lean

        def address(self):
            return "127.0.0.1", 0

        def setup(self, address, port):
            return 1  # parameter

        def imported(self):
            import sys

            return "torch" in sys.modules

        def interrupt(self):
            pass

        def generate(self, questions, num_samples, seed, temperature, top_p):
            import sys
            import time

            import numpy as np

            from log import sample_line

            start, rng, samples = time.monotonic(), np.random.default_rng(seed), []
            requests = [request for request in questions for _ in range(num_samples)]
            for i, (question, prompt) in enumerate(
                requests if self.rank % self.cfg.tensor_parallel == 0 else []
            ):
                length = int(rng.choice(lengths))
                sample = sys.modules["packing"].Sample()
                sample.__dict__ |= {
                    "question": question,
                    "prompt_ids": prompt.ids,
                    "response_ids": rng.integers(0, 150_000, length, np.int32),
                    "logprobs": -rng.random(length, np.float32),
                    "text": (text * (4 * length // len(text) + 1))[: 4 * length],
                    "finish_reason": "stop",
                    "reward": float(i % 2),
                    "graded": "by_value",
                    "stats": dict(stats),
                    "line": "",
                }
                sample.line = sample_line(sample, prompt.question)
                samples.append(sample)
            time.sleep(max(0.0, seconds["generate"] - (time.monotonic() - start)))
            return samples, seed

        def learn(self, kind, method, *args):
            import time

            import numpy as np

            phase = {"forward": "values", "update": kind}.get(method)
            if phase is None:
                return None
            time.sleep(seconds[phase])
            if self.rank:
                return None
            if method == "forward":
                return np.full(len(args[0].logprobs), 0.5, np.float32)
            names = ("pg_loss", "entropy", "drift_mean", "drift_max", "v_loss", "grad_norm_" + kind)
            return dict.fromkeys(names, 0.1)

        def sync(self):
            import time

            time.sleep(seconds["sync"])

    return StandIn


class Marked(launch.Log):
    """The log, which also notes what had been used when each step's samples were written: the end of its bookkeeping."""

    def __init__(self, cfg, look):
        super().__init__(cfg)
        self.look, self.marks, self.profiled_from = look, [], cfg.steps - 1
        self.profile = cProfile.Profile()

    def lines(self, name, rows):
        super().lines(name, rows)
        self.marks.append(self.look())
        if len(self.marks) == self.profiled_from:
            self.profile.enable()
        elif len(self.marks) > self.profiled_from:  # before the save at the end of a run
            self.profile.disable()


def ray_processes():
    """Ray's own processes of this driver, and the Workers, by name."""
    own, workers = [], []
    for process in psutil.Process().children(recursive=True):
        try:
            (workers if "ray::" in " ".join(process.cmdline()) else own).append(process)
        except psutil.Error:
            continue
    return own, workers


def looker():
    """A function that gives what has been used so far, of everything that is counted."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    own, _ = ray_processes()

    def look():
        store = get_memory_info_reply(state).store_stats
        times = [process.cpu_times() for process in own if process.is_running()]
        memory = psutil.Process().memory_info()
        return {
            "wall": time.monotonic(),
            "driver_cpu": time.process_time(),
            "ray_cpu": sum(t.user + t.system for t in times),
            "store_bytes": store.cumulative_created_bytes,
            "store_objects": store.cumulative_created_objects,
            "store_used": store.object_store_bytes_used,
            "driver_rss": memory.rss,
        }

    return look


def where_it_goes(profile):
    """The functions that take most of the driver's time in one step, by their own time and with what they call."""
    stats = pstats.Stats(profile).stats
    rows = []
    for (file, line, name), (_, calls, own, total, _) in stats.items():
        place = Path(file).name if file != "~" else "built in"
        rows.append({"function": f"{place}:{line} {name}", "calls": calls, "own": own, "with_callees": total})
    # Waiting is no work, and Ray's wrappers around every call say nothing.
    rows = [
        row
        for row in rows
        if not row["function"].endswith((" wait", "wrapper", "'acquire' of '_thread.lock' objects>"))
    ]
    result = {}
    for key in ("own", "with_callees"):
        top = sorted(rows, key=lambda row: -row[key])[:TOP]
        result[f"by_{key}"] = [
            {"function": row["function"], "calls": row["calls"], key: round(row[key], 3)} for row in top
        ]
    return result


def measure(num_workers, options):
    """One run of launch.train over stand-ins: per step, after one to warm up."""
    import ray

    import reward

    seconds = recorded_seconds(options.step_seconds)
    lengths = lengths_like_orz(np.random.default_rng(0))
    stats = reward.response_stats(TEXT)
    worker_module.Worker = stand_in(seconds, lengths, stats, TEXT)
    rng = np.random.default_rng(1)
    words = "Find the sum of all positive integers n such that n^2 + 12n - 2007 is a perfect square. "
    prompts = [
        Prompt(rng.integers(0, 150_000, rng.integers(100, 300), np.int32), Question(words, "5"))
        for _ in range(1024)
    ]
    tasks = SimpleNamespace(train=prompts, eval={}, tokenizer=None, hidden_size=HIDDEN)
    system = {"worker_maximum_startup_concurrency": 4, "worker_register_timeout_seconds": 600}
    ray.init(
        "local",
        num_cpus=num_workers,  # of which this machine has two: the Workers sleep
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=4 * 2**30,
        _system_config=system,
    )
    with tempfile.TemporaryDirectory() as folder:
        # One step to warm up, options.steps that count, one under the profiler.
        settings = [
            f"--workers={num_workers}",
            f"--steps={options.steps + 2}",
            f"--out_dir={folder}",
            "--save_every=-1",
        ]
        cfg = load(["configs/orz_32b.py", *settings, "--eval_every=-1", "--name=scale"])
        start = time.monotonic()
        log = Marked(cfg, None)
        log.cut(0)
        workers = launch.Workers(cfg, log, on_gpu=False)
        workers.start()
        log.look = looker()
        started = time.monotonic() - start
        launch.train(cfg, workers, tasks, log)
        torch_imported = any(ray.get([handle.imported.remote() for handle in workers.handles]))
        uss = [process.memory_full_info().uss for process in ray_processes()[1]]
        step_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / (
            options.steps + 2
        )
    ray.shutdown()
    marks = log.marks[: options.steps + 1]
    deltas = [{key: after[key] - before[key] for key in after} for before, after in zip(marks, marks[1:])]
    median_cpu = float(np.median([d["driver_cpu"] for d in deltas]))
    return {
        "workers": num_workers,
        "engines": num_workers // cfg.tensor_parallel,
        "start_seconds": round(started, 1),
        "step_seconds": spread([d["wall"] for d in deltas]),
        "driver_cpu_seconds": spread([d["driver_cpu"] for d in deltas]),
        "driver_cpu_share_of_60_s": round(median_cpu / 60, 4),
        "ray_processes_cpu_seconds": spread([d["ray_cpu"] for d in deltas]),
        "object_store_mib": spread([d["store_bytes"] / 2**20 for d in deltas]),
        "object_store_objects": spread([d["store_objects"] for d in deltas]),
        "object_store_most_used_mib": round(max(m["store_used"] for m in marks) / 2**20),
        "run_folder_mib_per_step": round(step_bytes / 2**20, 1),
        "driver_peak_rss_mib": round(max(m["driver_rss"] for m in marks) / 2**20),
        "workers_uss_mib": {"sum": round(sum(uss) / 2**20), "processes": len(uss)},
        "workers_import_torch": torch_imported,
        "load_average": launch.os.getloadavg()[0],
        "where_the_driver's_time_goes": where_it_goes(log.profile),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--step_seconds", type=float, default=60.0)
    parser.add_argument("--workers", default="8,32,128")
    options = parser.parse_args()
    sizes = [int(size) for size in options.workers.split(",")]
    room = psutil.virtual_memory().available - 4 * 2**30
    fitting = [size if size * 80 * 2**20 < room else size // 2 for size in sizes]
    launch.os.environ.update(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=launch.secrets.token_hex(32), RAY_ADDRESS="local"
    )
    result = machine("ray", "numpy", "torch") | {
        "network": "none is involved: driver and Workers are processes of one machine and share one object store",
        "asked_for": sizes,
        "responses_per_step": RESPONSES,
        "slept_seconds": {name: round(s, 2) for name, s in recorded_seconds(options.step_seconds).items()},
        "goal": f"driver CPU under {GOAL:.0%} of a 60 s step at 128 Workers, growing no faster than linearly",
        "runs": [],
    }
    for size in fitting:
        result["runs"].append(measure(size, options))
        print(json.dumps({k: v for k, v in result["runs"][-1].items() if "where" not in k}), flush=True)
    first, last = result["runs"][0], result["runs"][-1]
    cpu = [run["driver_cpu_seconds"]["median"] for run in (first, last)]
    result["driver_cpu_growth"] = {
        "workers": round(last["workers"] / first["workers"], 2),
        "driver_cpu": round(cpu[1] / cpu[0], 2),
    }
    result["met"] = cpu[1] <= GOAL * 60 and last["workers"] == 128
    write("scale", result)


if __name__ == "__main__":
    sys.exit(main())
