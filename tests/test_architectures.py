"""Every architecture in one table: a small random model makes three updates, is synced, and sampler and learner agree.

Each runs in a process of its own, as a rank does (tests/ranks.py): a vLLM engine beside a Learner. REFUSED has
architectures that are not supported.
"""

import pytest
import ranks
import tiny_models
import transformers

from configs.load import UserError
from data.load import read_tasks

pytestmark = pytest.mark.soak

ROPE_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
WINDOW = {"sliding_window": 8}  # tokens; prompts and responses are longer

# name → (transformers' config class, settings of tiny_models.make_model)
CASES = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie": True}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": ("LlamaConfig", {"rope_parameters": ROPE_LINEAR}),
    "llama, llama3 rope": ("LlamaConfig", {"rope_parameters": ROPE_LLAMA3}),
    # Half of the ids that it samples are no tokens.
    "llama, padded vocabulary": ("LlamaConfig", {"padding": 100}),
    "qwen2, tied": ("Qwen2Config", {"tie": True}),
    "qwen2, window": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 0} | WINDOW),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3, tied": ("Qwen3Config", {"head_dim": 32, "tie": True}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "mistral, window": ("MistralConfig", {"head_dim": 32} | WINDOW),
    "gemma, tied": ("GemmaConfig", {"head_dim": 32, "tie": True}),
    "gemma2, tied, no soft caps": (
        "Gemma2Config",
        {"head_dim": 32, "tie": True, "query_pre_attn_scalar": 32} | NO_CAPS | WINDOW,
    ),
    "gemma3, tied": ("Gemma3TextConfig", {"head_dim": 32, "tie": True, "query_pre_attn_scalar": 32} | WINDOW),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {"pad_token_id": None}),
    "olmo": ("OlmoConfig", {"pad_token_id": None}),
    "olmo2": ("Olmo2Config", {"pad_token_id": None}),
}
# name → (config class, settings, what the refusal must name); data/models.py refuses them before anything is loaded
REFUSED = {
    "gemma2, soft caps": ("Gemma2Config", {"head_dim": 32, "tie": True}, "caps attention scores or logits"),
    "granite, scaled logits": ("GraniteConfig", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
}


def train_and_sync(path):
    """Drift before training, after training without a sync, and after a sync, as (largest, mean)."""
    import test_rollout

    return test_rollout.in_sync(*test_rollout.start(path))


@pytest.mark.parametrize("name", CASES)
def test_sampler_and_learner_agree(name, tmp_path):
    """Fails if the log-probs of vLLM and of the Learner differ, before training or after a sync."""
    kind, settings = CASES[name]
    path = tiny_models.make_model(tmp_path / "model", getattr(transformers, kind), hidden=128, **settings)
    (drifts,) = ranks.run_ranks("test_architectures", "train_and_sync", 1, tmp_path, path=path)
    assert drifts["before"][0] < 1e-4, drifts
    assert drifts["stale"][1] > 1e-2, drifts  # the updates did change the policy
    assert drifts["synced"][0] < 1e-4, drifts


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name, tmp_path):
    """Fails if an unsupported architecture is accepted: a learner without a soft cap would train another policy than
    the one that samples, and in bf16 the difference could stay below the drift limit."""
    kind, settings, words = REFUSED[name]
    path = tiny_models.make_model(tmp_path / "model", getattr(transformers, kind), hidden=128, **settings)
    with pytest.raises(UserError, match=words):
        read_tasks(ranks.settings(model=path), {}, None)
