"""Make data/tiny, the demo's task and base model: python data/make_tiny.py  (CPU, deterministic, minutes).

In:   nothing but the constants below.
Out:  train.jsonl and eval.jsonl (questions for PPO and for evaluation) and a Hugging Face folder with a small
      Llama and its tokenizer, pre-trained on additions that appear in neither file.

The task is three-digit addition. Most responses in the pre-training text are guesses without work, the others work
column by column, and nothing in the text says which of the two is better:

    User: 345+678\nAssistant: <think></think><answer>\boxed{913}</answer>

    User: 345+678\nAssistant: <think>
    5+8=13, carry 1
    4+7+1=12, carry 1
    3+6+1=10, carry 1
    </think><answer>\boxed{1023}</answer>

A guess draws every carry at random, so nothing in the text tells a right guess from a wrong one. The slips in the
work are rare, so the right step is always the most likely one, and training can remove the slips.

data/make_recurrence.py makes a task with longer answers with the functions of this file.

The files of questions are the same on every machine. The weights are the same on one machine with one version of
torch; another may round differently.
"""

import hashlib
import json
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

OUT = Path(__file__).parent / "tiny"
PROMPT_TEMPLATE = "User: {question}\nAssistant: <think>"  # as in configs/tiny.py
GUESSED, WORKED = 56, 10  # documents in a batch of pre-training text: 15% of them work column by column
SLIP = 0.035  # chance per column of a wrong sum, and again of a wrong carry
NUM_TRAIN, NUM_EVAL = 4096, 512  # questions
STEPS, LR, SEED = 2500, 2e-3, 1
THREADS = 1  # the order of additions, and so the last digits of the weights, depends on it
MAX_TOKENS = 512  # of a document
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
}

EOS, UNKNOWN = "<|endoftext|>", "<unk>"
WORDS = ["User:", "Assistant:", "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", ", carry "]
CHARACTERS = ["\n"] + [chr(code) for code in range(32, 127)]


def make_tokenizer(words=WORDS):
    """One token for each of the words and for every other printable ASCII character; decoding gives the text back."""
    vocabulary = {token: i for i, token in enumerate([EOS, UNKNOWN] + words + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    pattern = "|".join(word.replace("\\", "\\\\").replace("{", "\\{") for word in words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # the default would put a space between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
    )


def split_of(a, b):
    """Which of the three sets the question a+b belongs to; b+a goes with it."""
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return {0: "eval", 1: "train", 2: "train"}.get(digest[0] % 32, "pretrain")


def pair_of(text):
    """The unordered pair of numbers that a question or a prompt asks for."""
    return frozenset(map(int, re.search(r"(\d+)\+(\d+)", text).groups()))


def draw_pair(rng, split):
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if split_of(a, b) == split:
            return a, b


def add_columns(a, b, rng, worked):
    """The sum of a and b as one would write it, and the lines of work. Errors are drawn from rng."""
    lines, carry, answer = [], 0, ""
    for column in range(3):
        x, y = a // 10**column % 10, b // 10**column % 10
        total = x + y + carry
        if worked and rng.random() < SLIP:
            total += 1 if total == 0 else rng.choice((-1, 1))
        shown = f"{x}+{y}" + (f"+{carry}" if column else "") + f"={total}"
        carry = total // 10
        if worked and rng.random() < SLIP:
            carry = 1 - carry  # a carry that is forgotten, or one too many
        if not worked and column < 2:
            carry = rng.randint(0, 1)
        answer = f"{total % 10}{answer}" if column < 2 else f"{total}{answer}"
        lines.append(f"{shown}, carry {carry}\n" if column < 2 else f"{shown}\n")
    return answer, "\n" + "".join(lines)


def document(question, work, answer):
    """(prompt, response): one document of pre-training text."""
    response = f"{work}</think><answer>\\boxed{{{answer}}}</answer>{EOS}"
    return PROMPT_TEMPLATE.format(question=question), response


def write_documents(rng, worked, count):
    """Documents on questions that neither file of questions holds."""
    documents = []
    for _ in range(count):
        a, b = draw_pair(rng, "pretrain")
        answer, work = add_columns(a, b, rng, worked)
        documents.append(document(f"{a}+{b}", work if worked else "", answer))
    return documents


def write_batch(rng):
    """The documents of one step, by kind. Those of one kind are about equally long, so that little is padding."""
    return {"guess": write_documents(rng, False, GUESSED), "work": write_documents(rng, True, WORKED)}


def make_questions():
    """Write train.jsonl and eval.jsonl, each question once. Returns the unordered pairs in them."""
    rng, seen = random.Random(SEED), set()
    for split, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        lines = []
        while len(lines) < count:
            a, b = draw_pair(rng, split)
            if frozenset((a, b)) not in seen:
                seen.add(frozenset((a, b)))
                lines.append(json.dumps({"question": f"{a}+{b}", "answer": str(a + b)}) + "\n")
        (OUT / f"{split}.jsonl").write_text("".join(lines))
    assert len(seen) == NUM_TRAIN + NUM_EVAL  # no question is in both files
    return seen


def response_loss(model, tokenizer, documents):
    """Cross-entropy summed over the response tokens of documents that are about equally long."""
    prompts = tokenizer([prompt for prompt, _ in documents]).input_ids
    rows = tokenizer([prompt + response for prompt, response in documents]).input_ids
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, -100)  # -100: no loss on prompt and padding
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    logits = model(ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def pretrain(tokenizer, write_batch, num_steps, sizes):
    """Train a base model from scratch: write_batch(rng) gives the documents of a step, `sizes` are settings of Qwen2Config."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **sizes,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=num_steps, pct_start=0.05)
    rng, start = random.Random(SEED + 1), time.time()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for step in range(1, num_steps + 1):
        batch = write_batch(rng)
        num_documents = sum(map(len, batch.values()))
        losses = {}  # nats per response of each kind
        for kind, documents in batch.items():
            loss = response_loss(model, tokenizer, documents)
            (loss / num_documents).backward()
            losses[kind] = loss.item() / len(documents)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            by_kind = "  ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
            print(f"step {step}  {by_kind}  {time.time() - start:.0f} s", flush=True)
    return model


def as_llama(qwen2):
    """A Llama that computes the same: for a folder with a Qwen2, AutoTokenizer would load Qwen2's tokenizer class."""
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size"
    )
    names += " max_position_embeddings tie_word_embeddings eos_token_id pad_token_id bos_token_id"
    settings = {name: getattr(qwen2.config, name) for name in names.split()}
    llama = LlamaForCausalLM(LlamaConfig(attention_bias=True, **settings))
    # Only the biases of the output projections are missing, which Qwen2 does not have.
    llama.load_state_dict(qwen2.state_dict(), strict=False)
    for layer in llama.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    return llama


def save(model, tokenizer, folder):
    """Write a Hugging Face folder."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # Older versions of transformers know only this name of the class.
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    model.save_pretrained(folder)


def main():
    OUT.mkdir(exist_ok=True)
    held_out = make_questions()
    tokenizer = make_tokenizer()
    for text in map("".join, write_documents(random.Random(0), True, 100)):
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def write_unseen(rng):
        batch = write_batch(rng)
        for documents in batch.values():
            assert not held_out & {pair_of(prompt) for prompt, _ in documents}
        return batch

    model = as_llama(pretrain(tokenizer, write_unseen, STEPS, SIZES))
    save(model, tokenizer, OUT)


if __name__ == "__main__":
    main()
