"""The formulas of ppo.py against plain loops, and what packing promises; without Ray, vLLM and DeepSpeed."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import packing
import ppo
import rollout
from configs.load import BASE, documentation, has_critic, read_file

EXACT = settings(deadline=None, derandomize=True, max_examples=100)


# ---- Generalised advantage estimation ---------------------------------------------------------------------------


def gae_as_written(rewards, values, lengths, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k}, token by token; the value after a response's last token is 0."""
    advantages, start = [], 0
    for length in lengths:
        r, v = rewards[start : start + length], list(values[start : start + length]) + [0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            advantages.append(sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)))
        start += length
    return np.array(advantages)


@EXACT
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    gamma=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    seed=st.integers(0, 999),
)
def test_gae_is_the_sum_over_future_deltas(lengths, gamma, lam, seed):
    """Fails if a value leaks from the next response, if a response of length 0 shifts the others, or if the discount
    is wrong."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, sum(lengths)))
    advantages, returns = ppo.gae(rewards, values, lengths, gamma, lam)
    expected = gae_as_written(rewards, values, lengths, gamma, lam)
    assert advantages.dtype == returns.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values, atol=1e-5)


@EXACT
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), seed=st.integers(0, 999))
def test_gae_of_orz_is_reward_minus_value(lengths, seed):
    """With γ = λ = 1 the advantage of every token is R − V(s_t): the values of later tokens cancel."""
    rng = np.random.default_rng(seed)
    values, scores = rng.normal(size=sum(lengths)), rng.integers(0, 2, len(lengths))
    batch = make_batch(lengths, scores)
    advantages, returns = ppo.gae(ppo.token_rewards(batch), values, batch.response_lens)
    reward_of_token = np.repeat(scores, lengths)
    np.testing.assert_allclose(advantages, reward_of_token - values, atol=1e-5)
    np.testing.assert_allclose(returns, reward_of_token, atol=1e-5)


def make_batch(response_lens, rewards=None, prompt_len=3, questions=None):
    """Samples whose token ids count up from 0 over the whole batch, so that an id names its place, and so does its
    log-prob. Samples of one question share the prompt of the first of them."""
    samples, prompts, token = [], {}, 0
    for i, length in enumerate(response_lens):
        ids = np.arange(token, token + prompt_len + length, dtype=np.int32)
        token += len(ids)
        question = i if questions is None else questions[i]
        prompt = prompts.setdefault(question, ids[:prompt_len])
        reward = float(rewards[i]) if rewards is not None else 0.0
        logprobs = -ids[prompt_len:].astype(np.float32)
        samples.append(
            packing.Sample(question, prompt, ids[prompt_len:], logprobs, "", "stop", reward > 0, reward)
        )
    return packing.Batch(samples)


def test_reward_and_kl_penalty_per_token():
    """Fails if the KL penalty has the wrong sign, or if an empty response puts its reward on a neighbour's last
    token."""
    batch = make_batch([3, 0, 2], [1.0, 1.0, 0.5])
    np.testing.assert_allclose(ppo.token_rewards(batch), [0, 0, 1.0, 0, 0.5])
    batch.old_logprobs = np.array([-1, -2, -3, -4, -5], np.float32)
    batch.ref_logprobs = np.array([-2, -2, -1, -4, -4.5], np.float32)
    np.testing.assert_allclose(ppo.token_rewards(batch, 0.1), [-0.1, 0, 1.2, 0, 0.55], atol=1e-6)


def test_normalise_over_all_tokens():
    """Fails if the mean is computed in fp32, which loses it in a sum of a million numbers, or if equal advantages
    divide by zero."""
    advantages = np.random.default_rng(0).normal(1000, 0.01, 1_000_000).astype(np.float32)
    wide = advantages.astype(np.float64)
    normal = ppo.normalise(advantages)
    np.testing.assert_allclose(normal, (wide - wide.mean()) / wide.std(), rtol=1e-4, atol=1e-4)
    assert abs(normal.mean(dtype=np.float64)) < 1e-5 and abs(normal.std(dtype=np.float64) - 1) < 1e-5
    assert (ppo.normalise(np.full(5, 0.25, np.float32)) == 0).all()


# ---- Losses -----------------------------------------------------------------------------------------------------


def test_policy_loss_and_gradient_on_both_clip_sides():
    """Fails if the loss takes max instead of min: a token would be clipped where it should be corrected, and trained
    on where it should stop."""
    eps = 0.2
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], dtype=torch.float64).repeat(2)
    advantages = torch.tensor([1.5] * 7 + [-1.5] * 7, dtype=torch.float64)
    old_logprobs = torch.linspace(-3, -0.1, 14, dtype=torch.float64)
    logprobs = (old_logprobs + ratios.log()).requires_grad_()
    loss, ratio = ppo.policy_loss(logprobs, old_logprobs, advantages, eps)
    loss.sum().backward()
    for i, (r, a) in enumerate(zip(ratios.tolist(), advantages.tolist())):
        stopped = r > 1 + eps if a > 0 else r < 1 - eps  # has already moved far enough in the right direction
        kept = (1 + eps if a > 0 else 1 - eps) if stopped else r
        assert loss[i].item() == pytest.approx(-kept * a)
        assert logprobs.grad[i].item() == pytest.approx(0.0 if stopped else -r * a)
    torch.testing.assert_close(ratio, ratios)


def test_policy_gradient_on_policy_is_reinforce():
    """With the detached log-probs as the old ones, the gradient is that of REINFORCE: −Â for each token."""
    logprobs = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    ppo.policy_loss(logprobs, logprobs.detach(), advantages, 0.2)[0].sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_value_loss_and_gradient_on_both_clip_sides():
    """Fails if the loss takes min instead of max: a value would stop learning just where it is wrong."""
    cases = []  # V, V_old, R, loss, gradient
    for v, old, target in [
        (0.1, 0.0, 1.0),  # inside the clip: the plain squared error
        (0.5, 0.0, 1.0),  # moved too far towards the target: the clipped error is larger, no gradient
        (-0.5, 0.0, -1.0),
        (0.5, 0.0, -1.0),  # moved too far away: the plain error is larger and pulls back
        (-0.5, 0.0, 1.0),
        (1.5, 0.9, 1.0),  # past the target: the plain error is larger
    ]:
        near = old + max(-0.2, min(0.2, v - old))
        plain, clipped = (v - target) ** 2, (near - target) ** 2
        cases.append((v, old, target, max(plain, clipped) / 2, v - target if plain >= clipped else 0.0))
    v, old, target, loss, grad = torch.tensor(cases, dtype=torch.float64).T
    v = v.clone().requires_grad_()
    result = ppo.value_loss(v, old, target, 0.2)
    result.sum().backward()
    torch.testing.assert_close(result.detach(), loss)
    assert (grad == 0).sum() == 2  # so the cases above reach both sides
    # Inside the clip both errors are equal; the gradient must be that of one of them, not twice it or half of it.
    torch.testing.assert_close(v.grad, grad)


# ---- Packing ----------------------------------------------------------------------------------------------------

HIDDEN, BUDGET = 3584, 16384  # Qwen2.5-7B, and the default budget


def orz_lengths(seed):
    """8,192 responses with their prompts: log-normal, mean about 2,200 tokens, at most 10,048."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.lognormal(math.log(2200) - 0.75**2 / 2, 0.75, 8192), 10048).astype(np.int64)


def work(lengths):
    """The cost of linear layers and causal attention, in units of a token's linear layers."""
    return lengths * (1 + lengths / (12 * HIDDEN))


def check_plan(plan, lengths, budget, ranks):
    assert len(plan) == ranks
    assert len({len(packs) for packs in plan}) == 1, "ZeRO-3 hangs on ranks with unequally many packs"
    assert sorted(i for packs in plan for indices in packs for i in indices) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in indices) <= budget for packs in plan for indices in packs)


def check_few(plan, lengths, ranks):
    """There are no more packs than the tokens need; on one or two ranks one more is allowed, since there every
    thousandth token counts."""
    need = -(-int(lengths.sum()) // (BUDGET * ranks))
    assert need <= len(plan[0]) <= need + (ranks <= 2)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 8, 32, 128])
def test_packing_of_orz_lengths(ranks, seed):
    """Fails if one rank has over 3% more work than the mean, since all others wait for it in every update, or if there
    are more packs than needed."""
    lengths = orz_lengths(seed)
    assert 2000 < lengths.mean() < 2400
    plan = packing.pack(lengths, BUDGET, ranks, HIDDEN)
    check_plan(plan, lengths, BUDGET, ranks)
    check_few(plan, lengths, ranks)
    per_rank = np.array([sum(work(lengths[i]) for indices in packs for i in indices) for packs in plan])
    assert per_rank.max() <= 1.03 * per_rank.mean(), per_rank.max() / per_rank.mean()


@pytest.mark.parametrize("ranks", [1, 2, 8, 32])
def test_packing_of_one_critic_mini_batch(ranks):
    """One twelfth of a step, packed on its own, is as even, although it has fewer sequences to balance with."""
    order = np.random.default_rng(0).permutation(8192)
    for part in np.array_split(order, 12)[:4]:
        lengths = orz_lengths(0)[part]
        plan = packing.pack(lengths, BUDGET, ranks, HIDDEN)
        check_plan(plan, lengths, BUDGET, ranks)
        check_few(plan, lengths, ranks)
        per_rank = np.array([sum(work(lengths[i]) for indices in packs for i in indices) for packs in plan])
        assert per_rank.max() <= 1.03 * per_rank.mean(), per_rank.max() / per_rank.mean()


@pytest.mark.parametrize("shape", ["half cut off", "uniform", "all cut off"])
def test_packing_of_coarse_lengths(shape):
    """Only two or three samples fit into a pack. Fails if packs that are filled evenly leave room that no sample fits
    into, so that more packs are needed than first fit needs."""
    rng = np.random.default_rng(0)
    long = rng.integers(5000, 10048, 1024)
    cut_off = np.full(1024, 10048)
    half = np.where(rng.random(1024) < 0.5, cut_off, rng.integers(6000, 7000, 1024))
    lengths = {"half cut off": half, "uniform": long, "all cut off": cut_off}[shape]
    free = []  # the room left in each pack of first fit, the longest first
    for length in sorted(lengths.tolist(), reverse=True):
        place = next((i for i, room in enumerate(free) if room >= length), len(free))
        free[place:] = free[place:] or [BUDGET]
        free[place] -= length
    plan = packing.pack(lengths, BUDGET, 1, HIDDEN)
    check_plan(plan, lengths, BUDGET, 1)
    assert len(plan[0]) <= len(free)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_packing_of_few_samples(ranks):
    """Fails if in a small step, with fewer tokens than its packs could hold, one rank gets nearly all samples and the
    others wait."""
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(130, 190, 32)
        plan = packing.pack(lengths, 2048, ranks, 576)
        check_plan(plan, lengths, 2048, ranks)
        per_rank = np.array([sum(lengths[i] for indices in packs for i in indices) for packs in plan])
        assert len(plan[0]) == -(-3 // ranks) and per_rank.max() <= 1.04 * per_rank.mean()


@EXACT
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), ranks=st.integers(1, 9))
def test_packing_keeps_every_sample_once(lengths, ranks):
    """Fails if a sample is lost or doubled at odd sizes: fewer samples than ranks, one sample, full packs."""
    check_plan(packing.pack(lengths, 50, ranks, HIDDEN), lengths, 50, ranks)


def test_packing_at_the_edges():
    """Fails if a full pack is counted as too full by one, or if a sample that fits into no pack is not named in an
    error."""
    assert packing.pack([50, 50], 50, 2, HIDDEN) in ([[[0]], [[1]]], [[[1]], [[0]]])
    assert sum(len(indices) for packs in packing.pack([7], 50, 4, HIDDEN) for indices in packs) == 1
    assert len(packing.pack([25, 25, 25, 25], 50, 2, HIDDEN)[0]) == 1
    assert len(packing.pack([26, 26, 26], 50, 1, HIDDEN)[0]) == 3  # no two fit into one pack
    with pytest.raises(ValueError, match="51 tokens does not fit into a pack of 50"):
        packing.pack([3, 51, 4], 50, 1, HIDDEN)


def draw_batch(data, response_lens, num_questions, prompt_len=3):
    """A batch of these responses to questions drawn at random, the question of each response, and an order of the
    samples."""
    count = len(response_lens)
    questions = data.draw(st.lists(st.integers(0, num_questions - 1), min_size=count, max_size=count))
    batch = make_batch(response_lens, prompt_len=prompt_len, questions=questions)
    return batch, questions, data.draw(st.permutations(range(count)))


@EXACT
@given(
    response_lens=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    prompt_len=st.integers(1, 4),
    data=st.data(),
)
def test_pack_contents(response_lens, prompt_len, data):
    """Fails if positions are off by one, so that a token is predicted from itself; if a field belongs to another
    sample; if a response sees another question's prompt or another response; or if a shared prompt is in the pack
    twice."""
    batch, questions, order = draw_batch(data, response_lens, 3, prompt_len)
    indices = order[:4]
    pack = packing.make_pack(batch, list(indices), "cpu", ["logprobs"])
    assert pack["input_ids"].dtype == pack["targets"].dtype == torch.int64
    assert pack["cu_seqlens_q"].dtype == pack["cu_seqlens_k"].dtype == torch.int32
    prompts = {questions[i] for i in indices}
    assert len(pack["input_ids"]) == prompt_len * len(prompts) + sum(response_lens[i] for i in indices)
    ids, keys = pack["input_ids"].numpy(), pack["key_index"].numpy()
    bounds = [pack["cu_seqlens_" + side].tolist() for side in "qk"]
    positions, targets, where = [], [], []
    for n, i in enumerate(indices):
        (first_query, last_query), (first, last) = (bound[n : n + 2] for bound in bounds)
        seen, start = keys[first:last], sum(prompt_len + length for length in response_lens[:i])
        first_asked = questions.index(questions[i])
        prompt = prompt_len * first_asked + sum(response_lens[:first_asked])
        response = list(range(start + prompt_len, start + prompt_len + response_lens[i]))
        assert ids[seen].tolist() == [*range(prompt, prompt + prompt_len), *response]
        assert pack["position_ids"][seen].tolist() == list(range(len(seen)))
        # A sample's queries are the last of its keys.
        queries = list(range(first_query, last_query))
        assert seen[len(seen) - len(queries) :].tolist() == queries and len(queries) >= len(response)
        positions += seen[prompt_len - 1 : -1].tolist()
        targets += response
        where += [token - prompt_len * (i + 1) for token in response]
    # In make_batch token ids and log-probs both name the token's place, so each can be checked on its own.
    assert pack["state_index"].tolist() == positions and pack["targets"].tolist() == targets
    assert (-pack["logprobs"]).tolist() == targets and pack["token_index"].tolist() == where
    assert pack["max_seqlen"] == max(batch.lengths[i] for i in indices)


def test_empty_pack_predicts_nothing():
    """A rank without work must still run the network: its pack has tokens to read and none to predict."""
    pack = packing.make_pack(make_batch([2, 3]), [], "cpu", ["logprobs"])
    assert len(pack["input_ids"]) == 3 and pack["cu_seqlens_q"].tolist() == [0, 3]
    assert len(pack["state_index"]) == len(pack["targets"]) == len(pack["logprobs"]) == 0


def test_batch_finds_each_response():
    """Fails if an empty response shifts everything after it by one."""
    batch = make_batch([2, 0, 3], [1, 0, 0.0])
    assert [batch.logprobs[tiny_models.place(batch, i)].tolist() for i in range(3)] == [
        [-3.0, -4.0],
        [],
        [-11.0, -12.0, -13.0],
    ]


@EXACT
@given(
    response_lens=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    capacity=st.integers(1, 40),
    data=st.data(),
)
def test_bundles(response_lens, capacity, data):
    """Fails if a sample is lost, shares another question's prompt, or is in a bundle over the capacity; or if two
    bundles of a question would fit into one."""
    batch, questions, order = draw_batch(data, response_lens, 5)
    part = order[: len(order) // 2 + 1]
    bundles, sizes = packing.bundle(batch, part, capacity)
    assert sorted(i for samples in bundles for i in samples) == sorted(part)
    for samples, size in zip(bundles, sizes, strict=True):
        assert len({questions[i] for i in samples}) == 1
        assert size == len(packing.make_pack(batch, samples, "cpu")["input_ids"])
        assert size <= capacity or len(samples) == 1
    # No two bundles of a question would fit into one.
    by_question = {q: [n for n, s in enumerate(bundles) if questions[s[0]] == q] for q in questions}
    for same in by_question.values():
        assert all(sizes[m] + sizes[n] - 3 > capacity for m in same for n in same if m < n)


@pytest.mark.parametrize("ranks", [1, 8, 32, 128])
def test_packing_of_shared_prompts(ranks):
    """Fails if the work that shared prompts save is lost again by waiting for the slowest rank."""
    lengths, rng = orz_lengths(0), np.random.default_rng(0)
    prompt_lens = rng.integers(60, 400, 128).repeat(64)
    batch = SimpleNamespace(prompt_indices=np.arange(128).repeat(64), prompt_lens=prompt_lens)
    batch.lengths = np.maximum(lengths, prompt_lens + 1)
    batch.response_lens = batch.lengths - prompt_lens
    cfg = SimpleNamespace(max_tokens_per_pack=BUDGET, workers=ranks, epochs_per_step=1)
    (plan,) = packing.plan_updates(batch, range(8192), 1, np.random.default_rng(1), cfg, HIDDEN)
    assert sorted(i for packs in plan for indices in packs for i in indices) == list(range(8192))

    def shared_work(indices):
        """In the units of `work`; of the samples that share a prompt, only the first computes the prompt's queries."""
        later = [
            i for n, i in enumerate(indices) if batch.prompt_indices[i] in batch.prompt_indices[indices[:n]]
        ]
        return work(batch.lengths[indices]).sum() - work(prompt_lens[later]).sum()

    per_rank = np.array([sum(map(shared_work, packs)) for packs in plan])
    assert per_rank.max() <= 1.03 * per_rank.mean(), per_rank.max() / per_rank.mean()
    assert per_rank.max() < work(batch.lengths).sum() / ranks


# ---- Variants ---------------------------------------------------------------------------------------------------


def settings_with(**overrides):
    """The defaults of base.py, with these changes."""
    base = read_file(BASE)
    assert overrides.keys() <= base.keys()
    return SimpleNamespace(**base | overrides)


def group_advantage_as_written(name, rewards, i, group_size):
    """The advantage of response i, by the formula of its paper; for `reinforce` it is normalised afterwards."""
    first = i // group_size * group_size
    group = [float(reward) for reward in rewards[first : first + group_size]]
    mean = sum(group) / group_size
    if name == "grpo":
        std = math.sqrt(sum((reward - mean) ** 2 for reward in group) / group_size)
        return (float(rewards[i]) - mean) / (std + 1e-6)
    if name == "rloo":
        others = [float(rewards[j]) for j in range(first, first + group_size) if j != i]
        return float(rewards[i]) - sum(others) / len(others)
    return float(rewards[i]) - mean


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce"])
def test_group_advantages_against_loops(name):
    """Fails if GRPO has ORZ's defect (it divides by True), if groups are mixed up, or if the mean is taken over all
    questions."""
    rng = np.random.default_rng(3)
    rewards, lens = rng.integers(0, 2, 12).astype(np.float32), rng.integers(1, 6, 12)
    rewards[4:8] = 1.0  # a group with equal rewards teaches nothing
    batch = SimpleNamespace(rewards=rewards, response_lens=lens)
    expected = []
    for i in range(12):
        expected += [group_advantage_as_written(name, rewards, i, 4)] * int(lens[i])
    if name == "reinforce":
        mean = sum(expected) / len(expected)
        std = math.sqrt(sum((value - mean) ** 2 for value in expected) / len(expected))
        expected = [(value - mean) / std for value in expected]
    metrics = ppo.set_advantages(batch, settings_with(advantage=name, samples_per_prompt=4))
    assert batch.advantages.dtype == np.float32
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-5, atol=1e-6)
    assert metrics == {"advantage_abs": pytest.approx(np.abs(expected).mean(), rel=1e-5)}
    equal = batch.advantages[lens[:4].sum() : lens[:8].sum()]
    assert name == "reinforce" or (equal == 0).all()  # `reinforce` also subtracts the mean over all tokens


@pytest.mark.parametrize("name", ppo.GROUP_ADVANTAGES)
def test_group_advantages_have_a_number_for_every_token(name):
    """Fails if an estimator, such as one that a fork has added, returns fp64, one advantage per response, or NaN for a
    group of equal rewards."""
    groups = np.array([[1, 0, 0.5], [1, 1, 1]], np.float32)
    advantages = ppo.GROUP_ADVANTAGES[name](groups, np.array([2, 0, 3, 1, 4, 2]))
    assert advantages.dtype == np.float32 and advantages.shape == (12,)
    assert np.isfinite(advantages).all()


def test_group_advantages_are_those_that_a_config_may_name():
    """Fails if no config can choose a function, or if a legal name has none. Only "gae", the name beside them, has a
    critic."""
    _, legal = documentation()["advantage"]
    names = [name for name in re.findall(r'"(\w+)"', legal)]
    assert sorted(names) == sorted([*ppo.GROUP_ADVANTAGES, "gae"])
    assert [name for name in names if has_critic(settings_with(advantage=name))] == ["gae"]


def test_rloo_is_dr_grpo_for_large_groups():
    """Limiting case: the share that a response has in its own group's mean vanishes with the size of the group."""
    groups = np.random.default_rng(0).integers(0, 2, (3, 1000)).astype(np.float32)
    lens = np.ones(3000, np.int64)
    np.testing.assert_allclose(ppo.rloo(groups, lens), ppo.dr_grpo(groups, lens), rtol=2e-3)


def test_returns_with_a_lambda_of_their_own():
    """VAPO's decoupled λ. Fails if the advantages use the critic's λ, if the returns use the policy's, or if equal
    ones give a different result."""
    lengths = [4, 0, 7, 1]
    rng = np.random.default_rng(0)
    for lam, critic_lam in [(0.9, 1.0), (0.9, 0.9), (1.0, 0.5), (1.0, 1.0)]:
        batch = make_batch(lengths, [1.0, 0.0, 1.0, 0.0])
        batch.values = rng.normal(size=12).astype(np.float32)
        cfg = settings_with(lam=lam, critic_lam=critic_lam, normalise_advantages=False)
        metrics = ppo.set_advantages(batch, cfg)
        rewards = ppo.token_rewards(batch)
        advantages = gae_as_written(rewards, batch.values, lengths, 1.0, lam)
        returns = gae_as_written(rewards, batch.values, lengths, 1.0, critic_lam) + batch.values
        np.testing.assert_allclose(batch.advantages, advantages, atol=1e-5)
        np.testing.assert_allclose(batch.returns, returns, atol=1e-5)
        assert metrics["value_mean"] == pytest.approx(batch.values.mean(), rel=1e-5)
        assert metrics["advantage_abs"] == pytest.approx(np.abs(advantages).mean(), rel=1e-5)
        # The same advantages are now normalised; the metric is still that of the unnormalised ones.
        again = ppo.set_advantages(batch, settings_with(lam=lam, critic_lam=critic_lam))
        np.testing.assert_allclose(batch.advantages, ppo.normalise(advantages.astype(np.float32)), atol=1e-4)
        assert again == metrics


def test_samples_that_the_policy_skips():
    """Fails if the wrong group is dropped, if a group of equal rewards is kept, or if a response that ended by itself
    is lost."""
    rewards = [1, 1, 1, 0, 1, 0, 0, 0, 0, 0.5, 0.5, 0.5]
    batch = make_batch([2] * 12, rewards)
    batch.cut_off[[4, 9]] = True

    def kept(**overrides):
        return ppo.policy_samples(batch, settings_with(samples_per_prompt=3, **overrides)).tolist()

    differing = []
    for i in range(12):
        group = [rewards[j] for j in range(12) if j // 3 == i // 3]
        if len(set(group)) > 1:
            differing.append(i)
    assert differing == [3, 4, 5]
    assert kept() == list(range(12))
    assert kept(drop_equal_groups=True) == differing
    assert kept(drop_cut_off=True) == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert kept(drop_equal_groups=True, drop_cut_off=True) == [3, 5]
    batch.rewards[:] = 1.0
    assert kept(drop_equal_groups=True) == []


def test_the_batch_knows_what_was_cut_off():
    """Fails if a response that ended by itself with its last allowed token counts as cut off."""
    ids = np.zeros(2, np.int32)
    samples = [
        packing.Sample(0, ids, ids, np.zeros(2, np.float32), "", reason) for reason in ("stop", "length")
    ]
    assert packing.Batch(samples).cut_off.tolist() == [False, True]


def test_clip_higher():
    """Fails if DAPO's second ε clips below 1 instead of above, or if the loss with the same ε on both sides is not
    plain PPO's."""
    ratios = torch.tensor([0.5, 0.79, 0.9, 1.0, 1.21, 1.29, 2.0], dtype=torch.float64).repeat(2)
    advantages = torch.tensor([1.5] * 7 + [-1.5] * 7, dtype=torch.float64)
    old_logprobs = torch.zeros(14, dtype=torch.float64)
    loss, _ = ppo.policy_loss(ratios.log(), old_logprobs, advantages, 0.2, 0.28)
    for i, (ratio, advantage) in enumerate(zip(ratios.tolist(), advantages.tolist())):
        clipped = min(max(ratio, 0.8), 1.28)
        assert loss[i].item() == pytest.approx(-min(ratio * advantage, clipped * advantage))
    plain, _ = ppo.policy_loss(ratios.log(), old_logprobs, advantages, 0.2)
    same, _ = ppo.policy_loss(ratios.log(), old_logprobs, advantages, 0.2, 0.2)
    assert torch.equal(plain, same) and not torch.equal(plain, loss)


def test_kl_estimators_by_enumeration():
    """Fails if an estimator is one of KL(q‖p), has the other sign, or has another gradient than its docstring says."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)

    def expectation(estimator):
        """The estimator's mean over all four outcomes, as over infinitely many samples, and its gradient as a loss."""
        logp = logits.log_softmax(0)
        probabilities = logp.detach().exp()
        estimates = ppo.kl_estimate(q.log() - logp, estimator)
        for outcome in range(4):
            p, r = probabilities[outcome].item(), (q[outcome] / probabilities[outcome]).item()
            formula = {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}[estimator]
            assert estimates[outcome].item() == pytest.approx(formula), p
        mean = (probabilities * estimates).sum()
        return mean.item(), torch.autograd.grad(mean, logits)[0]

    logp = logits.log_softmax(0)
    kl = (logp.exp() * (logp - q.log())).sum()
    (gradient,) = torch.autograd.grad(kl, logits)
    assert expectation("k1")[0] == pytest.approx(kl.item()) == expectation("k3")[0]
    torch.testing.assert_close(expectation("k1")[1], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(expectation("k2")[1], gradient)
    same = torch.zeros(3)
    assert all((ppo.kl_estimate(same, estimator) == 0).all() for estimator in ("k1", "k2", "k3"))


OFF = {"importance_cap": 0.0, "importance_token_band": [0, 0], "importance_response_band": [0, 0]}


def weights_as_written(logps, sampler_logps, lens, cap, token_band, response_band):
    """The weight of every token, computed one token at a time."""
    weights, start = [], 0
    for length in lens:
        ratios = [math.exp(logps[t] - sampler_logps[t]) for t in range(start, start + length)]
        geometric_mean = math.prod(ratios) ** (1 / length) if length else 1.0
        for ratio in ratios:
            weight = min(ratio, cap) if cap else 1.0
            if any(token_band) and not token_band[0] <= ratio <= token_band[1]:
                weight = 0.0
            if any(response_band) and not response_band[0] <= geometric_mean <= response_band[1]:
                weight = 0.0
            weights.append(weight)
        start += length
    return weights


@EXACT
@given(
    lens=st.lists(st.integers(0, 6), min_size=0, max_size=6),
    cap=st.sampled_from([0.0, 1.0, 2.0, math.inf]),
    token_band=st.sampled_from([[0, 0], [0.5, 5.0], [0.9, 1.1]]),
    response_band=st.sampled_from([[0, 0], [0.99, 1.01], [0.8, 1.25]]),
    seed=st.integers(0, 999),
)
def test_importance_weights_against_loops(lens, cap, token_band, response_band, seed):
    """Fails if the ratio is inverted, if an end of a band is ignored, if a response gets another one's mean, or if an
    empty response spoils the others."""
    rng = np.random.default_rng(seed)
    logps, sampler_logps = -rng.exponential(1.0, (2, sum(lens)))
    cfg = SimpleNamespace(
        importance_cap=cap, importance_token_band=token_band, importance_response_band=response_band
    )
    log_ratio = torch.from_numpy(logps - sampler_logps)
    weights, shares = ppo.importance_weights(log_ratio, lens, cfg)
    expected = weights_as_written(logps, sampler_logps, lens, cap, token_band, response_band)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)
    assert shares["importance_masked"].tolist() == [weight == 0 for weight in expected]
    ratios = np.exp(logps - sampler_logps)
    assert shares["importance_truncated"].tolist() == [cap > 0 and ratio > cap for ratio in ratios]


def test_importance_weights_at_their_limits():
    """Where both policies agree, every weight is 1. With an infinite cap a weight is the whole ratio, and wide bands
    mask nothing."""
    log_ratio = torch.tensor([0.5, -2.0, 3.0, 0.0])
    for name, value in [("importance_cap", 2.0), ("importance_token_band", [0.5, 5.0])]:
        weights, shares = ppo.importance_weights(
            torch.zeros(4), [1, 3], SimpleNamespace(**OFF | {name: value})
        )
        assert (weights == 1).all() and not shares["importance_masked"].any()
    weights, _ = ppo.importance_weights(
        log_ratio, [1, 3], SimpleNamespace(**OFF | {"importance_cap": math.inf})
    )
    torch.testing.assert_close(weights, log_ratio.exp())
    wide = {"importance_token_band": [0.0, math.inf], "importance_response_band": [0.0, math.inf]}
    weights, _ = ppo.importance_weights(log_ratio, [1, 3], SimpleNamespace(**OFF | wide))
    assert (weights == 1).all()


def test_loss_denominators():
    """Fails if the denominator counts the responses of one rank only, or the tokens of samples that are not trained
    on."""
    batch = make_batch([3, 5, 0, 2, 9])
    plan = [[[0, 1], []], [[3], [2]]]  # for two ranks, without the last sample
    assert ppo.loss_denominator(batch, plan, "token", 10) == 3 + 5 + 2 + 0
    assert ppo.loss_denominator(batch, plan, "response", 10) == 4
    assert ppo.loss_denominator(batch, plan, "constant", 10) == 40


def test_updates_of_a_schedule():
    """Fails if a resume counts the steps of critic warm-up as updates of the policy, whose own warm-up would then be
    over at once."""
    cfg = settings_with(
        critic_warmup_steps=3, policy_updates_per_step=2, critic_updates_per_step=5, epochs_per_step=2
    )
    policy = critic = 0
    for step in range(1, 8):
        critic += 5 * 2
        policy += 2 * 2 if step > 3 else 0
        assert ppo.num_updates(cfg, "critic", step) == critic
        assert ppo.num_updates(cfg, "policy", step) == policy
    first = ppo.num_updates(cfg, "policy", 3) + 1
    assert ppo.learning_rate(cfg, "policy", first) == pytest.approx(1e-6 / 50)


def test_epochs_take_every_sample_again():
    """Fails if a second pass splits the samples as the first one did, leaves samples out, or takes samples that were
    not asked for."""
    batch = make_batch([3] * 20)
    cfg = SimpleNamespace(max_tokens_per_pack=BUDGET, workers=2, epochs_per_step=3)
    indices = np.array([1, 3, 5, 7, 9, 11, 13])
    plans = packing.plan_updates(batch, indices, 2, np.random.default_rng(0), cfg, HIDDEN)
    parts = [sorted(i for packs in plan for pack in packs for i in pack) for plan in plans]
    assert len(parts) == 6
    for epoch in range(3):
        assert sorted(parts[2 * epoch] + parts[2 * epoch + 1]) == indices.tolist()
    assert len({tuple(part) for part in parts}) > 2


def test_drift_message_names_causes_and_what_to_look_at():
    """Fails if the error does not say what to look at, or is longer than what launch.py prints."""
    message = ppo.drift_message(0.2512, 14.61, 0.2)
    assert "0.25 apart on average, 15 at most (drift_limit=0.2)" in message
    for cause, place in (
        ("stale weights in vLLM", "load_weights"),
        ("dtype", "worker_0.log"),
        ("attention", "config.json"),
    ):
        assert cause in message and place in message
    assert len(f"DriftError: {message}") <= 600 and "\n" not in message
    assert hasattr(rollout.Rollout, "load_weights")  # named in the message


def test_drift_limits():
    """Healthy runs of small models in bf16 have a drift of 0.05: a limit of that size would stop them."""
    assert ppo.DRIFT_LIMITS == {torch.float32: 1e-3, torch.bfloat16: 0.2}
