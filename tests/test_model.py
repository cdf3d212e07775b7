"""The packed networks of model.py against transformers' own forward, one sequence at a time."""

import inspect

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

import model
import packing


@pytest.fixture(scope="module", params=list(tiny_models.KINDS))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return tiny_models.make_model(path, **tiny_models.KINDS[request.param])


def random_batch(lengths=((3, 7), (1, 1), (9, 2), (4, 0), (2, 12), (9, 8), (3, 0), (9, 4))):
    """Samples with prompts and responses of these lengths, some longer than the sliding window; prompts of one length
    are the same."""
    rng = np.random.default_rng(0)
    samples, prompts = [], {}
    for prompt_len, response_len in lengths:
        ids = rng.integers(0, tiny_models.VOCABULARY, prompt_len + response_len).astype(np.int32)
        prompt = prompts.setdefault(prompt_len, ids[:prompt_len])
        logprobs = np.zeros(response_len, np.float32)
        samples.append(packing.Sample(prompt_len, prompt, ids[prompt_len:], logprobs, "", "stop"))
    return samples, packing.Batch(samples)


def gradients(network):
    """Gradients by the parameter names of the Hugging Face folder; 0 for a parameter that has none."""
    return {
        name.removeprefix("hf."): torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in network.named_parameters()
    }


def assert_same_gradients(first, second):
    assert first.keys() == second.keys()
    whole = torch.cat([g.flatten() for g in second.values()]).norm()
    assert whole > 0.1
    for name in first:
        assert (first[name] - second[name]).norm() <= 1e-5 * whole, name
        assert (first[name] - second[name]).norm() <= 1e-3 * second[name].norm() + 1e-7, name


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_policy_equals_one_sequence_at_a_time(folder, temperature, checkpointing, monkeypatch):
    """Fails if samples of a pack see each other, if positions run on from one to the next, if a shared prompt gets the
    gradient of one sample only, if a tied head loses the gradient of one of its two uses, or if the gradient ignores
    the temperature."""
    monkeypatch.setattr(model, "MAX_LOGITS", 5 * tiny_models.VOCABULARY)  # several chunks
    samples, batch = random_batch()
    order = [3, 7, 1, 4, 0, 2, 6, 5]
    weights = torch.randn(len(batch.logprobs), generator=torch.Generator().manual_seed(1))
    policy = model.load_network("policy", folder, torch.float32, checkpointing)
    logprobs, entropy = policy(packing.make_pack(batch, order, "cpu"), temperature)
    places = np.concatenate([np.arange(len(weights))[tiny_models.place(batch, i)] for i in order])
    (logprobs * weights[places]).sum().backward()

    plain = tiny_models.plain_policy(folder)
    pairs = [
        tiny_models.plain_logprobs(plain, samples[i].prompt_ids, samples[i].response_ids, temperature)
        for i in order
    ]
    plain_logprobs, plain_entropy = (torch.cat(column) for column in zip(*pairs))
    (plain_logprobs * weights[places]).sum().backward()
    torch.testing.assert_close(logprobs, plain_logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, plain_entropy.detach(), atol=2e-5, rtol=1e-5)
    assert_same_gradients(gradients(policy), gradients(plain))


def test_packed_critic_equals_one_sequence_at_a_time(folder):
    """Fails if a value is read one token late, as the value after the action that it should judge."""
    samples, batch = random_batch()
    critic = model.load_network("critic", folder, torch.float32, seed=3)
    order = [2, 6, 0, 3, 5, 7, 4, 1]
    values = critic(packing.make_pack(batch, order, "cpu"))
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    (values * weights).sum().backward()

    plain = tiny_models.PlainCritic(folder, critic.value_head.weight.data)
    plain_values = torch.cat([plain(samples[i].prompt_ids, samples[i].response_ids) for i in order])
    (plain_values * weights).sum().backward()
    torch.testing.assert_close(values, plain_values, atol=2e-5, rtol=1e-5)
    assert_same_gradients(gradients(critic), gradients(plain))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_without_all_logits(bias, temperature, monkeypatch):
    """[N, V] logits for 55,000 tokens of Qwen's vocabulary take 33 GB; computing them in chunks must change no value
    or gradient."""
    # With hidden_size < chunk, Wᵀ is smaller than a chunk.
    num_tokens, hidden_size, vocabulary, chunk = 37, 4, 97, 5
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size)
    weight, offset = torch.randn(vocabulary, hidden_size), torch.randn(vocabulary) if bias else None
    targets, upstream = torch.randint(vocabulary, (num_tokens,)), torch.randn(num_tokens)

    def run(function):
        leaves = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, offset)]
        logprobs, entropy = function(*leaves)
        (logprobs * upstream).sum().backward()
        return [logprobs.detach(), entropy.detach()] + [x.grad for x in leaves if x is not None]

    def plain(h, w, b):
        table = (torch.nn.functional.linear(h, w, b) / temperature).log_softmax(-1)
        return table.gather(-1, targets[:, None]).squeeze(-1), -(table.exp() * table).sum(-1)

    def ours(h, w, b):
        head = model.LogprobHead(hidden_size, vocabulary, bias=bias)
        parameters = {"weight": w} | ({"bias": b} if bias else {})
        return torch.func.functional_call(head, parameters, (h, targets, temperature))

    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if torch.is_tensor(result) and result.shape[-1:] == (vocabulary,):
                largest = max(largest, result.numel())
            return result

    expected, whole = run(plain), run(ours)
    monkeypatch.setattr(model, "MAX_LOGITS", chunk * vocabulary)
    with Watch():
        chunked = run(ours)
    assert largest == chunk * vocabulary  # whole chunks of logits were made, and nothing larger
    for a, b, c in zip(expected, whole, chunked):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(c, a, atol=1e-5, rtol=1e-5)


def test_empty_pack_adds_exactly_nothing_to_any_gradient(folder):
    """Fails if a rank without work adds 0 · NaN or 0 / 0 to the others' update."""
    _, batch = random_batch()
    for network in (
        model.load_network("policy", folder, torch.float32),
        model.load_network("critic", folder, torch.float32),
    ):
        out = network(packing.make_pack(batch, [], "cpu"))
        out = out[0] if isinstance(out, tuple) else out
        assert out.shape == (0,)
        out.sum().backward()
        assert all((g == 0).all() for g in gradients(network).values())


def test_policy_folder_round_trip(folder, tmp_path):
    """Fails if a name or a tied head is lost on saving: everybody who loads the exported policy must get the trained
    one."""
    policy = model.load_network("policy", folder, torch.float32)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    weights = {name.removeprefix("hf."): tensor for name, tensor in policy.named_parameters()}
    model.save_pretrained(policy, weights, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    again = model.load_network("policy", str(tmp_path), torch.float32)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, plain.get_parameter(name.removeprefix("hf."))), name
    samples, batch = random_batch()
    ours = policy(packing.make_pack(batch, [0, 4], "cpu"))[0]
    theirs = [
        tiny_models.plain_logprobs(plain, samples[i].prompt_ids, samples[i].response_ids)[0] for i in (0, 4)
    ]
    torch.testing.assert_close(ours, torch.cat(theirs), atol=2e-5, rtol=1e-5)


def test_critic_folder_round_trip(folder, tmp_path):
    """Fails if a saved critic is loaded with a fresh value head."""
    critic = model.load_network("critic", folder, torch.float32, seed=1)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.01)
    model.save_pretrained(critic, dict(critic.named_parameters()), tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {
        "model",
        "value_head",
    } and "value_head.weight" in names
    again = model.load_network("critic", str(tmp_path), torch.float32, seed=2)
    plain = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in critic.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        if name.startswith("model."):
            assert torch.equal(parameter, plain.get_parameter(name.removeprefix("model."))), name


def test_fresh_value_head_is_seeded(folder):
    """Fails if a fresh head differs between ranks or runs, so that training cannot be repeated."""
    heads = [
        model.load_network("critic", folder, torch.float32, seed=seed).value_head.weight for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(1 / (heads[0].shape[1] + 1), rel=0.3)


def test_code_in_a_model_folder(tmp_path, monkeypatch):
    """Fails if a model's own Python code runs only because somebody named the model."""
    monkeypatch.setenv("REMOTE_CODE_RAN", str(tmp_path / "ran"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    samples, batch = random_batch()
    pack = packing.make_pack(batch, [0, 4], "cpu")
    path = tiny_models.make_model(tmp_path / "model", LlamaConfig)
    expected = model.load_network("policy", path, torch.float32)(pack)[0]
    tiny_models.bring_code(tmp_path / "model")
    for kind in ("policy", "critic"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            model.load_network(kind, path, torch.float32)
        with pytest.raises(ValueError, match="trust_remote_code"):
            model.plain_buffers(kind, path, torch.float32)
    assert not (tmp_path / "ran").exists()
    policy = model.load_network("policy", path, torch.float32, trust=True)
    assert type(policy.hf).__name__ == "MineForCausalLM" and (tmp_path / "ran").exists()
    assert torch.equal(policy(pack)[0], expected)
    model.check_buffers(policy, model.plain_buffers("policy", path, torch.float32, trust=True), path)


def test_options_of_both_torch_versions():
    """torch 2.11's varlen_attn has no enable_gqa; torch 2.13's refuses grouped heads without it."""

    def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        pass

    assert model.varlen_options(torch_2_11, 0.5, True, None) == {"scale": 0.5, "window_size": (-1, 0)}
    installed = {"scale": 0.5, "window_size": (4, 0), "enable_gqa": True}
    assert model.varlen_options(varlen_attn, 0.5, True, 5) == installed
    assert model.varlen_options(varlen_attn, 0.5, False, 5) == installed | {"enable_gqa": False}
    # The installed torch has all of these options.
    inspect.signature(varlen_attn).bind(*"qkvabcd", **installed)
