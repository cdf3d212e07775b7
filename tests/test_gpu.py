"""What only a GPU does: FlashAttention, bf16, buffers, turns of its memory, a sleeping vLLM, a whole run. NOT RUN yet.

`make gpu` runs them, with the packages of requirements.txt. Without a GPU they are skipped; with GPU_TESTS_ON_CPU=1 they
run on the CPU, which cannot do all of it, so that the tests' own lines have been run.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import ranks
import test_buffers
import test_rollout
import tiny_models
import torch
from test_launch import ROOT

import model
import packing
import ppo
import rollout

ON_GPU = not os.environ.get("GPU_TESTS_ON_CPU")
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no GPU that torch can use")
GIB = 2**30


def on_this_device(function, folder, module="test_gpu", **arguments):
    """What a function of this module, or of another one, returns from a rank of its own on DEVICE."""
    return ranks.run_ranks(module, function, 1, folder, 900, on_gpu=ON_GPU, device=DEVICE, **arguments)[0]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.make_model(tmp_path_factory.mktemp("models") / "m", hidden=128, dtype=torch.bfloat16)


def apart(x, reference):
    return float((x.double().cpu() - reference.double().cpu()).norm() / reference.double().norm())


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_flash_attention_of_a_pack(sliding_window):
    """Fails if the GPU's kernel aligns the queries of a sample that shares a prompt differently, or if its window is
    off by one."""
    torch.manual_seed(0)
    # Samples a and b answer one question, whose prompt has 3 tokens; c answers another one.
    keys = torch.tensor([*range(10), 0, 1, 2, *range(10, 14), *range(14, 25)])
    queries, lengths = torch.tensor([0, 10, 14, 25]), torch.tensor([0, 10, 17, 28])
    pack = {"key_index": keys, "cu_seqlens_q": queries, "cu_seqlens_k": lengths}
    pack = {name: x.int() if "cu" in name else x for name, x in pack.items()} | {"max_seqlen": 11}
    results = []
    inputs = [torch.randn(1, heads, 25, 32) for heads in (4, 2, 2)]
    for place, dtype in ((DEVICE, torch.bfloat16), ("cpu", torch.float32)):
        here = {name: x.to(place) if torch.is_tensor(x) else x for name, x in pack.items()}
        leaves = [x.bfloat16().to(place, dtype).requires_grad_() for x in inputs]
        out, _ = model.packed_attention(None, *leaves, None, 32**-0.5, here, sliding_window)
        (out * torch.arange(out.numel(), device=place).reshape(out.shape).cos()).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(apart(flash, padded) < 2e-2 for flash, padded in zip(*results))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The models' paths, and test_buffers.loaded_buffers of them in bf16 on the GPU."""
    folder = tmp_path_factory.mktemp("buffers")
    paths = test_buffers.make_models(folder)
    arguments = {"paths": paths, "dtypes": [torch.bfloat16]}
    return paths, on_this_device("loaded_buffers", folder, module="test_buffers", **arguments)


def test_buffers_on_a_gpu(loaded):
    """Fails if zero.Init rounds a buffer on the GPU, where its tensors are made, although it does not on a CPU."""
    paths, buffers = loaded
    for family, path in paths.items():
        for kind in test_buffers.KINDS:
            plain = test_buffers.plain_buffers(path, kind, torch.bfloat16, DEVICE)
            test_buffers.assert_same(buffers[family, kind, torch.bfloat16], plain)


def test_rounded_buffers_on_a_gpu_are_refused(loaded):
    for kind in test_buffers.KINDS:
        assert "inv_freq has torch.bfloat16 instead of torch.float32" in loaded[1]["rounded", kind]


def test_long_text_on_a_gpu(tmp_path):
    """Fails if, within a text of 4,096 tokens, a Learner's log-probs drift away from those of plain transformers."""
    path, ids = test_buffers.make_long_text(tmp_path / "model")
    arguments = {"path": path, "ids": ids}
    logprobs = on_this_device("learner_logprobs", tmp_path, module="test_buffers", **arguments)
    plain = test_buffers.plain_logprobs(path, ids, DEVICE)
    test_buffers.assert_long_text_shows_rounding(logprobs, plain)


def turns(path, device):
    """Updates between which a Learner never moves, stays, or moves away and back, and the devices of its tensors while
    it is away."""
    results = {}
    rng = np.random.default_rng(0)
    samples = [
        packing.Sample(
            i,
            rng.integers(0, 90, 10).astype(np.int32),
            rng.integers(0, 90, 20).astype(np.int32),
            np.zeros(20, np.float32),
            "",
            "stop",
        )
        for i in range(8)
    ]
    batch = packing.Batch(samples)
    batch.advantages = rng.standard_normal(160).astype(np.float32)
    for how in ("never moves", "stays", "waits"):
        learner = ppo.Learner(
            "policy", ranks.settings(drift_limit=-1.0), path, torch.device(device), torch.bfloat16
        )
        learner.onload()
        metrics = []
        for _ in range(3):
            metrics.append(learner.update(batch, [[[[0, 1, 2, 3], [4, 5, 6, 7]]]], step=1))
            if how != "never moves":
                if how == "stays":
                    learner.free_gathered()
                else:
                    learner.offload(keep_weights=True)
                    learner.offload()
                places = {tensor.device.type for _, tensor in learner.optimizer_state() if tensor.dim()}
                places |= {p.ds_tensor.device.type for p in learner.network.parameters()}
                learner.onload()
                results[how, "places"] = places
        weights = {name: tensor.cpu().clone() for name, tensor in learner.weights()}
        results[how] = metrics, weights
    return results


def test_turns_of_the_gpu(path, tmp_path):
    """What was moved to CPU memory and back is trained on as if it had stayed, to the last bit."""
    result = on_this_device("turns", tmp_path, path=path)
    assert result["stays", "places"] == {DEVICE} and result["waits", "places"] == {"cpu"}
    metrics, weights = result["never moves"]
    for how in ("stays", "waits"):
        assert result[how][0] == metrics
        assert all(torch.equal(result[how][1][name], weights[name]) for name in weights)


def engine(path, device):
    """Drift before training, after training without a sync, and after a sync; memory of the sleeping engine."""
    cfg = ranks.settings(**test_rollout.SETTINGS | {"gpu_memory_utilization": 0.2})
    learner = ppo.Learner("policy", cfg, path, torch.device(device), torch.bfloat16)

    def held():
        free, total = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
        return total - free

    before = held()
    llm = rollout.Rollout(cfg, path, torch.bfloat16, torch.device(device))
    result = {"awake": held() - before}
    sampled, result["hash"] = test_rollout.sample(llm, 1)
    result["hash again"] = test_rollout.sample(llm, 1)[1]
    llm.sleep()
    result["asleep"] = held() - before
    learner.onload()
    result["before"] = test_rollout.drift(learner, sampled)
    learner.cfg.policy_lr = 0.02
    test_rollout.train(learner, sampled, check=False)

    def wake(weights):
        learner.offload(keep_weights=True)
        llm.wake("weights")
        llm.load_weights(weights)
        learner.offload()
        llm.wake("kv_cache")

    wake(learner.weights())
    synced, _ = test_rollout.sample(llm, 2)
    llm.sleep()
    learner.onload()
    result["synced"] = test_rollout.drift(learner, synced)
    result["stale"] = test_rollout.drift(learner, sampled)
    changed = ((name, tensor * (1.1 if "norm" in name else 1)) for name, tensor in learner.weights())
    without = ((name, tensor) for name, tensor in learner.weights() if "model.norm" not in name)
    for name, weights in (("without", without), ("changed", changed)):
        try:
            wake(weights)
            result[name] = None
        except rollout.SyncError as error:
            result[name] = str(error)
    return result


def test_engine_and_learner(path, tmp_path):
    """Fails if the GPU's engine samples from old weights, keeps its memory while it sleeps, or takes half a sync for a
    complete one."""
    result = on_this_device("engine", tmp_path, path=path)
    if ON_GPU:
        assert result["asleep"] < 3 * GIB and result["awake"] - result["asleep"] > GIB
    assert result["hash"] == result["hash again"]
    assert result["before"][1] < 0.05 and result["synced"][1] < 0.05 < result["stale"][1]
    assert "model.norm.weight" in result["without"]
    # The proof is that the engine holds what was sent, not that the right weights were sent.
    assert result["changed"] is None


def test_demo_on_a_gpu(tmp_path):
    """The whole demo in bf16: a run of two steps, which is then continued to four."""
    command = [
        sys.executable,
        "launch.py",
        "configs/tiny.py",
        f"--out_dir={tmp_path}",
        "--name=a",
        "--dtype=bfloat16",
        "--eval_every=-1",
    ]
    for steps in (2, 4):
        done = subprocess.run(
            [*command, f"--steps={steps}"], cwd=ROOT, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["drift_mean"] < 0.05 and row["skipped_policy"] == 0 for row in rows)
    assert (tmp_path / "a/policy/config.json").exists() and (tmp_path / "a/critic/config.json").exists()
