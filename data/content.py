"""Hashes of what a run began from, so that it can continue after the project, its model or its data have moved.

Comparing paths would refuse too much: a commit to a hub model that changes only its README, or another HF_HOME, changes the
folder's path and nothing else.
"""

import hashlib
import json
import os
from pathlib import Path

from data.models import read_dict, read_header, weight_files

# Fields of config.json that only say which program wrote it, and from where.
PROVENANCE = ("transformers_version", "_name_or_path")

TOKENIZER_FILES = """tokenizer.json tokenizer_config.json chat_template.jinja special_tokens_map.json added_tokens.json
    vocab.json merges.txt vocab.txt tokenizer.model spiece.model""".split()

# Two fine-tunes of one model have files of the same size with the same header. Hashes of parts of the data tell them apart.
NUM_PLACES, PLACE_BYTES = 16, 2**16


def run_content(cfg):
    """{"model": …, "critic_model": …, "train_data": …, "task": …}: hashes of what these settings name."""
    model = model_content(cfg.model)
    critic = model if cfg.critic_model == cfg.model else model_content(cfg.critic_model)
    data = [file_hash(path) for path in cfg.train_data]
    task = file_hash(cfg.task) if cfg.task else ""
    return {"model": model, "critic_model": critic, "train_data": data, "task": task}


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_content(folder):
    """{part of a model folder: hash}. Weights are not read whole, which would take minutes for a large model."""
    place = f"model={folder!r}"
    settings = read_dict(folder, "config.json", place)
    for name in PROVENANCE:
        settings.pop(name, None)
    content = {"config.json": json_hash(settings)}
    tokenizer = {}
    for name in TOKENIZER_FILES:
        file = f"{folder}/{name}"
        if os.path.exists(file):
            tokenizer[name] = file_hash(file)
    content["tokenizer"] = json_hash(tokenizer)
    weights = []
    for name in weight_files(folder, place):
        weights.append(weights_hash(folder, name, place))
    content["weights"] = json_hash(weights)
    if os.path.exists(f"{folder}/generation_config.json"):  # A run uses nothing else of this file.
        end_tokens = read_dict(folder, "generation_config.json", place).get("eos_token_id")
        content["end tokens"] = json_hash(end_tokens)
    return content


def json_hash(value):
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_hash(folder, name, place):
    """The hash of a safetensors file's header, its size, and 64 KiB at each of 16 fixed places of its data."""
    header = read_header(folder, name, place)
    path = Path(folder, name)
    size = path.stat().st_size
    parts = []
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")  # of the data
        for i in range(NUM_PLACES):
            file.seek(start + (size - start) * i // NUM_PLACES)
            part = file.read(PLACE_BYTES)
            parts.append(hashlib.sha256(part).hexdigest())
    return json_hash([size, header, parts])
