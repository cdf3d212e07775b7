"""The networks: a packed policy (token log-probs, entropy) and a packed critic (token values).

In:   a pack, i.e. several samples laid end to end without padding; those of one question share its prompt.
Out:  one number per response token: log π(a_t|s_t) and the entropy of π(·|s_t), or V(s_t).

    input_ids   p p r r r r r r p p p r r     [T]  samples a and b of one question, c of another: prompts p, responses r
                a         b     c
    sample      its queries: tokens it adds    key_index: all its tokens     state_index: s_t ends here
    a           0 1 2 3 4                      0 1 2 3 4                      1 2 3
    b           5 6 7                          0 1 5 6 7                      1 5 6
    c           8 9 10 11 12                   8 9 10 11 12                   10 11

Both are Hugging Face models (any architecture with a plain linear head) whose attention sees one sample at a time and
whose vocabulary projection is never materialised as [N, V]. This file knows nothing of PPO, Ray or vLLM.

Shapes: T tokens of a pack, N response tokens of it, B samples, K the sum of their lengths and L the longest of them,
        H hidden, V vocabulary, A attention heads, D size of one head.
"""

import inspect
import json
import os
import re

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data.models import VALUE_HEAD, auto_class, dropout_settings, is_token_id, network_without_memory

# How many logits are held at once. 2^28 fp32 numbers are 1 GiB: 1,766 tokens of a 151,936-word vocabulary.
MAX_LOGITS = 2**28


# Arguments that transformers passes to the attention of some architectures and that change its scores.
NOT_PLAIN = ("softcap", "s_aux", "position_bias", "score_mod")


def packed_attention(
    module, query, key, value, attention_mask, scaling, pack, sliding_window=None, **options
):
    """Causal attention inside each sample of a pack, in the signature that transformers calls.

    query [1, A, T, D], key and value [1, A_kv, T, D]; returns [1, T, A, D] and no weights. A sample's last query stands at
    its last key. Raises ValueError for an attention that is more than softmax(q·k) v.
    """
    if not getattr(module, "is_causal", True):
        raise ValueError("this architecture's attention sees later tokens, too: it cannot be trained here")
    for name in NOT_PLAIN:
        if options.get(name) is not None:
            raise ValueError(f"this architecture gives {name} to its attention: it cannot be trained here")
    query = query[0].transpose(0, 1)  # [T, A, D]
    key = key[0].transpose(0, 1)  # [T, A_kv, D]
    value = value[0].transpose(0, 1)  # [T, A_kv, D]
    key_index = pack["key_index"]
    key, value = key[key_index], value[key_index]  # [K, A_kv, D]
    is_grouped = key.shape[1] != query.shape[1]  # several query heads share a key head
    if query.is_cuda and query.dtype != torch.float32:
        out = flash_attention(query, key, value, scaling, pack, is_grouped, sliding_window)
    else:  # FlashAttention takes neither CPU tensors nor fp32.
        out = padded_attention(query, key, value, scaling, pack, is_grouped, sliding_window)
    return out[None], None


def flash_attention(query, key, value, scaling, pack, is_grouped, sliding_window):
    """query [T, A, D], key and value [K, A_kv, D] → [T, A, D], by torch's FlashAttention over cumulative lengths."""
    from torch.nn.attention.varlen import varlen_attn

    options = varlen_options(varlen_attn, scaling, is_grouped, sliding_window)
    cu_seqlens_q, cu_seqlens_k = pack["cu_seqlens_q"], pack["cu_seqlens_k"]
    longest = pack["max_seqlen"]
    return varlen_attn(query, key, value, cu_seqlens_q, cu_seqlens_k, longest, longest, **options)


def varlen_options(varlen_attn, scaling, is_grouped, sliding_window):
    """Keyword arguments of torch's `varlen_attn`, by which it computes what packed_attention's docstring says.

    `enable_gqa` is left out where the function does not have it: torch 2.11 takes grouped heads as they are, torch 2.13
    refuses them without it.
    """
    # How many tokens a query sees to its left and to its right. varlen_attn, too, puts the last query at the last key.
    num_left = sliding_window - 1 if sliding_window else -1
    options = {"scale": scaling, "window_size": (num_left, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = is_grouped
    return options


def padded_attention(query, key, value, scaling, pack, is_grouped, sliding_window):
    """As flash_attention, with samples padded on the right, where a causal query never looks."""
    longest = pack["max_seqlen"]  # L
    places = torch.arange(longest, device=query.device)  # [L]
    num_queries = pack["cu_seqlens_q"].diff()[:, None]  # [B, 1]
    num_keys = pack["cu_seqlens_k"].diff()[:, None]  # [B, 1]
    newest_key = places + num_keys - num_queries  # [B, L]: the last key that a query sees
    newest_key = newest_key.clamp(max=longest - 1)
    newest_key = newest_key[..., None]  # [B, L, 1]
    oldest_key = newest_key - (sliding_window or longest) + 1
    mask = (places >= oldest_key) & (places <= newest_key)  # [B, L, L]
    is_query, is_key = places < num_queries, places < num_keys  # [B, L] each
    query = pad(query, is_query)  # [B, A, L, D]
    key = pad(key, is_key)  # [B, A_kv, L, D]
    value = pad(value, is_key)  # [B, A_kv, L, D]
    out = F.scaled_dot_product_attention(
        query, key, value, mask[:, None], scale=scaling, enable_gqa=is_grouped
    )
    return out.transpose(1, 2)[is_query]  # [T, A, D]


def pad(packed, is_real):
    """packed [T, A, D], is_real [B, L] with T places that are true → [B, A, L, D], zeros elsewhere."""
    padded = packed.new_zeros(*is_real.shape, *packed.shape[1:])  # [B, L, A, D]
    # All samples at once: pad_sequence writes row by row, and its backward pass copies everything for each row.
    padded[is_real] = packed
    return padded.transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


def token_logprobs(hidden, targets, weight, bias, temperature):
    """log softmax(h Wᵀ + b)[target] and the entropy: hidden [C, H], weight [V, H], targets [C] → both fp32 [C]."""
    logits = F.linear(hidden, weight, bias).float()  # [C, V]
    if temperature != 1:  # At 1 a division would only copy the largest tensor there is.
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)  # [C, V]
    with torch.no_grad():  # The entropy is reported, not optimised.
        entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)  # [C]: H = −Σ p log p
    target_logprobs = logprobs.gather(-1, targets[:, None])  # [C, 1]
    return target_logprobs.squeeze(-1), entropy


class LogprobHead(nn.Linear):
    """The vocabulary projection that goes straight to log-probs, a chunk of tokens at a time.

    The backward pass computes the logits of all chunks but the last again, so that memory is that of one chunk. This is
    one module, so that ZeRO-3 gathers its weight once.
    """

    def forward(self, hidden, targets, temperature):
        """hidden [N, H], targets [N] → log-probs and entropy, both fp32 [N]."""
        chunk_size = max(1, MAX_LOGITS // len(self.weight))
        chunks = list(zip(hidden.split(chunk_size), targets.split(chunk_size)))
        rest = (self.weight, self.bias, temperature)
        results = []
        for chunk in chunks[:-1]:
            results.append(checkpoint(token_logprobs, *chunk, *rest, use_reentrant=False))
        # The backward pass begins with the last chunk: computing its logits twice would save no memory.
        last_result = token_logprobs(*chunks[-1], *rest)
        results.append(last_result)
        logprobs, entropies = zip(*results)
        return torch.cat(logprobs), torch.cat(entropies)


class Policy(nn.Module):
    """π: a Hugging Face causal language model read at the response tokens of a pack."""

    def __init__(self, hf):
        super().__init__()
        self.hf = hf
        hf.get_output_embeddings().__class__ = LogprobHead  # same weights, tied or not, same name

    def forward(self, pack, temperature=1.0):
        """Returns log π(a_t|s_t) and the entropy of π(·|s_t) at this temperature, both fp32 [N]."""
        hidden = hidden_states(self.hf.base_model, pack)  # [N, H]
        return self.hf.get_output_embeddings()(hidden, pack["targets"], temperature)


class Critic(nn.Module):
    """V: a Hugging Face backbone with its own weights and a linear value head without bias (ORZ's layout)."""

    def __init__(self, model, seed):
        super().__init__()
        self.model = model
        hidden_size = model.config.hidden_size
        self.value_head = nn.Linear(hidden_size, 1, bias=False, dtype=model.dtype)
        generator = torch.Generator().manual_seed(seed)
        std = 1 / (hidden_size + 1)  # as in OpenRLHF and ORZ
        nn.init.normal_(self.value_head.weight, std=std, generator=generator)

    def forward(self, pack):
        """Returns V(s_t), fp32 [N]."""
        hidden = hidden_states(self.model, pack)  # [N, H]
        return self.value_head(hidden).squeeze(-1).float()


def hidden_states(backbone, pack):
    """The last hidden states at `state_index`, [N, H]: the head runs on response tokens only."""
    input_ids = pack["input_ids"][None]  # [1, T]
    position_ids = pack["position_ids"][None]  # [1, T]
    out = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False, pack=pack)
    return out.last_hidden_state[0][pack["state_index"]]  # [N, H]


# ---- Hugging Face in and out -------------------------------------------------------------------------------------


def load_network(kind, path, dtype, gradient_checkpointing=False, seed=0, trust=False):
    """Load a Policy, or a Critic if `kind` is "critic": from a base model (new value head) or a saved critic (its own).

    Python code in the folder is run only with `trust`; without it a model that needs such code raises ValueError. So does
    a folder that has no tensor for a parameter.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    for name in dropout_settings(config):
        setattr(config, name, 0.0)  # data/models.py has told the user.
    hf, loading = auto_class(kind).from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation="packed",
        trust_remote_code=trust,
        generation_config=token_ids(path),
        output_loading_info=True,
    )
    if loading["missing_keys"]:
        raise ValueError(f"{path}: has no tensors for {sorted(loading['missing_keys'])[:9]}")
    # Where vLLM has no implementation of its own, it patches transformers' class to be compiled. This model must not be.
    hf.base_model.do_not_compile = True
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    hf.train()  # transformers checkpoints activations only in training mode; dropout is 0
    if kind != "critic":
        return Policy(hf)
    critic = Critic(hf, seed)
    for tensors in weight_files(path):
        if VALUE_HEAD in tensors.keys():
            # ORZ published a head of the shape [8, H / 8].
            critic.value_head.weight.data.copy_(tensors.get_tensor(VALUE_HEAD).reshape(1, -1))
    return critic


def token_ids(path):
    """The token ids of a folder's config.json and generation_config.json, as a GenerationConfig without anything else.

    The other fields are sampling defaults. An exported policy must not keep them: a vLLM server would cut every answer at
    the base model's max_new_tokens, and transformers refuses to save some of the values that hub models have.
    """
    named = {}
    for name in ("config.json", "generation_config.json"):
        file = os.path.join(path, name)
        if os.path.exists(file):
            with open(file, encoding="utf-8") as content:
                named |= json.load(content)
    kept = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = named.get(name)
        if is_token_id(ids) or isinstance(ids, list):
            kept[name] = ids
    return GenerationConfig(**kept)


def weight_files(path):
    """Yield every safetensors file of a model folder, open for reading."""
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(path, name), framework="pt") as tensors:
                yield tensors


def plain_buffers(kind, path, dtype, trust=False):
    """The floating buffers of the model as plain `from_pretrained` would load it: {name: tensor}, on the CPU.

    Call it where no HfDeepSpeedConfig exists, because DeepSpeed would round these buffers, too.
    """
    hf = network_without_memory(kind, path, dtype, trust)
    buffers = floating_buffers(hf)
    # Persistent buffers are read from the weight files, where their names may have another prefix.
    prefix = f"{hf.base_model_prefix}."
    saved_names = set(hf.state_dict())
    persistent = {}  # name without the prefix → name
    for name in buffers:
        if name in saved_names:
            persistent[name.removeprefix(prefix)] = name
    for tensors in weight_files(path) if persistent else []:
        for key in tensors.keys():
            name = persistent.get(key.removeprefix(prefix))
            if name is not None:
                dtype = torch.float32 if stays_in_fp32(hf, name) else buffers[name].dtype
                buffers[name] = tensors.get_tensor(key).to(dtype)
    return buffers


def stays_in_fp32(hf, name):
    """Whether the model's class lists this tensor's name among those that stay in fp32, whatever the model's dtype is."""
    patterns = hf._keep_in_fp32_modules_strict or ()
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def floating_buffers(hf):
    """{name: buffer} of all floating buffers."""
    return {name: buffer for name, buffer in hf.named_buffers() if buffer.is_floating_point()}


def names_in_fp32(buffers):
    """The names of those of plain_buffers that are in fp32 whatever the model's dtype is, such as `inv_freq`."""
    return [name for name, buffer in buffers.items() if buffer.dtype == torch.float32]


def check_buffers(network, expected, path):
    """Raises ValueError unless every floating buffer of the network is the `expected` one of plain_buffers, to the bit.

    A buffer that differs, such as a rotary embedding's frequencies rounded to bf16, makes the learner another network than
    the one that vLLM samples from, and nothing else would report it.
    """
    loaded = floating_buffers(inner_model(network))
    for name in sorted(expected.keys() | loaded.keys()):
        if name not in expected or name not in loaded:
            where = "plain transformers" if name in expected else "the learner"
            raise ValueError(f"{path}: only {where} has the buffer {name}: this model cannot be trained here")
        buffer, plain = loaded[name].cpu(), expected[name]
        difference = None
        if buffer.dtype != plain.dtype:
            difference = f"{buffer.dtype} instead of {plain.dtype}"
        elif not torch.equal(buffer, plain):
            difference = "other values"
        if difference:
            raise ValueError(
                f"{path}: the learner's buffer {name} has {difference}, compared with plain transformers: "
                "its log-probs would differ from vLLM's, so this model cannot be trained here"
            )


def inner_model(network):
    """The Hugging Face model inside a Policy or a Critic."""
    return network.hf if isinstance(network, Policy) else network.model


def save_pretrained(network, state_dict, folder):
    """Write `state_dict` (Hugging Face name → whole tensor) as a folder of safetensors."""
    inner_model(network).save_pretrained(folder, state_dict=state_dict)
