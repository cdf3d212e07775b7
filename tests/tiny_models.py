"""Small random models and a tokenizer, written into a test's folder; transformers' own forward, to compare with."""

import json

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

torch.set_num_threads(1)  # threads that wait for each other make networks of this size fifty times slower

CHARACTERS = [chr(i) for i in range(32, 127)] + ["\n"]
END, OTHER_END = len(CHARACTERS), len(CHARACTERS) + 1  # two end tokens, as chat models have them
VOCABULARY = len(CHARACTERS) + 2


def make_model(
    path,
    kind=Qwen2Config,
    tie=False,
    heads=4,
    kv_heads=2,
    hidden=64,
    dtype=torch.float32,
    padding=0,
    **settings,
):
    """Write a Hugging Face folder: a model whose random weights are large enough that log-probs differ, and a
    tokenizer of single characters, which has no pad token and does not know the last `padding` ids."""
    config = kind(
        vocab_size=VOCABULARY + padding,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=END,
        **settings,
    )
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    for name, parameter in hf.named_parameters():
        if "bias" in name or "norm" in name:  # these are initialised to constants, which would hide an error
            parameter.data += torch.randn_like(parameter) / 10
    hf.to(dtype).save_pretrained(path)
    vocabulary = {c: i for i, c in enumerate(CHARACTERS)} | {"<end>": END, "<other end>": OTHER_END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    with open(f"{path}/generation_config.json", "w") as f:
        json.dump({"eos_token_id": [END, OTHER_END], "do_sample": True, "temperature": 0.5, "top_k": 2}, f)
    return str(path)


KINDS = {
    "qwen2": dict(),
    "qwen2 tied": dict(tie=True),
    "qwen2 sliding window": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "llama": dict(kind=LlamaConfig, kv_heads=4),
    "llama tied, grouped-query": dict(kind=LlamaConfig, kv_heads=1, tie=True, attention_bias=True),
}


# ---- The plain forward: transformers, one sequence at a time, every logit at once -------------------------------


def plain_policy(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=dtype)


def plain_logprobs(hf, prompt_ids, response_ids, temperature=1.0):
    """log π(a_t|s_t) and entropy for one response, by log_softmax over all logits."""
    ids = torch.tensor([*prompt_ids, *response_ids])
    logits = hf(input_ids=ids[None]).logits[0, len(prompt_ids) - 1 : -1].float() / temperature
    table = logits.log_softmax(-1)  # [N, V]
    chosen = table.gather(-1, ids[len(prompt_ids) :, None]).squeeze(-1)
    return chosen, -(table.exp() * table).sum(-1)


class PlainCritic(torch.nn.Module):
    """A value for every response token; the parameters are named as in a critic's folder."""

    def __init__(self, path, head):
        super().__init__()
        self.model = AutoModel.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
        self.value_head = torch.nn.Linear(head.shape[1], 1, bias=False)
        self.value_head.weight.data.copy_(head)

    def forward(self, prompt_ids, response_ids):
        ids = torch.tensor([*prompt_ids, *response_ids])
        hidden = self.model(input_ids=ids[None]).last_hidden_state[0]
        return self.value_head(hidden[len(prompt_ids) - 1 : -1]).squeeze(-1)


CONFIG_CODE = """
import os
from transformers import LlamaConfig

open(os.environ.get("REMOTE_CODE_RAN", os.devnull), "a").write("ran")


class MineConfig(LlamaConfig):
    model_type = "mine"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_mine import MineConfig


class MineModel(LlamaModel):
    config_class = MineConfig


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def place(batch, i):
    """The slice of response i in the batch's arrays over response tokens."""
    return slice(batch.response_starts[i], batch.response_starts[i] + batch.response_lens[i])


def bring_code(path):
    """Turn a Llama folder into one of an architecture that only the folder's own Python files know."""
    (path / "configuration_mine.py").write_text(CONFIG_CODE)
    (path / "modeling_mine.py").write_text(MODEL_CODE)
    classes = {"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "modeling_mine.MineModel"}
    classes["AutoModelForCausalLM"] = "modeling_mine.MineForCausalLM"
    config = json.loads((path / "config.json").read_text())
    # `architectures` keeps its old name, under which vLLM knows this architecture.
    (path / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": classes}))
