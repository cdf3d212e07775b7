"""Values on repeated text, ORZ's Figure 5 in miniature: python bench/repetition.py runs/NAME eval_SET_0 --critic=FOLDER

In:   a file of samples/ of a run, such as step_4 or eval_SET_0, and the folder of a critic: that of a finished run, or
      critic_step_N as tools/export.py makes it.
Out:  docs/repetition.json and docs/repetition.png.

A token is **repeated** if it ends a window of WINDOW tokens that has stood in the same response before. Three questions:
  - What does the critic expect there? The value of repeated tokens is compared with that of other tokens at the same distance
    from the start of the response, since values change along a response anyway.
  - How does the value move around the first repeated token, against responses without repetition at the same place?
  - Which advantage do repeated tokens get under PPO (GAE with γ = λ = 1, normalised) and under GRPO, on the same batch?
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import ppo  # noqa: E402
from packing import Batch, Sample, make_pack, plan_samples  # noqa: E402

DOCS = ROOT / "docs"
WINDOW = 16  # tokens; shorter windows repeat in a good response, too
BEFORE, AFTER = 24, 96  # tokens around the first repeated one


def read_batch(file):
    """The samples of a file of samples/, as a Batch."""
    samples = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        response_ids = np.array(row["response_ids"], np.int32)
        sample = Sample(
            prompt_index=row["prompt_index"],
            prompt_ids=np.array(row["prompt_ids"], np.int32),
            response_ids=response_ids,
            logprobs=np.zeros(len(response_ids), np.float32),
            text=row["response"],
            finish_reason=row["finish_reason"],
            correct=row["correct"],
            reward=row["reward"],
        )
        samples.append(sample)
    return Batch(samples), samples


@torch.no_grad()
def of_all_tokens(batch, network, cfg, hidden_size):
    """A network's outputs at all response tokens, a list of fp32 arrays [N]: the values, or the log-probs and entropies."""
    (packs,) = plan_samples(batch, range(len(batch.lengths)), cfg, hidden_size)  # There is only one rank.
    outputs, places = [], []
    for indices in packs:
        pack = make_pack(batch, indices, "cpu")
        output = network(pack)
        outputs.append(output if isinstance(output, tuple) else (output,))
        places.append(pack["token_index"])
    token_index = torch.cat(places)
    results = []
    for parts in zip(*outputs):
        result = torch.zeros(len(token_index))  # [N]
        result[token_index] = torch.cat(parts)
        results.append(result.numpy())
    return results


def repeated_tokens(token_ids):
    """Whether each token ends a window that has stood in the response before: bool [n]."""
    seen = set()
    repeated = np.zeros(len(token_ids), bool)
    for end in range(WINDOW, len(token_ids) + 1):
        window = tuple(token_ids[end - WINDOW : end])
        repeated[end - 1] = window in seen
        seen.add(window)
    return repeated


def compare(batch, samples, values, cfg):
    """Returns numbers that answer the three questions, and the curves around the first repeated token."""
    repeated = np.concatenate([repeated_tokens(sample.response_ids) for sample in samples])  # [N]
    place = np.concatenate([np.arange(length) for length in batch.response_lens])  # [N]
    batch.values = values
    ppo.set_advantages(batch, cfg)
    groups = batch.rewards.reshape(-1, cfg.samples_per_prompt)  # [prompts, G]
    grpo = ppo.grpo(groups, batch.response_lens)  # [N]
    grpo = grpo / grpo.std()  # on the scale of the normalised advantages of PPO
    before = before_repetition(batch, repeated)
    correct = np.repeat(batch.correct, batch.response_lens)  # [N]
    others_there = value_of_others(values, repeated, place)
    num_repeating = sum(bool(repeated_tokens(sample.response_ids).any()) for sample in samples)
    numbers = {
        "responses": len(samples),
        "responses_with_repetition": num_repeating,
        "repeated_tokens": int(repeated.sum()),
        "tokens": len(repeated),
        "value_repeated": mean(values[repeated]),
        "value_others_same_place": others_there,
        "value_others": mean(values[~repeated]),
        "ppo_repeated": mean(batch.advantages[repeated]),
        "ppo_before": mean(batch.advantages[before]),
        "ppo_others": mean(batch.advantages[~repeated]),
        "grpo_repeated": mean(grpo[repeated]),
        "grpo_before": mean(grpo[before]),
        "grpo_others": mean(grpo[~repeated]),
        "repeated_tokens_of_right_responses": int((repeated & correct).sum()),
        "value_before": mean(values[before]),
        "grpo_groups_without_advantage": mean(groups.min(axis=1) == groups.max(axis=1)),
    }
    return numbers, curves(batch, values, repeated)


def mean(values):
    """The mean as a float, or None if there are no values."""
    return float(np.mean(values, dtype=np.float64)) if len(values) else None


def before_repetition(batch, repeated):
    """Whether each token belongs to a response that repeats, and stands before its first repeated token: bool [N]."""
    before = np.zeros(len(repeated), bool)
    for start, length in zip(batch.response_starts, batch.response_lens):
        here = repeated[start : start + length]
        if here.any():
            before[start : start + int(np.argmax(here))] = True
    return before


def value_of_others(values, repeated, place):
    """The mean value of tokens that are not repeated, at the places of the repeated ones."""
    total, count = 0.0, 0
    for t in np.unique(place[repeated]):
        others = values[(place == t) & ~repeated]
        if len(others):
            here = int((repeated & (place == t)).sum())
            total += here * float(others.mean(dtype=np.float64))
            count += here
    return total / count if count else None


def curves(batch, values, repeated):
    """The value around the first repeated token, [BEFORE + AFTER], and that of responses without repetition there."""
    offsets = np.arange(-BEFORE, AFTER)
    with_repetition, without = [], []
    parts = np.split(np.arange(len(values)), np.cumsum(batch.response_lens)[:-1])
    plain = [part for part in parts if not repeated[part].any()]
    for part in parts:
        if not repeated[part].any():
            continue
        first = int(np.argmax(repeated[part]))
        with_repetition.append(window_of(values[part], first + offsets))
        for other in plain:
            if len(other) > first:
                without.append(window_of(values[other], first + offsets))
    return {
        "offsets": offsets.tolist(),
        "with_repetition": column_means(with_repetition),
        "without": column_means(without),
    }


def window_of(values, places):
    """The values at these places, NaN outside of the response."""
    inside = (places >= 0) & (places < len(values))
    return np.where(inside, values[np.clip(places, 0, len(values) - 1)], np.nan)


def column_means(rows):
    """The mean of each column over the rows that have it, None where none has it."""
    if not rows:
        return []
    table = np.array(rows)
    counts = (~np.isnan(table)).sum(axis=0)
    sums = np.nansum(table, axis=0)
    return [float(total / count) if count else None for total, count in zip(sums, counts)]


def draw(numbers, lines, file):
    """Left: the value around the first repeated token. Right: mean advantages under PPO and under GRPO."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in (
        ("with_repetition", "responses that repeat"),
        ("without", "responses that do not, same places"),
    ):
        shown = [np.nan if value is None else value for value in lines[name]]
        if shown:
            left.plot(lines["offsets"], shown, label=label)
    left.axvline(0, color="0.6", linewidth=1)
    left.set(title="Value V(s_t)", xlabel="tokens since the first repeated token")
    left.legend()
    left.grid(alpha=0.3)
    names = ["PPO", "GRPO"]
    places = np.arange(2)
    labels = {
        "before": "tokens before, in the same responses",
        "repeated": "repeated tokens",
        "others": "all tokens that are not repeated",
    }
    for i, (kind, label) in enumerate(labels.items()):
        heights = [numbers[f"ppo_{kind}"], numbers[f"grpo_{kind}"]]
        right.bar(places + 0.27 * (i - 1), heights, 0.25, label=label)
    right.set_xticks(places, names)
    right.axhline(0, color="0.3", linewidth=1)
    right.set(title="Mean advantage, in standard deviations of the batch")
    right.legend()
    right.grid(alpha=0.3, axis="y")
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("samples", help="a file of samples/ in the run, such as step_4 or eval_SET_0")
    parser.add_argument("--critic", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=DOCS / "repetition")
    options = parser.parse_args()
    cfg = SimpleNamespace(**json.loads((options.run / "config.json").read_text()))
    cfg.advantage = "gae"  # The critic may be another run's.
    cfg.workers = 1
    if options.samples.startswith("eval_"):
        cfg.samples_per_prompt = cfg.eval_samples
    batch, samples = read_batch(options.run / "samples" / f"{options.samples}.jsonl")
    critic = model.load_network("critic", options.critic, torch.float32)
    (values,) = of_all_tokens(batch, critic, cfg, critic.model.config.hidden_size)
    numbers, lines = compare(batch, samples, values, cfg)
    if not numbers["repeated_tokens"]:
        sys.exit(
            f"error: no response of {options.samples} repeats {WINDOW} tokens: take samples of another step"
        )
    draw(numbers, lines, options.out.with_suffix(".png"))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    about = {
        "command": f"python bench/repetition.py {' '.join(sys.argv[1:])}",
        "window": WINDOW,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
    }
    text = json.dumps(about | numbers | {"curves": lines}, indent=1)
    options.out.with_suffix(".json").write_text(text + "\n")
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
