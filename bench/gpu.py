"""Three measurements on a GPU: how fast a weight sync is, what sleeping vLLM holds, how busy training is. NOT RUN on a GPU.

python bench/gpu.py [--shapes=0.5B,1.5B,7B] [--repeats=5]     writes bench/results/gpu.json where there is a GPU
python bench/gpu.py --shapes=toy                               without a GPU, to try the script; writes nothing

In:   Qwen2.5's shapes with random weights (step.random_model), one GPU, bf16.
Out:  for each shape
      sync: Rollout.load_weights(Learner.weights()), as in a step, with its checks. Seconds, and the bytes that it must move
      per second (each weight read once and written once), as a share of the bandwidth of a large copy on this GPU. Goal:
      0.5; at most a third is expected, since vLLM's reload copies each weight twice and both checksums read it.
      asleep: GPU memory in use with vLLM asleep, less that before vLLM was made. Goal: under 3 GiB.
      train: Learner.update on packs of 16,384 tokens, two samples each, with and without gradient checkpointing: model
      FLOPs (6 a weight and token, and 6 · hidden size · length² a layer for a sample's causal attention; recomputation is
      not counted) per second, as a share of the 989 TFLOP/s that NVIDIA states for bf16. Goal: 0.15. 7B does not fit.
      peak_gib and planned_gib: the most that torch held during the updates, and what tools/plan.py predicts for them.

Each measurement runs in a process of its own, so that it finds the GPU's memory empty.
"""

import argparse
import json
import os
import subprocess
import sys
import time

from pieces import ROOT, gpu_name, machine, spread, write
from step import ON_A_GPU, SHAPES, random_model

from configs.load import load
from tools import plan

PEAK = 989e12  # FLOP/s of an H100 or H200, bf16, dense
PACK, PROMPT, RESPONSE = 16_384, 192, 8_000  # tokens: two samples fill a pack


def prepared(name, **overrides):
    """The settings, the device and the dtype, in a torch.distributed world of one."""
    import torch

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"LOCAL_RANK": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ |= {"DS_ACCELERATOR": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    cfg = load([*ON_A_GPU, f"--model={random_model(name)}", *arguments])
    return cfg, torch.device("cuda", 0) if on_gpu else torch.device("cpu"), torch.bfloat16


def wait(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def held(device):
    """Bytes of the GPU that are in use."""
    import torch

    free, total = torch.cuda.mem_get_info() if device.type == "cuda" else (0, 0)
    return total - free


def copy_bandwidth(device):
    """Bytes read and written per second by a large copy."""
    import torch

    size = 2**32 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(11):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / sorted(seconds)[5]


def sync(name, repeats):
    import torch

    import ppo
    import rollout

    cfg, device, dtype = prepared(name)
    bandwidth = copy_bandwidth(device)
    learner = ppo.Learner("reference", cfg, cfg.model, device, dtype)
    size = dtype.itemsize * sum(parameter.ds_numel for parameter in learner.network.parameters())
    if device.type == "cuda":
        torch.cuda.empty_cache()
    before = held(device)
    engine = rollout.Rollout(cfg, cfg.model, dtype, device)
    awake = held(device) - before
    engine.sleep()
    asleep = held(device) - before
    seconds = []
    for _ in range(repeats + 1):
        engine.wake("weights")
        wait(device)
        start = time.perf_counter()
        engine.load_weights(learner.weights())
        wait(device)
        seconds.append(time.perf_counter() - start)
        engine.wake("kv_cache")
        engine.sleep()
    share = spread([2 * size / s / bandwidth for s in seconds[1:]])
    return {
        "copy_bytes_per_second": bandwidth,
        "weight_bytes": size,
        "sync_seconds": spread(seconds[1:]),
        "share_of_bandwidth": share,
        "awake_gib": round(awake / 2**30, 2),
        "asleep_gib": round(asleep / 2**30, 2),
        "met": {"sync": share["median"] >= 0.5, "asleep": asleep < 3 * 2**30},
    }


def train(name, repeats, checkpointing):
    import numpy as np
    import torch

    import packing
    import ppo

    lengths = {"max_response_tokens": RESPONSE, "max_tokens_per_pack": PACK, "max_prompt_tokens": PROMPT}
    cfg, device, dtype = prepared(name, gradient_checkpointing=checkpointing, **lengths)
    learner = ppo.Learner("policy", cfg, cfg.model, device, dtype)
    learner.onload()
    rng = np.random.default_rng(0)
    num_packs, response_len = (4, RESPONSE) if device.type == "cuda" else (1, 200)
    vocabulary = SHAPES[name][5]
    samples = []
    for prompt_index in range(2 * num_packs):
        sample = packing.Sample(
            prompt_index=prompt_index,
            prompt_ids=rng.integers(0, vocabulary, PROMPT).astype(np.int32),
            response_ids=rng.integers(0, vocabulary, response_len).astype(np.int32),
            logprobs=np.zeros(response_len, np.float32),
            text="",
            finish_reason="length",
        )
        samples.append(sample)
    batch = packing.Batch(samples)
    batch.advantages = rng.standard_normal(len(batch.logprobs)).astype(np.float32)
    packs = [[[2 * i, 2 * i + 1] for i in range(num_packs)]]  # packs[rank][n], of one rank
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(1, repeats + 2):
        wait(device)
        start = time.perf_counter()
        learner.update(batch, [packs], step)
        wait(device)
        seconds.append(time.perf_counter() - start)
    size = sum(parameter.ds_numel for parameter in learner.network.parameters())
    hidden, layers = SHAPES[name][:2]  # All heads together are as wide as the hidden state.
    flops = 0
    for length in batch.lengths.tolist():
        flops += 6 * size * length + 6 * layers * hidden * length**2
    mfu = spread([flops / s / PEAK for s in seconds[1:]])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    shape = plan.read_shape(str(cfg.model))
    planned = plan.updating(cfg, shape, others_staying=0) | plan.log_probs(cfg, shape)
    return {
        "peak_gib": round(peak / 2**30, 2),
        "planned_gib": round(sum(planned.values()) / 2**30, 2),
        "tokens": int(batch.lengths.sum()),
        "update_seconds": spread(seconds[1:]),
        "tokens_per_second": spread([batch.lengths.sum() / s for s in seconds[1:]]),
        "mfu": mfu,
        "met": mfu["median"] >= 0.15,
    }


ONLY = {
    "sync": sync,
    "train": lambda name, repeats: train(name, repeats, checkpointing=False),
    "train_with_checkpointing": lambda name, repeats: train(name, repeats, checkpointing=True),
}


def in_a_process(*arguments):
    """The last line that `python bench/gpu.py ARGUMENTS` prints, read as JSON; its last error line where it fails."""
    done = subprocess.run([sys.executable, __file__, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return {"failed": done.stderr.splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="0.5B,1.5B,7B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=ONLY, help="for this script's own use: prints one measurement")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(ONLY[options.only](options.shapes, options.repeats)), flush=True)
        os._exit(0)  # vLLM's threads outlive main
    gpu = gpu_name()
    result = machine("torch", "vllm" if gpu else "vllm-cpu", "deepspeed", "transformers", "numpy") | {
        "shapes": {}
    }
    for name in options.shapes.split(","):
        random_model(name)
        fitting = ["sync"] if name == "7B" else ONLY  # Training takes 18 bytes a weight.
        row = result["shapes"][name] = {}
        for only in fitting:
            row[only] = in_a_process(f"--only={only}", f"--shapes={name}", f"--repeats={options.repeats}")
        print(name, json.dumps(row), flush=True)
    if gpu:
        write("gpu", result)
    failed = [
        f"{name} {only}" for name, row in result["shapes"].items() for only in row if "failed" in row[only]
    ]
    if failed:
        sys.exit(f"error: not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
