"""The pieces of a step at ORZ's sizes, each beside a plain reference: GAE, packing, make_pack, log-prob head, grading.

python bench/pieces.py [REPEATS]     writes bench/results/pieces.json

In:   8,192 responses of up to 8,000 tokens, mean 2,200 (log-normal), prompts of 100-300 tokens, packs of 16,384 tokens;
      for the head Qwen2.5-0.5B's, 896 x 151,936, and as many tokens as the reference's full logits leave memory for; for
      the grader half of the answers right as they stand, the others another question's, in responses of 5,000 characters.
Out:  for each piece seconds of both sides, measured in turns (REPEATS times, by default 5), their ratio in each turn,
      whether both gave the same result, and the goal where there is one.

The references: GAE is ORZ's loop over tokens (orz/ppo/utils.py: a few torch operations on tensors of one element), on 48
of the responses, since it takes the same time for each token; packing is first fit over a list of packs; make_pack's is
a loop over tokens; the head's is log_softmax of all logits in fp32; the grader's is its function without processes.
"""

import json
import os
import platform
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before bench/, which has a reward.py of its own

from tools import gpu_machine  # noqa: E402

RESPONSES, MEAN, LONGEST, BUDGET = 8192, 2200, 8000, 16384
HIDDEN, VOCABULARY = 896, 151_936
LOOPED = 48  # responses that ORZ's loop is measured on


# ---- Measurement, for the other scripts here too -----------------------------------------------------------------


def machine(*packages):
    """What the numbers were measured on and with."""
    cpus = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    gpu = gpu_name()
    gpu = f"{gpu}, driver {gpu_machine.driver_version()}" if gpu else "no GPU"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": f"{cpus[0]}, {os.cpu_count()} cores (shared), {gpu}, {platform.machine()}",
        "memory_gib": round(memory / 2**30, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "load_average": os.getloadavg(),
    }


def gpu_name():
    """None where there is no GPU that torch can use."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def spread(values):
    """Median, smallest and largest, and how many."""
    numbers = {"median": float(np.median(values)), "min": min(values), "max": max(values)}
    return {name: four_digits(value) for name, value in numbers.items()} | {"n": len(values)}


def four_digits(value):
    """The value, rounded to four significant digits."""
    return float(f"{value:.4g}")


def write(name, result):
    """Write the result to bench/results/NAME.json, with the load average at the end, and print it."""
    result["load_average_at_end"] = os.getloadavg()
    (ROOT / "bench/results").mkdir(exist_ok=True)
    (ROOT / f"bench/results/{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def timed(function, *arguments):
    """(seconds, result)."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def in_turns(repeats, ours, reference, ours_units=1, reference_units=1):
    """Time both sides in turns, after one turn to warm up. Returns a row with the seconds of each side and, for each turn,
    reference over ours in seconds per unit of work; then the last result of ours and of the reference."""
    functions = {"ours": ours, "reference": reference}
    seconds = {"ours": [], "reference": []}
    results = {}
    for turn in range(repeats + 1):
        order = ["ours", "reference"] if turn % 2 else ["reference", "ours"]
        for side in order:
            took, results[side] = timed(functions[side])
            if turn > 0:
                seconds[side].append(took)
    ratios = []
    for ours_seconds, reference_seconds in zip(seconds["ours"], seconds["reference"]):
        ratios.append((reference_seconds / reference_units) / (ours_seconds / ours_units))
    row = {
        "ours_seconds": spread(seconds["ours"]),
        "reference_seconds": spread(seconds["reference"]),
        "reference_over_ours": spread(ratios),
    }
    return row, results["ours"], results["reference"]


def lengths_like_orz(rng, count=RESPONSES):
    """Response lengths, log-normal, cut off at LONGEST and scaled until their mean is MEAN."""
    raw, scale = rng.lognormal(0.0, 0.8, count), float(MEAN)
    for _ in range(50):
        lengths = np.clip(raw * scale, 1, LONGEST).astype(np.int64)
        scale *= MEAN / lengths.mean()
    return lengths


def batch_like_orz(rng, lengths):
    """A packing.Batch of such responses, 64 to a question, with values, advantages and returns."""
    import packing

    prompts = []
    for prompt_len in rng.integers(100, 300, len(lengths) // 64 + 1):
        prompts.append(rng.integers(0, VOCABULARY, prompt_len, np.int32))
    samples = []
    for i, length in enumerate(lengths):
        response_ids = rng.integers(0, VOCABULARY, length, np.int32)
        correct = bool(rng.random() < 0.5)
        sample = packing.Sample(
            prompt_index=i // 64,
            prompt_ids=prompts[i // 64],
            response_ids=response_ids,
            logprobs=np.zeros(length, np.float32),
            text="",
            finish_reason="stop",
            correct=correct,
            reward=float(correct),
        )
        samples.append(sample)
    batch = packing.Batch(samples)
    batch.values = rng.random(len(batch.logprobs), np.float32)
    batch.advantages = batch.returns = batch.values
    return batch


# ---- The pieces --------------------------------------------------------------------------------------------------


def orz_gae(rewards, values, lengths, gamma=1.0, lam=1.0):
    """ORZ's loop, restated: backwards over all tokens of a pack, with tensors [1, N]."""
    import torch

    rewards = torch.from_numpy(rewards)[None]
    values = torch.from_numpy(values)[None]
    ends = torch.cumsum(torch.tensor(lengths), 0)
    reversed_advantages = []
    last = 0
    sample = len(lengths) - 1
    for t in reversed(range(rewards.size(1))):
        following = values[:, t + 1] if t < rewards.size(1) - 1 else 0.0
        if sample >= 0 and t + 1 == ends[sample]:
            sample, last, following = sample - 1, 0, 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        reversed_advantages.append(last)
    return torch.stack(reversed_advantages[::-1], 1)[0].numpy()


def gae(repeats, batch):
    import ppo

    rewards = ppo.token_rewards(batch)
    lengths = batch.response_lens
    few = lengths[:LOOPED]
    tokens = int(lengths.sum())
    cut = int(few.sum())  # tokens of the few
    row, (ours, _), loop = in_turns(
        repeats,
        lambda: ppo.gae(rewards, batch.values, lengths),
        lambda: orz_gae(rewards[:cut], batch.values[:cut], few.tolist()),
        tokens,
        cut,
    )
    ours_per_token = row["ours_seconds"]["median"] / tokens
    reference_per_token = row["reference_seconds"]["median"] / cut
    return row | {
        "tokens": tokens,
        "reference_tokens": cut,
        "microseconds_per_token": {
            "ours": four_digits(ours_per_token * 1e6),
            "reference": four_digits(reference_per_token * 1e6),
        },
        "max_difference": float(np.abs(ours[:cut] - loop).max()),
        "goal": "at least 100 times ORZ's 13 microseconds a token: 0.13",
        "met": ours_per_token <= 0.13e-6,
    }


def first_fit(lengths, budget):
    """Put each sample, in the given order, into the first pack with room for it. Returns the packs."""
    packs, rooms = [], []
    for i, length in enumerate(lengths):
        for place, room in enumerate(rooms):
            if length <= room:
                packs[place].append(i)
                rooms[place] -= length
                break
        else:
            packs.append([i])
            rooms.append(budget - length)
    return packs


def packing(repeats, batch):
    """Packing for 128 ranks and a hidden size of 5,120 (ORZ-32B). Balance is the slowest rank's work over the mean."""
    import packing

    lengths, ranks, hidden = batch.lengths, 128, 5120
    row, plan, naive = in_turns(
        repeats,
        lambda: packing.pack(lengths, BUDGET, ranks, hidden),
        lambda: first_fit(lengths.tolist(), BUDGET),
    )
    cost = lengths * (1 + lengths / (12 * hidden))
    by_turns = [naive[rank::ranks] for rank in range(ranks)]

    def quality(plan):
        work = []  # of each rank
        for packs in plan:
            work.append(sum(cost[pack].sum() for pack in packs))
        packs_a_rank = max(map(len, plan))
        room = ranks * packs_a_rank * BUDGET
        return {
            "packs_a_rank": packs_a_rank,
            "fill": round(float(lengths.sum() / room), 4),
            "slowest_over_mean": round(float(max(work) / np.mean(work)), 4),
        }

    return row | {
        "sequences": len(lengths),
        "ranks": ranks,
        "ours": quality(plan),
        "reference": quality(by_turns) | {"note": "its packs dealt to the ranks in turn"},
        "goal": "8,192 sequences in less than 0.05 s",
        "met": row["ours_seconds"]["median"] < 0.05,
    }


def looped_pack(batch, indices):
    """make_pack's tensors token by token."""
    import torch

    pack = defaultdict(list)
    ends_q, ends_k = [0], [0]
    prompt_places = {}  # prompt_index → places of its tokens in the pack
    for i in indices:
        start = int(batch.token_starts[i])
        prompt_len = int(batch.prompt_lens[i])
        prompt_index = batch.prompt_indices[i]
        places = list(prompt_places.get(prompt_index, ()))
        for k in range(int(batch.lengths[i])):
            token = int(batch.tokens[start + k])
            if k >= len(places):
                places.append(len(pack["input_ids"]))
                pack["input_ids"].append(token)
                pack["position_ids"].append(k)
            pack["key_index"].append(places[k])
            if k >= prompt_len:
                token_index = int(batch.response_starts[i]) + k - prompt_len
                pack["state_index"].append(places[k - 1])
                pack["targets"].append(token)
                pack["token_index"].append(token_index)
                pack["values"].append(float(batch.values[token_index]))
        prompt_places[prompt_index] = places[:prompt_len]
        ends_q.append(len(pack["input_ids"]))
        ends_k.append(len(pack["key_index"]))
    tensors = {name: torch.tensor(values) for name, values in pack.items()}
    tensors["cu_seqlens_q"] = torch.tensor(ends_q, dtype=torch.int32)
    tensors["cu_seqlens_k"] = torch.tensor(ends_k, dtype=torch.int32)
    return tensors


def make_packs(repeats, batch):
    """make_pack for all packs of one of 128 ranks, beside the loop for the first of them."""
    import torch

    import packing

    packs = packing.pack(batch.lengths, BUDGET, 128, 5120)[0]
    tokens = [int(batch.lengths[pack].sum()) for pack in packs]
    row, ours, looped = in_turns(
        repeats,
        lambda: [packing.make_pack(batch, pack, "cpu", ["values"]) for pack in packs],
        lambda: looped_pack(batch, packs[0]),
        sum(tokens),
        tokens[0],
    )
    return row | {
        "packs": len(packs),
        "tokens": sum(tokens),
        "reference_tokens": tokens[0],
        "equal": all(torch.equal(tensor, ours[0][name]) for name, tensor in looped.items()),
    }


class PeakMemory:
    """Resident memory beyond what there was before, sampled while the block runs."""

    def __enter__(self):
        self.start, self.peak, self.over = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def now(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def look(self):
        while not self.over.wait(0.005):
            self.peak = max(self.peak, self.now() - self.start)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def available_memory():
    """Bytes of this machine's memory that a process can have."""
    for line in open("/proc/meminfo"):
        name, kib, *_ = line.split()
        if name == "MemAvailable:":
            return int(kib) * 1024


def log_probs(repeats, tokens=None):
    """Forward and backward of the head and of its reference, fp32, for as many tokens as memory allows."""
    import torch

    import model

    if tokens is None:
        # The reference holds logits, their log-softmax, its exponential and product for the entropy, and gradients.
        bytes_per_token = 5 * 4 * VOCABULARY
        room = 0.8 * min(available_memory(), 12 * 2**30)  # Other processes need memory, too.
        tokens = int(room / bytes_per_token) // 64 * 64
    torch.manual_seed(0)
    head = model.LogprobHead(HIDDEN, VOCABULARY, bias=False)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (tokens,))
    peaks = {"ours": 0, "reference": 0}

    def run(name, forward):
        head.weight.grad = hidden.grad = None
        with PeakMemory() as memory:
            logprobs, entropy = forward()
            logprobs.sum().backward()
        peaks[name] = max(peaks[name], memory.peak)
        return logprobs.detach(), entropy.detach(), hidden.grad.clone()

    def full():
        table = torch.nn.functional.linear(hidden, head.weight).float().log_softmax(-1)  # [N, V]
        with torch.no_grad():
            entropy = -(table.exp() * table).sum(-1)
        return table.gather(-1, targets[:, None])[:, 0], entropy

    row, ours, reference = in_turns(
        repeats,
        lambda: run("ours", lambda: head(hidden, targets, 1.0)),
        lambda: run("reference", full),
    )
    difference = {}
    for name, ours_tensor, reference_tensor in zip(("logprobs", "entropy", "gradient"), ours, reference):
        difference[name] = float((ours_tensor - reference_tensor).abs().max())
    return row | {
        "tokens": tokens,
        "tokens_note": "what the reference has memory for: 80% of what is available, at most 12 GiB; five fp32 "
        "tables of tokens x vocabulary",
        "hidden_size": HIDDEN,
        "vocabulary": VOCABULARY,
        "tokens_per_second": {
            "ours": four_digits(tokens / row["ours_seconds"]["median"]),
            "reference": four_digits(tokens / row["reference_seconds"]["median"]),
        },
        "peak_gib": {name: round(peak / 2**30, 2) for name, peak in peaks.items()},
        "max_difference": difference,
    }


def answers(rng):
    """(response, reference) of 8,192 typical responses, and where the references come from."""
    folders = [ROOT.parent / "shared/data", ROOT.parent.parent / "shared/data"]
    if "ORZ_DATA" in os.environ:
        folders.insert(0, Path(os.environ["ORZ_DATA"]))
    files = []
    for folder in folders:
        files += sorted(folder.glob("*orz_math*.json"))
    references = []
    for file in files:
        for _, record in json.loads(file.read_text()):
            references.append(record["ground_truth"]["value"])
    if not files:
        sys.path.append(str(ROOT / "tests"))
        from reward_pairs import PAIRS

        for pairs in PAIRS.values():
            references += [pair[1] for pair in pairs if pair[1]]
    filler = "Let me think about this step by step. Wait, I should recheck the sum of the digits. " * 60
    items = []
    for _ in range(RESPONSES):
        reference = rng.choice(references)
        answer = rng.choice([reference, rng.choice(references)])
        items.append((f"{filler}</think> <answer> \\boxed{{{answer}}} </answer>", reference))
    return items, ", ".join(sorted({file.name for file in files})) or "tests/reward_pairs.py"


def grading(repeats):
    """The grader with two processes beside its function in this process: what the processes cost and gain."""
    import equality
    import reward

    items, source = answers(random.Random(0))
    grader = reward.Grader(2)
    for future in [grader.submit(items[0][0], "0.5") for _ in range(8)]:
        future.result()  # the processes have started
    row, ours, plain = in_turns(
        repeats,
        lambda: [future.result() for future in [grader.submit(*item) for item in items]],
        lambda: [equality.is_equal(reward.extract_answer(text), answer) for text, answer in items],
    )
    verdicts, outcomes = zip(*ours)
    return row | {
        "responses": len(items),
        "characters_each": len(items[0][0]),
        "references": source,
        "processes": 2,
        "equal": list(verdicts) == plain,
        "right": int(sum(verdicts)),
        "outcomes": Counter(outcomes),
        "goal": "8,192 typical answers in less than 5 s on 2 cores",
        "met": row["ours_seconds"]["median"] < 5,
    }


def main(repeats=5):
    result = machine("torch", "numpy", "transformers", "lark", "mpmath")
    rng = np.random.default_rng(0)
    lengths = lengths_like_orz(rng)
    result["repeats"] = repeats
    result["lengths"] = {"mean": float(lengths.mean()), "max": int(lengths.max())}
    batch = batch_like_orz(rng, lengths)
    pieces = {
        "gae": lambda: gae(repeats, batch),
        "packing": lambda: packing(repeats, batch),
        "make_pack": lambda: make_packs(repeats, batch),
        "log_probs": lambda: log_probs(repeats),
        "grading": lambda: grading(repeats),
    }
    for name, piece in pieces.items():
        result[name] = piece() | {"load_average": os.getloadavg()[0]}
        print(name, json.dumps(result[name]), flush=True)
    write("pieces", result)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
