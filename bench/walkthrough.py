"""Record the step that docs/walkthrough.md follows, and compute the page's numbers from the record.

    python launch.py configs/tiny.py --workers=2 --name=walk --save_every=1 --keep_checkpoints=30
    python tools/export.py runs/walk 3
    python tools/export.py runs/walk 4
    python bench/walkthrough.py record runs/walk      docs/walkthrough/: step.npz and step.json

    python launch.py configs/tiny.py --workers=2 --name=walk_4updates --policy_updates_per_step=4
    python launch.py configs/tiny.py --workers=2 --name=walk_collapse --policy_lr=5e-3 --eval_every=-1      Ctrl-C after step 4
    python bench/walkthrough.py rows runs/walk runs/walk_4updates runs/walk_collapse      docs/walkthrough/rows.json

    python bench/walkthrough.py write                 the blocks of numbers in docs/walkthrough.md

In:   a run of the demo with its checkpoints of two steps exported.
Out:  step.npz, one training step as flat arrays: the samples, the critic's values and the policy's log-probs and entropies
      at every token before the step, and the log-probs after it. step.json: the run's row of metrics, the change of every
      weight, and responses to the question that the page follows, after training.

A block of the page stands between the lines <!-- NAME --> and ```, and is what the function NAME of this file prints. It
computes with the project's own functions; tests/test_walkthrough.py computes every block again.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from repetition import of_all_tokens, read_batch  # noqa: E402

import model  # noqa: E402
import ppo  # noqa: E402
from configs.load import load  # noqa: E402
from packing import Batch, Sample, make_pack, plan_samples, plan_updates  # noqa: E402
from tools import plan as memory_plan  # noqa: E402
from workers import rng_for  # noqa: E402

PAGE = ROOT / "docs" / "walkthrough.md"
FOLDER = ROOT / "docs" / "walkthrough"
CONFIG = str(ROOT / "configs" / "tiny.py")
STEP = 4
# Places in the batch: a worked answer with a slip, a guess, a worked answer that is right, a guess that is right.
FOLLOWED = [16, 17, 20, 27]
PACKED = [17, 27, 1]  # two guesses of one question and one of another: a pack that fits on the page
HIDDEN_SIZE = 128  # of the demo's model

# ---- The record --------------------------------------------------------------------------------------------------


def record(run):
    """Write step.npz and step.json from a run's folder."""
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    batch, samples = read_batch(run / "samples" / f"step_{STEP}.jsonl")
    cfg = load([CONFIG])
    policy_before = model.load_network("policy", run / f"policy_step_{STEP - 1}", torch.float32)
    policy_after = model.load_network("policy", run / f"policy_step_{STEP}", torch.float32)
    critic_before = model.load_network("critic", run / f"critic_step_{STEP - 1}", torch.float32)
    logprobs, entropies = of_all_tokens(batch, policy_before, cfg, HIDDEN_SIZE)
    logprobs_after, _ = of_all_tokens(batch, policy_after, cfg, HIDDEN_SIZE)
    (values,) = of_all_tokens(batch, critic_before, cfg, HIDDEN_SIZE)
    arrays = {
        "tokens": batch.tokens.astype(np.int16),
        "prompt_indices": batch.prompt_indices.astype(np.int16),
        "prompt_lens": batch.prompt_lens.astype(np.int16),
        "response_lens": batch.response_lens.astype(np.int16),
        "correct": batch.correct,
        "logprobs": logprobs,
        "logprobs_after": logprobs_after,
        "entropies": entropies.astype(np.float16),
        "values": values,
    }
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "step.npz", **arrays)
    prompt = samples[FOLLOWED[0]].prompt_ids.tolist()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    words = {int(token): tokenizer.decode([token]) for token in np.unique(batch.tokens)}
    recorded = {
        "words": words,
        "metrics": metrics[STEP],
        "weights": weight_changes(policy_before, policy_after),
        "after_training": continuations(run / "policy", tokenizer, prompt),
    }
    (FOLDER / "step.json").write_text(json.dumps(recorded, indent=1) + "\n")


def weight_changes(before, after):
    """For each weight of the policy: its number of elements, its norm, and the norm and the maximum of its change."""
    changed = dict(after.named_parameters())
    changes = {}
    for name, old in before.named_parameters():
        change = (changed[name] - old).detach()
        changes[name.removeprefix("hf.")] = {
            "elements": old.numel(),
            "norm": float(old.detach().norm()),
            "norm_of_change": float(change.norm()),
            "max_change": float(change.abs().max()),
        }
    return changes


def continuations(folder, tokenizer, prompt):
    """Four responses of the trained policy to a prompt, sampled by plain transformers."""
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    ids = torch.tensor([prompt] * 4)  # [4, T]
    out = trained.generate(ids, do_sample=True, top_k=0, max_new_tokens=96, pad_token_id=0)
    texts = []
    for row in out[:, len(prompt) :]:
        text = tokenizer.decode(row)
        texts.append(text[: text.index("</answer>") + len("</answer>")])
    return texts


KEPT = (
    "step",
    "accuracy",
    "response_tokens",
    "cut_off",
    "entropy",
    "update_kl",
    "approx_kl",
    "clipfrac_low",
    "clipfrac_high",
    "grad_norm_policy",
    "equal_groups",
)


def record_rows(runs):
    """Write rows.json: run → the metrics of its steps that the page compares, and the first response of each step."""
    recorded = {}
    for run in runs:
        rows = []
        for line in (run / "metrics.jsonl").read_text().splitlines():
            metrics = json.loads(line)
            if metrics["step"] > 0:
                row = {name: metrics[name] for name in KEPT}
                samples = run / "samples" / f"step_{metrics['step']}.jsonl"
                first = json.loads(samples.read_text().partition("\n")[0])
                rows.append(row | {"first_response": first["response"]})
        recorded[run.name] = rows
    (FOLDER / "rows.json").write_text(json.dumps(recorded, indent=1) + "\n")


# ---- The recorded step, as the training loop has it ---------------------------------------------------------------


def recorded_step():
    """The record as a namespace: batch (with values, advantages and returns), cfg, raw advantages, and step.json."""
    arrays = np.load(FOLDER / "step.npz")
    recorded = json.loads((FOLDER / "step.json").read_text())
    rows = json.loads((FOLDER / "rows.json").read_text())
    samples = []
    token, response_token = 0, 0
    for i in range(len(arrays["prompt_lens"])):
        prompt_len, response_len = int(arrays["prompt_lens"][i]), int(arrays["response_lens"][i])
        ids = arrays["tokens"][token : token + prompt_len + response_len].astype(np.int32)
        logprobs = arrays["logprobs"][response_token : response_token + response_len]
        correct = bool(arrays["correct"][i])
        sample = Sample(
            prompt_index=int(arrays["prompt_indices"][i]),
            prompt_ids=ids[:prompt_len],
            response_ids=ids[prompt_len:],
            logprobs=logprobs,
            text="".join(recorded["words"][str(token_id)] for token_id in ids[prompt_len:]),
            finish_reason="stop",
            correct=correct,
            reward=float(correct),
        )
        samples.append(sample)
        token += prompt_len + response_len
        response_token += response_len
    batch = Batch(samples)
    batch.values = arrays["values"]
    cfg = load([CONFIG])
    metrics = ppo.set_advantages(batch, cfg)
    raw_advantages, _ = ppo.gae(ppo.token_rewards(batch), batch.values, batch.response_lens)
    return SimpleNamespace(
        samples=samples,
        batch=batch,
        cfg=cfg,
        metrics=metrics,
        raw_advantages=raw_advantages,
        logprobs=arrays["logprobs"],
        logprobs_after=arrays["logprobs_after"],
        entropies=arrays["entropies"],
        recorded=recorded,
        rows=rows,
    )


def tokens_of(step, i):
    """The places of a response's tokens in the [N] arrays."""
    start = int(step.batch.response_starts[i])
    return range(start, start + int(step.batch.response_lens[i]))


def word(step, token_id):
    """A token as it is printed in a table."""
    return step.recorded["words"][str(int(token_id))].replace("\n", "⏎")


# ---- The blocks of the page ----------------------------------------------------------------------------------------


def prompt(step):
    """The prompt of the question, as text and as token ids."""
    sample = step.samples[FOLLOWED[0]]
    words = [word(step, token_id) for token_id in sample.prompt_ids]
    return f"{' '.join(words)}\n{sample.prompt_ids.tolist()}"


def responses(step):
    """The four responses, with their lengths and rewards."""
    text = ""
    for i in FOLLOWED:
        sample = step.samples[i]
        shown = sample.text.replace("\n", "⏎")
        text += f"{i:>3}  {shown}\n     {len(sample.response_ids)} tokens, reward {sample.reward:.0f}\n"
    return text.rstrip()


def batch_in_numbers(step):
    """The whole batch: its size and its rewards."""
    batch = step.batch
    return (
        f"{len(batch.rewards):,} responses, {len(batch.logprobs):,} response tokens, {len(batch.tokens):,} tokens\n"
        f"mean reward {batch.rewards.mean():.3f}, mean length {batch.response_lens.mean():.1f}"
    )


def values(step):
    """V(s_t) before each token of a right worked answer and of one with a slip."""
    right, wrong = FOLLOWED[2], FOLLOWED[0]
    text = f"{'response ' + str(right):>16}{'V(s_t)':>8}   {'response ' + str(wrong):>16}{'V(s_t)':>8}\n"
    for place, other in zip(tokens_of(step, right), tokens_of(step, wrong)):
        t = place - tokens_of(step, right)[0]
        own = word(step, step.samples[right].response_ids[t])
        others = word(step, step.samples[wrong].response_ids[t])
        mark = "  ←" if own != others else ""
        text += f"{own:>16}{step.batch.values[place]:>8.2f}   {others:>16}{step.batch.values[other]:>8.2f}{mark}\n"
    return text.rstrip()


def advantages(step):
    """The arithmetic of one short response, token by token."""
    i = FOLLOWED[1]
    rewards = ppo.token_rewards(step.batch)
    text = f"{'t':>2}{'token':>12}{'r_t':>6}{'V(s_t)':>9}{'δ_t':>9}{'Â_t':>9}{'R_t':>6}{'normalised':>12}\n"
    places = tokens_of(step, i)
    for t, place in enumerate(places):
        value = step.batch.values[place]
        next_value = step.batch.values[place + 1] if t + 1 < len(places) else 0.0
        delta = rewards[place] + next_value - value
        token = word(step, step.samples[i].response_ids[t])
        text += f"{t:>2}{token:>12}{rewards[place]:>6.0f}{value:>9.3f}{delta:>9.3f}"
        text += f"{step.raw_advantages[place]:>9.3f}{abs(step.batch.returns[place]):>6.2f}"
        text += f"{step.batch.advantages[place]:>12.3f}\n"
    return text.rstrip()


def normalisation(step):
    """Mean and deviation of all advantages, before and after, and the critic's explained variance."""
    raw, normalised = step.raw_advantages.astype(np.float64), step.batch.advantages.astype(np.float64)
    return (
        f"before      mean {raw.mean():7.4f}   standard deviation {raw.std():.4f}\n"
        f"normalised  mean {normalised.mean() + 0.0:7.4f}   standard deviation {normalised.std():.4f}\n"
        f"explained variance of the critic {step.metrics['explained_var']:.2f}, mean |Â| {step.metrics['advantage_abs']:.3f}"
    ).replace("-0.0000", " 0.0000")


def critic_updates(step):
    """How the samples are split into the critic's updates, and the loss of one token before the first."""
    rng = rng_for(step.cfg.seed, STEP, "critic")
    everything = range(len(step.batch.lengths))
    plans = plan_updates(step.batch, everything, step.cfg.critic_updates_per_step, rng, step.cfg, HIDDEN_SIZE)
    text = ""
    for n, plan in enumerate(plans):
        members = [i for packs in plan for indices in packs for i in indices]
        tokens = ppo.num_response_tokens(step.batch, plan)
        rate = ppo.learning_rate(step.cfg, "critic", ppo.num_updates(step.cfg, "critic", STEP - 1) + n + 1)
        text += f"update {n + 1}: {len(members)} responses, {tokens:,} response tokens (N), learning rate {rate:g}\n"
    i = FOLLOWED[2]
    place = tokens_of(step, i)[0]
    value = torch.tensor([float(step.batch.values[place])])
    target = torch.tensor([float(step.batch.returns[place])])
    text += f"first token of response {i}: V_old = {value.item():.3f}, R = {target.item():.0f}\n"
    for moved in (0.0, 0.1, 0.19, 0.3):
        moved_value = (value + moved).requires_grad_()
        loss = ppo.value_loss(moved_value, value, target, step.cfg.value_clip)
        loss.sum().backward()
        text += f"   V = {moved_value.item():.3f}: loss {loss.item():.3f}, ∂loss/∂V {moved_value.grad.item():.3f}\n"
    return text.rstrip()


def policy_gradient(step):
    """Ratio, loss and gradient of some tokens at the policy's only update."""
    plan = [[list(range(len(step.batch.lengths)))]]
    denominator = ppo.loss_denominator(step.batch, plan, step.cfg.loss_average, step.cfg.max_response_tokens)
    text = f"N = {denominator:,}\n"
    text += (
        f"{'response':>8}{'token':>10}{'log π':>9}{'Â':>8}{'ratio':>7}{'loss':>8}{'∂loss/∂log π · N':>18}\n"
    )
    for i, t in ((FOLLOWED[0], 0), (FOLLOWED[1], 0), (FOLLOWED[2], 0), (FOLLOWED[3], 0), *slips(step)):
        place = tokens_of(step, i)[t]
        logprobs = torch.tensor([float(step.logprobs[place])], requires_grad=True)
        advantage = torch.tensor([float(step.batch.advantages[place])])
        loss, ratio = ppo.policy_loss(logprobs, logprobs.detach(), advantage, step.cfg.clip_eps)
        loss.sum().backward()
        token = word(step, step.samples[i].response_ids[t])
        text += f"{i:>8}{token:>10}{logprobs.item():>9.3f}{advantage.item():>8.2f}{ratio.item():>7.2f}"
        text += f"{loss.item():>8.2f}{logprobs.grad.item():>18.2f}\n"
    return text.rstrip()


def slips(step):
    """(response, place) of the first token in which the wrong worked answer differs from the right one, in both."""
    wrong, right = FOLLOWED[0], FOLLOWED[2]
    pairs = zip(step.samples[wrong].response_ids, step.samples[right].response_ids)
    for t, (a, b) in enumerate(pairs):
        if a != b:
            return [(wrong, t), (right, t)]


def first_tokens(step):
    """The first token of all responses of the batch: what working and guessing earned, and how the update changed them."""
    firsts = step.batch.response_starts  # [B]
    tokens = [int(sample.response_ids[0]) for sample in step.samples]
    text = f"{'first token':>11}{'responses':>11}{'mean reward':>13}{'mean Â':>8}{'mean π before':>15}{'mean π after':>14}\n"
    for token_id in sorted(set(tokens), key=tokens.count):
        chosen = firsts[np.array(tokens) == token_id]
        rewards = step.batch.returns[chosen].mean()
        before, after = np.exp(step.logprobs[chosen]).mean(), np.exp(step.logprobs_after[chosen]).mean()
        text += f"{word(step, token_id):>11}{len(chosen):>11}{rewards:>13.2f}{step.batch.advantages[chosen].mean():>8.2f}"
        text += f"{before:>15.3f}{after:>14.3f}\n"
    return text.rstrip()


def after_update(step):
    """What the update did to the probabilities of the same tokens."""
    text = f"{'response':>8}{'token':>10}{'Â':>8}{'π before':>10}{'π after':>10}\n"
    for i, t in ((FOLLOWED[0], 0), (FOLLOWED[1], 0), *slips(step)):
        place = tokens_of(step, i)[t]
        token = word(step, step.samples[i].response_ids[t])
        before, after = np.exp(step.logprobs[place]), np.exp(step.logprobs_after[place])
        text += f"{i:>8}{token:>10}{step.batch.advantages[place]:>8.2f}{before:>10.3f}{after:>10.3f}\n"
    change = step.logprobs_after - step.logprobs  # [N]
    uncertain = step.entropies > 0.1  # [N]
    for name, chosen in (("Â > 0", step.batch.advantages > 0), ("Â < 0", step.batch.advantages < 0)):
        rose = (change[chosen & uncertain] > 0).mean()
        text += f"tokens with {name} and an entropy over 0.1: the probability of {rose:.0%} rose\n"
    return text.rstrip()


def weight_change(step):
    """How far the policy's weights moved in the update."""
    weights = step.recorded["weights"].values()
    norm = sum(weight["norm"] ** 2 for weight in weights) ** 0.5
    norm_of_change = sum(weight["norm_of_change"] ** 2 for weight in weights) ** 0.5
    rate = ppo.learning_rate(step.cfg, "policy", ppo.num_updates(step.cfg, "policy", STEP))
    largest = max(weight["max_change"] for weight in weights)
    elements = sum(weight["elements"] for weight in weights)
    return (
        f"{elements:,} weights, learning rate {rate:g}\n"
        f"‖θ‖ = {norm:.2f}   ‖Δθ‖ = {norm_of_change:.3f}   ‖Δθ‖ / ‖θ‖ = {norm_of_change / norm:.4f}\n"
        f"largest change of one weight {largest:.2g}, which is {largest / rate:.2f} times the learning rate"
    )


def trained(step):
    """Four responses to the same question after training."""
    shown = [text.replace("\n", "⏎") for text in step.recorded["after_training"]]
    return "\n".join(shown)


def pack(step):
    """The arrays of one pack of three samples."""
    arrays = make_pack(step.batch, PACKED, "cpu", ["advantages"])
    text = ""
    for i in PACKED:
        sample = step.samples[i]
        text += f"sample {i}: a prompt of {len(sample.prompt_ids)} tokens, a response of {len(sample.response_ids)}\n"
    for name in (
        "input_ids",
        "position_ids",
        "key_index",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "state_index",
        "targets",
    ):
        array = arrays[name].tolist()
        text += f"\n{name} [{len(array)}]\n{wrapped(array)}\n"
    rounded = [f"{advantage:.1f}" for advantage in arrays["advantages"].tolist()]
    text += f"\nadvantages [{len(rounded)}]\n{wrapped(rounded)}\n"
    return text.rstrip()


def wrapped(items, per_line=26):
    lines = []
    for start in range(0, len(items), per_line):
        lines.append("  " + " ".join(str(item) for item in items[start : start + per_line]))
    return "\n".join(lines)


def plan(step):
    """The packs of the whole step on two ranks."""
    cfg = load([CONFIG, "--workers=2"])
    ranks = plan_samples(step.batch, range(len(step.batch.lengths)), cfg, HIDDEN_SIZE)
    text = ""
    for rank, packs in enumerate(ranks):
        tokens = [len(make_pack(step.batch, indices, "cpu")["input_ids"]) for indices in packs]
        text += f"rank {rank}: {len(packs)} packs of {', '.join(f'{n:,}' for n in tokens)} tokens\n"
    unshared = int(step.batch.lengths.sum())
    text += f"Without sharing prompts these would be {unshared:,} tokens."
    return text


def one_and_four_updates(step):
    """Accuracy with one and with four policy updates a step, and what four updates look like in the metrics."""
    one, four = step.rows["walk"], step.rows["walk_4updates"]
    text = f"{'':>4}{'one update':>12}{'':>11}{'four updates':>14}\n"
    text += f"{'step':>4}{'accuracy':>12}{'update_kl':>11}{'accuracy':>14}{'update_kl':>11}{'approx_kl':>11}{'clipfrac':>10}\n"
    for n in (1, 2, 3, 4, 6, 8, 10, 20):
        row, other = one[n - 1], four[n - 1]
        clipped = other["clipfrac_low"] + other["clipfrac_high"]
        text += f"{n:>4}{row['accuracy']:>12.1%}{row['update_kl']:>11.1e}{other['accuracy']:>14.1%}"
        text += f"{other['update_kl']:>11.1e}{other['approx_kl']:>11.1e}{clipped:>10.1%}\n"
    return text.rstrip()


def stumble(step):
    """The steps around one in which the run of this page lost accuracy for a moment."""
    return metrics_table(step.rows["walk"][5:11])


def collapse(step):
    """A run with ten times the policy's learning rate."""
    return metrics_table(step.rows["walk_collapse"])


def metrics_table(rows):
    names = (
        "accuracy",
        "update_kl",
        "grad_norm_policy",
        "entropy",
        "response_tokens",
        "cut_off",
        "equal_groups",
    )
    formats = (".1%", ".1e", ".2f", ".3f", ".1f", ".1%", ".1%")
    text = "step" + "".join(f"{name:>17}" for name in names) + "\n"
    for row in rows:
        text += f"{row['step']:>4}"
        for name, form in zip(names, formats):
            text += f"{row[name]:>17{form}}"
        text += "\n"
    return text.rstrip()


def collapsed_responses(step):
    """The first response of steps 1 to 4 of that run, cut to a line."""
    lines = []
    for row in step.rows["walk_collapse"][:4]:
        shown = row["first_response"].replace("\n", "⏎")
        lines.append(f"step {row['step']}  {shown[:90]}{' …' if len(shown) > 90 else ''}")
    return "\n".join(lines)


def repetition(_):
    """Values and advantages of repeated text, from the record of bench/repetition.py."""
    numbers = json.loads((PAGE.parent / "repetition.json").read_text())
    text = f"{numbers['responses_with_repetition']} of {numbers['responses']} responses repeat, "
    text += f"{numbers['repeated_tokens']:,} of {numbers['tokens']:,} tokens are repeated\n"
    text += f"{'':>38}{'V(s_t)':>8}{'PPO':>8}{'GRPO':>8}\n"
    kinds = {
        "repeated": "repeated tokens",
        "before": "tokens before, in the same responses",
        "others": "all tokens that are not repeated",
    }
    for kind, label in kinds.items():
        text += f"{label:>38}{numbers[f'value_{kind}']:>8.2f}{numbers[f'ppo_{kind}']:>8.2f}{numbers[f'grpo_{kind}']:>8.2f}\n"
    label = "not repeated, as far into a response"
    return text + f"{label:>38}{numbers['value_others_same_place']:>8.2f}"


def memory(_):
    """What fills a GPU in each phase of a step of ORZ's 7B run, by the estimates of tools/plan.py."""
    cfg = load([str(ROOT / "configs" / "orz_7b.py")])
    text = ""
    for phase, items in memory_plan.plan(cfg, memory_plan.read_shape(cfg.model), 80.0).items():
        total = sum(items.values())
        text += f"{phase}: {total:.1f} GiB\n"
        largest = sorted(items, key=items.get, reverse=True)[:4]
        for name in largest:
            shown = name.partition(" = ")[0].partition(":")[0].partition(" (")[0]
            text += f"{items[name]:>8.1f}  {shown}\n"
    vocabulary = memory_plan.read_shape(cfg.model).vocabulary
    logits = 4 * cfg.max_tokens_per_pack * vocabulary / 2**30
    return (
        text
        + f"never held: {logits:.1f} GiB of logits, {cfg.max_tokens_per_pack:,} tokens times {vocabulary:,} words in fp32"
    )


BLOCKS = (
    prompt,
    responses,
    batch_in_numbers,
    plan,
    pack,
    values,
    advantages,
    normalisation,
    critic_updates,
    policy_gradient,
    first_tokens,
    after_update,
    weight_change,
    trained,
    one_and_four_updates,
    stumble,
    collapse,
    collapsed_responses,
    repetition,
    memory,
)


def with_blocks(page, step):
    """The text of the page with every block computed anew. Raises ValueError where a block has no place in the page."""
    for block in BLOCKS:
        pattern = rf"(<!-- {block.__name__} -->\n```\n).*?(^```$)"
        flags = re.DOTALL | re.MULTILINE
        page, count = re.subn(
            pattern, lambda found: f"{found[1]}{block(step)}\n{found[2]}", page, flags=flags
        )
        if count != 1:
            raise ValueError(
                f"docs/walkthrough.md has {count} places for the block {block.__name__}, not one"
            )
    return page


def main(argv):
    if argv[:1] == ["record"] and len(argv) == 2:
        record(Path(argv[1]))
    elif argv[:1] == ["rows"] and len(argv) > 1:
        record_rows([Path(path) for path in argv[1:]])
    elif argv == ["write"]:
        PAGE.write_text(with_blocks(PAGE.read_text(encoding="utf-8"), recorded_step()), encoding="utf-8")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
