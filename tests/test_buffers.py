"""A Learner's buffers have the dtype and the bits of plain transformers' ones: zero.Init would round them to bf16.

All that needs DeepSpeed runs in two starts, `loaded_buffers` and `learner_logprobs` of a long text; the tests check what
these return.
"""

from unittest import mock

import numpy as np
import pytest
import ranks
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, DeepseekV3Config, GemmaConfig, LlamaConfig

import model
import packing
import ppo

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
FAMILIES = {
    "qwen2": {},
    "llama with rope scaling": {"kind": LlamaConfig, "rope_parameters": ROPE_LLAMA3},
    "gemma": {"kind": GemmaConfig, "head_dim": 16},
}
KINDS = ("policy", "critic", "reference")
DTYPES = (torch.bfloat16, torch.float32)
NUM_POSITIONS = 4096

# This model's e_score_correction_bias is a buffer in the checkpoint, which its class keeps in fp32. (It is only loaded:
# mixtures of experts are not trained here.)
PERSISTENT = {
    "kind": DeepseekV3Config,
    "kv_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


def read_buffers(hf):
    """Every floating-point buffer of a transformers model, and cos and sin of its rotary embedding at NUM_POSITIONS
    positions."""
    buffers = {
        name: buffer.cpu().clone() for name, buffer in hf.named_buffers() if buffer.is_floating_point()
    }
    # The rotary embedding takes only the dtype and the device from this tensor.
    hidden = torch.zeros(1, 1, 1, dtype=hf.dtype, device=next(hf.buffers()).device)
    positions = torch.arange(NUM_POSITIONS, device=hidden.device)[None]
    cos, sin = hf.base_model.rotary_emb(hidden, positions)  # [1, NUM_POSITIONS, D]
    return buffers | {"cos": cos.cpu(), "sin": sin.cpu()}


def loaded_buffers(paths, device="cpu", dtypes=DTYPES):
    """read_buffers of a Learner for each family, kind and dtype; and the error of a Learner for which zero.Init may
    round."""
    results, cfg, device = {}, ranks.settings(kl_coef=0.1), torch.device(device)
    for family, path in paths.items():
        for kind in KINDS:
            for dtype in dtypes:
                learner = ppo.Learner(kind, cfg, path, device, dtype)
                results[family, kind, dtype] = read_buffers(model.inner_model(learner.network))
    for kind in KINDS:
        with mock.patch.object(model, "names_in_fp32", lambda buffers: []):
            try:
                ppo.Learner(kind, cfg, paths["qwen2"], device, torch.bfloat16)
            except ValueError as error:
                results["rounded", kind] = str(error)
    return results


def plain_buffers(path, kind, dtype, device="cpu"):
    """read_buffers of the same model loaded by plain transformers."""
    auto = AutoModel if kind == "critic" else AutoModelForCausalLM
    return read_buffers(auto.from_pretrained(path, dtype=dtype).to(device))


def rounding_allowed():
    """A context in which zero.Init rounds every buffer, as before it was fixed, and the Learner does not check."""
    return mock.patch.multiple(model, names_in_fp32=lambda buffers: [], check_buffers=lambda *arguments: None)


def learner_logprobs(path, ids, device="cpu"):
    """log π of ids[1:] in one text, by a Learner in bf16, fp32 [len(ids) − 1]: as it is, and with rounding_allowed."""
    ppo.KEPT_WHOLE = 0  # every weight is partitioned over the ranks
    cfg = ranks.settings(max_response_tokens=len(ids), max_tokens_per_pack=len(ids))
    sample = packing.Sample(0, ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32), "", "stop")
    batch, idle_ranks = packing.Batch([sample]), torch.distributed.get_world_size() - 1
    plan = [[[0]]] + [[[]]] * idle_ranks
    learner = ppo.Learner("policy", cfg, path, torch.device(device), torch.bfloat16)
    learner.onload()
    mended = learner.forward(batch, plan)
    learner.offload()
    with rounding_allowed():
        learner = ppo.Learner("policy", cfg, path, torch.device(device), torch.bfloat16)
    learner.onload()
    return mended, learner.forward(batch, plan)


def plain_logprobs(path, ids, device="cpu"):
    """The same log-probs by plain transformers in bf16."""
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
    ids = torch.tensor(ids, device=device).long()
    with torch.no_grad():
        logits = hf(input_ids=ids[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1).cpu().numpy()


def early_and_late(logprobs, plain):
    """Mean |Δ log-prob| of positions 128 to 1,151, and of the last 1,024: wrong angles grow with the position."""
    difference = np.abs(logprobs - plain)
    return difference[128:1152].mean(), difference[-1024:].mean()


def make_long_text(folder):
    """A model whose log-probs depend on far tokens, and NUM_POSITIONS random tokens."""
    path = tiny_models.make_model(folder, hidden=256)  # heads of 64
    ids = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, NUM_POSITIONS).astype(np.int32)
    return path, ids


def assert_long_text_shows_rounding(logprobs, plain):
    """Measured: 0.022 and 0.026 between two kinds of attention; 0.13 and 0.58 with rounded angles."""
    mended, rounded = (early_and_late(each, plain) for each in logprobs)
    assert mended[1] <= 1.5 * mended[0] + 1e-3 and mended[1] < 0.05, mended
    assert rounded[1] > 3 * rounded[0], rounded


def assert_same(loaded, plain):
    assert loaded.keys() == plain.keys()
    for name, buffer in plain.items():
        assert loaded[name].dtype == buffer.dtype and torch.equal(loaded[name], buffer), name


def make_models(folder):
    """A model folder of each family, and one whose checkpoint holds a buffer, as {name: path}."""
    paths = {name: tiny_models.make_model(folder / name, **settings) for name, settings in FAMILIES.items()}
    paths["persistent"] = tiny_models.make_model(folder / "persistent", **PERSISTENT)
    weights = load_file(folder / "persistent/model.safetensors")
    (name,) = (name for name in weights if name.endswith("e_score_correction_bias"))
    weights[name] = 5 + torch.tensor([0.001, 0.002, 0.003, 0.004])  # all are 5 in bf16
    save_file(weights, folder / "persistent/model.safetensors", {"format": "pt"})
    return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def loaded(paths, tmp_path_factory):
    return ranks.run_ranks(
        "test_buffers", "loaded_buffers", 1, tmp_path_factory.mktemp("ranks"), paths=paths
    )[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, "persistent"])
def test_buffers_equal_plain_transformers(loaded, paths, family, kind, dtype):
    """zero.Init rounded inv_freq to bf16: the learners computed another network than vLLM, more so in long texts."""
    plain = plain_buffers(paths[family], kind, dtype)
    assert_same(loaded[family, kind, dtype], plain)
    assert any(name.endswith("inv_freq") and buffer.dtype == torch.float32 for name, buffer in plain.items())
    if family == "gemma":  # plain transformers itself rounds its embed_scale, so that the learner must, too
        (scale,) = (buffer for name, buffer in plain.items() if name.endswith("embed_scale"))
        assert scale.dtype == dtype
    if family == "persistent":  # the names in keep_in_fp32_modules replace those that the class asks for
        (bias,) = (buffer for name, buffer in plain.items() if name.endswith("e_score_correction_bias"))
        assert bias.dtype == torch.float32 and len(bias.unique()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_buffer_is_refused(loaded, kind):
    """Fails if a Learner accepts a buffer that zero.Init has rounded, as a later version may round another one."""
    assert "inv_freq has torch.bfloat16 instead of torch.float32" in loaded["rounded", kind]


@pytest.mark.parametrize("kind", KINDS)
def test_expected_buffers_of_a_checkpoint(paths, kind):
    """Fails if a buffer that is stored with the weights is compared with the zeros of a fresh model."""
    expected = model.plain_buffers(kind, paths["persistent"], torch.bfloat16)
    plain = plain_buffers(paths["persistent"], kind, torch.bfloat16)
    assert_same(expected, {name: plain[name] for name in plain if name not in ("cos", "sin")})


def test_expected_buffers_take_no_memory_for_weights(paths):
    """Fails if every rank reads the weights a second time, only to look at the buffers."""
    plain = AutoModelForCausalLM.from_pretrained(paths["gemma"], dtype=torch.bfloat16)
    with mock.patch.object(model, "weight_files", side_effect=AssertionError("the weights are read")):
        assert_same(
            model.plain_buffers("policy", paths["gemma"], torch.bfloat16),
            {name: buffer for name, buffer in plain.named_buffers()},
        )


def test_a_buffer_of_other_values_is_refused(paths):
    """Fails if the check looks at the dtype only, or at one kind of network."""
    for kind in KINDS:
        network = model.load_network(kind, paths["qwen2"], torch.float32)
        expected = model.plain_buffers(kind, paths["qwen2"], torch.float32)
        model.check_buffers(network, expected, paths["qwen2"])
        name, buffer = next(iter(model.inner_model(network).named_buffers()))
        buffer[3] = torch.nextafter(buffer[3], torch.tensor(2.0))
        with pytest.raises(ValueError, match=f"{name} has other values"):
            model.check_buffers(network, expected, paths["qwen2"])
        with pytest.raises(ValueError, match=f"only the learner has the buffer {name}"):
            model.check_buffers(network, {}, paths["qwen2"])


def test_long_text_in_bf16(tmp_path):
    """The difference between a Learner in bf16 on two ranks and plain transformers must not grow with the position."""
    path, ids = make_long_text(tmp_path / "model")
    logprobs, _ = ranks.run_ranks("test_buffers", "learner_logprobs", 2, tmp_path, path=path, ids=ids)
    assert_long_text_shows_rounding(logprobs, plain_logprobs(path, ids))
