"""The Learner on one and two ZeRO-3 ranks against plain torch: the same gradients, the same updates.

All that needs DeepSpeed runs in a few starts, `learner_checks` on 1 and on 2 ranks and `checks_in_bf16` on 2; the tests
check what these return.
"""

import copy
from unittest import mock

import numpy as np
import pytest
import ranks
import tiny_models
import torch

import model
import packing
import ppo

RESPONSE_LENS = [9, 4, 12, 1, 7, 0, 5, 11, 6, 3, 8, 10, 2, 7, 5, 9, 4, 6, 8, 3, 11, 5, 2, 7]
CLIP, NO_CLIP = 0.05, 1e9  # max_grad_norm, below and above every gradient norm here
SPLITS = (1, 2, 4, 8)
KL_SAMPLES = [20, 3, 7, 11, 5]  # the samples on which update_kl is measured
VARIANTS = {  # variants of the policy's update: settings that differ from the defaults
    "clip higher": {"clip_eps_high": 0.4, "policy_updates_per_step": 2},
    "epochs": {"epochs_per_step": 2},
    "truncated": {"importance_cap": 1.1},
    "truncated, several updates": {"importance_cap": 1.1, "policy_updates_per_step": 2},
    "tokens masked": {"importance_token_band": [0.8, 1.25]},
    "responses masked": {"importance_response_band": [0.9, 1.1]},
    "KL k1": {"kl_loss_coef": 0.5, "kl_estimator": "k1"},
    "KL k2": {"kl_loss_coef": 0.5, "kl_estimator": "k2"},
    "KL k3": {"kl_loss_coef": 0.5},
    "average by response": {"loss_average": "response"},
    "constant length": {"loss_average": "constant"},
    "equal groups dropped": {"drop_equal_groups": True},
    "cut off dropped": {"drop_cut_off": True},
    "GRPO": {"advantage": "grpo", "loss_average": "response"},
    "Dr. GRPO": {"advantage": "dr_grpo", "loss_average": "constant"},
    "RLOO": {"advantage": "rloo"},
    "REINFORCE": {"advantage": "reinforce"},
    "all": {
        "advantage": "dr_grpo",
        "policy_updates_per_step": 2,
        "clip_eps_high": 0.4,
        "importance_cap": 1.1,
        "importance_token_band": [0.8, 1.25],
        "importance_response_band": [0.9, 1.1],
        "kl_loss_coef": 0.5,
        "loss_average": "response",
        "drop_equal_groups": True,
        "drop_cut_off": True,
    },
}


def make_batch(path):
    """24 samples, 3 for each question. Their values, returns and advantages reach both sides of the value clip."""
    rng = np.random.default_rng(0)
    plain, samples = tiny_models.plain_policy(path), []
    for i, response_len in enumerate(RESPONSE_LENS):
        if i % 3 == 0:
            prompt = rng.integers(0, tiny_models.VOCABULARY, 3 + i % 5).astype(np.int32)
        response = rng.integers(0, tiny_models.VOCABULARY, response_len).astype(np.int32)
        with torch.no_grad():
            logprobs = tiny_models.plain_logprobs(plain, prompt, response)[0].numpy()
        sample = packing.Sample(i // 3, prompt, response, logprobs, "", "stop")
        sample.correct = i % 4 == 1  # unrelated to the reward, as if that were shaped
        sample.reward = float(i % 3 == 0)
        samples.append(sample)
    batch = packing.Batch(samples)
    n = len(batch.logprobs)
    batch.values = rng.normal(0, 0.3, n).astype(np.float32)
    batch.returns = np.repeat(batch.rewards, batch.response_lens)
    batch.advantages = ppo.normalise(batch.returns - batch.values)
    batch.old_logprobs = batch.logprobs
    return samples, batch


def variant_settings(name):
    return ranks.settings(samples_per_prompt=3, policy_lr=0.0, max_grad_norm=NO_CLIP, **VARIANTS[name])


def variant_batch(batch, cfg):
    """The batch with other rewards, and with log-probs of the sampler, the old policy and the reference that
    differ."""
    rng = np.random.default_rng(5)
    changed = copy.copy(batch)
    changed.rewards = rng.integers(0, 2, len(RESPONSE_LENS)).astype(np.float32)
    changed.rewards[3:6] = 1.0
    changed.cut_off = rng.random(len(RESPONSE_LENS)) < 0.2
    noise = rng.normal(0, 0.2, (3, len(batch.logprobs))).astype(np.float32)
    changed.old_logprobs = batch.logprobs + noise[0]
    changed.ref_logprobs = batch.logprobs + noise[1]
    changed.logprobs = batch.logprobs + noise[2]  # those of the sampler
    ppo.set_advantages(changed, cfg)
    return changed


def even_plan(indices, num_packs, world_size):
    """`indices` cut into `num_packs` packs, which are dealt to the ranks; a rank with one fewer gets an empty pack."""
    packs = [part.tolist() for part in np.array_split(np.asarray(indices), num_packs)]
    packs += [[]] * (-num_packs % world_size)
    return [packs[rank::world_size] for rank in range(world_size)]


def mini_batches(world_size):
    """Twelve critic updates, each on a twelfth of the samples, as the training loop makes them."""
    parts = np.array_split(np.random.default_rng(7).permutation(len(RESPONSE_LENS)), 12)
    return [even_plan(part, 2, world_size) for part in parts]


# ---- In the ranks -----------------------------------------------------------------------------------------------


def weights(learner):
    return {name: tensor.clone() for name, tensor in learner.weights()}


def gradients_of_plans(still, batch):
    """The gradient and its norm, for the same samples in different packs. `still` is a learner with learning rate
    0."""
    world_size, everything = torch.distributed.get_world_size(), range(len(RESPONSE_LENS))
    plans = {num_packs: even_plan(everything, num_packs, world_size) for num_packs in SPLITS}
    shuffled = np.random.default_rng(1).permutation(len(everything))
    plans["shuffled"] = even_plan(shuffled, 4, world_size)
    plans["empty packs"] = [[[], *packs, []] for packs in even_plan(everything, 4, world_size)]
    return {
        (still.kind, "gradient", variant): gradient(still, batch, plan) for variant, plan in plans.items()
    }


def gradient(still, batch, plan):
    grads, metrics = gradient_and_metrics(still, batch, plan)
    return grads, metrics[f"grad_norm_{still.kind}"]


def variants_of_the_policy(still, batch):
    """The gradient and the metrics of each of VARIANTS. `still` is a learner with learning rate 0."""
    results = {}
    for name in VARIANTS:
        still.cfg, still.drift_limit = variant_settings(name), -1.0
        changed = variant_batch(batch, still.cfg)
        plan = even_plan(ppo.policy_samples(changed, still.cfg), 3, still.world_size)
        results["variant", name] = gradient_and_metrics(still, changed, plan)
    return results


def gradient_and_metrics(still, batch, plan):
    from deepspeed.utils import safe_get_full_grad

    step, grads = still.engine.step, {}

    def record():
        for name, parameter in still.network.named_parameters():
            grads[name.removeprefix("hf.")] = safe_get_full_grad(parameter).clone()
        step()

    with mock.patch.object(still.engine, "step", record):
        metrics = still.update(batch, [plan], 1)
    return grads, metrics


def spoilt_updates(learner, batch):
    """All ranks stop before the update if one rank has numbers that are not finite, or if the sampler's log-probs
    disagree."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole, results = [even_plan(range(len(RESPONSE_LENS)), 4, world_size)], {}
    few = even_plan(KL_SAMPLES, 3, world_size)

    def infinite(self, *arguments):
        """A finite loss whose gradient is not finite: √ at 0."""
        loss, vectors = policy_terms(self, *arguments)
        return loss + (loss - loss.detach()).abs().clamp(min=0).sqrt() if rank == 0 else loss, vectors

    policy_terms = ppo.Learner.policy_terms
    for name, field, error in (
        ("not finite", "advantages", FloatingPointError),
        ("infinite gradient", None, FloatingPointError),
        ("drift", "logprobs", ppo.DriftError),
    ):
        # The out_dir is the folder of this call's ranks.
        spoilt = learner("policy", max_grad_norm=CLIP, out_dir=".", name=".")
        before, good = weights(spoilt), getattr(batch, field or "logprobs")
        bad = good.copy()
        if field:
            bad[tiny_models.place(batch, 0)] = (
                np.nan if name == "not finite" else good[tiny_models.place(batch, 0)] - 5
            )
        terms = policy_terms if field else infinite
        with mock.patch.object(batch, field or "logprobs", bad), pytest.raises(error) as caught:
            with mock.patch.object(ppo.Learner, "policy_terms", terms):
                spoilt.update(batch, whole, 1)
        unchanged = all(torch.equal(before[key], tensor) for key, tensor in weights(spoilt).items())
        change, means, saved = None, None, None
        # An update that stopped and one that is skipped must both leave the next update as if they had not been.
        if error is FloatingPointError:
            spoilt.cfg.on_nonfinite = "skip"
            with mock.patch.object(batch, field or "logprobs", bad):
                with mock.patch.object(ppo.Learner, "policy_terms", terms):
                    means = spoilt.update(batch, whole, 1, few)
            unchanged &= all(torch.equal(before[key], tensor) for key, tensor in weights(spoilt).items())
            spoilt.update(batch, whole, 1)
            change = {key: tensor - before[key] for key, tensor in weights(spoilt).items()}
            torch.distributed.barrier()
            saved = dict(np.load("nonfinite_policy_1.npz"))
            saved = (saved.pop(field) if field else bad, bad, saved["tokens"], batch.tokens)
        results[name] = str(caught.value), unchanged, change, means, saved
    return results


def saved_and_loaded(learner, batch):
    """A Learner is saved after its updates and loaded by another one, which must then be equal to the last bit."""
    world_size, results = torch.distributed.get_world_size(), {}
    for kind in ("policy", "critic"):
        first, second = (learner(kind, drift_limit=-1.0, warmup_steps=100) for _ in range(2))
        whole = [even_plan(range(len(RESPONSE_LENS)), 4, world_size)]
        plans = whole if kind == "policy" else mini_batches(world_size)
        first.update(batch, plans, 1)
        first.save(".")  # the folder of this call's ranks
        second.load(".")
        both = []
        for trained in (first, second):
            metrics = trained.update(batch, plans[:1], 2)
            both.append((metrics, weights(trained)))
        same = all(torch.equal(both[0][1][key], both[1][1][key]) for key in both[0][1])
        results["saved", kind] = same, both[0][0] == both[1][0], both[1][0][f"lr_{kind}"]
    return results


def checks_in_bf16(path, batch):
    """Gradients, skipped updates and saved states, in the dtype that a GPU trains in."""
    results, world_size = {}, torch.distributed.get_world_size()
    ppo.KEPT_WHOLE = 40_000  # half of the weights stay whole; the others are gathered when they are needed

    def learner(kind, **overrides):
        return ppo.Learner(kind, ranks.settings(**overrides), path, torch.device("cpu"), torch.bfloat16)

    for kind in ("policy", "critic"):
        results |= gradients_of_plans(learner(kind, **{f"{kind}_lr": 0.0, "max_grad_norm": NO_CLIP}), batch)
    clean = learner("policy", max_grad_norm=CLIP)
    before = weights(clean)
    clean.update(batch, [even_plan(range(len(RESPONSE_LENS)), 4, world_size)], 1)
    results["change"] = {name: tensor - before[name] for name, tensor in weights(clean).items()}
    return results | spoilt_updates(learner, batch) | saved_and_loaded(learner, batch)


def learner_checks(path, batch):
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    everything, results = range(len(RESPONSE_LENS)), {}
    if world_size > 1:
        ppo.KEPT_WHOLE = (
            40_000  # half of the weights stay whole; the others are gathered when they are needed
        )

    def learner(kind, **overrides):
        cpu = torch.device("cpu")
        return ppo.Learner(kind, ranks.settings(**overrides), path, cpu, torch.float32)

    def updated(kind, plans, between=lambda learner: None, **overrides):
        """The change of every weight, and the metrics of every update."""
        trained = learner(kind, critic_updates_per_step=1, **overrides)
        before, metrics = weights(trained), []
        for step, plan in enumerate(plans, 1):
            metrics.append(trained.update(batch, [plan], step))
            between(trained)
        return {name: tensor - before[name] for name, tensor in weights(trained).items()}, metrics

    for kind in ("policy", "critic"):
        # With learning rate 0 the gradients are all those of the same weights.
        still = learner(kind, **{f"{kind}_lr": 0.0, "max_grad_norm": NO_CLIP})
        results[kind, "kept whole"] = {parameter.ds_persist for parameter in still.network.parameters()}

        results |= gradients_of_plans(still, batch)
        if kind == "policy":
            results |= variants_of_the_policy(still, batch)

    whole = [even_plan(everything, 4, world_size)]
    for clip in (CLIP, NO_CLIP):
        results["policy", clip] = updated("policy", whole, max_grad_norm=clip)
        results["critic", clip] = updated("critic", mini_batches(world_size), max_grad_norm=clip)
    results["critic skipped"] = updated("critic", mini_batches(world_size)[:-1])

    def halved(self, *arguments):
        loss, *rest = whole_terms(self, *arguments)
        return loss * (0.5 if rank == world_size - 1 else 1), *rest

    for kind, plans in (("policy", whole), ("critic", mini_batches(world_size))):
        whole_terms = getattr(ppo.Learner, f"{kind}_terms")
        with mock.patch.object(ppo.Learner, f"{kind}_terms", halved):
            results[f"{kind} halved"] = updated(kind, plans, max_grad_norm=CLIP)

    results["warm-up"] = updated("policy", whole * 6, warmup_steps=4, drift_limit=-1.0)
    decay = {"lr_decay_steps": 4, "policy_lr_final": 1e-4, "drift_limit": -1.0}
    results["decay"] = (
        updated("policy", whole * 6, **decay),
        updated("critic", mini_batches(world_size)[:2], **decay),
    )
    results["first of warm-up"] = updated("policy", whole, warmup_steps=4)
    results["moved"] = updated("critic", mini_batches(world_size), move_away_and_back, max_grad_norm=CLIP)

    # Two policy updates: the second one's ratio is no longer 1.
    twice = learner("policy", policy_updates_per_step=2, drift_limit=-1.0)
    first = twice.update(batch, whole, 1)
    ratio = np.exp(twice.forward(batch, whole[0]) - batch.old_logprobs)
    results["two policy updates"] = first, twice.update(batch, whole, 2), ratio
    both = learner("policy", policy_updates_per_step=2).update(batch, whole * 2, 1)
    results["two policy updates at once"] = both

    # What an update reports of its own size, and the log-probs of all samples before and after it.
    few = even_plan(KL_SAMPLES, 3, world_size)
    moving, still = learner("policy"), learner("policy", policy_lr=0.0)
    before, means = moving.forward(batch, whole[0]), moving.update(batch, whole, 1, few)
    results["update_kl"] = means["update_kl"], before, moving.forward(batch, whole[0])
    results["update_kl at rate 0"] = still.update(batch, whole, 1, few)["update_kl"]
    assert "update_kl" not in still.update(batch, whole, 1)

    # What the report shows for some samples.
    results["report"] = still.token_outputs(batch, few)

    # A reference model takes the policy's weights; saved and loaded, it is the same to the last bit.
    reference, loaded = learner("reference"), learner("reference")
    forwards = [moving.forward(batch, whole[0]), reference.forward(batch, whole[0])]
    reference.copy_weights(moving)
    forwards.append(reference.forward(batch, whole[0]))
    reference.save(".")  # the folder of this call's ranks
    loaded.load(".")
    results["reference"] = [*forwards, loaded.forward(batch, whole[0])]

    results |= spoilt_updates(learner, batch)
    results |= saved_and_loaded(learner, batch)
    return results


def move_away_and_back(learner):
    """A Learner leaves the GPU and comes back, by DeepSpeed's own moves, or stays; neither may lose anything.

    Both places are CPU memory here. As between two devices, a move makes a copy, and what still points to the old
    memory reads NaN.
    """
    to = torch.Tensor.to

    def copying_to(tensor, device, **how):
        copy = to(tensor, device) if device == "meta" else tensor.clone()
        tensor.fill_(float("nan"))
        return copy

    gpu = mock.patch.object(learner, "device", torch.device("cuda"))
    with gpu, mock.patch.object(torch.Tensor, "to", copying_to):
        if learner.engine.global_steps % 2:  # After every other update the learner stays.
            learner.free_gathered()
            assert not learner.engine.optimizer.offloaded_states
            learner.onload()
            return
        learner.offload(keep_weights=True)
        kept = {parameter.ds_tensor.isfinite().all().item() for parameter in learner.network.parameters()}
        learner.offload()
        away = learner.engine.optimizer.offloaded_states
        assert kept == {True} and away
        learner.onload()
        assert not away


# ---- Plain torch ------------------------------------------------------------------------------------------------


def plain_updates(kind, path, samples, batch, plans, max_grad_norm, lr=1e-3):
    """AdamW on a plain transformers model, one sample at a time: the change of each weight, the gradient norms, and
    the last gradient."""
    if kind == "policy":
        network = tiny_models.plain_policy(path)
    else:
        head = model.load_network("critic", path, torch.float32, seed=1).value_head.weight.data
        network = tiny_models.PlainCritic(path, head)
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    norms, gradients = [], {}
    for plan in plans:
        indices = [i for packs in plan for pack in packs for i in pack]
        num_tokens = sum(len(samples[i].response_ids) for i in indices)
        loss = 0.0
        for i in indices:
            place, sample = tiny_models.place(batch, i), samples[i]
            if kind == "policy":
                logprobs = tiny_models.plain_logprobs(network, sample.prompt_ids, sample.response_ids)[0]
                ratio = (logprobs - logprobs.detach()).exp()
                loss = loss - (ratio * torch.from_numpy(batch.advantages[place])).sum()
            else:
                values = network(sample.prompt_ids, sample.response_ids)
                old, target = torch.from_numpy(batch.values[place]), torch.from_numpy(batch.returns[place])
                clipped = old + (values - old).clamp(-0.2, 0.2)
                loss = loss + torch.max((values - target) ** 2, (clipped - target) ** 2).sum() / 2
        optimizer.zero_grad()
        (loss / num_tokens).backward()
        gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)))
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in network.named_parameters()}, norms, gradients


def plain_variant_gradient(path, samples, batch, cfg):
    """The gradient of a variant's loss on a plain transformers model, by its formulas, token by token."""
    network = tiny_models.plain_policy(path)
    kept = []
    for i in range(len(samples)):
        group = {float(reward) for reward in batch.rewards[i // 3 * 3 : i // 3 * 3 + 3]}
        dropped = (cfg.drop_equal_groups and len(group) == 1) or (cfg.drop_cut_off and batch.cut_off[i])
        if not dropped:
            kept.append(i)
    num_tokens = sum(RESPONSE_LENS[i] for i in kept)
    high = 1 + (cfg.clip_eps_high or cfg.clip_eps)
    total = 0.0
    for i in kept:
        place, sample, length = tiny_models.place(batch, i), samples[i], RESPONSE_LENS[i]
        if length == 0:
            continue
        logprobs = tiny_models.plain_logprobs(network, sample.prompt_ids, sample.response_ids)[0]
        several = cfg.policy_updates_per_step * cfg.epochs_per_step > 1
        old = torch.from_numpy(batch.old_logprobs[place]) if several else logprobs.detach()
        rho = (old - torch.from_numpy(batch.logprobs[place])).exp()
        geometric_mean = rho.prod() ** (1 / length)
        losses = []
        for t in range(length):
            advantage = float(batch.advantages[place][t])
            ratio = (logprobs[t] - old[t]).exp()
            clipped = ratio.clamp(1 - cfg.clip_eps, high)
            loss = -torch.min(ratio * advantage, clipped * advantage)
            weight = min(float(rho[t]), cfg.importance_cap) if cfg.importance_cap else 1.0
            for value, (lowest, highest) in (
                (rho[t], cfg.importance_token_band),
                (geometric_mean, cfg.importance_response_band),
            ):
                if highest and not lowest <= value <= highest:
                    weight = 0.0
            log_r = float(batch.ref_logprobs[place][t]) - logprobs[t]
            kl = {"k1": -log_r, "k2": log_r**2 / 2, "k3": log_r.exp() - 1 - log_r}[cfg.kl_estimator]
            losses.append(weight * loss + cfg.kl_loss_coef * kl)
        share = {
            "token": 1 / num_tokens,
            "response": 1 / length / len(kept),
            "constant": 1 / cfg.max_response_tokens / len(kept),
        }
        total = total + sum(losses) * share[cfg.loss_average]
    total.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def differences(first, second):
    """‖Δ₁ − Δ₂‖ / ‖Δ₂‖ over all weights, and the largest such ratio of a single tensor."""
    assert first.keys() == second.keys()
    apart = {name: (first[name] - second[name]).norm().item() for name in first}
    size = {name: second[name].norm().item() for name in first}
    overall = np.linalg.norm(list(apart.values())) / np.linalg.norm(list(size.values()))
    return overall, max(apart[name] / size[name] for name in first)


def same_update(first, second):
    overall, worst = differences(first, second)
    return overall <= 1e-4 and worst <= 1e-3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.make_model(tmp_path_factory.mktemp("model"), tie=True)


@pytest.fixture(scope="module")
def data(path):
    return make_batch(path)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def checks(request, path, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.run_ranks("test_learner", "learner_checks", request.param, folder, path=path, batch=data[1])


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_gradient_does_not_depend_on_packs(checks, kind, path, data):
    """One batch in 1, 2, 4 or 8 packs, in any order, has the plain gradient over unpacked samples. With means of means
    it would depend on the number of packs, on how full they are, and on the number of ranks."""
    plan = even_plan(range(len(RESPONSE_LENS)), 1, 1)
    _, norms, plain = plain_updates(kind, path, *data, [plan], NO_CLIP)
    assert checks[0][kind, "kept whole"] == ({True} if len(checks) == 1 else {True, False})
    for variant in (*SPLITS, "shuffled", "empty packs"):
        gradient, norm = checks[0][kind, "gradient", variant]
        overall, worst = differences(gradient, plain)
        assert overall <= 1e-5, (variant, overall)
        assert worst <= 1e-3, (variant, worst)
        assert norm == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_its_formula(checks, name, path, data):
    """Fails if a weight is lost between the formula and the update, if a denominator is that of one rank, or if a KL
    term has no gradient."""
    samples, batch = data
    cfg = variant_settings(name)
    changed = variant_batch(batch, cfg)
    gradient, metrics = checks[0]["variant", name]
    plain = plain_variant_gradient(path, samples, changed, cfg)
    overall, worst = differences(gradient, plain)
    assert overall <= 1e-5 and worst <= 1e-3, (overall, worst)
    # Without the settings the gradient must differ; otherwise the comparison above would show nothing.
    default = ranks.settings(samples_per_prompt=3, policy_updates_per_step=cfg.policy_updates_per_step)
    for key in ("advantage", "epochs_per_step") if len(VARIANTS[name]) == 1 else ():
        setattr(default, key, getattr(cfg, key))
    if name not in ("epochs", "RLOO", "REINFORCE"):
        assert differences(plain_variant_gradient(path, samples, changed, default), plain)[0] > 1e-2
    shares = {"importance_truncated", "importance_masked"} & metrics.keys()
    assert len(shares) == (2 if any(key.startswith("importance") for key in VARIANTS[name]) else 0)
    assert ("kl_loss" in metrics) == bool(cfg.kl_loss_coef)
    if "masked" in name:
        assert 0 < metrics["importance_masked"] < 1 and metrics["importance_truncated"] == 0
    if "truncated" in name:
        assert 0 < metrics["importance_truncated"] < 1 and metrics["importance_masked"] == 0


def test_the_reference_becomes_the_policy(checks):
    """Fails if the reference keeps the base model's weights where they are not partitioned, or is the base model after
    a resume."""
    policy, before, after, loaded = checks[0]["reference"]
    assert not np.array_equal(policy, before)
    assert np.array_equal(policy, after) and np.array_equal(after, loaded)


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_empty_pack_adds_exactly_nothing(checks, kind):
    """Ranks with fewer samples run empty packs, which must not change the gradient by a bit."""
    without, _ = checks[0][kind, "gradient", 4]
    with_empty, _ = checks[0][kind, "gradient", "empty packs"]
    assert all(torch.equal(without[name], with_empty[name]) for name in without)


@pytest.mark.parametrize("clip", [CLIP, NO_CLIP], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_updates_equal_plain_adamw(checks, kind, clip, path, data):
    """Fails if a gradient is scaled, clipped or averaged wrongly over ranks, with which training would still seem to
    work."""
    plans = mini_batches(1) if kind == "critic" else [even_plan(range(len(RESPONSE_LENS)), 1, 1)]
    plain, norms, _ = plain_updates(kind, path, *data, plans, clip)
    changes, metrics = checks[0][kind, clip]
    assert (min(norms) > clip) if clip == CLIP else (max(norms) < clip)
    assert same_update(changes, plain), differences(changes, plain)
    assert [m[f"grad_norm_{kind}"] for m in metrics] == pytest.approx(norms, rel=1e-4)
    for rank in checks[1:]:
        assert rank[kind, clip][1] == metrics
        assert all(torch.equal(rank[kind, clip][0][name], changes[name]) for name in changes)


def test_the_check_can_fail(checks, path, data):
    """Fails if the tolerance is so wide that it accepts a skipped update, or one with a rank's gradient halved."""
    plain_policy, *_ = plain_updates("policy", path, *data, [even_plan(range(24), 1, 1)], CLIP)
    plain_critic, *_ = plain_updates("critic", path, *data, mini_batches(1), CLIP)
    assert same_update(plain_critic, plain_critic)
    assert not same_update(checks[0]["critic skipped"][0], plain_critic)
    # On one rank alone clipping undoes the halving, and AdamW's step does not depend on the gradient's size.
    if len(checks) > 1:
        assert not same_update(checks[0]["policy halved"][0], plain_policy)
        assert not same_update(checks[0]["critic halved"][0], plain_critic)


def test_metrics_are_means_over_the_whole_update(checks, path, data):
    """Fails if the last pack's loss, or rank 0's, is reported as the step's, or if `entropy_right` is that of rewarded
    responses instead of right ones."""
    samples, batch = data
    plain = tiny_models.plain_policy(path)
    with torch.no_grad():
        pairs = [tiny_models.plain_logprobs(plain, s.prompt_ids, s.response_ids) for s in samples]
    entropy = torch.cat([entropy for _, entropy in pairs]).numpy()
    metrics = checks[0]["policy", NO_CLIP][1][0]
    right = np.concatenate([np.full(len(s.response_ids), s.correct) for s in samples])
    assert metrics["entropy"] == pytest.approx(entropy.mean(), rel=1e-5)
    assert metrics["entropy_right"] == pytest.approx(entropy[right].mean(), rel=1e-5)
    assert metrics["entropy_wrong"] == pytest.approx(entropy[~right].mean(), rel=1e-5)
    assert metrics["pg_loss"] == pytest.approx(-batch.advantages.mean(), abs=1e-6)
    assert 0 < metrics["drift_mean"] < 1e-5
    constant = {"clipfrac_low", "clipfrac_high", "approx_kl"}  # constant on-policy, and so not reported
    assert not constant & metrics.keys()


def test_warm_up(checks):
    """Fails if the first update has rate 0, if warm-up is counted in steps instead of updates, or if the logged rate
    is not the one that trained."""
    rates = [metrics["lr_policy"] for metrics in checks[0]["warm-up"][1]]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    first, full = checks[0]["first of warm-up"][0], checks[0]["policy", NO_CLIP][0]
    # AdamW's first step is the rate times a direction that does not depend on it.
    assert differences({name: 4 * change for name, change in first.items()}, full)[0] < 1e-3


def test_decay(checks):
    """Fails if the rate decays by steps instead of updates, falls below its final value, or takes the critic's with
    it."""
    policy, critic = (
        [row[f"lr_{kind}"] for row in rows]
        for kind, (_, rows) in zip(("policy", "critic"), checks[0]["decay"])
    )
    assert policy == pytest.approx([7.75e-4, 5.5e-4, 3.25e-4, 1e-4, 1e-4, 1e-4])
    assert critic == pytest.approx([1e-3, 1e-3])


def test_moving_the_optimizer_changes_nothing(checks):
    """Fails if a move leaves moments behind, or fp32 weights of which DeepSpeed keeps another view."""
    moved, still = checks[0]["moved"], checks[0]["critic", CLIP]
    assert moved[1] == still[1]
    assert all(torch.equal(moved[0][name], still[0][name]) for name in still[0])


def test_two_policy_updates_report_their_clipping(checks, data):
    """The second update reports the clip shares of a policy that has moved, measured against the log-probs before the
    step."""
    _, batch = data
    first, second, ratio = checks[0]["two policy updates"]
    assert first["clipfrac_low"] == first["clipfrac_high"] == 0 and abs(first["approx_kl"]) < 1e-6
    low = (ratio < 0.8) & (batch.advantages < 0)
    high = (ratio > 1.2) & (batch.advantages > 0)
    assert low.any() and high.any()
    assert second["clipfrac_low"] == pytest.approx(low.mean(), abs=1e-6)
    assert second["clipfrac_high"] == pytest.approx(high.mean(), abs=1e-6)
    assert second["approx_kl"] == pytest.approx((ratio - 1 - np.log(ratio)).mean(), rel=1e-3)
    # Of two updates in one step, drift is measured in the first, where vLLM has the same weights: neither is refused.
    both = checks[0]["two policy updates at once"]
    assert both["approx_kl"] == pytest.approx((first["approx_kl"] + second["approx_kl"]) / 2, rel=1e-3)
    assert both["drift_mean"] == pytest.approx(first["drift_mean"], rel=1e-3) and second["drift_mean"] > 1e-3


def test_update_kl(checks, data):
    """Fails if the KL is that of other samples than those asked for, or of one rank's alone, or if rounding makes it
    positive at learning rate 0."""
    _, batch = data
    reported, before, after = checks[0]["update_kl"]
    log_ratio = np.concatenate([(after - before)[tiny_models.place(batch, i)] for i in KL_SAMPLES])
    assert reported == pytest.approx((np.exp(log_ratio) - 1 - log_ratio).mean(), rel=1e-3) and reported > 1e-5
    assert checks[0]["update_kl at rate 0"] == 0


def test_bad_numbers_stop_every_rank_before_the_update(checks):
    """Fails if NaN on one rank leaves the others waiting for ever or reaches the weights, or if the update after a
    skipped one adds its gradient to what was left."""
    for rank in checks:
        check_spoilt_updates(rank, rank["policy", CLIP][0])
        assert rank["policy", CLIP][1][0]["skipped_policy"] == 0.0


def check_spoilt_updates(rank, clean_change):
    """clean_change is what the same update changes in a Learner that has skipped none."""
    for name in ("not finite", "infinite gradient"):
        message, unchanged, change, means, saved = rank[name]
        assert "not finite" in message and "nonfinite_policy_1.npz" in message and unchanged
        assert change.keys() == clean_change.keys()
        assert all(torch.equal(change[key], clean_change[key]) for key in change)
        assert any(tensor.any() for tensor in change.values())
        assert means["skipped_policy"] == 1.0 and np.isfinite(means["update_kl"])
        assert np.array_equal(saved[0], saved[1], equal_nan=True) and np.array_equal(saved[2], saved[3])
    message, unchanged, *_ = rank["drift"]
    assert "stale weights" in message and unchanged


def test_a_loaded_learner_is_the_saved_one(checks):
    """Fails if a resume loses AdamW's moments, computes with other weights than those loaded, or starts warm-up
    again."""
    for rank in checks:
        check_saved_and_loaded(rank)


def check_saved_and_loaded(rank):
    for kind, update in (("policy", 2), ("critic", 13)):
        same_weights, same_metrics, rate = rank["saved", kind]
        assert same_weights and same_metrics
        assert rate == pytest.approx(1e-3 * update / 100)


# ---- In bf16, as on a GPU ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16(path, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.run_ranks("test_learner", "checks_in_bf16", 2, folder, path=path, batch=data[1])


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_gradient_in_bf16(bf16, kind, path, data):
    """Fails if gradients are summed in bf16 over packs and ranks, or scaled differently than in fp32."""
    plan = even_plan(range(len(RESPONSE_LENS)), 1, 1)
    _, norms, plain = plain_updates(kind, path, *data, [plan], NO_CLIP)
    one_pack, _ = bf16[0][kind, "gradient", 1]
    for variant in (*SPLITS, "shuffled", "empty packs"):
        gradient, norm = bf16[0][kind, "gradient", variant]
        assert norm == pytest.approx(norms[0], rel=0.01)
        overall, worst = differences(gradient, plain)  # measured: 0.009 and 0.03
        assert overall <= 0.03 and worst <= 0.1, (variant, overall, worst)
        overall, worst = differences(gradient, one_pack)  # measured: 0.004 and 0.016
        assert overall <= 0.012 and worst <= 0.05, (variant, overall, worst)
    without, _ = bf16[0][kind, "gradient", 4]
    with_empty, _ = bf16[0][kind, "gradient", "empty packs"]
    assert all(torch.equal(without[name], with_empty[name]) for name in without)


def test_bad_numbers_in_bf16(bf16):
    """In bf16 DeepSpeed keeps gradients elsewhere. Fails if a skipped update forgets only the fp32 ones."""
    for rank in bf16:
        check_spoilt_updates(rank, rank["change"])


def test_a_loaded_learner_in_bf16(bf16):
    """Fails if the bf16 weights that compute are not the loaded ones, rounded to bf16."""
    for rank in bf16:
        check_saved_and_loaded(rank)


def test_token_outputs_are_those_of_plain_transformers(checks, path, data):
    """Fails if the report shows the entropy of another token, doubles numbers by adding up two ranks, or has numbers
    for samples outside the plan."""
    network = tiny_models.plain_policy(path)
    samples, batch = data
    logprobs, entropies = checks[0]["report"]
    seen = np.zeros(len(logprobs), bool)
    for i in KL_SAMPLES:
        place = tiny_models.place(batch, i)
        with torch.no_grad():
            plain = tiny_models.plain_logprobs(network, samples[i].prompt_ids, samples[i].response_ids)
        assert np.abs(logprobs[place] - plain[0].numpy()).max(initial=0) < 1e-5
        assert np.abs(entropies[place] - plain[1].numpy()).max(initial=0) < 1e-5
        seen[place] = True
    assert seen.any() and not logprobs[~seen].any() and not entropies[~seen].any()
