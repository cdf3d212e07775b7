"""What the driver costs in a step of ORZ-32B's size, at 8, 32 and 128 Workers; the Workers only sleep.

python bench/scale.py [--steps=4] [--step_seconds=60] [--workers=8,32,128]     writes bench/results/scale.json

In:   launch.train as it is, with the settings of configs/orz_32b.py: 8,192 responses of up to 8,000 tokens a step (mean
      2,200, four characters a token), through WorkerGroup and Ray's object store, packing.Batch, packing, GAE, and the log
      with its samples files. Each Worker is a Ray actor on this machine that imports numpy and not torch: it makes
      responses of those lengths and sleeps for the time of each phase (its share of the step in docs/smollm2/metrics.jsonl,
      times step_seconds). No network is involved: all processes share one object store.
Out:  per step, of the driver's process: CPU seconds, and the goal (2% of the step); bytes and objects put into Ray's object
      store; peak memory of driver and Workers; CPU seconds of Ray's own processes. Then where the driver's time goes, from
      one more step under cProfile (which makes Python code slower, and is not counted).

Where memory is too small for a number of Workers (80 MiB each, and 4 GiB for the rest), half as many are used: 64 in place
of 128. The result says so.
"""

import argparse
import cProfile
import json
import os
import pstats
import secrets
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from pieces import RESPONSES, ROOT, lengths_like_orz, machine, spread, write

import launch
import workers
from configs.load import load
from data.load import Prompt, Question

GOAL = 0.02  # of a step
HIDDEN = 5120  # Qwen2.5-32B's
TEXT = "Let me check: $\\frac{1}{2} + \\frac{1}{3} = \\frac{5}{6}$, so wait, the sum is not 1.\n"
TOP = 25  # rows of the profile
WORKER_BYTES = 80 * 2**20
RESERVED_BYTES = 4 * 2**30  # for the driver, Ray and the rest of the machine


def recorded_seconds(step_seconds):
    """Seconds of each phase: its share of the SmolLM2 run's steps, times step_seconds."""
    rows = [json.loads(line) for line in (ROOT / "docs/smollm2/metrics.jsonl").read_text().splitlines()]
    total = {}
    for phase in ("generate", "values", "critic", "policy", "sync"):
        total[phase] = sum(row["seconds"][phase] for row in rows if row["step"] > 0)
    scale = step_seconds / sum(total.values())
    return {phase: seconds * scale for phase, seconds in total.items()}


def stand_in(seconds, lengths, stats, text):
    """The class that takes workers.Worker's place: the same methods, with numpy only.

    seconds: of each phase; lengths: of responses, to draw from; stats and text: of every response. Ray sends the class by
    value, so its methods import what they need.
    """

    class StandIn:
        def __init__(self, cfg, rank):
            import sys
            import types

            self.cfg, self.rank = cfg, rank
            # Objects cross processes by the name of their class. Here these modules hold empty classes of those names,
            # because packing would import torch, and workers much else that would fill the memory of 128 processes.
            for module_name, class_names in {"packing": ["Sample", "Batch"], "workers": ["Request"]}.items():
                module = types.ModuleType(module_name)
                for name in class_names:
                    setattr(module, name, type(name, (), {"__module__": module_name}))
                sys.modules[module_name] = module

        def address(self):
            return "127.0.0.1", 0

        def code(self):
            return {}  # It runs none of the modules that the driver compares.

        def setup(self, address, port):
            return 1  # parameter

        def imported(self):
            import sys

            return "torch" in sys.modules

        def interrupt(self):
            pass

        def generate(self, request):
            import time

            import numpy as np

            start = time.monotonic()
            samples = []
            if self.rank % self.cfg.tensor_parallel == 0:
                rng = np.random.default_rng(request.seed)
                for prompt_index, prompt in request.prompts:
                    for n in range(request.num_samples):
                        samples.append(self.sample(prompt_index, prompt, n % 2 == 1, rng))
            time.sleep(max(0.0, seconds["generate"] - (time.monotonic() - start)))
            return samples, request.seed

        def sample(self, prompt_index, prompt, correct, rng):
            import sys

            import numpy as np

            from log import sample_line

            length = int(rng.choice(lengths))
            num_characters = 4 * length
            sample = sys.modules["packing"].Sample()
            sample.prompt_index = prompt_index
            sample.prompt_ids = prompt.ids
            sample.response_ids = rng.integers(0, 150_000, length, np.int32)
            sample.logprobs = -rng.random(length, np.float32)
            sample.text = (text * (num_characters // len(text) + 1))[:num_characters]
            sample.finish_reason = "stop"
            sample.correct = correct
            sample.reward = float(correct)
            sample.graded = "by_value"
            sample.stats = dict(stats)
            sample.line = ""
            sample.line = sample_line(sample, prompt.question)
            return sample

        def forward(self, kind, batch, plan):
            import time

            import numpy as np

            time.sleep(seconds["values"])
            return np.full(len(batch.logprobs), 0.5, np.float32) if self.rank == 0 else None

        def update(self, kind, batch, plans, step, kl_plan):
            import time

            time.sleep(seconds[kind])
            names = ("pg_loss", "entropy", "drift_mean", "drift_max", "v_loss", f"grad_norm_{kind}")
            return dict.fromkeys(names, 0.1) if self.rank == 0 else None

        def sync(self):
            import time

            time.sleep(seconds["sync"])

        def save(self, kind, folder):
            pass

    return StandIn


class Marked(launch.Log):
    """A Log that also notes the resources used so far whenever a step's samples have been written, the end of the step's
    bookkeeping."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.look = None  # made by looker, when Ray's processes have started
        self.marks = []  # what self.look found at the end of each step
        self.profiled_from = cfg.steps - 1
        self.profile = cProfile.Profile()

    def lines(self, name, rows):
        super().lines(name, rows)
        self.marks.append(self.look())
        if len(self.marks) == self.profiled_from:
            self.profile.enable()
        elif len(self.marks) > self.profiled_from:  # before the save at the end of a run
            self.profile.disable()


def ray_processes():
    """Ray's own processes of this driver, and the Workers."""
    own, actors = [], []
    for process in psutil.Process().children(recursive=True):
        try:
            is_actor = "ray::" in " ".join(process.cmdline())
        except psutil.Error:
            continue
        if is_actor:
            actors.append(process)
        else:
            own.append(process)
    return own, actors


def looker():
    """Returns a function that returns how much of each counted resource has been used so far."""
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


# Functions that are left out of the profile: waiting is not work, and Ray wraps every call in functions that say nothing.
NO_WORK = (" wait", "wrapper", "'acquire' of '_thread.lock' objects>")


def where_it_goes(profile):
    """The functions that take most of the driver's time in one step, by their own time and with what they call."""
    rows = []
    for (file, line, name), (_, calls, own, total, _) in pstats.Stats(profile).stats.items():
        place = Path(file).name if file != "~" else "built in"
        row = {"function": f"{place}:{line} {name}", "calls": calls, "own": own, "with_callees": total}
        if not row["function"].endswith(NO_WORK):
            rows.append(row)
    result = {}
    for key in ("own", "with_callees"):
        top = sorted(rows, key=lambda row: -row[key])[:TOP]
        result[f"by_{key}"] = [
            {"function": row["function"], "calls": row["calls"], key: round(row[key], 3)} for row in top
        ]
    return result


def start_ray(num_workers):
    import ray

    return ray.init(
        "local",
        num_cpus=num_workers,  # more than this machine has, because the Workers only sleep
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=4 * 2**30,
        _system_config={"worker_maximum_startup_concurrency": 4, "worker_register_timeout_seconds": 600},
    )


def make_tasks():
    """1,024 prompts of 100 to 300 tokens, as read_tasks would return them."""
    rng = np.random.default_rng(1)
    words = "Find the sum of all positive integers n such that n^2 + 12n - 2007 is a perfect square. "
    prompts = []
    for _ in range(1024):
        ids = rng.integers(0, 150_000, rng.integers(100, 300), np.int32)
        prompts.append(Prompt(ids, Question(words, "5")))
    return SimpleNamespace(train=prompts, eval={}, tokenizer=None, hidden_size=HIDDEN)


def run(num_workers, options, folder):
    """Run launch.train with stand-ins. Returns the log, and the part of the result that is not in its marks.

    One step warms up, options.steps count, and one runs under the profiler.
    """
    import ray

    import reward

    steps = options.steps + 2
    settings = [
        f"--workers={num_workers}",
        f"--steps={steps}",
        f"--out_dir={folder}",
        "--save_every=-1",
        "--report_samples=0",
    ]
    cfg = load(["configs/orz_32b.py", *settings, "--eval_every=-1", "--name=scale"])
    lengths = lengths_like_orz(np.random.default_rng(0))
    seconds = recorded_seconds(options.step_seconds)
    workers.Worker = stand_in(seconds, lengths, reward.response_stats(TEXT), TEXT)
    tasks = make_tasks()
    context = start_ray(num_workers)
    start = time.monotonic()
    log = Marked(cfg)
    cluster = workers.Cluster(has_gpus=False, session_dir=context.address_info["session_dir"])
    group = workers.WorkerGroup(cfg, log, cluster, workers.StopRequest())
    group.place()
    group.start()
    log.start(group.step, group.num_parameters, tasks)
    log.look = looker()
    start_seconds = time.monotonic() - start
    launch.train(cfg, group, tasks, log)
    torch_imported = any(ray.get([handle.imported.remote() for handle in group.handles]))
    uss = [process.memory_full_info().uss for process in ray_processes()[1]]
    ray.shutdown()
    sizes = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()]
    return log, {
        "workers": num_workers,
        "engines": num_workers // cfg.tensor_parallel,
        "start_seconds": round(start_seconds, 1),
        "run_folder_mib_per_step": round(sum(sizes) / steps / 2**20, 1),
        "workers_uss_mib": {"sum": round(sum(uss) / 2**20), "processes": len(uss)},
        "workers_import_torch": torch_imported,
    }


def measure(num_workers, options):
    """The result of a run with this number of Workers, per step."""
    with tempfile.TemporaryDirectory() as folder:
        log, result = run(num_workers, options, folder)
    marks = log.marks[: options.steps + 1]
    deltas = []
    for before, after in zip(marks, marks[1:]):
        deltas.append({key: after[key] - before[key] for key in after})
    median_cpu = float(np.median([delta["driver_cpu"] for delta in deltas]))
    return result | {
        "step_seconds": spread([delta["wall"] for delta in deltas]),
        "driver_cpu_seconds": spread([delta["driver_cpu"] for delta in deltas]),
        "driver_cpu_share_of_60_s": round(median_cpu / 60, 4),
        "ray_processes_cpu_seconds": spread([delta["ray_cpu"] for delta in deltas]),
        "object_store_mib": spread([delta["store_bytes"] / 2**20 for delta in deltas]),
        "object_store_objects": spread([delta["store_objects"] for delta in deltas]),
        "object_store_most_used_mib": round(max(mark["store_used"] for mark in marks) / 2**20),
        "driver_peak_rss_mib": round(max(mark["driver_rss"] for mark in marks) / 2**20),
        "load_average": os.getloadavg()[0],
        "where_the_driver's_time_goes": where_it_goes(log.profile),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--step_seconds", type=float, default=60.0)
    parser.add_argument("--workers", default="8,32,128")
    options = parser.parse_args()
    sizes = [int(size) for size in options.workers.split(",")]
    room = psutil.virtual_memory().available - RESERVED_BYTES
    fitting = [size if size * WORKER_BYTES < room else size // 2 for size in sizes]
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": "local",
    }
    slept = recorded_seconds(options.step_seconds)
    result = machine("ray", "numpy", "torch") | {
        "network": "none is involved: driver and Workers are processes of one machine and share one object store",
        "asked_for": sizes,
        "responses_per_step": RESPONSES,
        "slept_seconds": {phase: round(seconds, 2) for phase, seconds in slept.items()},
        "goal": f"driver CPU under {GOAL:.0%} of a 60 s step at 128 Workers, growing no faster than linearly",
        "runs": [],
    }
    for size in fitting:
        row = measure(size, options)
        result["runs"].append(row)
        print(json.dumps({key: row[key] for key in row if "where" not in key}), flush=True)
    first, last = result["runs"][0], result["runs"][-1]
    first_cpu, last_cpu = (row["driver_cpu_seconds"]["median"] for row in (first, last))
    result["driver_cpu_growth"] = {
        "workers": round(last["workers"] / first["workers"], 2),
        "driver_cpu": round(last_cpu / first_cpu, 2),
    }
    result["met"] = last_cpu <= GOAL * 60 and last["workers"] == 128
    write("scale", result)


if __name__ == "__main__":
    sys.exit(main())
