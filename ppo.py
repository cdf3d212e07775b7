"""The algorithm: advantages, losses, and the Learner that trains one network with DeepSpeed ZeRO-3.

Vanilla PPO, as Open-Reasoner-Zero runs it (arXiv 2503.24290, section 2), against the textbook (arXiv 1707.06347):
  1. There is no KL term, neither in the reward (kl_coef) nor in the loss (kl_loss_coef), and so no reference model.
  2. γ = λ = 1: every token of a response gets the advantage R − V(s_t), undiscounted. The critic is then a baseline only:
     whatever it predicts, the expected policy gradient is that of the reward, without bias.
  3. The critic is a network of its own, started from the same base model, with its own learning rate.
  4. The policy takes one update per batch and the critic twelve, each on a twelfth of it. A second policy update would
     train on samples of an older policy; the critic is a regression, which may take many small steps.
  5. The reward is 0 or 1 at the last token and nothing else: no format reward, no length penalty.
  6. Advantages are normalised over all tokens of the whole batch.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t)        Â_t = Σ_k (γλ)^k δ_{t+k}        R_t = Â_t + V(s_t)            gae
    r_t(θ) = π_θ(a_t|s_t) / π_old(a_t|s_t)   L_π = −Σ_t min(r_t Â_t, clip(r_t, 1−ε, 1+ε) Â_t) / N          policy_loss
    L_V = Σ_t ½ max((V − R_t)², (V_old + clip(V − V_old, ±value_clip) − R_t)²) / N                         value_loss

N is the number of response tokens of the whole update, over all ranks and packs. The loss is a mean over tokens, not a mean
over responses of means over their tokens: every token weighs the same, whether its response is long or short.

With one policy update per batch, π_old is the policy itself: the ratio r_t is 1, the clip does nothing, and what is left of
PPO is REINFORCE with a learned baseline. The clip matters with more than one policy update a step.

A variant changes one of three things, and is off by default:
  the advantages       gae, or one of the group advantages without a critic       set_advantages, GROUP_ADVANTAGES
  what is trained on   all responses, or without equal groups, or cut-off ones    policy_samples
  the policy's loss    a weight per token, a KL term, an average by response      Learner.vary_loss, loss_denominator

In:   a Batch (flat arrays over all samples) and plans of packs.   Out: values, log-probs, updated networks, metrics.
Nothing above the section "The Learner" needs Ray, vLLM or DeepSpeed.

Shapes: B samples, N response tokens, T tokens of a pack; [N] arrays run over the samples in order.
"""

import os

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import model
from configs.load import has_critic, updates_per_step
from packing import make_pack

# ---- Advantages --------------------------------------------------------------------------------------------------


def set_advantages(batch, cfg):
    """Set batch.advantages and, if there is a critic, batch.returns, which the critic learns. Returns metrics."""
    if not has_critic(cfg):
        # The samples stand in the order of their prompts.
        groups = batch.rewards.reshape(-1, cfg.samples_per_prompt)  # [prompts, G]
        group_advantages = GROUP_ADVANTAGES[cfg.advantage]
        batch.advantages = group_advantages(groups, batch.response_lens)
        return {"advantage_abs": mean_abs(batch.advantages)}
    rewards = token_rewards(batch, cfg.kl_coef)
    values, response_lens = batch.values, batch.response_lens
    advantages, batch.returns = gae(rewards, values, response_lens, cfg.gamma, cfg.lam)
    if cfg.critic_lam != cfg.lam:  # decoupled GAE (VAPO, arXiv 2504.05118, section 4.1)
        _, batch.returns = gae(rewards, values, response_lens, cfg.gamma, cfg.critic_lam)
    batch.advantages = normalise(advantages) if cfg.normalise_advantages else advantages
    return {
        "explained_var": explained_variance(values, batch.returns),
        "value_mean": float(values.mean(dtype=np.float64)),
        "advantage_abs": mean_abs(advantages),
    }


def mean_abs(advantages):
    """Mean |Â| over all tokens."""
    return float(np.abs(advantages).mean(dtype=np.float64))


def token_rewards(batch, kl_coef=0.0):
    """r_t, fp32 [N]: the reward at the last token, minus kl_coef · (log π_old − log π_ref) at every token."""
    rewards = np.zeros(len(batch.logprobs), np.float32)  # [N]
    if kl_coef:
        rewards -= kl_coef * (batch.old_logprobs - batch.ref_logprobs)
    last_tokens = batch.response_starts + batch.response_lens - 1  # [B]
    not_empty = batch.response_lens > 0
    rewards[last_tokens[not_empty]] += batch.rewards[not_empty]
    return rewards


def gae(rewards, values, response_lens, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), response by response.

    rewards and values [N], per token, responses laid end to end; response_lens [B], which sum to N. Returns advantages and
    returns, fp32 [N]. The value after a response's last token is 0, also where the response was cut off at the length
    limit: ORZ counts a response without an answer as a finished one with reward 0.
    """
    advantages = np.empty(len(values), np.float32)  # [N]
    start = 0
    for length in response_lens:
        end = start + int(length)
        rewards_here, values_here = rewards[start:end].tolist(), values[start:end].tolist()
        advantages[start:end] = gae_of_response(rewards_here, values_here, gamma, lam)
        start = end
    return advantages, advantages + np.asarray(values, np.float32)


def gae_of_response(rewards, values, gamma, lam):
    """Â_t = δ_t + γλ Â_{t+1}, from the last token to the first. Plain lists in and out: Python's floats are fp64."""
    advantages = [0.0] * len(values)
    next_value, next_advantage = 0.0, 0.0
    for t in reversed(range(len(values))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = delta + gamma * lam * next_advantage
        next_value, next_advantage = values[t], advantages[t]
    return advantages


def normalise(advantages):
    """Mean 0 and standard deviation 1 over all tokens of the batch, fp32 [N]. Sums of millions of terms need fp64."""
    wide = advantages.astype(np.float64)
    normalised = (wide - wide.mean()) / (wide.std() + 1e-8)
    return normalised.astype(np.float32)


def explained_variance(values, returns):
    """1 − Var(R − V) / Var(R): 1 for a critic that knows every return, 0 for one that predicts a constant."""
    variance = returns.var()
    if variance == 0:
        return None
    unexplained = (returns - values).var()
    return float(1 - unexplained / variance)


# Without a critic a response is compared with the G responses to its prompt, and its tokens all get the same advantage.
# Each function takes the rewards [prompts, G] and response_lens [B], and returns the advantages, fp32 [N].


def dr_grpo(groups, response_lens):
    """r − mean(r) (Dr. GRPO, arXiv 2503.20783, section 3). Its loss divides by a constant: --loss_average=constant."""
    relative = groups - groups.mean(axis=1, keepdims=True)  # [prompts, G]
    return np.repeat(relative.ravel(), response_lens)


def grpo(groups, response_lens):
    """(r − mean(r)) / std(r) (GRPO, arXiv 2402.03300, section 4.1.2). Its loss: --loss_average=response."""
    mean = groups.mean(axis=1, keepdims=True)
    std = groups.std(axis=1, keepdims=True)
    relative = (groups - mean) / (std + 1e-6)  # [prompts, G]
    return np.repeat(relative.ravel(), response_lens)


def rloo(groups, response_lens):
    """r_i − Σ_{j≠i} r_j / (G − 1) (RLOO, arXiv 2402.14740, "REINFORCE Leave-One-Out")."""
    group_size = groups.shape[1]
    sum_of_others = groups.sum(axis=1, keepdims=True) - groups
    relative = groups - sum_of_others / (group_size - 1)  # [prompts, G]
    return np.repeat(relative.ravel(), response_lens)


def reinforce(groups, response_lens):
    """r − mean(r), normalised over all tokens of the batch ("REINFORCE++-baseline", arXiv 2501.03262).

    This is also what ORZ's own GRPO arm computes: because of a bug, its standard deviation of a group is always 1.
    """
    return normalise(dr_grpo(groups, response_lens))


GROUP_ADVANTAGES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce": reinforce,
}


# ---- Which responses the policy is trained on --------------------------------------------------------------------


def policy_samples(batch, cfg):
    """The samples that the policy is trained on, as indices: all, unless a setting leaves some out."""
    kept = np.ones(len(batch.rewards), bool)  # [B]
    if cfg.drop_equal_groups:
        # Responses with equal rewards teach nothing by comparison (DAPO, arXiv 2503.14476, section 3.2, samples others).
        groups = batch.rewards.reshape(-1, cfg.samples_per_prompt)  # [prompts, G]
        differ = groups.min(axis=1) < groups.max(axis=1)
        kept &= differ.repeat(cfg.samples_per_prompt)
    if cfg.drop_cut_off:
        # A cut-off response counts as wrong, although its reasoning may have been right so far (DAPO, section 3.4).
        kept &= ~batch.cut_off
    return np.flatnonzero(kept)


# ---- Losses ------------------------------------------------------------------------------------------------------


def policy_loss(logprobs, old_logprobs, advantages, clip_eps, clip_eps_high=None):
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), negated. All [N]; returns the loss per token and the ratio.

    A larger clip_eps_high lets rare tokens become more probable (DAPO, arXiv 2503.14476, eq. 10). With one policy update a
    step the ratio is 1 at every token and the clip has no effect: losses that differ in the clip alone are then the same.
    """
    ratio = (logprobs - old_logprobs).exp()  # [N]
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + (clip_eps_high or clip_eps))
    return -torch.min(ratio * advantages, clipped_ratio * advantages), ratio


def value_loss(values, old_values, returns, value_clip):
    """ORZ's clipped value loss, ½ max of the squared errors of V and of V clipped to V_old ± value_clip. All [N]."""
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error = (values - returns) ** 2
    clipped_error = (clipped_values - returns) ** 2
    return 0.5 * torch.max(error, clipped_error)


def kl_estimate(log_ratio, estimator="k3"):
    """Schulman's estimators of KL(p‖q) from samples of p (2020, "Approximating KL divergence"): log_ratio = log q − log p.

    As a loss with p the policy, k2 has the gradient of KL(p‖q), but the gradient of k1 has mean 0.
    """
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return log_ratio.exp() - 1 - log_ratio  # k3, never negative


def importance_weights(log_ratio, response_lens, cfg):
    """The weight of each token in the policy's loss, [N], because vLLM samples from a slightly different policy; and
    vectors of two metrics.

    log_ratio [N] is log ρ = log π_old − log π_vLLM, of responses of these lengths laid end to end. The weight is
      min(ρ, importance_cap), or 1 without a cap           (TIS: Yao et al. 2025, fengyao.notion.site/off-policy-rl)
      0 if ρ is outside a band                             (IcePop: arXiv 2510.18855, section on reinforcement learning)
      0 if a response's exp(mean log ρ) is outside one     (geometric masks: Liu et al. 2025, "When speed kills stability")
    """
    ratio = log_ratio.exp()
    weights = torch.ones_like(ratio)
    if cfg.importance_cap:
        weights = ratio.clamp(max=cfg.importance_cap)
    if any(cfg.importance_token_band):
        weights = weights * inside(ratio, cfg.importance_token_band)
    if any(cfg.importance_response_band):
        geometric_mean = response_means(log_ratio, response_lens).exp()  # [N]
        weights = weights * inside(geometric_mean, cfg.importance_response_band)
    shares = {
        "importance_truncated": ratio > (cfg.importance_cap or np.inf),
        "importance_masked": weights == 0,
    }
    return weights, shares


def inside(ratio, band):
    """1.0 where the ratio is in the band, else 0.0."""
    low, high = band
    is_inside = (low <= ratio) & (ratio <= high)
    return is_inside.to(ratio.dtype)


def response_means(values, response_lens):
    """At each token the mean of `values` over its response: values [N], laid end to end, and response_lens [B] → [N]."""
    means = [values[:0]]  # A pack may be empty.
    for part in values.split(response_lens):
        means.append(part.mean().expand(len(part)))
    return torch.cat(means)


def num_response_tokens(batch, plan):
    """The response tokens of a plan, over all ranks and packs."""
    num_tokens = 0
    for packs in plan:
        for indices in packs:
            num_tokens += int(batch.response_lens[indices].sum())
    return num_tokens


def loss_denominator(batch, plan, average, max_response_tokens):
    """What the sum of an update's loss is divided by. It is known before the first pack.

    "token": all response tokens. "response": the responses, where each token's loss has been divided by the length of its
    response (GRPO, arXiv 2402.03300, eq. 3). "constant": the responses times max_response_tokens (arXiv 2503.20783).
    """
    if average == "token":
        return num_response_tokens(batch, plan)
    num_responses = 0
    for packs in plan:
        for indices in packs:
            num_responses += len(indices)
    if average == "constant":
        return num_responses * max_response_tokens
    return num_responses


# ---- The schedule ------------------------------------------------------------------------------------------------


def num_updates(cfg, kind, step):
    """How many updates are due by the end of `step`. In the first critic_warmup_steps steps only the critic has any."""
    steps = max(0, step - cfg.critic_warmup_steps) if kind == "policy" else step
    return steps * updates_per_step(cfg, kind)


def learning_rate(cfg, kind, update):
    """The learning rate of update number 1, 2, …: linear warm-up, then constant or, for the policy, a linear decay."""
    start = cfg.policy_lr if kind == "policy" else cfg.critic_lr
    final = cfg.policy_lr_final if kind == "policy" and cfg.lr_decay_steps else start
    decayed = min(1.0, update / max(1, cfg.lr_decay_steps))
    warmed_up = min(1.0, update / max(1, cfg.warmup_steps))
    return (start + decayed * (final - start)) * warmed_up


# ---- The Learner -------------------------------------------------------------------------------------------------

# How many weights every rank keeps whole from pack to pack: 1 GB in 16 bits. All others are gathered for each pack, layer
# by layer. This is half of DeepSpeed's stage3_max_live_parameters, so that DeepSpeed may still fetch a layer ahead.
KEPT_WHOLE = 5 * 10**8
# How many gradients are summed over the ranks at once. DeepSpeed's default, 500 million, is a buffer of 1 GB in 16 bits.
REDUCED_AT_ONCE = 2 * 10**7
# How many tensors are gathered at once for a sync or an export: a layer or two, 1 GB in a 32B model. Gathering them one
# by one would take ten times as long.
GATHERED_AT_ONCE = 16


# Mean |Δ log-prob| between vLLM and the policy above which a run stops, unless drift_limit says otherwise. Where both are
# bf16, healthy runs have 0.01 to 0.05 (published: 0.011 Qwen3-4B, 0.05 Qwen2.5-0.5B; measured here: 0.040 SmolLM2-135M), so
# that the limit in bf16 catches only gross errors.
DRIFT_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}


class DriftError(Exception):
    """vLLM and the policy give the same tokens different log-probs: the samples are not those of the policy."""


def drift_message(drift_mean, drift_max, limit):
    """What a DriftError says: the numbers, the three likely causes, and what to look at for each."""
    return (
        f"vLLM's and the policy's log-probs are {drift_mean:.2g} apart on average, {drift_max:.2g} at most "
        f"(drift_limit={limit:.2g}). Likely causes: (1) stale weights in vLLM, if drift_mean in metrics.jsonl was low at "
        "first: look at Rollout.load_weights; (2) another dtype in vLLM, if it was high from the first step on: look for "
        "dtype= and quantization= in logs/worker_0.log; (3) another attention or rotary embedding, if it is lower with a "
        "small max_response_tokens: look for sliding_window, rope_parameters and soft caps in the model's config.json"
    )


def deepspeed_config(cfg, dtype, buffers_in_fp32):
    """ZeRO-3: weights, gradients and optimizer states are each cut into one part per rank."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        # backward() accumulates over as many packs as there are; every step() is an update.
        "managed_gradient_accumulation": False,
        "gradient_clipping": cfg.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # DeepSpeed rounds buffers that a model's __init__ creates to the training dtype, unless they are named here.
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": buffers_in_fp32},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            # This would replace torch's linear function in the whole process, also for vLLM.
            "memory_efficient_linear": False,
            "reduce_bucket_size": REDUCED_AT_ONCE,
            "stage3_param_persistence_threshold": KEPT_WHOLE,
            "stage3_model_persistence_threshold": KEPT_WHOLE,
        },
    }


class Learner:
    """One network under training: "policy", "critic", or "reference" (forward only). There is one per rank.

    All ranks call the same methods together. After __init__ a trained network is in CPU memory: see offload and onload.
    """

    def __init__(self, kind, cfg, path, device, dtype):
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.kind, self.cfg, self.device = kind, cfg, device
        self.is_trained = kind != "reference"
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.drift_limit = cfg.drift_limit or DRIFT_LIMITS[dtype]
        plain_buffers = model.plain_buffers(kind, path, dtype, cfg.trust_remote_code)
        config = deepspeed_config(cfg, dtype, model.names_in_fp32(plain_buffers))
        # While this object lives, from_pretrained cuts each weight into its parts as soon as it is read.
        _partition_while_loading = HfDeepSpeedConfig(config)
        self.network = model.load_network(
            kind, path, dtype, cfg.gradient_checkpointing, cfg.seed, cfg.trust_remote_code
        )
        # The weights of a layer are gathered and dropped together.
        deepspeed.utils.set_z3_leaf_modules(
            self.network, [GradientCheckpointingLayer], raise_if_not_found=False
        )
        optimizer = self.make_optimizer() if self.is_trained else None
        self.engine = deepspeed.initialize(model=self.network, optimizer=optimizer, config=config)[0]
        model.check_buffers(self.network, plain_buffers, path)
        # After an update DeepSpeed would gather the weights that are kept whole, parameter by parameter. With this list
        # empty they are gathered at their next use, layer by layer.
        self.engine.optimizer.persistent_parameters = []
        self.offload()

    def make_optimizer(self):
        """AdamW. ZeRO-3 gives the optimizer flat parts of weights, without rows and columns: only an elementwise one
        (Adam, Lion, SGD) can take its place, and none that works on matrices (Muon, Shampoo)."""
        return torch.optim.AdamW(
            self.network.parameters(),
            betas=tuple(self.cfg.adam_betas),
            weight_decay=0.0,
            fused=self.device.type == "cuda",
        )

    def forward(self, batch, plan):
        """V(s_t) of a critic, log π(a_t|s_t) of a policy: fp32 [N] on every rank; 0 for samples not in the plan."""
        return self.token_outputs(batch, plan)[0]

    @torch.no_grad()
    def token_outputs(self, batch, plan):
        """What the network computes at each response token, on every rank; 0 for samples not in the plan. For a critic
        its values, fp32 [1, N]; for a policy log π(a_t|s_t) and the entropy of π(·|s_t), fp32 [2, N]."""
        num_outputs = 1 if self.kind == "critic" else 2
        results = torch.zeros(num_outputs, len(batch.logprobs), device=self.device)  # [1 or 2, N]
        for indices in plan[self.rank]:
            pack = make_pack(batch, indices, self.device)
            if self.kind == "critic":
                outputs = self.engine(pack)[None]  # [1, N of the pack]
            else:
                logprobs, entropies = self.engine(pack, self.cfg.temperature)  # [N of the pack] each
                outputs = torch.stack([logprobs, entropies])  # [2, N of the pack]
            results[:, pack["token_index"]] = outputs
        torch.distributed.all_reduce(results)
        return results.cpu().numpy()

    def update(self, batch, plans, step, kl_plan=None):
        """One optimizer update on the samples of each plan. Returns metrics: means over tokens, or over updates.

        step is the number of the training step, from which the learning rate follows. kl_plan is a plan of a few samples,
        on which the metric `update_kl` compares the policy before and after all updates (estimator k3).
        Raises FloatingPointError or DriftError, on all ranks alike, instead of applying an update.
        """
        logprobs_before = self.forward(batch, kl_plan) if kl_plan else None  # [N]
        totals = {}  # metric → [sum, count] over all ranks and updates
        for n, plan in enumerate(plans):
            update = num_updates(self.cfg, self.kind, step - 1) + n + 1
            sums = self.accumulate(batch, plan, is_first=n == 0)
            for name, sum_and_count in self.apply(batch, sums, update).items():
                totals[name] = totals.get(name, 0) + np.array(sum_and_count)
        metrics = {}
        for name, (total, count) in totals.items():
            metrics[name] = float(total / count) if count else None
        if kl_plan:
            # Both passes run the same packs: packs of other shapes would round differently.
            log_ratio = self.forward(batch, kl_plan) - logprobs_before  # [N], 0 outside the plan
            sum_of_kl = float(kl_estimate(torch.from_numpy(log_ratio)).sum())
            metrics["update_kl"] = sum_of_kl / max(1, num_response_tokens(batch, kl_plan))
        return metrics

    def accumulate(self, batch, plan, is_first):
        """Compute the gradient of one update. Returns metric → [sum, count] over all ranks."""
        average = self.cfg.loss_average if self.kind == "policy" else "token"
        denominator = loss_denominator(batch, plan, average, self.cfg.max_response_tokens)
        totals = {}  # metric → fp64 [2], sum and count
        drift_max = torch.zeros((), device=self.device)
        for indices in plan[self.rank]:
            if self.kind == "policy":
                loss, vectors = self.policy_terms(batch, indices, is_first)
            else:
                loss, vectors = self.critic_terms(batch, indices)
            # ZeRO-3 divides every reduced gradient by the number of ranks; multiplying by it first leaves the sum.
            self.engine.backward(loss.sum() * self.world_size / denominator)
            for name, vector in vectors.items():
                total = vector.detach().double().sum()
                count = torch.full_like(total, len(vector))
                totals[name] = totals.get(name, 0) + torch.stack([total, count])
            if "drift_mean" in vectors and len(loss):
                drift_max = torch.max(drift_max, vectors["drift_mean"].detach().max())
        stacked = torch.stack(list(totals.values()))  # [M, 2]: of M metrics
        torch.distributed.all_reduce(stacked)
        sums = dict(zip(totals, stacked.tolist()))
        if "drift_mean" in sums:
            torch.distributed.all_reduce(drift_max, torch.distributed.ReduceOp.MAX)
            sums["drift_max"] = [float(drift_max), 1]
            total, count = sums["drift_mean"]
            if total / count > self.drift_limit >= 0:
                raise DriftError(drift_message(total / count, float(drift_max), self.drift_limit))
        return sums

    def policy_terms(self, batch, indices, is_first):
        """The loss per token of one pack [N], and vectors of which the step's metrics are the means.

        is_first: this is the step's first update, whose weights are those that vLLM sampled with.
        """
        cfg = self.cfg
        is_only_update = updates_per_step(cfg, "policy") == 1
        fields = ["advantages", "logprobs"]
        if not is_only_update:
            fields.append("old_logprobs")
        if cfg.kl_loss_coef:
            fields.append("ref_logprobs")
        pack = make_pack(batch, indices, self.device, fields)
        logprobs, entropy = self.engine(pack, cfg.temperature)  # [N] each
        # Strictly on-policy, the old log-probs are the new ones: they need no pass of their own, and the ratio is 1.
        old_logprobs = logprobs.detach() if is_only_update else pack["old_logprobs"]
        advantages, clip_eps = pack["advantages"], cfg.clip_eps
        clip_eps_high = cfg.clip_eps_high or clip_eps
        response_lens = batch.response_lens[indices]  # [B]
        loss, ratio = policy_loss(logprobs, old_logprobs, advantages, clip_eps, clip_eps_high)
        correct = np.repeat(batch.correct[indices], response_lens)  # [N]
        correct = torch.from_numpy(correct).to(self.device)
        vectors = {
            "entropy": entropy,
            "entropy_right": entropy[correct],
            "entropy_wrong": entropy[~correct],
        }
        if is_first:
            vectors["drift_mean"] = (logprobs - pack["logprobs"]).abs()
        if not is_only_update:
            vectors["clipfrac_low"] = (ratio < 1 - clip_eps) & (advantages < 0)
            vectors["clipfrac_high"] = (ratio > 1 + clip_eps_high) & (advantages > 0)
            vectors["approx_kl"] = kl_estimate(logprobs - old_logprobs)
        loss, loss_vectors = self.vary_loss(loss, logprobs, old_logprobs, pack, response_lens)
        return loss, vectors | loss_vectors

    def vary_loss(self, loss, logprobs, old_logprobs, pack, response_lens):
        """Apply the settings that change PPO's loss per token: importance weights, a KL term, an average by response.

        loss, logprobs and old_logprobs are [N], response_lens is [B]. Returns the loss and vectors, as policy_terms does.
        """
        cfg, vectors = self.cfg, {}
        if cfg.importance_cap or any(cfg.importance_token_band + cfg.importance_response_band):
            log_ratio = old_logprobs - pack["logprobs"]  # [N]
            weights, shares = importance_weights(log_ratio, response_lens.tolist(), cfg)
            loss = loss * weights
            vectors |= shares
        vectors["pg_loss"] = loss
        if cfg.kl_loss_coef:
            kl_loss = kl_estimate(pack["ref_logprobs"] - logprobs, cfg.kl_estimator)  # [N]
            loss = loss + cfg.kl_loss_coef * kl_loss
            vectors["kl_loss"] = kl_loss
        if cfg.loss_average == "response":
            length_of_response = np.repeat(response_lens, response_lens)  # [N]
            loss = loss / torch.from_numpy(length_of_response).to(self.device)
        return loss, vectors

    def critic_terms(self, batch, indices):
        """What policy_terms returns, for the critic."""
        pack = make_pack(batch, indices, self.device, ["values", "returns"])
        values, old_values = self.engine(pack), pack["values"]  # [N] each
        value_clip = self.cfg.value_clip
        loss = value_loss(values, old_values, pack["returns"], value_clip)
        is_clipped = (values - old_values).abs() > value_clip
        return loss, {"v_loss": loss, "value_clipfrac": is_clipped}

    def apply(self, batch, sums, update):
        """Apply the gradient as update number `update`. Returns `sums` with the metrics of the update itself, or only
        skipped_KIND = 1 where something was not finite and the update was left out."""
        kind, grad_norm = self.kind, np.inf
        rate = learning_rate(self.cfg, kind, update)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        if np.isfinite(list(sums.values())).all():
            self.engine.step()  # DeepSpeed leaves out an update whose gradient is not finite.
            # Reading the norm waits for the GPU, which orders the next gathering of weights behind this update.
            grad_norm = float(self.engine.get_global_grad_norm())
        if np.isfinite(grad_norm):
            return sums | {
                f"grad_norm_{kind}": [grad_norm, 1],
                f"lr_{kind}": [rate, 1],
                f"skipped_{kind}": [0, 1],
            }
        self.engine.optimizer._overflow_clean_up(None)  # forgets the gradients
        path = f"{self.cfg.out_dir}/{self.cfg.name}/nonfinite_{kind}_{update}.npz"
        if self.rank == 0:
            np.savez(path, **vars(batch))
        torch.distributed.barrier()  # The run may end as soon as one rank raises, so the file must be whole by then.
        if self.cfg.on_nonfinite == "stop":
            raise FloatingPointError(f"{kind} update is not finite and was left out; its data: {path}")
        return {f"skipped_{kind}": [1, 1]}

    # ---- Weights in and out --------------------------------------------------------------------------------------

    def weights(self):
        """Yield (Hugging Face name, whole tensor) of every parameter. All ranks gather, and must iterate, together."""
        import deepspeed

        parameters = list(self.network.named_parameters())
        for first in range(0, len(parameters), GATHERED_AT_ONCE):
            bucket = parameters[first : first + GATHERED_AT_ONCE]
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
                for name, parameter in bucket:
                    yield name.removeprefix("hf."), parameter.data

    def copy_weights(self, other):
        """Take the weights of another Learner of the same network."""
        import deepspeed

        own = dict(self.network.named_parameters())
        for name, tensor in other.weights():
            parameter = own[f"hf.{name}"]
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(tensor)

    def export(self, folder):
        """Write a Hugging Face folder. For this rank 0 holds the whole model in its CPU memory."""
        state_dict = {}
        for name, tensor in self.weights():
            if self.rank == 0:
                state_dict[name] = tensor.cpu().clone()
        if self.rank == 0:
            model.save_pretrained(self.network, state_dict, folder)

    # ---- Turns on the GPU. On a CPU nothing moves; the reference model always stays. -----------------------------

    def offload(self, keep_weights=False):
        """Move fp32 weights, optimizer states, gradients and 16-bit weights to CPU memory.

        keep_weights leaves the 16-bit weights in place, which a weight sync still needs.
        """
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        if self.device.type == "cuda" and self.is_trained:
            self.move_optimizer_state("cpu")
            leaving = {State.lp_grads, State.contiguous_grad_buffer}
            if not keep_weights:
                leaving.add(State.lp_params)
            self.engine.offload_states(include=leaving)

    def free_gathered(self):
        """Free the weights that were gathered whole and torch's cache; this rank's parts stay on the GPU."""
        if self.device.type == "cuda" and self.is_trained:
            self.engine.offload_states(include=set())

    def onload(self):
        """Move everything to the GPU; what is there already stays."""
        if self.device.type == "cuda" and self.is_trained:
            self.engine.reload_states()
            self.move_optimizer_state(self.device)

    def move_optimizer_state(self, device):
        """Move what optimizer_state yields. DeepSpeed's own function for this needs its FusedAdam, compiled by nvcc."""
        for _, tensor in self.optimizer_state():
            tensor.data = tensor.data.to(device)

    # ---- Checkpoints: this rank's part in one file of safetensors, never a pickle --------------------------------

    def optimizer_state(self):
        """Yield (name, tensor): the fp32 weights and AdamW's state, from which all else follows."""
        for i, master in enumerate(self.engine.optimizer.fp32_partitioned_groups_flat):
            yield f"{i}.weights", master
            for name, tensor in self.engine.optimizer.optimizer.state[master].items():
                yield f"{i}.{name}", tensor

    def own_parts(self):
        """Yield (name, tensor): this rank's part of every weight, in the dtype that the forward pass uses."""
        for name, parameter in self.network.named_parameters():
            yield name, parameter.ds_tensor

    def save(self, folder):
        parts = self.optimizer_state() if self.is_trained else self.own_parts()
        state = {name: tensor.detach().cpu() for name, tensor in parts}
        save_file(state, self.checkpoint_file(folder))
        os.sync()

    def load(self, folder):
        """Load what `save` wrote into this folder. As for forward and update, the Learner must be on the GPU."""
        zero = self.engine.optimizer
        saved = load_file(self.checkpoint_file(folder))
        if not self.is_trained:
            for name, part in self.own_parts():
                part.copy_(saved[name])
            return
        zero._partition_all_parameters()
        for i, master in enumerate(zero.fp32_partitioned_groups_flat):
            master.data.copy_(saved[f"{i}.weights"])
            adam_state = {}
            for name, tensor in saved.items():
                group, _, key = name.partition(".")
                if group == str(i) and key != "weights":
                    adam_state[key] = tensor.to(self.device)
            zero.optimizer.state[master] = adam_state
            zero._reassign_or_swap_out_partitioned_parameters(i)  # sets the forward pass's weights

    def checkpoint_file(self, folder):
        return f"{folder}/{self.kind}_{self.rank}.safetensors"
