"""Model folders that cannot be trained are refused before Ray starts, in one line that names the folder and the way out."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ranks
import test_model
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

import model
import packing
from configs.load import ROOT, UserError
from data.load import read_tasks
from data.models import INDEX, VALUE_HEAD, check_config, dropout_settings, local_model

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 3270744\n"


def demo_folder(path):
    """A copy of the demo's model, without its data."""
    shutil.copytree(ROOT / "data/tiny", path, ignore=shutil.ignore_patterns("*.jsonl"))
    return path


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_critic(folder, name=VALUE_HEAD, shape=(1, 128)):
    """Turn a policy's folder into a critic's, with a value head of this name and shape."""
    head = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)

    def edit(tensors):
        tensors.pop("lm_head.weight")
        tensors[name] = head

    edit_tensors(folder, edit)


def judge(policy=ROOT / "data/tiny", critic="", **settings):
    """What a run with these folders prints before Ray starts. Raises UserError if it is refused."""
    said = []
    cfg = ranks.settings(**{"max_prompt_tokens": 32, "max_response_tokens": 96} | settings)
    cfg.model = local_model(str(policy), "model")
    cfg.critic_model = local_model(str(critic), "critic_model") if critic else cfg.model
    read_tasks(cfg, {}, SimpleNamespace(say=said.append))
    return said


# ---- Folders that are refused --------------------------------------------------------------------------------------


def shorten(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def split(folder, weight_map):
    """Turn the weights into the first of two shards, and write an index with this weight_map unless it is None."""
    (folder / "model.safetensors").rename(folder / FIRST)
    if weight_map:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def edit_index(folder):
    (folder / INDEX).write_text("{}")


def rename_token(folder):
    text = (folder / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


# name → (what is done to a copy of the demo's model, what the refusal must name)
BROKEN = {
    "pointer to weights": (
        lambda f: (f / "model.safetensors").write_text(LFS_POINTER),
        "model.safetensors is a Git LFS pointer",
    ),
    "pointer to a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(LFS_POINTER),
        "tokenizer.json is a Git LFS pointer",
    ),
    "cut short": (
        lambda f: shorten(f, -1000),
        "model.safetensors is cut short, 3,269,744 of 3,270,744 bytes",
    ),
    "cut in the header": (lambda f: shorten(f, 100), "model.safetensors is not a whole safetensors file"),
    "empty": (lambda f: shorten(f, 0), "model.safetensors is not a whole safetensors file"),
    "a web page": (
        lambda f: (f / "model.safetensors").write_text("<!doctype html><html>Sign in</html>"),
        "model.safetensors is not a whole safetensors file",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "nor a folder with config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable as JSON"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "broken generation_config": (
        lambda f: (f / "generation_config.json").write_text('{"eos'),
        "generation_config.json is not readable as JSON",
    ),
    "end token no number": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "generation_config.json has eos_token_id='</s>'",
    ),
    "shards without an index": (lambda f: split(f, None), f"neither model.safetensors nor {INDEX}"),
    "missing shard": (lambda f: split(f, {"a": FIRST, "b": SECOND}), f"such as {SECOND}"),
    "shard of another model": (lambda f: split(f, {"a": FIRST}), f"{FIRST} lacks a"),
    "empty index": (lambda f: split(f, {"a": ""}) or edit_index(f), f"{INDEX} names no shards"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "holds no *.safetensors",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge it into its base model"),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda tensors: tensors.pop("model.norm.weight")),
        "no tensors for 1 of 55 parameters, such as model.norm.weight",
    ),
    "a critic as policy": (make_critic, "such as lm_head.weight"),
    "more layers than tensors": (
        lambda f: edit_config(f, num_hidden_layers=5, layer_types=None),
        "such as model.layers.4.",
    ),
    "another shape": (
        lambda f: edit_tensors(f, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)})),
        "model.norm.weight is [64] in model.safetensors, but [128] by config.json",
    ),
    "quantized tensors": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"model.norm.weight": torch.ones(128, dtype=torch.int8)})
        ),
        "model.norm.weight is quantized (I8)",
    ),
    "quantized": (
        lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}),
        "quantized (quantization_config)",
    ),
    "small vocabulary": (
        lambda f: edit_config(f, vocab_size=90),
        "ids up to 105, but the model has vocab_size=90",
    ),
    "short positions": (
        lambda f: edit_config(f, max_position_embeddings=127),
        "max_prompt_tokens=32 + max_response_tokens=96 = 128, but it has max_position_embeddings=127",
    ),
    "unknown architecture": (
        lambda f: edit_config(f, model_type="no_such"),
        "transformers cannot read its config.json",
    ),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "transformers cannot read its tokenizer",
    ),
    "heads that tensor parallel does not divide": (
        lambda f: edit_config(f, num_attention_heads=1, num_key_value_heads=1),
        "its 1 attention heads cannot be shared by tensor_parallel=2",
    ),
    "linear attention": (
        lambda f: edit_config(f, layer_types=["full_attention"] * 3 + ["linear_attention"]),
        "its layer_types hold linear_attention",
    ),
}
POLICY_ONLY = {"a critic as policy", "heads that tensor parallel does not divide"}


def refusal(**folders):
    with pytest.raises(UserError) as error:
        judge(tensor_parallel=2, **folders)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder_is_refused(case, tmp_path):
    """Fails if a broken folder is noticed only by an exception of some library after Ray has started, or trains random
    weights."""
    spoil, words = BROKEN[case]
    folder = demo_folder(tmp_path / "model")
    judge(policy=folder)  # accepted while it is whole; otherwise the refusal would prove nothing
    spoil(folder)
    message = refusal(policy=folder)
    assert words in message and message.startswith(f"model='{folder}': "), message


@pytest.mark.parametrize("case", BROKEN.keys() - POLICY_ONLY)
def test_the_critics_folder_is_judged_as_the_policys(case, tmp_path):
    """Fails if only the policy's folder is checked. The critic has no drift check, so it would train on whatever was
    loaded."""
    spoil, words = BROKEN[case]
    folder = demo_folder(tmp_path / "model")
    judge(critic=folder)
    spoil(folder)
    message = refusal(critic=folder)
    assert message.startswith(f"critic_model='{folder}': "), message
    # A critic's network has no output head, and no "model." before the names of the rest.
    words = words.replace("of 55 parameters, such as model.", "of 54 parameters, such as ")
    assert words.replace("such as model.", "such as ") in message, message


def test_critic_of_another_vocabulary(tmp_path):
    """Fails if a critic whose tokenizer numbers tokens differently is accepted: it would read other texts than the
    policy writes."""
    folder = demo_folder(tmp_path / "model")
    rename_token(folder)
    assert "token '1' is " in refusal(critic=folder)


def test_what_only_evaluation_needs(tmp_path):
    """Fails if evaluation alone refuses a model that vLLM can run but the learner cannot train, or if it checks no
    lengths."""
    folder = demo_folder(tmp_path / "model")
    edit_config(folder, layer_types=["full_attention"] * 3 + ["linear_attention"])
    judge(policy=folder, eval_only=True)
    assert "max_position_embeddings=512" in refusal_of_length(folder)


def refusal_of_length(folder):
    with pytest.raises(UserError) as error:
        judge(policy=folder, eval_only=True, max_response_tokens=600)
    return str(error.value)


# ---- Architectures, by their configuration alone ---------------------------------------------------------------------

# name of transformers' configuration class → (settings, what the refusal must name, or None if it is accepted)
STATE, EXPERTS = "carry a state from token to token", "a mixture of experts"
CONFIGS = {
    "Qwen3_5TextConfig": ({}, "layer_types hold linear_attention"),
    "Qwen3NextConfig": ({}, "layer_types hold linear_attention"),
    "Lfm2Config": ({"layer_types": ["conv", "full_attention"] * 16}, "layer_types hold conv"),
    "FalconH1Config": ({}, STATE),
    "GraniteMoeHybridConfig": ({}, "layer_types hold linear_attention"),
    "BambaConfig": ({}, STATE),
    "Mamba2Config": ({}, STATE),
    "RwkvConfig": ({}, STATE),
    "RecurrentGemmaConfig": ({"logits_soft_cap": 0.0}, STATE),
    "MiniMaxConfig": ({}, "layer_types hold linear_attention"),
    "GptOssConfig": ({}, f"{EXPERTS} (num_local_experts=128)"),
    "MixtralConfig": ({}, EXPERTS),
    "Qwen3MoeConfig": ({}, EXPERTS),
    "DbrxConfig": ({}, f"{EXPERTS} (moe_num_experts=4)"),
    "DeepseekV3Config": ({}, EXPERTS),
    "MiniCPM3Config": ({}, "latent attention (kv_lora_rank="),
    "Llama4TextConfig": ({}, "layer_types hold chunked_attention"),
    "Gemma2Config": ({}, "caps attention scores or logits (final_logit_softcapping=30.0)"),
    "Gemma3Config": ({}, "more than a text decoder (vision_config)"),
    "CohereConfig": ({}, "scales its logits (logit_scale=0.0625)"),
    "GraniteConfig": ({"logits_scaling": 8.0}, "scales its logits (logits_scaling=8.0)"),
    "BloomConfig": ({}, "an attention of its own"),
    "FalconConfig": ({}, "an attention of its own"),
    "GPTJConfig": ({}, "an attention of its own"),
    "NemotronConfig": ({}, "an attention of its own"),
    "BertConfig": ({}, "an encoder"),
    "BartConfig": ({}, "more than a text decoder (is_encoder_decoder)"),
    "LlamaConfig": ({}, None),
    "Qwen2Config": ({}, None),
    "Qwen3Config": ({}, None),
    "MistralConfig": ({}, None),
    "Gemma3TextConfig": ({}, None),
    "Phi3Config": ({}, None),
    "Olmo2Config": ({}, None),
    "GPTNeoXConfig": ({}, None),
    "SmolLM3Config": ({}, None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_by_configuration_alone(name):
    """Fails if an architecture is accepted whose learner would compute log-probs that differ from the sampler's by 0.1
    to 0.6 nats. In bf16 that may stay below the drift limit, and nothing measures it for a critic."""
    settings, words = CONFIGS[name]
    config = getattr(transformers, name)(**settings)
    if words is None:
        check_config(config, "model='m'")
        return
    with pytest.raises(UserError) as error:
        check_config(config, "model='m'")
    kind = name.removesuffix("Config")
    assert str(error.value).startswith(f"model='m': a {kind} model cannot be trained here: "), error.value
    assert words in str(error.value)


def test_attention_sinks_are_refused(tmp_path):
    """Fails if a model with attention sinks is accepted: the attention over packs leaves them out. No setting mentions
    them; only the names of parameters do."""
    path = tmp_path / "model"
    tiny_models.make_model(path, transformers.GraniteSWAConfig, pad_token_id=None)
    assert "it cannot be trained here: it has attention sinks (model.layers.0.self_attn.sinks)" in refusal(
        policy=path
    )
    with pytest.raises(ValueError, match="s_aux"):
        network = model.load_network("policy", str(path), torch.float32)
        _, batch = test_model.random_batch()
        network(packing.make_pack(batch, range(4), torch.device("cpu")))


# Architectures that are accepted, as the names of transformers' configuration classes without "Config".
ACCEPTED = """Apertus Arcee DiffLlama Ernie4_5 Exaone4 Gemma Gemma3Text Glm Glm4 GPT2 GPTBigCode GPTNeoX Granite Helium
    HunYuanDenseV1 HyperCLOVAX Jais2 Llama Ministral Mistral Olmo Olmo2 Olmo3 OPT Persimmon Phi Phi3 Qwen2 Qwen3 SeedOss
    SmolLM3 Starcoder2""".split()
# Architectures that are refused, with the settings that a small model of each needs.
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
DEEPSEEK |= {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
DEEPSEEK |= {"qk_nope_head_dim": 16, "v_head_dim": 32, "pad_token_id": None}
REFUSED = {
    "Qwen3_5TextConfig": LINEAR
    | {"layer_types": ["linear_attention", "full_attention"], "pad_token_id": None},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"], "pad_token_id": None},
    "GptOssConfig": MOE | {"head_dim": 32, "sliding_window": 128},
    "Llama4TextConfig": MOE | {"head_dim": 32, "attention_chunk_size": 8, "no_rope_layers": [1, 0]},
    "DeepseekV3Config": DEEPSEEK,
    "GraniteSWAConfig": {"pad_token_id": None},
}


def small_model(path, kind):
    """A small random model of an architecture, made with the first of these settings that its configuration
    accepts."""
    attempts = [{}, {"pad_token_id": None}, {"pad_token_id": 0, "head_dim": 32}]
    if kind is transformers.HeliumConfig:
        attempts = [{"head_dim": 32}]
    for settings in attempts:
        try:
            return tiny_models.make_model(path, kind, hidden=128, padding=1, **settings)
        except Exception as error:
            last_error = error
    raise last_error


@pytest.mark.soak
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_architectures_are_right(name, tmp_path):
    """Fails if an accepted architecture computes other log-probs in a pack. Each response in a pack is compared with
    transformers' own forward of its sample alone."""
    kind = getattr(transformers, f"{name}Config")
    path = small_model(tmp_path / "model", kind)
    judge(policy=path)
    samples, batch = test_model.random_batch()
    samples = [sample for sample in samples if len(sample.response_ids)]
    batch = packing.Batch(samples)
    pack = packing.make_pack(batch, range(len(samples)), torch.device("cpu"))
    plain = tiny_models.plain_policy(path).eval()
    with torch.no_grad():
        found = torch.zeros(len(batch.logprobs))
        found[pack["token_index"]] = model.load_network("policy", path, torch.float32)(pack)[0]
        rows = [tiny_models.plain_logprobs(plain, s.prompt_ids, s.response_ids)[0] for s in samples]
    assert (found - torch.cat(rows)).abs().mean() < 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("name", REFUSED)
def test_folders_of_other_architectures_are_refused(name, tmp_path):
    """Fails if an architecture is recognised only in memory: config.json on disk holds only the settings that differ
    from the defaults."""
    path = tmp_path / "model"
    tiny_models.make_model(path, getattr(transformers, name), hidden=128, padding=1, **REFUSED[name])
    assert "cannot be trained here" in refusal(policy=path)
    policy = tiny_models.make_model(tmp_path / "policy", transformers.LlamaConfig)
    message = refusal(policy=policy, critic=path)
    assert "critic_model=" in message and "cannot be trained here" in message


# ---- A critic's head -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 128), (8, 16), (128, 1)])
def test_a_saved_head_is_read(shape, tmp_path):
    """Fails if a head of another shape, such as ORZ's, ends the run; or if brackets in a folder's name are read as a
    pattern, so that the trained head is not found."""
    folder = demo_folder(tmp_path / "run[lr=1e-6] critic")
    make_critic(folder, shape=shape)
    said = judge(critic=folder)
    assert said == [] if shape == (1, 128) else f"{list(shape)} is read as [1, 128]" in said[0]
    head = model.load_network("critic", str(folder), torch.float32).value_head.weight
    assert head.tolist() == [list(range(128))]


@pytest.mark.parametrize("name", ["score.weight", "v_head.summary.weight"])
def test_a_head_by_another_name_is_said_to_be_left_out(name, tmp_path):
    """Other tools name the head differently. Fails if such a critic starts with a random head without a message."""
    folder = demo_folder(tmp_path / "critic")
    make_critic(folder, name=name)
    (said,) = judge(critic=folder)
    assert f"it has no {VALUE_HEAD}, so the critic's head starts fresh; not used: {name}" in said


def test_a_bias_of_the_head_is_said_to_be_left_out(tmp_path):
    """Fails if a critic that was trained with a bias loses it, so that its values are shifted, without a message."""
    folder = demo_folder(tmp_path / "critic")
    make_critic(folder)
    edit_tensors(folder, lambda tensors: tensors.update({"value_head.bias": torch.ones(1)}))
    (said,) = judge(critic=folder)
    assert said.endswith("; not used: value_head.bias")


def test_tensors_without_a_place_are_said(tmp_path):
    """Fails if config.json names fewer layers than the folder holds, and the smaller model is trained without a
    message."""
    folder = demo_folder(tmp_path / "model")
    edit_config(folder, num_hidden_layers=3)
    (said,) = judge(policy=folder)
    assert "tensors that the policy does not use: model.layers.3." in said and said.endswith(" more")


def test_a_file_that_cannot_be_read(tmp_path):
    """Fails if a dangling link ends in a traceback; the hub's cache has one where a download broke off."""
    folder = demo_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert "model.safetensors cannot be read: No such file" in refusal(policy=folder)


def test_a_base_model_as_critic_has_no_head_to_leave_out(tmp_path):
    """Fails if the message about a base model's fresh value head names the output head, as if a value head had been
    lost."""
    folder = demo_folder(tmp_path / "base")
    (said,) = judge(critic=folder)
    assert said.endswith("so the critic's head starts fresh")


def test_a_head_of_another_width_is_refused(tmp_path):
    folder = demo_folder(tmp_path / "critic")
    make_critic(folder, shape=(1, 64))
    assert f"{VALUE_HEAD} is [1, 64] in model.safetensors, but hidden_size is 128" in refusal(critic=folder)


# ---- generation_config.json ----------------------------------------------------------------------------------------

# What hub models have in it. transformers refuses to save some of it, and vLLM's server would take the rest as defaults.
GENERATION_CONFIGS = [
    {"eos_token_id": 0, "pad_token_id": -1},
    {"eos_token_id": 0, "num_beams": 1, "early_stopping": True, "length_penalty": 1.2},
    {"eos_token_id": [0, 5], "max_new_tokens": 2048, "do_sample": False},
    {
        "eos_token_id": 0,
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "repetition_penalty": 1.05,
    },
]


def export(folder, out):
    """Load the policy of a folder and save it again, as a run does when it ends."""
    network = model.load_network("policy", str(folder), torch.float32)
    tensors = {name.removeprefix("hf."): tensor for name, tensor in network.named_parameters()}
    model.save_pretrained(network, tensors, out)


@pytest.mark.parametrize("content", GENERATION_CONFIGS)
def test_an_export_keeps_the_token_ids_and_nothing_else(content, tmp_path):
    """Fails if a long run ends without its policy, because transformers refuses to save what it has read; or if the
    policy keeps a base model's max_new_tokens, so that a server cuts every long answer without an error."""
    folder = demo_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(content))
    judge(policy=folder)
    export(folder, tmp_path / "policy")
    found = json.loads((tmp_path / "policy/generation_config.json").read_text())
    assert found.pop("eos_token_id") == content["eos_token_id"]
    assert set(found) <= {"_from_model_config", "bos_token_id", "pad_token_id", "transformers_version"}


def test_token_ids_of_config_json(tmp_path):
    """Fails if an end token that only config.json names is lost in the export, whose generation_config.json takes
    precedence."""
    folder = demo_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"pad_token_id": 1}')
    export(folder, tmp_path / "policy")
    found = json.loads((tmp_path / "policy/generation_config.json").read_text())
    assert (found["eos_token_id"], found["pad_token_id"]) == (0, 1)


READ_BY_VLLM = """
import sys
from vllm.config import ModelConfig
print([ModelConfig(model=folder, dtype="float32").get_diff_sampling_param() for folder in sys.argv[1:]])
"""


@pytest.mark.soak
def test_vllm_reads_no_defaults_from_an_export(tmp_path):
    folder = demo_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIGS[2] | GENERATION_CONFIGS[3]))
    export(folder, tmp_path / "policy")
    command = [sys.executable, "-c", READ_BY_VLLM, str(folder), str(tmp_path / "policy")]
    environment = os.environ | ranks.ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    before, after = eval(done.stdout.splitlines()[-1])
    assert before["max_tokens"] == 2048 and after == {}


# ---- Dropout -------------------------------------------------------------------------------------------------------


def test_dropout_is_set_to_0_and_said(tmp_path):
    """Fails if dropout stays on: the learner's log-probs would differ from vLLM's at random, and the run would stop
    for a drift that nobody can explain."""
    path = tmp_path / "model"
    tiny_models.make_model(path, transformers.PhiConfig, resid_pdrop=0.1, embd_pdrop=0.2)
    (said, *_) = judge(policy=path)
    assert "its dropout is set to 0" in said and "resid_pdrop=0.1" in said and "embd_pdrop=0.2" in said
    network = model.load_network("policy", str(path), torch.float32)
    dropouts = [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and not any(dropouts)
    assert dropout_settings(network.hf.config) == {}
