"""The algorithm: packing, advantages, losses, and the Learner that trains one network with DeepSpeed ZeRO-3.

Vanilla PPO, as Open-Reasoner-Zero runs it (arXiv 2503.24290, section 2), against the textbook (arXiv 1707.06347):
  1. no KL term, neither in the reward nor in the loss, and so no reference model (kl_coef brings both back);
  2. γ = λ = 1: every token of a response gets the advantage R − V(s_t), undiscounted;
  3. the critic is a network of its own, started from the same base model, with its own learning rate;
  4. the policy takes one update per batch, strictly on-policy; the critic takes twelve, on one twelfth each;
  5. the reward is 0 or 1 at the last token and nothing else: no format reward, no length penalty;
  6. advantages are normalised over all tokens of the whole batch.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t)        Â_t = Σ_k (γλ)^k δ_{t+k}        R_t = Â_t + V(s_t)            gae
    r_t(θ) = π_θ(a_t|s_t) / π_old(a_t|s_t)   L_π = −Σ_t min(r_t Â_t, clip(r_t, 1−ε, 1+ε) Â_t) / N          policy_loss
    L_V = Σ_t ½ max((V − R_t)², (V_old + clip(V − V_old, ±value_clip) − R_t)²) / N                         value_loss

N is the number of response tokens of the whole update, over all ranks and packs: one mean, not a mean of means.

In:   a Batch (flat arrays over all samples) and a plan of packs.   Out: values, log-probs, updated networks, metrics.
Nothing above the Learner knows of Ray, vLLM or DeepSpeed.

Shapes: B samples, N response tokens, T tokens of a pack; [N] arrays run over the samples in order.
"""

import bisect
import heapq
import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import model


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


# ---- Advantages and losses ---------------------------------------------------------------------------------------


def gae(rewards, values, lengths, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over many responses at once.

    rewards and values [N], per token, responses laid end to end; lengths [B], their sizes, which sum to N. Returns
    advantages and returns, fp32 [N]. Sums of 1, 2, 4, … terms (Hillis and Steele 1986): no loop over tokens.
    """
    advantages, returns = np.empty((2, len(values)), np.float32)  # [N] each
    ends = np.cumsum(lengths)  # [B]
    for start, end in zip(ends - lengths, ends):
        v = values[start:end].astype(np.float64)  # [n], this response's
        a = rewards[start:end] - v
        a[:-1] += gamma * v[1:]  # δ_t; nothing follows the end
        for terms in (2**k for k in range(int(end - start - 1).bit_length())):
            a[:-terms] += (gamma * lam) ** terms * a[terms:]  # Â_t = Σ_k (γλ)^k δ_{t+k}, of twice as many
        advantages[start:end], returns[start:end] = a, a + v
    return advantages, returns


def token_rewards(batch, kl_coef=0.0):
    """r_t, fp32 [N]: the 0/1 reward at the last token, minus kl_coef · (log π_old − log π_ref) at every token."""
    rewards = np.zeros(len(batch.logprobs), np.float32)
    if kl_coef:
        rewards -= kl_coef * (batch.old_logprobs - batch.ref_logprobs)
    answered = batch.response_lens > 0
    rewards[(batch.response_starts + batch.response_lens)[answered] - 1] += batch.rewards[answered]
    return rewards


def normalise(advantages):
    """Mean 0 and standard deviation 1 over all tokens of the batch. Sums are fp64, arrays are not: the driver would spend
    more time on their memory than on the arithmetic."""
    a = np.subtract(advantages, advantages.mean(dtype=np.float64), out=np.empty_like(advantages))  # [N]
    return np.divide(a, np.sqrt(np.einsum("i,i", a, a, dtype=np.float64) / len(a)) + 1e-8, out=a)


def group_advantages(batch, size):
    """GRPO's (arXiv 2402.03300, section 4.1.2): the reward against the mean over the `size` samples of its question, in
    their standard deviations, at every token. The samples stand in the order of their questions; fp32 [N]."""
    groups = batch.rewards.reshape(-1, size)  # [B / size, size]
    relative = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-6)
    return np.repeat(relative.ravel(), batch.response_lens)


def policy_loss(logprobs, old_logprobs, advantages, clip_eps):
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), negated. All [N]; returns the loss per token and the ratio."""
    ratio = (logprobs - old_logprobs).exp()  # [N]
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.min(ratio * advantages, clipped * advantages), ratio


def value_loss(values, old_values, returns, value_clip):
    """The clipped value loss of ORZ, ½ max of the squared errors of V and of V kept near V_old. All [N]."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


# ---- The Learner -------------------------------------------------------------------------------------------------


# Weights of a network that every rank keeps whole from pack to pack, 1 GB in 16 bits; all others are gathered for each
# pack, layer by layer. Half of DeepSpeed's stage3_max_live_parameters, so that it may still fetch a layer ahead.
# And gradients that are summed over the ranks at once: DeepSpeed's default, 500 million, is a buffer of 1 GB in 16 bits.
KEPT_WHOLE, REDUCED_AT_ONCE = 5 * 10**8, 2 * 10**7


# Mean |Δ log-prob| between vLLM and the policy above which a run stops, where drift_limit does not say. Both in bf16, healthy
# runs have 0.01 to 0.05 (0.011 Qwen3-4B, 0.05 Qwen2.5-0.5B and SmolLM2-135M): there it is a net for gross errors.
DRIFT_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}


class DriftError(Exception):
    """Sampler and learner disagree about the same tokens: what would be trained on is not what was sampled."""


def drift_message(drift_mean, drift_max, limit):
    """What a DriftError says: the numbers, the three likely causes, and what to look at for each."""
    return (
        f"vLLM's and the policy's log-probs are {drift_mean:.2g} apart on average, {drift_max:.2g} at most "
        f"(drift_limit={limit:.2g}). Likely causes: (1) stale weights in vLLM, if drift_mean in metrics.jsonl was low at "
        "first: look at Rollout.load_weights; (2) another dtype in vLLM, if it was high from the first step on: look for "
        "dtype= and quantization= in logs/worker_0.log; (3) another attention or rotary embedding, if it is lower with a "
        "small max_response_tokens: look for sliding_window, rope_parameters and soft caps in the model's config.json"
    )


class Learner:
    """One network under training: "policy", "critic", or "reference" (forward only). One per rank; calls are collective."""

    stays = False  # on the GPU while others work: if there is room for all, which the Worker finds out

    def __init__(self, kind, cfg, path, device, dtype):
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.kind, self.cfg, self.device = kind, cfg, device
        self.updates = 0  # so far; it follows from the step
        self.drift_limit = cfg.drift_limit or DRIFT_LIMITS[dtype]
        # Weights, gradients and optimizer states are each cut into one part per rank.
        # (memory_efficient_linear would replace torch's linear function in the whole process, for vLLM, too.)
        zero = {"stage": 3, "overlap_comm": False, "memory_efficient_linear": False}
        zero["reduce_bucket_size"] = REDUCED_AT_ONCE
        zero |= {f"stage3_{what}_persistence_threshold": KEPT_WHOLE for what in ("param", "model")}
        # DeepSpeed rounds what a model's __init__ creates to the training dtype, unless it is named in keep_in_fp32_modules.
        plain_buffers = model.plain_buffers(kind, path, dtype, cfg.trust_remote_code)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            # backward() accumulates over as many packs as there are; every step() is an update.
            "managed_gradient_accumulation": False,
            "gradient_clipping": cfg.max_grad_norm,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "data_types": {
                "grad_accum_dtype": "fp32",
                "keep_in_fp32_modules": model.names_in_fp32(plain_buffers),
            },
            "zero_optimization": zero,
        }
        # While this object lives, from_pretrained cuts each weight into its parts as soon as it is read.
        _partition_while_loading = HfDeepSpeedConfig(config)
        settings = cfg.gradient_checkpointing, cfg.seed, cfg.trust_remote_code
        network = self.network = model.load_network(kind, path, dtype, *settings)
        # the weights of a layer come and go together
        deepspeed.utils.set_z3_leaf_modules(network, [GradientCheckpointingLayer], raise_if_not_found=False)
        self.lr = {"policy": cfg.policy_lr, "critic": cfg.critic_lr}.get(kind)  # None: it only looks
        self.final_lr = cfg.policy_lr_final if kind == "policy" and cfg.lr_decay_steps else self.lr
        how = {"betas": tuple(cfg.adam_betas), "weight_decay": 0.0, "fused": device.type == "cuda"}
        optimizer = torch.optim.AdamW(network.parameters(), self.lr, **how) if self.lr is not None else None
        self.engine = deepspeed.initialize(model=network, optimizer=optimizer, config=config)[0]
        model.check_buffers(network, plain_buffers, path)
        # These are kept whole. DeepSpeed would gather them after each update, one by one; left to their next use, they
        # come layer by layer.
        self.engine.optimizer.persistent_parameters = []
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.offload()

    @torch.no_grad()
    def forward(self, batch, plan, before=None):
        """V(s_t) of a critic, log π(a_t|s_t) of a policy: fp32 [N], the whole batch on every rank; 0 outside the plan.
        Less `before` [N], where it is given: the same of earlier, on the rank that has the sample."""
        results = torch.zeros(len(batch.logprobs), device=self.device)  # [N]
        for indices in plan[self.rank]:
            pack = make_pack(batch, indices, self.device)
            out = self.engine(pack) if self.kind == "critic" else self.engine(pack, self.cfg.temperature)[0]
            results[pack["where"]] = out if before is None else out - before[pack["where"]]
        torch.distributed.all_reduce(results)
        return results.cpu().numpy()

    def update(self, batch, plans):
        """One optimizer update on the samples of each plan (all ranks' packs); returns {metric: mean over all elements}
        and, of the policy, update_kl: k3 (Schulman 2020) between it before and after, on a few samples.

        Raises FloatingPointError or DriftError, on all ranks alike, instead of applying an update.
        """
        sums = defaultdict(lambda: np.zeros(2))  # metric → [sum, count], over all ranks and updates
        report = [[packs[0][:2]] for packs in plans[0]]
        # [N]: the log-probs before the first update, for update_kl; policy_terms fills it
        self.before = torch.zeros(len(batch.logprobs), device=self.device)
        for plan in plans:
            metrics, grad_norm = self.accumulate(batch, plan), np.inf
            self.updates += 1
            done = min(1.0, self.updates / max(1, self.cfg.lr_decay_steps))
            lr = self.lr + done * (self.final_lr - self.lr)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr * min(1.0, self.updates / max(1, self.cfg.warmup_steps))
            if np.isfinite(list(metrics.values())).all():
                self.engine.step()  # DeepSpeed leaves out an update whose gradient is not finite
                grad_norm = float(self.engine.get_global_grad_norm())
            if not np.isfinite(grad_norm):
                self.engine.optimizer._overflow_clean_up(None)  # forgets the gradients
                path = f"{self.cfg.out_dir}/{self.cfg.name}/nonfinite_{self.kind}_{self.updates}.npz"
                if self.rank == 0:
                    np.savez(path, **vars(batch))
                torch.distributed.barrier()  # the run may end with the first rank that raises
                if self.cfg.on_nonfinite == "stop":
                    raise FloatingPointError(f"{self.kind} update not finite, left out; its data: {path}")
                metrics = {f"skipped_{self.kind}": [1, 1]}
            else:
                metrics |= {f"grad_norm_{self.kind}": [grad_norm, 1], f"lr_{self.kind}": [group["lr"], 1]}
                metrics[f"skipped_{self.kind}"] = [0, 1]
            for name, total_and_count in metrics.items():
                sums[name] += total_and_count
        means = {name: float(total / count) if count else None for name, (total, count) in sums.items()}
        if self.kind == "policy":
            log_ratio = self.forward(batch, report, self.before)  # [N], 0 outside the report
            num_tokens = sum(batch.response_lens[packs[0]].sum() for packs in report)
            means["update_kl"] = float((np.exp(log_ratio) - 1 - log_ratio).sum() / max(1, num_tokens))
        return means

    def accumulate(self, batch, plan):
        """The gradient of one update; returns the [sum, count] of its metrics over all ranks."""
        num_tokens = sum(int(batch.response_lens[i]) for packs in plan for indices in packs for i in indices)
        terms = self.policy_terms if self.kind == "policy" else self.critic_terms
        sums, drift_max = {}, torch.zeros((), device=self.device)
        for indices in plan[self.rank]:
            loss, vectors = terms(batch, indices)
            # ZeRO-3 divides every reduced gradient by the number of ranks; multiplying by it first leaves the sum.
            self.engine.backward(loss.sum() * self.world_size / num_tokens)
            for name, vector in vectors.items():
                total = vector.detach().double().sum()
                sums[name] = sums.get(name, 0) + torch.stack([total, torch.full_like(total, len(vector))])
            if "drift_mean" in vectors and len(loss):
                drift_max = torch.max(drift_max, vectors["drift_mean"].detach().max())
        totals = torch.stack(list(sums.values()))  # [M, 2]
        torch.distributed.all_reduce(totals)
        metrics = dict(zip(sums, totals.tolist()))
        if "drift_mean" in metrics:
            torch.distributed.all_reduce(drift_max, torch.distributed.ReduceOp.MAX)
            metrics["drift_max"] = [float(drift_max), 1]
            total, count = metrics["drift_mean"]
            if total / count > self.drift_limit >= 0:  # refused: these samples are another policy's
                raise DriftError(drift_message(total / count, float(drift_max), self.drift_limit))
        return metrics

    def policy_terms(self, batch, indices):
        """The loss per token of one pack, and vectors of which the step's metrics are the means."""
        strict = self.cfg.policy_updates_per_step == 1
        fields = ["advantages", "logprobs"] + ([] if strict else ["old_logprobs"])
        pack = make_pack(batch, indices, self.device, fields)
        logprobs, entropy = self.engine(pack, self.cfg.temperature)  # [N]
        # Strictly on-policy, the old log-probs are the new ones: no pass of their own, and the ratio is 1.
        old_logprobs = logprobs.detach() if strict else pack["old_logprobs"]
        self.before[pack["where"]] = old_logprobs  # for update_kl
        advantages, eps = pack["advantages"], self.cfg.clip_eps
        loss, ratio = policy_loss(logprobs, old_logprobs, advantages, eps)
        right = torch.from_numpy(np.repeat(batch.rewards[indices] > 0, batch.response_lens[indices]))  # [N]
        vectors = {"pg_loss": loss, "entropy": entropy}
        vectors |= {"entropy_right": entropy[right], "entropy_wrong": entropy[~right]}
        if self.updates % self.cfg.policy_updates_per_step == 0:  # vLLM sampled with just these weights
            vectors["drift_mean"] = (logprobs - pack["logprobs"]).abs()
        if not strict:
            vectors["clipfrac_low"] = (ratio < 1 - eps) & (advantages < 0)
            vectors["clipfrac_high"] = (ratio > 1 + eps) & (advantages > 0)
            vectors["approx_kl"] = ratio - 1 - (logprobs - old_logprobs)  # k3 (Schulman 2020)
        return loss, vectors

    def critic_terms(self, batch, indices):
        """As policy_terms, for the critic."""
        pack = make_pack(batch, indices, self.device, ["values", "returns"])
        values = self.engine(pack)  # [N]
        loss = value_loss(values, pack["values"], pack["returns"], self.cfg.value_clip)
        return loss, {"v_loss": loss, "value_clipfrac": (values - pack["values"]).abs() > self.cfg.value_clip}

    def weights(self):
        """Yield (Hugging Face name, whole tensor) of every parameter, gathered 16 at a time. All ranks together."""
        import deepspeed

        parameters = list(self.network.named_parameters())
        # 16 are a layer or two, 1 GB in a 32B model; one by one costs ten times more
        for i in range(0, len(parameters), 16):
            bucket = parameters[i : i + 16]
            with deepspeed.zero.GatheredParameters([p for _, p in bucket]):
                yield from ((name.removeprefix("hf."), p.data) for name, p in bucket)

    def export(self, folder):
        """Write a Hugging Face folder; rank 0 holds the whole model in its CPU memory for this."""
        state_dict = {name: tensor.cpu().clone() for name, tensor in self.weights() if self.rank == 0}
        if self.rank == 0:
            model.save_pretrained(self.network, state_dict, folder)

    # GPU memory is shared by turns: who is not at work waits in CPU memory, unless all `stay`. On CPU nothing moves.

    def offload(self, keep_weights=False):
        """Give back what was gathered; where it may not stay, everything but (with keep_weights) the 16-bit weights, which
        a weight sync still needs, goes to CPU memory."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        if self.device.type == "cuda" and self.lr is not None:
            leaving = set() if self.stays else {State.lp_grads, State.contiguous_grad_buffer, State.lp_params}
            self.move_optimizer(self.device if self.stays else "cpu")
            # whatever leaves, it partitions what was gathered, and empties torch's cache
            self.engine.offload_states(include=leaving - ({State.lp_params} if keep_weights else set()))

    def onload(self):
        if self.device.type == "cuda" and self.lr is not None:
            self.engine.reload_states()
            self.move_optimizer(self.device)

    def move_optimizer(self, device):
        """Move the fp32 weights and AdamW's moments: DeepSpeed's own mover wants FusedAdam, which needs nvcc."""
        for _, tensor in self.optimizer_state():
            tensor.data = tensor.data.to(device)

    # ---- Checkpoints: this rank's part in one file, which is no pickle -------------------------------------------

    def optimizer_state(self):
        """Yield (name, tensor): the fp32 weights and AdamW's state, of which all else follows."""
        for i, master in enumerate(self.engine.optimizer.fp32_partitioned_groups_flat):
            yield f"{i}.weights", master
            for name, tensor in self.engine.optimizer.optimizer.state[master].items():
                yield f"{i}.{name}", tensor

    def save(self, folder):
        state = {name: tensor.detach().cpu() for name, tensor in self.optimizer_state()}
        save_file(state, f"{folder}/{self.kind}_{self.rank}.safetensors")
        os.sync()

    def load(self, folder, step):
        """Become what was saved after `step`. It wants the GPU, as forward and update do."""
        zero, saved = self.engine.optimizer, load_file(f"{folder}/{self.kind}_{self.rank}.safetensors")
        zero._partition_all_parameters()
        for i, master in enumerate(zero.fp32_partitioned_groups_flat):
            master.data.copy_(saved.pop(f"{i}.weights"))
            mine = {name.partition(".")[2]: name for name in saved if name.startswith(f"{i}.")}
            zero.optimizer.state[master] = {key: saved[name].to(self.device) for key, name in mine.items()}
            zero._reassign_or_swap_out_partitioned_parameters(i)  # the weights at work, from the fp32 ones
        self.updates = step * getattr(self.cfg, f"{self.kind}_updates_per_step")
