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
Everything above the Learner needs torch and numpy only.

Shapes: B samples, N response tokens, T tokens of a pack; [N] arrays run over the samples in order.
"""

from dataclasses import dataclass

import numpy as np
import torch

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


class Batch:
    """All samples of a step as flat arrays: one object that Ray shares without copying on every node.

    tokens int32 [ΣT] (each prompt followed by its response), prompt_lens and response_lens int64 [B], rewards
    fp32 [B], and fp32 arrays over response tokens [N]: logprobs (the sampler's), right (1 where the answer was), then,
    as the step goes on, values, advantages, returns, and where a setting needs them old_logprobs and ref_logprobs.
    """

    def __init__(self, samples):
        self.tokens = np.concatenate([ids for s in samples for ids in (s.prompt_ids, s.response_ids)])
        self.prompt_lens = np.array([len(s.prompt_ids) for s in samples])
        self.response_lens = np.array([len(s.response_ids) for s in samples])
        self.rewards = np.array([s.reward for s in samples], np.float32)
        self.logprobs = np.concatenate([s.logprobs for s in samples]).astype(np.float32)
        self.lengths = self.prompt_lens + self.response_lens
        self.token_ends = np.cumsum(self.lengths)
        self.response_ends = np.cumsum(self.response_lens)
        self.right = np.repeat((self.rewards > 0).astype(np.float32), self.response_lens)  # [N]

    def response(self, i):
        """Where sample i stands in the [N] arrays."""
        return slice(self.response_ends[i] - self.response_lens[i], self.response_ends[i])


# ---- Packing -----------------------------------------------------------------------------------------------------


def pack(lengths, budget, ranks, hidden_size):
    """Put samples into packs of at most `budget` tokens, as many packs on every rank and the same work on each.

    lengths [B]; returns plan[rank][i] = list of sample indices. All ranks have equally many packs, because ZeRO-3
    gathers weights together, pack by pack; some may be empty. The number of packs is the least that a search finds to fit.

    Work of a sequence of l tokens: linear layers cost about 24·H² per token and causal attention 2·H·l, so
    l · (1 + l / 12H) in units of a token. Packs of like work meet at the same time, the heaviest of them on the
    least loaded rank.
    """
    lengths = np.asarray(lengths)
    if lengths.max(initial=0) > budget:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit into a pack of {budget} tokens")
    failed = max(0, -(-int(lengths.sum()) // (budget * ranks)) - 1)
    for k in range(1, 9):  # of samples longer than budget / (k + 1) at most k share a pack
        failed = max(failed, -(-int((lengths * (k + 1) > budget).sum()) // (k * ranks)) - 1)
    step = 1  # in doubling steps to a number of packs that fits, and in halving ones back to the least
    while (packs := fill_packs(lengths.tolist(), budget, (failed + step) * ranks)) is None or step > 1:
        failed, step = (failed + step, 2 * step) if packs is None else (failed, step // 2)
    work = [sum(lengths[i] * (1 + lengths[i] / (12 * hidden_size)) for i in indices) for indices in packs]
    order = np.argsort(work, kind="stable")[::-1]
    plan, load = [[] for _ in range(ranks)], np.zeros(ranks)
    for round_start in range(0, len(order), ranks):
        for rank, i in zip(np.argsort(load, kind="stable"), order[round_start : round_start + ranks]):
            plan[rank].append(packs[i])
            load[rank] += work[i]
    return plan


def fill_packs(lengths, budget, num_packs):
    """All samples in `num_packs` lists of indices with nearly the same number of tokens, or None if they do not fit.

    Each pack takes the longest sample that is left, and others that bring it up to its share of the tokens that are
    left, or where they are too coarse for that, as close to the budget as they can: an exact subset sum over 64 or
    more of them, spread over all lengths. Bit s of an integer says that some of them have s tokens together.
    """
    rest = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    tokens, packs = sum(lengths), []
    for packs_left in range(num_packs, 0, -1):
        indices = rest[:1]
        if rest:
            share = max(0, -(-tokens // packs_left) - lengths[rest[0]])
            room = (2 << budget - lengths[rest[0]]) - 1
            others = rest[1 :: max(1, len(rest) // max(64, 2 * len(rest) // packs_left))]
            sums = [1]
            for i in others:
                sums.append((sums[-1] | sums[-1] << lengths[i]) & room)
            reachable = sums.pop()
            best = (reachable & (2 << share) - 1).bit_length() - 1
            if share - best > budget // 50:
                best = reachable.bit_length() - 1
            for i in reversed(others):
                if not sums.pop() >> best & 1:  # not to be had without this one
                    indices.append(i)
                    best -= lengths[i]
            taken = set(indices)
            rest = [i for i in rest if i not in taken]
            tokens -= sum(lengths[i] for i in indices)
        packs.append(indices)
        if tokens > budget * (packs_left - 1):
            return None
    return packs


def make_pack(batch, indices, device, fields=()):
    """The tensors of one pack: what the networks read, and `fields` of the batch, fp32 [N of this pack].

    An empty list of samples gives a pack of two tokens to predict nothing from: it takes part in every collective
    and adds exactly nothing.
    """
    lengths = batch.lengths[indices] if indices else np.array([2])
    sequences = [batch.tokens[batch.token_ends[i] - batch.lengths[i] : batch.token_ends[i]] for i in indices]
    input_ids = np.concatenate(sequences or [np.zeros(2, np.int32)])
    ends = np.cumsum(lengths)
    # s_t of the first response token ends at the last prompt token, hence the −1.
    positions = [np.arange(end - batch.response_lens[i], end) - 1 for i, end in zip(indices, ends)]
    result = {
        "input_ids": torch.from_numpy(input_ids).long(),  # [T]
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),  # [T], restarting
        "cu_seqlens": torch.tensor([0, *ends], dtype=torch.int32),  # [B + 1]
        "positions": torch.from_numpy(np.concatenate([np.empty(0, np.int64), *positions])),  # [N]
    }
    for field in fields:
        values = [getattr(batch, field)[batch.response(i)] for i in indices]
        result[field] = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *values]))  # [N]
    result = {name: tensor.to(device, non_blocking=True) for name, tensor in result.items()}
    return result | {"max_seqlen": int(max(lengths))}


# ---- Advantages and losses ---------------------------------------------------------------------------------------


def gae(rewards, values, lengths, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over many responses at once.

    rewards and values [N], per token, responses laid end to end; lengths [B], their sizes, ΣN. Returns advantages
    and returns, fp32 [N]. One vectorised step per position from the end, over the responses that reach it.
    """
    lengths = np.asarray(lengths)
    rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    last = np.cumsum(lengths) - 1  # [B] index of each response's last token
    next_values = np.append(values[1:], 0.0)  # [N]
    next_values[last[lengths > 0]] = 0.0  # nothing follows the end
    deltas = rewards + gamma * next_values - values  # [N]
    advantages = np.empty_like(deltas)
    order = np.argsort(-lengths, kind="stable")
    last, running = last[order], np.zeros(len(lengths))
    # num_active[k] = responses of more than k tokens: the first so many in `order`.
    num_active = len(lengths) - np.searchsorted(
        np.sort(lengths), np.arange(lengths.max(initial=0)), side="right"
    )
    for k, n in enumerate(num_active.tolist()):
        index = last[:n] - k
        running[:n] = deltas[index] + gamma * lam * running[:n]  # Â_t = δ_t + γλ Â_{t+1}
        advantages[index] = running[:n]
    return advantages.astype(np.float32), (advantages + values).astype(np.float32)


def token_rewards(batch, kl_coef=0.0):
    """r_t, fp32 [N]: the 0/1 reward at the last token, minus kl_coef · (log π_old − log π_ref) at every token."""
    rewards = np.zeros(len(batch.logprobs), np.float32)
    if kl_coef:
        rewards -= kl_coef * (batch.old_logprobs - batch.ref_logprobs)
    answered = batch.response_lens > 0
    rewards[batch.response_ends[answered] - 1] += batch.rewards[answered]
    return rewards


def normalise(advantages):
    """Mean 0 and standard deviation 1 over all tokens of the batch, in fp64 and back to fp32."""
    wide = advantages.astype(np.float64)
    return ((wide - wide.mean()) / (wide.std() + 1e-8)).astype(np.float32)


def policy_loss(logprobs, old_logprobs, advantages, clip_eps):
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), negated. All [N]; returns the loss per token and the ratio."""
    ratio = (logprobs - old_logprobs).exp()  # [N]
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.min(ratio * advantages, clipped * advantages), ratio


def value_loss(values, old_values, returns, value_clip):
    """The clipped value loss of ORZ, ½ max of the squared errors of V and of V kept near V_old. All [N]."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


class DriftError(Exception):
    """Sampler and learner disagree about the same tokens: what would be trained on is not what was sampled."""


# ---- The Learner -------------------------------------------------------------------------------------------------


def deepspeed_config(cfg, dtype):
    """ZeRO-3: weights, gradients and optimizer states are each cut into one part per rank."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        # backward() accumulates over as many packs as there are; every step() is an update.
        "managed_gradient_accumulation": False,
        "gradient_clipping": cfg.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "steps_per_print": 10**9,
    }


class Learner:
    """One network under training: "policy", "critic", or "reference" (forward only). One per rank; calls are collective."""

    def __init__(self, kind, cfg, path, device, dtype, tick=lambda: None):
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        self.kind, self.cfg, self.device, self.tick = kind, cfg, device, tick
        self.updates = 0  # applied so far
        self.drift_max = 0.0  # the largest difference of log-probs that this rank saw
        self.updates_per_step = (
            cfg.policy_updates_per_step if kind == "policy" else cfg.critic_updates_per_step
        )
        self.drift_limit = cfg.drift_limit or (1e-3 if dtype == torch.float32 else 0.05)
        config = deepspeed_config(cfg, dtype)
        # While this object lives, from_pretrained cuts each weight into its parts as soon as it is read.
        partition_while_loading = HfDeepSpeedConfig(config)
        if kind == "critic":
            network = model.load_critic(path, dtype, cfg.gradient_checkpointing, cfg.seed)
        else:
            network = model.load_policy(path, dtype, cfg.gradient_checkpointing)
        del partition_while_loading
        self.lr = {"policy": cfg.policy_lr, "critic": cfg.critic_lr}.get(kind)
        optimizer = None
        if self.lr is not None:
            fused = device.type == "cuda"
            optimizer = torch.optim.AdamW(
                network.parameters(), self.lr, betas=tuple(cfg.adam_betas), weight_decay=0.0, fused=fused
            )
        self.engine = deepspeed.initialize(model=network, optimizer=optimizer, config=config)[0]
        self.network = self.engine.module
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    @torch.no_grad()
    def forward(self, batch, plan):
        """V(s_t) of a critic, log π(a_t|s_t) of a policy: fp32 [N of this rank's samples, in the plan's order]."""
        results = []
        for indices in plan[self.rank]:
            pack = make_pack(batch, indices, self.device)
            out = self.engine(pack) if self.kind == "critic" else self.engine(pack, self.cfg.temperature)[0]
            results.append(out.cpu().numpy())
            self.tick()
        return np.concatenate(results)

    def update(self, batch, plan):
        """One optimizer update on the samples of `plan` (all ranks' packs); returns {metric: [sum, count]} over all ranks.

        Raises FloatingPointError or DriftError before the update is applied, on all ranks alike.
        """
        num_tokens = sum(int(batch.response_lens[i]) for packs in plan for indices in packs for i in indices)
        terms = self.policy_terms if self.kind == "policy" else self.critic_terms
        sums = {}
        for indices in plan[self.rank]:
            loss, vectors = terms(batch, indices)
            # ZeRO-3 divides every reduced gradient by the number of ranks; multiplying by it first leaves the sum.
            self.engine.backward(loss.sum() * self.world_size / num_tokens)
            for name, vector in vectors.items():
                total = vector.detach().double().sum()
                sums[name] = sums.get(name, 0) + torch.stack([total, torch.full_like(total, len(vector))])
            if "drift_mean" in vectors and len(loss):
                self.drift_max = max(self.drift_max, float(vectors["drift_mean"].detach().max()))
            self.tick()
        totals = torch.stack(list(sums.values()))  # [M, 2]
        torch.distributed.all_reduce(totals)
        metrics = dict(zip(sums, totals.tolist()))
        self.check(metrics)
        self.updates += 1
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.updates / max(1, self.cfg.warmup_steps))
        self.engine.step()
        metrics[f"grad_norm_{self.kind}"] = (float(self.engine.get_global_grad_norm()), 1)
        metrics[f"lr_{self.kind}"] = (group["lr"], 1)
        return metrics

    def check(self, metrics):
        """Refuse an update of numbers that went wrong, or of samples that another policy made."""
        if not np.isfinite(list(metrics.values())).all():
            raise FloatingPointError(f"the {self.kind} update is not finite and was not applied: {metrics}")
        drift, count = metrics.get("drift_mean", (0.0, 1))
        if drift / count > self.drift_limit >= 0:
            raise DriftError(
                f"vLLM and the policy give the same tokens log-probs {drift / count:.2g} apart on average, over the "
                f"limit of {self.drift_limit:.2g}: stale weights in vLLM, another dtype, or another temperature"
            )

    def policy_terms(self, batch, indices):
        """The loss per token of one pack, and vectors of which the step's metrics are the means."""
        strict = self.cfg.policy_updates_per_step == 1
        fields = ["advantages", "logprobs", "right"] + ([] if strict else ["old_logprobs"])
        pack = make_pack(batch, indices, self.device, fields)
        logprobs, entropy = self.engine(pack, self.cfg.temperature)  # [N]
        # Strictly on-policy, the old log-probs are the new ones: no pass of their own, and the ratio is 1.
        old_logprobs = logprobs.detach() if strict else pack["old_logprobs"]
        advantages, right, eps = pack["advantages"], pack["right"] > 0, self.cfg.clip_eps
        loss, ratio = policy_loss(logprobs, old_logprobs, advantages, eps)
        vectors = {"pg_loss": loss, "entropy": entropy}
        vectors |= {"entropy_right": entropy[right], "entropy_wrong": entropy[~right]}
        if self.updates % self.cfg.policy_updates_per_step == 0:  # vLLM sampled with just these weights
            vectors["drift_mean"] = (logprobs - pack["logprobs"]).abs()
        if not strict:
            vectors["clipfrac_low"] = (ratio < 1 - eps) & (advantages < 0)
            vectors["clipfrac_high"] = (ratio > 1 + eps) & (advantages > 0)
            vectors["approx_kl"] = ratio - 1 - ratio.log()  # k3 (Schulman 2020)
        return loss, vectors

    def critic_terms(self, batch, indices):
        """As policy_terms, for the critic."""
        pack = make_pack(batch, indices, self.device, ["values", "returns"])
        values = self.engine(pack)  # [N]
        loss = value_loss(values, pack["values"], pack["returns"], self.cfg.value_clip)
        return loss, {"v_loss": loss, "value_clipfrac": (values - pack["values"]).abs() > self.cfg.value_clip}

    def weights(self, bucket_bytes=2**30):
        """Yield (Hugging Face name, whole tensor) of every parameter, gathered a bucket at a time. All ranks together."""
        import deepspeed

        bucket, size = [], 0
        parameters = list(self.network.named_parameters())
        for i, (name, parameter) in enumerate(parameters):
            bucket.append((name, parameter))
            size += parameter.ds_numel * parameter.element_size()
            if size >= bucket_bytes or i == len(parameters) - 1:
                with deepspeed.zero.GatheredParameters([p for _, p in bucket]):
                    yield from ((name.removeprefix("hf."), p.data) for name, p in bucket)
                bucket, size = [], 0

    def export(self, folder):
        """Write a Hugging Face folder; rank 0 holds the whole model in its CPU memory for this."""
        state_dict = {}
        for name, tensor in self.weights():
            if self.rank == 0:
                state_dict[name] = tensor.cpu().clone()
        if self.rank == 0:
            model.save_pretrained(self.network, state_dict, folder)

    # GPU memory is shared by turns: what is not at work moves to the CPU. On CPU there is nowhere to move.

    def offload(self, keep_weights=False):
        """Everything but (with keep_weights) the 16-bit weights, which a weight sync still needs, to CPU memory."""
        if self.device.type != "cuda":
            return
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        parts = {State.lp_grads, State.contiguous_grad_buffer} | (
            set() if keep_weights else {State.lp_params}
        )
        if self.lr is not None:
            self.move_optimizer("cpu")
            self.engine.offload_states(include=parts)
        torch.cuda.empty_cache()

    def onload(self):
        if self.device.type == "cuda" and self.lr is not None:
            self.engine.reload_states()
            self.move_optimizer(self.device)

    def move_optimizer(self, device):
        """Move the fp32 weights and AdamW's moments: DeepSpeed's own mover wants FusedAdam, which needs nvcc."""
        for master in self.engine.optimizer.fp32_partitioned_groups_flat:
            master.data = master.data.to(device)
            for name, moment in self.engine.optimizer.optimizer.state.get(master, {}).items():
                if torch.is_tensor(moment) and moment.dim() > 0:
                    moment.data = moment.data.to(device)
