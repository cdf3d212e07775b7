"""The formulas of ppo.py against themselves written as plain loops, and packing against its promises. No Ray, vLLM, DeepSpeed."""

import math
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

EXACT = settings(deadline=None, derandomize=True, max_examples=100)


# ---- Generalised advantage estimation ---------------------------------------------------------------------------


def gae_as_written(rewards, values, lengths, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k}, token by token; the value after the last token is 0."""
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
    """A value that leaks from the next response, a response of length 0, or a wrong discount."""
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
    """With γ = λ = 1 nothing may be left of the other values: every token gets R − V(s_t)."""
    rng = np.random.default_rng(seed)
    values, scores = rng.normal(size=sum(lengths)), rng.integers(0, 2, len(lengths))
    batch = make_batch(lengths, scores)
    advantages, returns = ppo.gae(ppo.token_rewards(batch), values, batch.response_lens)
    reward_of_token = np.repeat(scores, lengths)
    np.testing.assert_allclose(advantages, reward_of_token - values, atol=1e-5)
    np.testing.assert_allclose(returns, reward_of_token, atol=1e-5)


def make_batch(response_lens, rewards=None, prompt_len=3, questions=None):
    """Token ids count up from 0 over the whole batch, so that a token names its place, and that of its log-prob; a
    prompt of a question that came before is that question's."""
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
    """A KL penalty of the wrong sign; a reward on a neighbour's last token where a response is empty."""
    batch = make_batch([3, 0, 2], [1.0, 1.0, 0.5])
    np.testing.assert_allclose(ppo.token_rewards(batch), [0, 0, 1.0, 0, 0.5])
    batch.old_logprobs = np.array([-1, -2, -3, -4, -5], np.float32)
    batch.ref_logprobs = np.array([-2, -2, -1, -4, -4.5], np.float32)
    np.testing.assert_allclose(ppo.token_rewards(batch, 0.1), [-0.1, 0, 1.2, 0, 0.55], atol=1e-6)


def test_normalise_over_all_tokens():
    """Sums of a million fp32 numbers lose the mean; equal advantages must not divide by zero."""
    advantages = np.random.default_rng(0).normal(1000, 0.01, 1_000_000).astype(np.float32)
    wide = advantages.astype(np.float64)
    normal = ppo.normalise(advantages)
    np.testing.assert_allclose(normal, (wide - wide.mean()) / wide.std(), rtol=1e-4, atol=1e-4)
    assert abs(normal.mean(dtype=np.float64)) < 1e-5 and abs(normal.std(dtype=np.float64) - 1) < 1e-5
    assert (ppo.normalise(np.full(5, 0.25, np.float32)) == 0).all()


# ---- Losses -----------------------------------------------------------------------------------------------------


def test_policy_loss_and_gradient_on_both_clip_sides():
    """A max for a min: then a token is clipped where it should be corrected, and trained on where it should stop."""
    eps = 0.2
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], dtype=torch.float64).repeat(2)
    advantages = torch.tensor([1.5] * 7 + [-1.5] * 7, dtype=torch.float64)
    old_logprobs = torch.linspace(-3, -0.1, 14, dtype=torch.float64)
    logprobs = (old_logprobs + ratios.log()).requires_grad_()
    loss, ratio = ppo.policy_loss(logprobs, old_logprobs, advantages, eps)
    loss.sum().backward()
    for i, (r, a) in enumerate(zip(ratios.tolist(), advantages.tolist())):
        stopped = r > 1 + eps if a > 0 else r < 1 - eps  # already moved far enough the right way
        kept = (1 + eps if a > 0 else 1 - eps) if stopped else r
        assert loss[i].item() == pytest.approx(-kept * a)
        assert logprobs.grad[i].item() == pytest.approx(0.0 if stopped else -r * a)
    torch.testing.assert_close(ratio, ratios)


def test_policy_gradient_on_policy_is_reinforce():
    """Old log-probs that are not detached: the ratio is then constant and the gradient 0."""
    logprobs = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    ppo.policy_loss(logprobs, logprobs.detach(), advantages, 0.2)[0].sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_value_loss_and_gradient_on_both_clip_sides():
    """A min for a max: a value then stops learning just where it is wrong."""
    cases = []  # V, V_old, R, loss, gradient
    for v, old, target in [
        (0.1, 0.0, 1.0),  # inside the clip: plain squared error
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
    assert (grad == 0).sum() == 2  # the cases above do reach both sides
    # Inside the clip both errors are V's own, and the gradient is that of one of them, not of two or of a half.
    torch.testing.assert_close(v.grad, grad)


# ---- Packing ----------------------------------------------------------------------------------------------------

HIDDEN, BUDGET = 3584, 16384  # Qwen2.5-7B, and the default budget


def orz_lengths(seed):
    """8,192 responses with their prompts: log-normal, mean about 2,200 tokens, at most 10,048."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.lognormal(math.log(2200) - 0.75**2 / 2, 0.75, 8192), 10048).astype(np.int64)


def work(lengths):
    """Linear layers and causal attention, in units of a token."""
    return lengths * (1 + lengths / (12 * HIDDEN))


def check_plan(plan, lengths, budget, ranks):
    assert len(plan) == ranks
    assert len({len(packs) for packs in plan}) == 1, "ZeRO-3 hangs on ranks with unequally many packs"
    assert sorted(i for packs in plan for indices in packs for i in indices) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in indices) <= budget for packs in plan for indices in packs)


def check_few(plan, lengths, ranks):
    """No more packs than the tokens need; on one or two ranks, where every thousandth token counts, one at most."""
    need = -(-int(lengths.sum()) // (BUDGET * ranks))
    assert need <= len(plan[0]) <= need + (ranks <= 2)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 8, 32, 128])
def test_packing_of_orz_lengths(ranks, seed):
    """A rank with a tenth more work makes all the others wait in every update; so does a pack more than needed."""
    lengths = orz_lengths(seed)
    assert 2000 < lengths.mean() < 2400
    plan = packing.pack(lengths, BUDGET, ranks, HIDDEN)
    check_plan(plan, lengths, BUDGET, ranks)
    check_few(plan, lengths, ranks)
    per_rank = np.array([sum(work(lengths[i]) for indices in packs for i in indices) for packs in plan])
    assert per_rank.max() <= 1.03 * per_rank.mean(), per_rank.max() / per_rank.mean()


@pytest.mark.parametrize("ranks", [1, 2, 8, 32])
def test_packing_of_one_critic_mini_batch(ranks):
    """One twelfth of a step, packed on its own: fewer sequences to balance with."""
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
    """Two or three samples a pack: filling packs evenly leaves room that nothing fits into, and a search of thousands
    of numbers of packs takes minutes."""
    rng = np.random.default_rng(0)
    long = rng.integers(5000, 10048, 1024)
    cut_off = np.full(1024, 10048)
    half = np.where(rng.random(1024) < 0.5, cut_off, rng.integers(6000, 7000, 1024))
    lengths = {"half cut off": half, "uniform": long, "all cut off": cut_off}[shape]
    free = []  # first fit, the longest first
    for length in sorted(lengths.tolist(), reverse=True):
        place = next((i for i, room in enumerate(free) if room >= length), len(free))
        free[place:] = free[place:] or [BUDGET]
        free[place] -= length
    plan = packing.pack(lengths, BUDGET, 1, HIDDEN)
    check_plan(plan, lengths, BUDGET, 1)
    assert len(plan[0]) <= len(free)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_packing_of_few_samples(ranks):
    """A small step, of fewer tokens than the packs would hold: one rank gets them nearly all, and the others wait."""
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(130, 190, 32)
        plan = packing.pack(lengths, 2048, ranks, 576)
        check_plan(plan, lengths, 2048, ranks)
        per_rank = np.array([sum(lengths[i] for indices in packs for i in indices) for packs in plan])
        assert len(plan[0]) == -(-3 // ranks) and per_rank.max() <= 1.04 * per_rank.mean()


@EXACT
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), ranks=st.integers(1, 9))
def test_packing_keeps_every_sample_once(lengths, ranks):
    """A sample lost or doubled at odd sizes: fewer samples than ranks, one sample, full packs."""
    check_plan(packing.pack(lengths, 50, ranks, HIDDEN), lengths, 50, ranks)


def test_packing_at_the_edges():
    """Packs that could hold one token more; a sample that fits nowhere must be named, not searched a place for ever."""
    assert packing.pack([50, 50], 50, 2, HIDDEN) in ([[[0]], [[1]]], [[[1]], [[0]]])
    assert sum(len(indices) for packs in packing.pack([7], 50, 4, HIDDEN) for indices in packs) == 1
    assert len(packing.pack([25, 25, 25, 25], 50, 2, HIDDEN)[0]) == 1
    assert len(packing.pack([26, 26, 26], 50, 1, HIDDEN)[0]) == 3  # none of them share a pack
    with pytest.raises(ValueError, match="51 tokens does not fit into a pack of 50"):
        packing.pack([3, 51, 4], 50, 1, HIDDEN)


def draw_batch(data, response_lens, num_questions, prompt_len=3):
    """A batch of these responses to questions drawn at random, the question of each, and the samples in some order."""
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
    """Positions off by one: then a token is predicted from itself. Fields that belong to another sample; a response
    that reads another question's prompt, or its sister's response; a prompt that stands there twice."""
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
        # Its queries are the last of its keys.
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
    """A rank without work must still run the network: tokens to read, none to predict."""
    pack = packing.make_pack(make_batch([2, 3]), [], "cpu", ["logprobs"])
    assert len(pack["input_ids"]) == 3 and pack["cu_seqlens_q"].tolist() == [0, 3]
    assert len(pack["state_index"]) == len(pack["targets"]) == len(pack["logprobs"]) == 0


def test_batch_finds_each_response():
    """Empty responses shift everything after them by one."""
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
    """A sample lost; one that shares another question's prompt; a bundle so large that no pack is even."""
    batch, questions, order = draw_batch(data, response_lens, 5)
    part = order[: len(order) // 2 + 1]
    bundles, sizes = packing.bundle(batch, part, capacity)
    assert sorted(i for samples in bundles for i in samples) == sorted(part)
    for samples, size in zip(bundles, sizes, strict=True):
        assert len({questions[i] for i in samples}) == 1
        assert size == len(packing.make_pack(batch, samples, "cpu")["input_ids"])
        assert size <= capacity or len(samples) == 1
    # No two bundles of a question would go into one.
    by_question = {q: [n for n, s in enumerate(bundles) if questions[s[0]] == q] for q in questions}
    for same in by_question.values():
        assert all(sizes[m] + sizes[n] - 3 > capacity for m in same for n in same if m < n)


@pytest.mark.parametrize("ranks", [1, 8, 32, 128])
def test_packing_of_shared_prompts(ranks):
    """What sharing saves must not be lost again by waiting for the slowest rank."""
    lengths, rng = orz_lengths(0), np.random.default_rng(0)
    prompt_lens = rng.integers(60, 400, 128).repeat(64)
    batch = SimpleNamespace(prompt_indices=np.arange(128).repeat(64), prompt_lens=prompt_lens)
    batch.lengths = np.maximum(lengths, prompt_lens + 1)
    batch.response_lens = batch.lengths - prompt_lens
    cfg = SimpleNamespace(max_tokens_per_pack=BUDGET, workers=ranks, epochs_per_step=1)
    (plan,) = packing.plan_updates(batch, range(8192), 1, np.random.default_rng(1), cfg, HIDDEN)
    assert sorted(i for packs in plan for indices in packs for i in indices) == list(range(8192))

    def shared_work(indices):
        """In units of a token, as `work`; the queries of a prompt are the first of its samples' alone."""
        later = [
            i for n, i in enumerate(indices) if batch.prompt_indices[i] in batch.prompt_indices[indices[:n]]
        ]
        return work(batch.lengths[indices]).sum() - work(prompt_lens[later]).sum()

    per_rank = np.array([sum(map(shared_work, packs)) for packs in plan])
    assert per_rank.max() <= 1.03 * per_rank.mean(), per_rank.max() / per_rank.mean()
    assert per_rank.max() < work(batch.lengths).sum() / ranks


def test_group_advantages_against_loops():
    """GRPO with ORZ's defect (divided by True), with groups mixed up, or with the mean over all questions."""
    rng = np.random.default_rng(3)
    rewards, lens = rng.integers(0, 2, 12).astype(np.float32), rng.integers(1, 6, 12)
    rewards[4:8] = 1.0  # a group that agrees teaches nothing
    batch = SimpleNamespace(rewards=rewards, response_lens=lens)
    expected = []
    for i in range(12):
        group = [float(rewards[j]) for j in range(12) if j // 4 == i // 4]
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 4)
        expected += [(float(rewards[i]) - mean) / (std + 1e-6)] * int(lens[i])
    advantages = ppo.group_advantages(batch, 4)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)


def test_drift_message_names_causes_and_what_to_look_at():
    """An error that says what went wrong and leaves the reader alone with it, or is longer than what launch.py prints."""
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
    """In bf16 healthy runs of small models have 0.05: a limit of that size stops them."""
    assert ppo.DRIFT_LIMITS == {torch.float32: 1e-3, torch.bfloat16: 0.2}
