"""Some responses of each step and each evaluation, token by token: what tools/report.py makes report.html from.

    runs/NAME/tokens/step_N.npz        report_samples responses of the step's batch, chosen at random
    runs/NAME/tokens/eval_SET_N.npz    one response to each of report_samples questions, the same ones in every evaluation

In:   samples, their prompts, and the batch before the policy's update.   Out: those files; `read` gives one back.
Nothing here changes the numbers of a run: the choice has a random generator of its own, and the forward pass is only read.

Arrays of a file: B responses, N response tokens of all of them, laid end to end.

    rows, prompt_indices, response_lens    int32 [B]: line in samples/*.jsonl (from 0), question of the step, tokens
    rewards, question_accuracy             fp32 [B]: the response's; the share of its question's responses that are right
    correct                                bool [B]
    token_ids                              int32 [N]
    values                                 fp32 [N]: V(s_t), only with a critic
    raw_advantages                         fp16 [N]: of GAE, before they are normalised, only with a critic
    advantages                             fp16 [N]: as the policy's loss takes them
    policy_logprobs, entropies             fp16 [N]: log π(a_t|s_t) and the entropy of π(·|s_t), of the policy before its update
    logprob_differences                    fp32 [N]: log π − log π_vLLM, too small (1e-6) to be computed from fp16 log-probs
    importance_weights                     fp16 [N]: the weight of the token in the policy's loss
    sampler_logprobs                       fp16 [N]: log π_vLLM(a_t|s_t), in evaluations, which have none of the seven above
    texts                                  uint8: a JSON object of lists: questions, answers, prompts, finish_reasons and graded [B], tokens [N]
"""

import json
import os

import numpy as np

from configs.load import has_critic
from workers import rng_for

# The fp32 [N] arrays that a step adds to its batch, where its settings need them.
STEP_FIELDS = ("values", "advantages", "old_logprobs", "ref_logprobs")


def record_step(cfg, workers, tasks, log, step, prompts, samples, batch):
    """Write tokens/step_N.npz: some samples of a step, with what the critic and the policy compute for each token before
    the policy's update."""
    from packing import plan_samples

    rng = rng_for(cfg.seed, step, "report")
    rows = choose(len(samples), cfg.report_samples, rng)  # [B]
    few = part_of_batch(batch, samples, rows)
    everything = range(len(rows))
    plan = plan_samples(few, everything, cfg, tasks.hidden_size)
    logprobs, entropies = workers.logprobs_and_entropies(few, plan)
    with log.best_effort("tokens/", Exception):
        arrays = describe_responses(rows, prompts, samples, tasks.tokenizer)
        arrays["question_accuracy"] = question_accuracy(samples, cfg.samples_per_prompt, rows)
        arrays |= describe_tokens(cfg, few, logprobs, entropies)
        write(log.dir / "tokens", f"step_{step}", arrays)


def record_evaluation(cfg, tasks, log, name, step, samples):
    """Write tokens/eval_SET_N.npz: the first response to each of some questions of the set `name`."""
    with log.best_effort("tokens/", Exception):
        prompts = tasks.eval[name]
        rng = rng_for(cfg.seed, "report", name)  # without the step: always the same questions
        questions = choose(len(prompts), cfg.report_samples, rng)  # [B]
        rows = questions * cfg.eval_samples
        arrays = describe_responses(rows, prompts, samples, tasks.tokenizer)
        arrays["question_accuracy"] = question_accuracy(samples, cfg.eval_samples, rows)
        logprobs = [samples[row].logprobs for row in rows]
        arrays["sampler_logprobs"] = half(np.concatenate(logprobs))
        write(log.dir / "tokens", f"eval_{name}_{step}", arrays)


def choose(count, most, rng):
    """At most `most` of the numbers from 0 to count − 1, in their order."""
    shuffled = rng.permutation(count)
    return np.sort(shuffled[:most])


def part_of_batch(batch, samples, rows):
    """The Batch of the samples in these rows, with what the step has added to the whole batch so far."""
    from packing import Batch

    few = Batch([samples[row] for row in rows])
    places = []  # in the [N] arrays of the whole batch
    for row in rows:
        start = batch.response_starts[row]
        end = start + batch.response_lens[row]
        places.append(np.arange(start, end))
    token_index = np.concatenate(places)
    for name in STEP_FIELDS:
        if hasattr(batch, name):
            of_whole_batch = getattr(batch, name)
            setattr(few, name, of_whole_batch[token_index])
    return few


def describe_responses(rows, prompts, samples, tokenizer):
    """The arrays that training and evaluation have in common, of the samples in these rows."""
    chosen = [samples[row] for row in rows]
    token_ids = [sample.response_ids for sample in chosen]
    lengths = [len(ids) for ids in token_ids]
    return {
        "rows": np.asarray(rows, np.int32),
        "prompt_indices": per_sample(chosen, "prompt_index", np.int32),
        "response_lens": np.array(lengths, np.int32),
        "rewards": per_sample(chosen, "reward", np.float32),
        "correct": per_sample(chosen, "correct", bool),
        "token_ids": np.concatenate(token_ids),
        "texts": describe_texts(chosen, prompts, tokenizer),
    }


def per_sample(samples, field, dtype):
    """A field of every sample, as an array [B]."""
    values = [getattr(sample, field) for sample in samples]
    return np.array(values, dtype)


def question_accuracy(samples, group_size, rows):
    """The share of right responses to the question that each of these rows answers, fp32 [B]."""
    correct = per_sample(samples, "correct", np.float32)
    groups = correct.reshape(-1, group_size)  # [questions, G]
    accuracy = groups.mean(axis=1)
    return accuracy[rows // group_size]


def describe_texts(samples, prompts, tokenizer):
    """All texts of these samples as JSON in UTF-8, which numpy stores more compactly than an array of texts."""
    texts = {
        "questions": [],
        "answers": [],
        "prompts": [],
        "finish_reasons": [],
        "graded": [],
        "tokens": [],
    }
    for sample in samples:
        question = prompts[sample.prompt_index].question
        prompt_text = decode(tokenizer, sample.prompt_ids.tolist())
        texts["questions"].append(question.question)
        texts["answers"].append(question.answer)
        texts["prompts"].append(prompt_text)
        texts["finish_reasons"].append(sample.finish_reason)
        texts["graded"].append(sample.graded)
        texts["tokens"] += token_texts(sample.prompt_ids, sample.response_ids, tokenizer)
    encoded = json.dumps(texts).encode()
    return np.frombuffer(encoded, np.uint8)


def describe_tokens(cfg, few, logprobs, entropies):
    """The arrays [N] of training: what the critic and the policy compute for each token of the batch `few`."""
    import torch

    import ppo

    arrays = {}
    if has_critic(cfg):
        # The batch has the normalised advantages only.
        rewards = ppo.token_rewards(few, cfg.kl_coef)
        values, response_lens = few.values, few.response_lens
        raw_advantages, _ = ppo.gae(rewards, values, response_lens, cfg.gamma, cfg.lam)
        arrays["values"] = values
        arrays["raw_advantages"] = half(raw_advantages)
    differences = logprobs - few.logprobs
    log_ratio = torch.from_numpy(differences)
    response_lens = few.response_lens.tolist()
    weights, _ = ppo.importance_weights(log_ratio, response_lens, cfg)
    arrays["advantages"] = half(few.advantages)
    arrays["policy_logprobs"] = half(logprobs)
    arrays["entropies"] = half(entropies)
    arrays["logprob_differences"] = differences
    arrays["importance_weights"] = half(weights.numpy())
    return arrays


def half(array):
    """The array in fp16: three significant digits are enough for the report."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16)


# ---- Texts of tokens ---------------------------------------------------------------------------------------------

MOST_TOKENS_OF_A_CHARACTER = 4  # In UTF-8 a character has up to four bytes.


def decode(tokenizer, ids):
    """The text of these token ids, as it is: nothing is left out and nothing tidied."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_texts(prompt_ids, response_ids, tokenizer):
    """The text that each token adds to what stands before it; together they are the response.

    Some tokenizers drop a space at the beginning of a text, so each token is decoded together with the one before it.
    A character whose bytes lie in several tokens belongs to the last of them.
    """
    ids = np.append(prompt_ids[-1:], response_ids).tolist()
    texts = []
    start = 0  # the last token whose characters are complete
    for t in range(1, len(ids)):
        before = decode(tokenizer, [ids[start]])
        text = decode(tokenizer, ids[start : t + 1])
        is_last = t == len(ids) - 1
        num_pending = t - start
        is_incomplete = text.endswith("\ufffd") and num_pending < MOST_TOKENS_OF_A_CHARACTER
        if is_incomplete and not is_last:
            texts.append("")
        else:
            texts.append(text[len(before) :])
            start = t
    return texts


# ---- Files -------------------------------------------------------------------------------------------------------


def write(folder, name, arrays):
    """Write folder/NAME.npz atomically; an older one of a step that is made again is replaced."""
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.tmp", "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(folder / f"{name}.tmp", folder / f"{name}.npz")


def read(path):
    """The arrays of a file as a dict, with the lists of its JSON text beside them. Nothing is unpickled."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    encoded = arrays.pop("texts").tobytes()
    return arrays | json.loads(encoded)
