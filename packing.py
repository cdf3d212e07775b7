"""Packing: samples laid end to end, without padding, and dealt to the ranks.

In:   Samples, one response each.   Out: a Batch of flat arrays, a plan of packs, and the tensors of one pack.

Shapes: B samples, N response tokens, T tokens of a pack; [N] arrays run over the samples in order.
"""

import bisect
import heapq
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Sample:
    """One response, as it was sampled. Token ids are never made from text again."""

    question: int  # index of the question in its data set
    prompt_ids: np.ndarray  # int32
    response_ids: np.ndarray  # int32
    logprobs: np.ndarray  # the sampler's, fp32, one for each of response_ids
    text: str
    finish_reason: str  # "stop": it ended by itself; "length": it was cut off
    reward: float = 0.0
    graded: str = ""  # how the reward was reached, one of reward.Grader's outcomes
    stats: dict | None = None  # reward.response_stats of the text
    line: str = ""  # all of it, as samples/ holds it


class Batch:
    """All samples of a step as flat arrays: one object that Ray shares without copying on every node.

    tokens int32 [ΣT] (each prompt followed by its response), questions, prompt_lens and response_lens int64 [B], rewards
    fp32 [B], and fp32 arrays over response tokens [N]: logprobs (the sampler's), then, as the step goes on, values,
    advantages, returns, and where a setting needs them old_logprobs and ref_logprobs.
    """

    def __init__(self, samples):
        self.tokens = np.concatenate([ids for s in samples for ids in (s.prompt_ids, s.response_ids)])
        self.questions = np.array([s.question for s in samples])
        self.prompt_lens = np.array([len(s.prompt_ids) for s in samples])
        self.response_lens = np.array([len(s.response_ids) for s in samples])
        self.rewards = np.array([s.reward for s in samples], np.float32)
        self.logprobs = np.concatenate([s.logprobs for s in samples], dtype=np.float32)
        self.lengths = self.prompt_lens + self.response_lens
        self.token_starts = np.cumsum(self.lengths) - self.lengths
        self.response_starts = np.cumsum(self.response_lens) - self.response_lens


# ---- Packing -----------------------------------------------------------------------------------------------------


def bundle(batch, samples, capacity):
    """Samples of one question, which will share its prompt: as many together as `capacity` tokens hold.

    samples [B], indices; returns lists of indices, and how many tokens each list has.
    """
    samples, bundles = samples[np.argsort(batch.questions[samples], kind="stable")], []
    for group in np.split(samples, np.flatnonzero(np.diff(batch.questions[samples])) + 1):
        room = capacity - batch.prompt_lens[group[0]]
        bundles += [group[together].tolist() for together in best_fit(batch.response_lens[group], room)]
    return bundles, [batch.prompt_lens[b[0]] + batch.response_lens[b].sum() for b in bundles]


def pack(lengths, budget, ranks, hidden_size):
    """Put samples into packs of at most `budget` tokens, as many packs on every rank and the same work on each.

    lengths [B]; returns plan[rank][i] = list of sample indices. All ranks have equally many packs, because ZeRO-3
    gathers weights together, pack by pack; some may be empty. At ORZ's sizes this takes at most one pack more than
    the tokens need. Raises ValueError where a sample is over the budget.

    Work of a sequence of l tokens: linear layers cost about 24·H² per token and causal attention 2·H·l, so
    l · (1 + l / 12H) in units of a token. Packs of like work meet at the same time.
    """
    lengths = np.asarray(lengths)
    if lengths.max(initial=0) > budget:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit into a pack of {budget} tokens")
    tightest = best_fit(lengths, budget)
    tightest += [[] for _ in range(-len(tightest) % ranks)]  # as many on every rank
    # The same number, evenly filled: longest first, each to the emptiest pack (Graham 1969).
    # fills: (tokens so far, the pack they are in), a heap
    packs, fills = [[] for _ in tightest], [(0, i) for i in range(len(tightest))]
    for i in np.argsort(-lengths, kind="stable").tolist():
        fill, emptiest = fills[0]
        packs[emptiest].append(i)
        heapq.heapreplace(fills, (fill + lengths[i], emptiest))
    packs = packs if max(fills)[0] <= budget else tightest
    cost = lengths * (1 + lengths / (12 * hidden_size))
    # [packs of a rank, ranks]: packs of like work, which are computed at the same time
    meetings = np.argsort([-cost[indices].sum() for indices in packs], kind="stable").reshape(-1, ranks)
    meetings[1::2] = meetings[1::2, ::-1].copy()  # in snake order over the ranks
    return [[packs[i] for i in meeting] for meeting in meetings.T]


def best_fit(lengths, capacity):
    """Lists of indices: longest first, each to the fullest list where it fits (best fit decreasing, Johnson 1974)."""
    packs, rooms = defaultdict(list), []  # rooms: (tokens left, the pack they are left in), sorted
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist()):
        place = bisect.bisect_left(rooms, (length,))
        room, pack = rooms.pop(place) if place < len(rooms) else (capacity, len(packs))
        packs[pack].append(i)
        bisect.insort(rooms, (room - length, pack))
    return list(packs.values())


def make_pack(batch, indices, device, fields=()):
    """The tensors of one pack: what the networks read (model.py), and `fields` of the batch, fp32 [N of this pack].

    Samples of one question share its prompt, which stands in the pack once. `where` [N] are the places of its response
    tokens in the batch. An empty list of samples gives a prompt to predict nothing from: it takes part in every
    collective and adds exactly nothing.
    """
    samples = indices or [0]
    lengths = (batch.lengths if indices else batch.prompt_lens)[samples]  # [B]
    ends, questions = np.cumsum(lengths), batch.questions[samples]  # [B]
    # every token of every sample, and whose it is
    token, i = np.arange(ends[-1]), np.repeat(samples, lengths)  # [K]
    offset = token - np.repeat(ends - lengths, lengths)  # [K], in its sample
    response = offset >= batch.prompt_lens[i]  # [K]
    first = (questions[:, None] == questions).argmax(1)  # [B]: the first sample of the same question
    # the token that stands for it in the pack, and how many stay so far
    copy = np.where(response, token, np.repeat((ends - lengths)[first], lengths) + offset)  # [K]
    kept = np.cumsum(copy == token)  # [K]
    ids = batch.tokens[batch.token_starts[i] + offset].astype(np.int64)  # [K]
    arrays = {
        "input_ids": ids[copy == token],  # [T]
        "position_ids": offset[copy == token],  # [T]
        "keys": kept[copy] - 1,  # [K]
        "cu_seqlens_q": np.array([0, *kept[ends - 1]], np.int32),  # [B + 1]
        "cu_seqlens_k": np.array([0, *ends], np.int32),  # [B + 1]
        "positions": kept[copy][np.flatnonzero(response) - 1] - 1,  # [N]: s_t ends one token before a_t
        "targets": ids[response],  # [N]
        "where": (batch.response_starts[i] + offset - batch.prompt_lens[i])[response],  # [N]
    }
    arrays |= {field: getattr(batch, field)[arrays["where"]] for field in fields}
    pack = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
    return pack | {"max_seqlen": int(max(lengths))}
