"""Checks of model folders before a run starts; the same functions check the policy's folder and the critic's.

    local_model      a folder or a hub name → a folder whose files are whole: no Git LFS pointer, no missing shard, no adapter
    read_config      its config.json, as transformers reads it
    check_config     refuses a model that would compute other log-probs for a pack than for each sample alone
    check_vocabulary, check_length     the model has an embedding for each token id, and positions for the longest sequence
    check_weights    every parameter of the network has a tensor in the folder
    value_head       whether a critic's folder has a value head, and whether it fits

Each raises UserError: one line that says what is wrong with which folder, and what to do. local_model needs nothing but
Python (for a hub name also huggingface_hub); others import transformers, and check_weights builds a network whose parameters
take no memory.
"""

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

from configs.load import UserError, has_critic

# The files that are fetched of a model on the hub. *.j* stands for .json and for .jinja, the format of newer chat templates.
HUB_FILES = ["*.j*", "*.safetensors", "*.txt", "*.model", "*.py"]

INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.weight"
LFS_POINTER = b"version https://git-lfs"


class Tensor(NamedTuple):
    """What the header of a safetensors file says about a tensor."""

    file: str  # the name of the file that holds it
    shape: list
    dtype: str  # in the words of safetensors, such as "BF16"


# ---- Files -------------------------------------------------------------------------------------------------------


def local_model(name, setting):
    """The folder of a model: `name` itself, or the folder in this machine's cache to which a hub name is fetched.

    Raises UserError unless its files are whole; `setting` is the setting that gave the name.
    """
    is_hub_name = name.count("/") == 1 and name[0] not in "./"
    if is_hub_name and not os.path.isdir(name):
        from huggingface_hub import snapshot_download

        try:
            name = snapshot_download(name, allow_patterns=HUB_FILES)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{setting}={name!r}: it cannot be fetched from the hub: {reason}") from error
    place = f"{setting}={name!r}"
    try:
        check_files(name, place)
    except OSError as error:  # for example a broken link in the hub's cache, or a file of another user
        raise UserError(f"{place}: {error.filename} cannot be read: {error.strerror}") from None
    return name


def check_files(folder, place):
    """Raises UserError unless the folder holds a whole model. `place` says which setting named it."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in names:
        if is_lfs_pointer(f"{folder}/{name}"):
            raise UserError(f"{place}: {name} is a Git LFS pointer, not the file: run `git lfs pull` there")
    if "adapter_config.json" in names:
        way_out = "merge it into its base model first (peft: merge_and_unload, then save_pretrained)"
        raise UserError(
            f"{place}: is an adapter, which holds changes to a model and not the model: {way_out}"
        )
    holds_weights = any(name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf")) for name in names)
    if "config.json" not in names or not holds_weights:
        raise UserError(f"{place}: neither a hub name nor a folder with config.json and *.safetensors")
    for name in ("config.json", "generation_config.json"):
        if name in names:
            read_dict(folder, name, place)
    check_end_tokens(folder, place)
    read_tensors(folder, place)


def is_lfs_pointer(file):
    """Whether a file is what Git leaves in place of a large file that was not fetched."""
    if not os.path.isfile(file):
        return False
    with open(file, "rb") as content:
        return content.read(len(LFS_POINTER)) == LFS_POINTER


def read_dict(folder, name, place):
    """The dict in a JSON file of the folder."""
    try:
        content = json.loads(Path(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: {name} is not readable as JSON: {reason}; fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{place}: {name} is not a JSON object; fetch it again")
    return content


def check_end_tokens(folder, place):
    """Raises UserError unless the end tokens that the folder names are token ids."""
    for name in ("config.json", "generation_config.json"):
        if not os.path.exists(f"{folder}/{name}"):
            continue
        named = read_dict(folder, name, place).get("eos_token_id")
        ids = named if isinstance(named, list) else [named]
        if named is not None and not all(is_token_id(number) for number in ids):
            raise UserError(
                f"{place}: {name} has eos_token_id={named!r}: it must be a token id, or a list of them"
            )


def is_token_id(number):
    return type(number) is int and number >= 0


def read_tensors(folder, place):
    """The tensors of the folder's weight files: name → Tensor. Raises UserError where a file is missing or not whole."""
    tensors = read_headers(folder, weight_files(folder, place), place)
    if INDEX in os.listdir(folder):
        listed = read_dict(folder, INDEX, place).get("weight_map", {})
        lost = sorted(set(listed) - set(tensors))
        if lost and "model.safetensors" not in os.listdir(folder):
            file = listed[lost[0]]
            raise UserError(f"{place}: {file} lacks {lost[0]}, which {INDEX} puts there; fetch it again")
    return tensors


def safetensors_in(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


def weight_files(folder, place):
    """The names of the files from which transformers reads the weights: model.safetensors, or the index's shards."""
    present = safetensors_in(folder)
    if "model.safetensors" in present:
        return ["model.safetensors"]
    if INDEX in os.listdir(folder):
        weight_map = read_dict(folder, INDEX, place).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{place}: {INDEX} names no shards in weight_map; fetch it again")
        shards = sorted(set(map(str, weight_map.values())))
        missing = [shard for shard in shards if shard not in present]
        if missing:
            few = f"{len(missing)} of {len(shards)} shards"
            raise UserError(
                f"{place}: {few} that {INDEX} names are missing, such as {missing[0]}; fetch them"
            )
        return shards
    if present:
        raise UserError(
            f"{place}: holds {present[0]}, but neither model.safetensors nor {INDEX}; fetch it again"
        )
    way_out = "save the model again as safetensors, by transformers' save_pretrained"
    raise UserError(f"{place}: holds no *.safetensors, and other weight files are not read: {way_out}")


def read_headers(folder, files, place):
    """The tensors of these safetensors files of the folder: name → Tensor."""
    tensors = {}
    for file in files:
        for name, entry in read_header(folder, file, place).items():
            tensors[name] = Tensor(file, entry["shape"], entry["dtype"])
    return tensors


def read_header(folder, file, place):
    """The same as safetensors_header, but it raises UserError where the file is not whole."""
    try:
        return safetensors_header(Path(folder, file))
    except ValueError as error:
        raise UserError(f"{place}: {file} {error}; fetch it again") from None


def safetensors_header(path):
    """The header of a safetensors file: name → {"dtype", "shape", "data_offsets"}. Raises ValueError where it is not whole."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            if length > size:
                raise ValueError
            header = json.loads(content.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ValueError("is not a whole safetensors file") from None
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ValueError(f"is cut short, {size:,} of {expected:,} bytes")
    return header


# ---- Architecture ------------------------------------------------------------------------------------------------


# These settings of a config.json scale the logits. model.py computes logits as hidden states times a matrix, without a scale.
SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier_scale")

# For these models transformers does not pass a pack on to the attention, which then fails in the first step.
WITHOUT_PACKS = ("nemotron", "moshi")

# Layers whose attention sees all earlier tokens of its sample, or a window of them.
PLAIN_LAYERS = {"full_attention", "sliding_attention", "attention"}


def read_config(path, place, trust):
    """The configuration of the model folder, as transformers reads it. Raises UserError where it cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:  # A broken config.json, or the model's own code, may raise anything.
        text = " ".join(str(error).split())
        hint = "; to run its Python code give --trust_remote_code=True" if "trust_remote_code" in text else ""
        reason = text[:300]
        raise UserError(f"{place}: transformers cannot read its config.json: {reason}{hint}") from None
    return config


def check_config(config, place):
    """Raises UserError unless a pack of samples gives the log-probs that each sample has alone.

    That holds for a text model made of softmax(q·k) v attention, layers that treat each token by itself, and an output
    head that is a matrix.
    """
    from transformers import PreTrainedConfig

    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    for part in (config, config.get_text_config(), *nested):
        reason = not_supported(part)
        if reason:
            kind = type(config).__name__.removesuffix("Config")
            raise UserError(f"{place}: a {kind} model cannot be trained here: {reason}")


def not_supported(config):
    """Why this configuration is refused, or None."""
    settings = {name: value for name, value in vars(config).items() if value}
    if "quantization_config" in settings:
        return "its weights are quantized (quantization_config); take the version in bfloat16 or float32"
    for name in ("vision_config", "audio_config", "is_encoder_decoder"):
        if name in settings:
            return f"it is more than a text decoder ({name})"
    other_layers = set(settings.get("layer_types") or ()) - PLAIN_LAYERS
    if other_layers:
        return (
            f"its layer_types hold {', '.join(sorted(other_layers))}, which is not softmax(q·k) v attention"
        )
    for name, value in settings.items():
        if "experts" in name and type(value) is int and value > 1:
            return f"it is a mixture of experts ({name}={value})"
        if ("softcap" in name or "soft_cap" in name or "logit_cap" in name) and type(value) in (int, float):
            return f"it caps attention scores or logits ({name}={value})"
        if name in SCALES and value != 1:
            return f"it scales its logits ({name}={value})"
    if "kv_lora_rank" in settings:
        return f"it has latent attention (kv_lora_rank={settings['kv_lora_rank']})"
    if settings.get("alibi") or settings.get("position_embedding_type", "absolute") != "absolute":
        return "its attention adds a bias by position"
    return not_supported_class(config)


def not_supported_class(config):
    """Why the class in which transformers implements the architecture is refused, or None. It is also None for an
    architecture that only the folder's own Python code knows."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        return None
    if type(config) in AutoModelForMaskedLM._model_mapping and not config.is_decoder:
        return "it is an encoder, whose attention sees later tokens, too (is_decoder=False)"
    if model_class._is_stateful:
        return (
            "its layers carry a state from token to token, which would run on from sample to sample of a pack"
        )
    if not model_class._supports_attention_backend or config.model_type in WITHOUT_PACKS:
        return (
            "transformers gives it an attention of its own, which cannot be replaced by attention over packs"
        )
    return None


def dropout_settings(config):
    """Which settings of a configuration would drop activations at random: name → value.

    model.py sets them to 0: a learner with dropout would compute other log-probs than vLLM. ORZ's models have none.
    """
    found = {}
    for name, value in vars(config).items():
        if "drop" in name and type(value) in (int, float) and value > 0:
            found[name] = value
    return found


# ---- Tokens, length ----------------------------------------------------------------------------------------------


def check_vocabulary(tokenizer, config, place):
    """Raises UserError where the tokenizer has ids for which the model has no embedding."""
    largest, size = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if largest >= size:
        reason = f"the tokenizer has ids up to {largest}, but the model has vocab_size={size}"
        raise UserError(f"{place}: {reason}; take the tokenizer and the model of one folder")


def check_same_tokens(tokenizer, path, place, trust):
    """Raises UserError if the critic's folder has a tokenizer in which the policy's token ids mean other tokens."""
    if not any(os.path.exists(f"{path}/{name}") for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    theirs = read_tokenizer(path, place, trust).get_vocab()
    ours = tokenizer.get_vocab()
    for token in sorted(ours.keys() & theirs.keys()):
        if ours[token] != theirs[token]:
            reason = f"token {token!r} is {theirs[token]} there and {ours[token]} in the policy's tokenizer"
            raise UserError(
                f"{place}: {reason}; a critic reads the policy's ids, so take one of the same family"
            )


def check_length(cfg, config, place):
    """Raises UserError where a prompt and its response may be longer than the model's positions."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    if longest > limit * rope_factor(text):
        sizes = f"max_prompt_tokens={cfg.max_prompt_tokens} + max_response_tokens={cfg.max_response_tokens}"
        reason = f"{sizes} = {longest:,}, but it has max_position_embeddings={limit:,}"
        raise UserError(f"{place}: {reason}; give shorter ones")


def check_heads(cfg, config, place):
    """Raises UserError where vLLM cannot share the attention heads among the ranks of an engine."""
    heads = config.get_text_config().num_attention_heads
    if heads % cfg.tensor_parallel:
        reason = f"its {heads} attention heads cannot be shared by tensor_parallel={cfg.tensor_parallel}"
        raise UserError(f"{place}: {reason}; give a divisor of {heads}")


def rope_factor(config):
    """The factor by which the scaling of rotary embeddings extends max_position_embeddings, computed as in vLLM. It is 1 for
    the types whose max_position_embeddings is the extended length already."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    scaled_already = ("llama3", "yarn", "longrope", "su", "deepseek_yarn", "default")
    if rope.get("rope_type", rope.get("type")) in scaled_already or "gemma3" in config.model_type:
        return 1.0
    return rope.get("factor") or 1.0


# ---- Weights -----------------------------------------------------------------------------------------------------


def auto_class(kind):
    """The class of transformers that loads a "critic" (without an output head) or any other kind of network."""
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModel if kind == "critic" else AutoModelForCausalLM


def network_without_memory(kind, path, dtype=None, trust=False):
    """The Hugging Face model that config.json describes. Its parameters have no memory, so that this takes less than a
    second for a model of any size; its buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    with init_empty_weights(include_buffers=False):
        return auto_class(kind).from_config(config, dtype=dtype, trust_remote_code=trust)


def parameter_names(hf, tensor_names):
    """{the name of a tensor in a weight file: the name that transformers gives it in the model `hf`}."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(hf)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    names_in_model = hf.state_dict()
    found = {}
    for name in tensor_names:
        found[name], _ = rename_source_key(name, renamings, [], hf.base_model_prefix, names_in_model)
    return found


def check_weights(kind, path, place, trust):
    """Raises UserError unless the folder holds every parameter of the network, in its shape.

    kind is "policy" or "critic". Returns the tensors that the network does not use: name → Tensor.
    """
    hf = network_without_memory(kind, path, trust=trust)
    parameters = dict(hf.named_parameters(remove_duplicate=False))
    sinks = [name for name in parameters if "sink" in name]
    if sinks:
        raise UserError(f"{place}: it cannot be trained here: it has attention sinks ({sinks[0]})")
    tensors = read_tensors(path, place)
    name_in_model = parameter_names(hf, tensors)
    for name, tensor in tensors.items():
        if name_in_model[name] in parameters:
            check_tensor(name, tensor, parameters[name_in_model[name]], place)
    found = set(name_in_model.values())
    for name, other in hf.all_tied_weights_keys.items():
        if name in found or other in found:
            found |= {name, other}
    missing = sorted(parameters.keys() - found)
    if missing:
        count = f"{len(missing)} of {len(parameters)} parameters"
        raise UserError(f"{place}: it has no tensors for {count}, such as {missing[0]}: they would be random")
    # Older checkpoints hold buffers that are computed now; each architecture lists its own.
    known = hf.state_dict()
    ignored = [r"inv_freq$", *(hf._keys_to_ignore_on_load_unexpected or ())]
    unused = {}
    for name, tensor in tensors.items():
        is_old_buffer = any(re.search(pattern, name) for pattern in ignored)
        if name_in_model[name] not in known and not is_old_buffer:
            unused[name] = tensor
    return unused


def check_tensor(name, tensor, parameter, place):
    """Raises UserError unless a tensor can become the parameter."""
    if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
        reason = f"{name} is quantized ({tensor.dtype})"
        raise UserError(f"{place}: {reason}; take the version in bfloat16 or float32")
    if tensor.shape != list(parameter.shape):
        shapes = f"{tensor.shape} in {tensor.file}, but {list(parameter.shape)} by config.json"
        raise UserError(f"{place}: {name} is {shapes}; take both files of one model")


def value_head(path, config, unused, place):
    """A line for the log about a critic's value head, or None. `unused`: the tensors that its backbone does not use.

    Raises UserError where there is a head whose number of elements is not hidden_size.
    """
    head = read_headers(path, safetensors_in(path), place).get(VALUE_HEAD)
    text = config.get_text_config()
    if head and math.prod(head.shape) != text.hidden_size:
        reason = f"{VALUE_HEAD} is {head.shape} in {head.file}, but hidden_size is {text.hidden_size}"
        raise UserError(f"{place}: {reason}; take the head of this backbone")
    # A tensor with a row for each token of the vocabulary is a policy's output head, which a critic does not use.
    others = [name for name, tensor in unused.items() if tensor.shape[:1] != [text.vocab_size]]
    others = [name for name in others if name != VALUE_HEAD]
    not_used = f"; not used: {few(others)}" if others else ""
    if not head:
        return f"{place}: it has no {VALUE_HEAD}, so the critic's head starts fresh{not_used}"
    if others or head.shape != [1, text.hidden_size]:
        return f"{place}: {VALUE_HEAD} {head.shape} is read as [1, {text.hidden_size}]{not_used}"
    return None


def few(names):
    """The first three names of a list, and how many more there are, as a text."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ---- Both networks of a run --------------------------------------------------------------------------------------


def read_models(cfg, log):
    """(the tokenizer, the configuration) of the policy, after its folder and the critic's have been checked.

    Says through `log` where a run does something else than the folders say.
    """
    place = f"model={cfg.model!r}"
    config = read_config(cfg.model, place, cfg.trust_remote_code)
    tokenizer = read_tokenizer(cfg.model, place, cfg.trust_remote_code)
    check_tokenizer(cfg, tokenizer, place)
    check_vocabulary(tokenizer, config, place)
    check_length(cfg, config, place)
    check_heads(cfg, config, place)
    if cfg.eval_only:  # vLLM alone reads the model.
        return tokenizer, config
    unused = judge_network("policy", cfg.model, config, place, cfg, log)
    if unused:
        log.say(f"{place}: the folder holds tensors that the policy does not use: {few(list(unused))}")
    if has_critic(cfg):
        judge_critic(cfg, tokenizer, log)
    return tokenizer, config


def read_tokenizer(path, place, trust):
    """The tokenizer of a model folder. Raises UserError where it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:  # Broken files, or the tokenizer's own code, may raise anything.
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{place}: transformers cannot read its tokenizer: {reason}") from None


def check_tokenizer(cfg, tokenizer, place):
    """Raises UserError where the policy's tokenizer lacks what the run needs."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{place}: its tokenizer names no end token (eos_token): no response could end")
    if cfg.prompt_template == "chat" and not tokenizer.chat_template:
        raise UserError(f"prompt_template=chat, but {cfg.model} has no chat template: give a text instead")


def judge_network(kind, path, config, place, cfg, log):
    """The checks that policy and critic share. Returns the tensors that the network does not use."""
    check_config(config, place)
    unused = check_weights(kind, path, place, cfg.trust_remote_code)
    dropout = dropout_settings(config)
    if dropout:
        values = ", ".join(f"{name}={value}" for name, value in dropout.items())
        log.say(
            f"{place}: its dropout is set to 0 ({values}): with it the learner would not compute vLLM's log-probs"
        )
    return unused


def judge_critic(cfg, tokenizer, log):
    """Raises UserError unless the critic can start from its folder, which is the policy's where none is named."""
    path = cfg.critic_model or cfg.model
    place = f"critic_model={path!r}"
    config = read_config(path, place, cfg.trust_remote_code)
    unused = {}
    if path != cfg.model:
        check_vocabulary(tokenizer, config, place)
        check_same_tokens(tokenizer, path, place, cfg.trust_remote_code)
        check_length(cfg, config, place)
        unused = judge_network("critic", path, config, place, cfg, log)
    said = value_head(path, config, unused, place)
    if said and path != cfg.model:
        log.say(said)
