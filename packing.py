"""Packing: samples are laid end to end, without padding, and dealt to the ranks so that all ranks do the same work.

    sample      one prompt with one response
    bundle      samples of one prompt, which will share that prompt
    pack        bundles, together at most max_tokens_per_pack tokens: one forward pass of a network on one rank
    plan        plans[update][rank][n] is the n-th pack of a rank in an update, as a list of indices into the batch

          samples              bundles                packs                 plan of one update on two ranks
    p r   p r   q r       ┌p r r┐  ┌q r┐         │p r r│q r│       rank 0   │p r r│q r│   │s r r r│
    s r   s r   s r       └s r r r┘  …           │s r r r│  …      rank 1   │…        │   │…      │

In:   Samples, one response each.   Out: a Batch of flat arrays, the plans, and the tensors of one pack.

Shapes: B samples, N response tokens of the batch (or of the pack), T tokens of a pack, K the sum of the lengths of its
samples, in which a shared prompt counts once for every sample. [N] arrays run over the samples in order.
"""

import bisect
import heapq
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch


@dataclass
class Sample:
    """One response, as it was sampled. Its token ids are kept and never computed again from its text."""

    prompt_index: int  # which of the step's prompts it answers
    prompt_ids: np.ndarray  # int32
    response_ids: np.ndarray  # int32
    logprobs: np.ndarray  # fp32, the sampler's, one for each of response_ids
    text: str
    finish_reason: str  # "stop": the response ended by itself; "length": it was cut off
    correct: bool = False  # the verdict of the rule; never True for a response that was cut off
    # What PPO maximises; by default 1.0 where correct, else 0.0. A reward of another scale needs another value_clip.
    reward: float = 0.0
    graded: str = ""  # how the verdict was reached, one of the outcomes of reward.Grader
    stats: dict | None = None  # reward.response_stats of the text
    line: str = ""  # the sample as one line of samples/
    error: str = ""  # of the task file, where it failed on this response


class Batch:
    """All samples of a step as flat arrays: one object, which all Workers of a node read from the same memory.

    tokens          int32 [sum of `lengths`]: each prompt followed by its response
    prompt_indices, prompt_lens, response_lens, lengths, token_starts, response_starts      int64 [B]
    rewards         fp32 [B]
    correct         bool [B]
    cut_off         bool [B]: at the length limit
    logprobs        fp32 [N], the sampler's

    As a step goes on, the training loop adds fp32 [N] arrays: values, advantages, returns, and where a setting needs them
    old_logprobs and ref_logprobs.
    """

    def __init__(self, samples):
        tokens = []
        for sample in samples:
            tokens += [sample.prompt_ids, sample.response_ids]
        self.tokens = np.concatenate(tokens)
        self.prompt_indices = np.array([sample.prompt_index for sample in samples])
        self.prompt_lens = np.array([len(sample.prompt_ids) for sample in samples])
        self.response_lens = np.array([len(sample.response_ids) for sample in samples])
        self.lengths = self.prompt_lens + self.response_lens
        self.token_starts = np.cumsum(self.lengths) - self.lengths
        self.response_starts = np.cumsum(self.response_lens) - self.response_lens
        self.correct = np.array([sample.correct for sample in samples], bool)
        self.cut_off = np.array([sample.finish_reason == "length" for sample in samples], bool)
        self.rewards = np.array([sample.reward for sample in samples], np.float32)
        self.logprobs = np.concatenate([sample.logprobs for sample in samples])


# ---- From samples to plans ---------------------------------------------------------------------------------------


def plan_updates(batch, indices, num_updates, rng, cfg, hidden_size):
    """Split these samples at random into num_updates parts and pack each: plans[update][rank][n] = indices of a pack.

    There are epochs_per_step passes over the samples, one after the other, each split anew.
    """
    plans = []
    for _ in range(cfg.epochs_per_step):
        for part in np.array_split(rng.permutation(indices), num_updates):
            plans.append(plan_samples(batch, part.tolist(), cfg, hidden_size))
    return plans


def plan_samples(batch, indices, cfg, hidden_size):
    """Pack these samples of the batch: plan[rank][n] = indices of a pack.

    Samples of a prompt go together to share it, up to an eighth of a pack: larger bundles would fill packs unevenly.
    """
    bundles, lengths = bundle(batch, indices, cfg.max_tokens_per_pack // 8)
    plan = []
    for packs_of_bundles in pack(lengths, cfg.max_tokens_per_pack, cfg.workers, hidden_size):
        packs = []
        for members in packs_of_bundles:
            samples = chain.from_iterable(bundles[member] for member in members)
            packs.append(list(samples))
        plan.append(packs)
    return plan


def bundle(batch, indices, capacity):
    """Put samples that share a prompt into bundles of at most `capacity` tokens, the prompt counted once.

    indices: list of places in the batch. Returns the bundles, which are lists of such indices, and the tokens of each.
    """
    samples_of_prompt = defaultdict(list)
    for i in indices:
        samples_of_prompt[batch.prompt_indices[i]].append(i)
    bundles, lengths = [], []
    for prompt_index in sorted(samples_of_prompt):
        samples = samples_of_prompt[prompt_index]
        prompt_len = int(batch.prompt_lens[samples[0]])
        response_lens = batch.response_lens[samples].tolist()
        for members in best_fit(response_lens, capacity - prompt_len):
            bundles.append([samples[member] for member in members])
            lengths.append(prompt_len + sum(response_lens[member] for member in members))
    return bundles, lengths


def pack(lengths, budget, num_ranks, hidden_size):
    """Put pieces (samples or bundles) into packs of at most `budget` tokens, with the same work on every rank.

    lengths [B]; returns plan[rank][n] = list of indices into `lengths`. All ranks get equally many packs, because ZeRO-3
    gathers the weights on all ranks together, pack by pack; some packs may be empty. At ORZ's sizes this takes at most
    one pack more than the tokens need. Raises ValueError where a piece is over the budget.
    """
    lengths = np.asarray(lengths)
    longest = lengths.max(initial=0)
    if longest > budget:
        raise ValueError(f"a sample of {longest} tokens does not fit into a pack of {budget} tokens")
    packs = best_fit(lengths, budget)
    num_empty = -len(packs) % num_ranks  # to a multiple of the number of ranks
    packs += [[] for _ in range(num_empty)]
    # The same number of packs, but evenly filled, so that no rank waits for another. With large pieces, packs filled this
    # way may be over the budget.
    even_packs = fill_evenly(lengths, len(packs))
    fullest = max(lengths[indices].sum() for indices in even_packs)
    if fullest <= budget:
        packs = even_packs
    # Per token the linear layers cost about 24·H² operations, and causal attention over l tokens 2·H·l: the work on a
    # sequence is l · (1 + l / 12H), in units of one token of the linear layers.
    work = lengths * (1 + lengths / (12 * hidden_size))
    work_of_packs = [work[indices].sum() for indices in packs]
    return deal(packs, work_of_packs, num_ranks)


def largest_first(numbers):
    """The indices of these numbers, the largest number first; equal ones stay in their order."""
    return np.argsort(-np.asarray(numbers), kind="stable").tolist()


def best_fit(lengths, capacity):
    """Lists of indices: longest piece first, each is put into the list with the least room that it still fits into.

    This is best fit decreasing (Johnson 1974): at most 11/9 of the fewest lists possible, plus 4. A piece that is over the
    capacity gets a list of its own.
    """
    packs = []
    rooms = []  # (tokens left, which pack has them left), sorted
    for i in largest_first(lengths):
        length = int(lengths[i])
        tightest = bisect.bisect_left(rooms, (length,))
        if tightest < len(rooms):
            room, pack_index = rooms.pop(tightest)
        else:
            room, pack_index = capacity, len(packs)
            packs.append([])
        packs[pack_index].append(i)
        bisect.insort(rooms, (room - length, pack_index))
    return packs


def fill_evenly(lengths, num_packs):
    """Lists of indices: longest piece first, each is put into the emptiest pack (Graham 1969)."""
    packs = [[] for _ in range(num_packs)]
    # A heap of (tokens so far, which pack has them).
    fills = []
    for pack_index in range(num_packs):
        fills.append((0, pack_index))
    for i in largest_first(lengths):
        tokens, emptiest = fills[0]
        packs[emptiest].append(i)
        tokens += int(lengths[i])
        heapq.heapreplace(fills, (tokens, emptiest))
    return packs


def deal(packs, work_of_packs, num_ranks):
    """Deal packs to ranks, most work first, in snake order (0 1 2, 2 1 0, …): plan[rank][n] = a pack.

    The n-th packs of all ranks are computed at the same time, because gathering weights holds the ranks together: they
    come from neighbouring places in the order of work, and so cost about the same.
    """
    plan = [[] for _ in range(num_ranks)]
    for place, pack_index in enumerate(largest_first(work_of_packs)):
        plan[snake(place, num_ranks)].append(packs[pack_index])
    return plan


def snake(place, num_seats):
    """The seat that is served at this place of the order 0 1 2, 2 1 0, 0 1 2, …"""
    turn, seat = divmod(place, num_seats)
    return seat if turn % 2 == 0 else num_seats - 1 - seat


# ---- The tensors of a pack ---------------------------------------------------------------------------------------


def make_pack(batch, indices, device, fields=()):
    """The tensors of one pack: what the networks read, and `fields` of the batch for its response tokens, fp32 [N].

    input_ids     int64 [T]: the tokens; a prompt that several samples share stands in the pack once
    position_ids  int64 [T]: where each token stands in its own sample
    key_index     int64 [K]: for every token of every sample, where it stands in the pack
    cu_seqlens_q  int32 [B + 1]: 0, and where the tokens that each sample adds to input_ids end
    cu_seqlens_k  int32 [B + 1]: 0, and where each sample's part of key_index ends
    state_index   int64 [N]: where in the pack s_t ends, which is the token before a_t
    targets       int64 [N]: the response tokens a_t
    token_index   int64 [N]: where in the batch's [N] arrays the response tokens stand
    max_seqlen    the longest sample, a plain int

    An empty list of samples gives a pack of one prompt without a response: the rank then takes part in every collective
    operation, and adds exactly 0 to the gradient.
    """
    pieces = defaultdict(list)  # tensor → its pieces, one for each sample
    cu_seqlens_q, cu_seqlens_k = [0], [0]
    prompt_places = {}  # prompt_index → where its tokens stand in the pack
    for i in indices or [0]:
        prompt_index = batch.prompt_indices[i]
        prompt_len = batch.prompt_lens[i]
        length = batch.lengths[i] if indices else prompt_len
        # A prompt that stands in the pack already is not written again.
        is_in_pack = prompt_index in prompt_places
        first_new = prompt_len if is_in_pack else 0
        num_new = length - first_new
        num_placed = cu_seqlens_q[-1]
        places = np.arange(num_placed, num_placed + num_new)
        if first_new:
            places = np.concatenate([prompt_places[prompt_index], places])
        prompt_places[prompt_index] = places[:prompt_len]
        start = batch.token_starts[i]
        tokens = batch.tokens[start : start + length].astype(np.int64)
        response_len = length - prompt_len
        pieces["input_ids"].append(tokens[first_new:])
        pieces["position_ids"].append(np.arange(first_new, length))
        pieces["key_index"].append(places)
        pieces["state_index"].append(places[prompt_len - 1 : length - 1])
        pieces["targets"].append(tokens[prompt_len:])
        pieces["token_index"].append(batch.response_starts[i] + np.arange(response_len))
        cu_seqlens_q.append(num_placed + num_new)
        cu_seqlens_k.append(cu_seqlens_k[-1] + length)
    arrays = {}
    for name, parts in pieces.items():
        arrays[name] = np.concatenate(parts)
    for field in fields:
        arrays[field] = getattr(batch, field)[arrays["token_index"]]
    arrays["cu_seqlens_q"] = np.array(cu_seqlens_q, np.int32)
    arrays["cu_seqlens_k"] = np.array(cu_seqlens_k, np.int32)
    pack = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array)
        pack[name] = tensor.to(device, non_blocking=True)
    pack["max_seqlen"] = int(np.diff(cu_seqlens_k).max())
    return pack
