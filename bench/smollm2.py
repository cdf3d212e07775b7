"""The SmolLM2 run, recorded: python bench/smollm2.py runs/smollm2_135m [--note="…"]

In:   the folder of a finished (or stopped) run of configs/smollm2_135m.py.
Out:  docs/smollm2/: metrics.jsonl as the run wrote it; samples.jsonl, the first sample of the first 8 questions of each
      held-out file, before and after; summary.json; and docs/smollm2.png.

The exported policy is then loaded by plain transformers and by plain vLLM, with nothing of this project but the prompts
and the grader, and measured twice on held-out files: accuracy of fresh samples, which must agree with the run's
within their errors, and log-probs of the run's own last responses, which must agree token by token.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import reward  # noqa: E402

OUT = ROOT / "docs" / "smollm2"
TASK = ROOT / "data" / "word_problems"
SHOWN = 8  # questions of each file whose samples are kept
BATCH = 64  # sequences that transformers generates at once


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def accuracy_of(rewards, per_question):
    """Mean over questions, and its standard error, as launch.evaluate computes them."""
    means = np.array(rewards).reshape(-1, per_question).mean(1)
    return {"accuracy": float(means.mean()), "accuracy_stderr": float(means.std() / (len(means) - 1) ** 0.5)}


def graded(rows, texts_and_reasons):
    grader = reward.Grader()
    pairs = zip(rows, texts_and_reasons, strict=True)
    futures = [grader.submit(text, row["answer"], reason) for row, (text, reason) in pairs]
    return [future.result()[0] for future in futures]


def anatomy(rows, kinds):
    """What an accuracy is made of: the share that gives a boxed answer at all, how many of those are right, and the
    accuracy by kind of problem."""
    formed = [row["finish_reason"] == "stop" and reward.extract_answer(row["response"]) != "" for row in rows]
    right = np.array([row["reward"] for row in rows])
    asked = np.array([kinds[row["question"]] for row in rows])
    return {
        "boxed": float(np.mean(formed)),
        "right_of_boxed": float(right[formed].mean()) if any(formed) else None,
        "by_kind": {kind: float(right[asked == kind].mean()) for kind in dict.fromkeys(asked.tolist())},
    }


def with_transformers(folder, rows, cfg):
    """(text, finish reason) of one sample for each row, and log-probs of the row's own response, one array a row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(cfg["seed"])
    neutral = {
        "do_sample": True,
        "temperature": cfg["eval_temperature"],
        "top_p": cfg["eval_top_p"],
        "top_k": 0,
    }
    results, logprobs = [], []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        inputs = tokenizer.pad({"input_ids": [row["prompt_ids"] for row in part]}, return_tensors="pt")
        with torch.no_grad():
            ids = hf.generate(**inputs, **neutral, max_new_tokens=cfg["max_response_tokens"])
        for response in ids[:, inputs["input_ids"].shape[1] :]:
            text = tokenizer.decode(response)
            ends = [text.index(stop) + len(stop) for stop in cfg["stop"] if stop in text]
            ended = bool(ends) or tokenizer.eos_token_id in response
            results.append((text[: min(ends)] if ends else text, "stop" if ended else "length"))
        for row in part:
            prompt, response = row["prompt_ids"], torch.tensor(row["response_ids"])
            with torch.no_grad():
                logits = hf(torch.tensor([prompt + row["response_ids"]])).logits[0, len(prompt) - 1 : -1]
            table = (logits.float() / cfg["eval_temperature"]).log_softmax(-1)
            logprobs.append(table.gather(-1, response[:, None]).squeeze(-1).numpy())
    return results, logprobs


def with_vllm(folder, rows, cfg):
    """As with_transformers."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        max_model_len=cfg["max_prompt_tokens"] + cfg["max_response_tokens"] + 1,
        enforce_eager=True,
        generation_config="vllm",
        seed=cfg["seed"],
        disable_log_stats=True,
    )
    params = SamplingParams(
        temperature=cfg["eval_temperature"],
        top_p=cfg["eval_top_p"],
        max_tokens=cfg["max_response_tokens"],
        stop=cfg["stop"],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )
    prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in rows]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    whole = [{"prompt_token_ids": row["prompt_ids"] + row["response_ids"]} for row in rows]
    scored = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    logprobs = [
        np.array([at[token].logprob for at, token in zip(output.prompt_logprobs[-n:], row["response_ids"])])
        for row, output in zip(rows, scored)
        for n in [len(row["response_ids"])]
    ]
    return [(output.text, output.finish_reason) for output in outputs], logprobs


def reload(run, cfg, name, step, questions):
    """What the exported policy scores on the first `questions` of a held-out file, loaded by others than this project,
    beside what the run itself measured on them."""
    rows = lines(run / "samples" / f"eval_{name}_{step}.jsonl")[: questions * cfg["eval_samples"]]
    in_training = accuracy_of([row["reward"] for row in rows], cfg["eval_samples"])
    results, logprobs = {"questions": len(rows) // cfg["eval_samples"], "in_training": in_training}, {}
    for loader in (with_transformers, with_vllm):
        samples, logprobs[loader] = loader(run / "policy", rows, cfg)
        results[loader.__name__] = accuracy_of(graded(rows, samples), cfg["eval_samples"])
    apart = np.abs(np.concatenate(logprobs[with_transformers]) - np.concatenate(logprobs[with_vllm]))
    results["logprobs_apart"] = {"mean": float(apart.mean()), "max": float(apart.max()), "tokens": len(apart)}
    return results


def record(run, note):
    cfg, metrics = json.loads((run / "config.json").read_text()), lines(run / "metrics.jsonl")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    before, after = [row for row in metrics if "eval" in row][:: len([r for r in metrics if "eval" in r]) - 1]
    steps = [row for row in metrics if row["step"] > 0]
    summary = {
        "steps": len(steps),
        "before": {"step": before["step"], **before["eval"]},
        "after": {"step": after["step"], **after["eval"]},
        "questions": {name: 0 for name in before["eval"]},
        "samples_per_question": cfg["eval_samples"],
        "responses_per_step": cfg["prompts_per_step"] * cfg["samples_per_prompt"],
        "tokens_trained": sum(row["tokens"] for row in steps),
        "seconds_training": round(
            sum(s for r in steps for phase, s in r["seconds"].items() if phase != "eval")
        ),
        "seconds_evaluation": round(sum(row["seconds"].get("eval", 0) for row in metrics)),
        "drift_max": max(row["drift_max"] for row in steps),
        "machine": f"{os.cpu_count()} cores, {cpu_name()}, {platform.platform()}, Python {platform.python_version()}",
        "note": note,
        "versions": {
            name: version(name) for name in ("torch", "vllm-cpu", "deepspeed", "ray", "transformers")
        },
        "settings": {
            key: value
            for key, value in cfg.items()
            if key in ("policy_lr", "critic_lr", "dtype", "temperature", "max_response_tokens", "seed")
        },
    }
    with open(OUT / "samples.jsonl", "w", encoding="utf-8") as file:
        for name in before["eval"]:
            ends = [lines(run / "samples" / f"eval_{name}_{row['step']}.jsonl") for row in (before, after)]
            kinds = {row["question"]: row["kind"] for row in lines(TASK / f"{name}.jsonl")}
            for when, rows in zip(("before", "after"), ends):
                summary[when][name] |= anatomy(rows, kinds)
            summary["questions"][name] = len(ends[0]) // cfg["eval_samples"]
            firsts = [rows[: SHOWN * cfg["eval_samples"] : cfg["eval_samples"]] for rows in ends]
            for old, new in zip(*firsts, strict=True):
                assert old["question"] == new["question"]
                row = {"file": name, "question": old["question"], "answer": old["answer"]}
                for when, sample in (("before", old), ("after", new)):
                    row[when] = {key: sample[key] for key in ("response", "finish_reason", "reward")}
                file.write(json.dumps(row) + "\n")
    draw(metrics)
    write(summary)
    return cfg, after, summary


def cpu_name():
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2]


def write(summary):
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def draw(metrics):
    """Held-out accuracy with its errors and the training reward, on the left; response tokens on the right."""
    evals, steps = ([row for row in metrics if key in row] for key in ("eval", "reward"))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {"eval": "held-out numbers", "eval_wordings": "held-out numbers and wordings"}
    x = [row["step"] for row in steps]
    axes[0].plot(x, [row["reward"] for row in steps], color="0.7", label="training reward")
    for name in evals[0]["eval"]:
        accuracy, error = (
            [row["eval"][name][key] for row in evals] for key in ("accuracy", "accuracy_stderr")
        )
        axes[0].errorbar(
            [row["step"] for row in evals], accuracy, error, marker="o", capsize=3, label=labels[name]
        )
    axes[0].set(title="Share of right answers", xlabel="step", ylim=(0, 1))
    axes[1].plot(x, [row["response_tokens"] for row in steps], label="response tokens")
    axes[1].plot(x, [100 * row["cut_off"] for row in steps], label="cut off (%)")
    axes[1].set(title="Responses", xlabel="step")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(OUT.parent / "smollm2.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--note", default="", help="what else is to be known about the machine during the run"
    )
    parser.add_argument("--reload", nargs="*", help="held-out files to measure the exported policy on (all)")
    parser.add_argument(
        "--questions", type=int, default=10**9, help="the first so many of each such file (all)"
    )
    parser.add_argument("--load", type=Path, help="lines of /proc/loadavg taken during the run, for its mean")
    arguments = parser.parse_args()
    cfg, after, summary = record(arguments.run, arguments.note)
    if arguments.load:
        loads = [float(line.split()[1]) for line in arguments.load.read_text().splitlines()]
        summary["load_average"] = {"mean": round(float(np.mean(loads)), 1), "max": max(loads)}
        write(summary)
    for name in after["eval"] if arguments.reload is None else arguments.reload:
        summary.setdefault("policy_loaded_elsewhere", {})[name] = reload(
            arguments.run, cfg, name, after["step"], arguments.questions
        )
        write(summary)
    print(json.dumps(summary, indent=2))
