"""The networks: a packed policy (token log-probs, entropy) and a packed critic (token values).

In:   a pack, i.e. several prompt+response sequences laid end to end without padding, and the positions to predict from.
Out:  one number per response token: log π(a_t|s_t) and the entropy of π(·|s_t), or V(s_t).

    input_ids   p p p r r r r | p p r r | p p p p r r r       [T]  three sequences, prompts p, responses r
    positions       ^ ^ ^ ^       ^ ^           ^ ^ ^         [N]  s_t ends here; the token after it is a_t

Both are Hugging Face models (any architecture with a plain linear head) whose attention sees one sequence at a
time and whose vocabulary projection is never materialised as [N, V]. This file knows nothing of PPO, Ray or vLLM.

Shapes: T tokens of a pack, N response tokens of it, B sequences, L longest of them, H hidden, V vocabulary,
        A attention heads, D size of one head.
"""

import glob
import os

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Logits held at once. 2^28 fp32 numbers are 1 GiB: 1,766 tokens of a 151,936-word vocabulary.
MAX_LOGITS = 2**28


def packed_attention(
    module, query, key, value, mask, scaling, cu_seqlens, max_seqlen, sliding_window=None, **_
):
    """Causal attention inside each sequence of a pack, in the signature that transformers calls.

    query [1, A, T, D], key and value [1, A_kv, T, D], cu_seqlens int32 [B + 1]; returns [1, T, A, D] and no weights.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, A, D]
    grouped = key.shape[1] != query.shape[1]
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn  # FlashAttention over cumulative lengths

        window = (
            -1 if sliding_window is None else sliding_window - 1,
            0,
        )  # tokens seen to the left, to the right
        spans = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return varlen_attn(query, key, value, *spans, scale=scaling, window_size=window, enable_gqa=grouped)[
            None
        ], None

    # CPU: pad on the right, where a causal query never looks, and drop the padding again.
    real = torch.arange(max_seqlen) < cu_seqlens.diff()[:, None]  # [B, L]

    def padded(x):
        out = x.new_zeros(*real.shape, *x.shape[1:])  # [B, L, A, D]
        out[real] = (
            x  # at once: pad_sequence writes a row at a time, and its backward copies everything for each
        )
        return out.transpose(1, 2)  # [B, A, L, D]

    query, key, value = padded(query), padded(key), padded(value)
    mask = None
    if sliding_window is not None and sliding_window < max_seqlen:
        mask = torch.ones(max_seqlen, max_seqlen, dtype=torch.bool).tril().triu(1 - sliding_window)  # [L, L]
    out = F.scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, is_causal=mask is None, enable_gqa=grouped
    )  # [B, A, L, D]
    return out.transpose(1, 2)[real][None], None  # [1, T, A, D]


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[target] and its entropy, a chunk of tokens at a time; backward computes the logits again.

    Memory is one chunk of logits instead of three copies of [N, V]. Sums and exponentials are in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        """hidden [N, H], weight [V, H], bias [V] or None, targets [N] → logprobs, entropy, both fp32 [N]."""
        logprobs, entropy, log_z = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(3))
        chunk = max(1, MAX_LOGITS // len(weight))
        for i in range(0, len(targets), chunk):
            span = slice(i, i + chunk)
            logits = F.linear(hidden[span], weight, bias).float() / temperature  # [C, V]
            log_z[span] = logits.logsumexp(-1)
            logprobs[span] = logits.gather(-1, targets[span, None]).squeeze(-1) - log_z[span]  # [C]
            probs = (logits - log_z[span, None]).exp_()
            entropy[span] = log_z[span] - probs.mul_(logits).sum(-1)  # H = log Z − Σ p·logit
        ctx.save_for_backward(hidden, weight, bias, targets, log_z)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)  # it is reported, not optimised
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        chunk = max(1, MAX_LOGITS // len(weight))
        for i in range(0, len(targets), chunk):
            span = slice(i, i + chunk)
            logits = F.linear(hidden[span], weight, bias).float() / ctx.temperature
            grad_logits = (logits - log_z[span, None]).exp_().neg_()  # −softmax                      [C, V]
            grad_logits.scatter_add_(-1, targets[span, None], torch.ones_like(grad_logits[:, :1]))  # + onehot
            grad_logits.mul_(grad[span, None] / ctx.temperature)
            if bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[span] = grad_logits @ weight  # [C, H]
            grad_weight += grad_logits.T @ hidden[span]  # [V, H]
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None


class LogprobHead(nn.Linear):
    """The vocabulary projection that goes straight to log-probs. One module, so that ZeRO-3 gathers it once."""

    def forward(self, hidden, targets, temperature):
        return TokenLogprobs.apply(hidden, self.weight, self.bias, targets, temperature)


class Policy(nn.Module):
    """π: a Hugging Face causal language model read at the response tokens of a pack."""

    def __init__(self, hf):
        super().__init__()
        self.hf = hf
        hf.get_output_embeddings().__class__ = LogprobHead  # same weights, tied or not, same name

    def forward(self, pack, temperature=1.0):
        """Returns log π(a_t|s_t) and the entropy of π(·|s_t) at this temperature, both fp32 [N]."""
        hidden = hidden_states(self.hf.base_model, pack)  # [N, H]
        return self.hf.get_output_embeddings()(hidden, pack["input_ids"][pack["positions"] + 1], temperature)


class Critic(nn.Module):
    """V: a Hugging Face backbone with its own weights and a linear value head without bias (ORZ's layout)."""

    def __init__(self, model, seed):
        super().__init__()
        self.model = model
        hidden_size = model.config.hidden_size
        self.value_head = nn.Linear(hidden_size, 1, bias=False, dtype=model.dtype)
        generator = torch.Generator().manual_seed(seed)
        initial = torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1)
        self.value_head.weight.data.copy_(initial)  # as OpenRLHF and ORZ: std 1 / (H + 1)

    def forward(self, pack):
        """Returns V(s_t), fp32 [N]."""
        return self.value_head(hidden_states(self.model, pack)).squeeze(-1).float()


def hidden_states(backbone, pack):
    """The last hidden states at `positions`, [N, H]: the head runs on response tokens only."""
    hidden = backbone(
        input_ids=pack["input_ids"][None],  # [1, T]
        position_ids=pack["position_ids"][None],
        cu_seqlens=pack["cu_seqlens"],
        max_seqlen=pack["max_seqlen"],
        use_cache=False,
    ).last_hidden_state[0]  # [T, H]
    return hidden[pack["positions"]]


# ---- Hugging Face in and out -------------------------------------------------------------------------------------


def load_policy(path, dtype, gradient_checkpointing=False):
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="packed")
    return Policy(checkpointed(hf, gradient_checkpointing))


def load_critic(path, dtype, gradient_checkpointing=False, seed=0):
    """A critic from a base model (fresh value head) or from a saved critic (its own head)."""
    model = AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="packed")
    critic = Critic(checkpointed(model, gradient_checkpointing), seed)
    for file in sorted(glob.glob(os.path.join(path, "*.safetensors"))):
        with safe_open(file, framework="pt") as tensors:
            if "value_head.weight" in tensors.keys():
                critic.value_head.weight.data.copy_(tensors.get_tensor("value_head.weight"))
    return critic


def checkpointed(hf, enabled):
    if enabled:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    # Where vLLM has no version of its own of an architecture, it patches transformers' class to compile: not ours.
    hf.base_model.do_not_compile = True
    hf.train()  # transformers checkpoints activations only in training mode; dropout is 0 in these models
    return hf


def save_pretrained(network, state_dict, folder):
    """Write `state_dict` (whole tensors, named as in `network`) as a Hugging Face folder of safetensors."""
    if isinstance(network, Policy):
        state_dict = {name.removeprefix("hf."): tensor for name, tensor in state_dict.items()}
        network.hf.generation_config.do_sample = (
            True  # else a temperature in it, as some models have, is refused
        )
        network.hf.save_pretrained(folder, state_dict=state_dict)
    else:
        network.model.save_pretrained(folder, state_dict=state_dict)
