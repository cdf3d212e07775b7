"""docs/forking.md: the lines that it tells a fork to change fit the code, and do what the page says."""

import copy
import math
import re
import types
from types import SimpleNamespace

import numpy as np
import pytest
import test_ppo
import tiny_models
import torch

import model
import ppo
from configs.load import ROOT

PAGE = (ROOT / "docs" / "forking.md").read_text(encoding="utf-8")


def changed_source(title, file):
    """The source of a file with the change under this title of the page."""
    (diff,) = re.findall(rf"\*\*{re.escape(title)}\*\*.*?```diff\n(.*?)```", PAGE, re.DOTALL)
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{title}: its lines are not in {file}"
    return source.replace(old, new)


def fork(title):
    """ppo.py as a module, with the change under this title."""
    module = types.ModuleType(f"ppo_with_{title}")
    exec(compile(changed_source(title, "ppo.py"), title, "exec"), vars(module))
    return module


def test_cispo():
    """Tokens over the clip lose their gradient, as in PPO; or the weight has one of its own."""
    ratios = torch.tensor([0.5, 1.0, 1.19, 1.3, 3.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0], dtype=torch.float64)
    old_logprobs = torch.linspace(-2, -0.5, 5, dtype=torch.float64)
    logprobs = (old_logprobs + ratios.log()).requires_grad_()
    loss, _ = fork("CISPO").policy_loss(logprobs, old_logprobs, advantages, 0.2, 0.28)
    loss.sum().backward()
    for t in range(5):
        weight = min(ratios[t].item(), 1.28)
        assert loss[t].item() == pytest.approx(-weight * advantages[t].item() * logprobs[t].item())
        assert logprobs.grad[t].item() == pytest.approx(-weight * advantages[t].item())


def test_gspo(tmp_path):
    """A ratio per token, a mean over the whole pack, or clipping by tokens."""
    path = tiny_models.make_model(tmp_path)
    cfg = test_ppo.settings_with(
        clip_eps=0.05, clip_eps_high=0.1, loss_average="response", policy_updates_per_step=2
    )
    lens = [3, 5, 1, 4]
    batch = test_ppo.make_batch(lens, [1, 0, 1, 0])
    batch.tokens = batch.tokens % tiny_models.VOCABULARY
    batch.advantages = np.repeat([0.7, -0.4, 1.1, -1.3], lens).astype(np.float32)
    network = model.load_network("policy", path, torch.float32)
    pack = ppo.make_pack(batch, range(4), "cpu")
    with torch.no_grad():
        logprobs, _ = network(pack)
    batch.old_logprobs = logprobs.numpy() + np.random.default_rng(0).normal(0, 0.2, 13).astype(np.float32)
    expected, start = [], 0
    for i, length in enumerate(lens):
        place = slice(start, start + length)
        difference = logprobs[place].double() - torch.from_numpy(batch.old_logprobs[place]).double()
        ratio = math.exp(difference.sum().item() / length)
        clipped = min(max(ratio, 0.95), 1.1)
        advantage = float(batch.advantages[start])
        expected += [-min(ratio * advantage, clipped * advantage) / length] * length
        start += length
    learner = SimpleNamespace(cfg=cfg, device="cpu", engine=network)
    changed = fork("GSPO").Learner
    learner.vary_loss = types.MethodType(changed.vary_loss, learner)
    loss, _ = changed.policy_terms(learner, batch, [0, 1, 2, 3], is_first=True)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-4)
    learner.vary_loss = types.MethodType(ppo.Learner.vary_loss, learner)
    plain, _ = ppo.Learner.policy_terms(learner, batch, [0, 1, 2, 3], is_first=True)
    assert not np.allclose(plain.detach().numpy(), expected, rtol=1e-2)


def test_lambda_by_length():
    """The returns, whose λ is 1, change with the advantages; or a short response gets a negative λ."""
    lengths, gae = [30, 5, 100], fork("λ by length").gae
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 135))
    advantages, _ = gae(rewards, values, lengths, 1.0, 0.95)
    start = 0
    for length in lengths:
        part, lam = slice(start, start + length), max(0.0, 1 - 1 / (0.05 * length))
        written = test_ppo.gae_as_written(rewards[part], values[part], [length], 1.0, lam)
        np.testing.assert_allclose(advantages[part], written, atol=1e-5)
        start += length
    for same, plain in zip(gae(rewards, values, lengths), ppo.gae(rewards, values, lengths)):
        assert np.array_equal(same, plain)


def test_batch_invariance():
    """The variable is set where there is no GPU, or nowhere."""
    environment = types.ModuleType("workers_with_batch_invariance")
    source = changed_source("Batch-invariant sampling", "workers.py")
    exec(compile(source, "workers", "exec"), vars(environment))
    cfg = SimpleNamespace(**copy.copy(vars(test_ppo.settings_with())))
    assert environment.worker_environment(cfg, on_gpu=True)["VLLM_BATCH_INVARIANT"] == "1"
    assert "VLLM_BATCH_INVARIANT" not in environment.worker_environment(cfg, on_gpu=False)
