"""The per-token records of a run: they belong to the right responses, and recording changes nothing else of a run."""

import json

import numpy as np
import pytest
from test_launch import RUN, metrics, run, without_timings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import token_record

TEXTS = [
    "8+6=14, carry 1\n  2+3+1=6",
    "  It is \\boxed{½}, i.e. 0.5 \t</answer>",
    "été: 你好 🙂👩‍👩‍👧, ∑ᵢ xᵢ ≤ ∞",
    "",
    "\ufffd\ufffd and more",
]


def byte_tokenizer():
    """A token for each byte, as in the tokenizers of Qwen and Llama 3: one character may be four tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer():
    """A token for each word with the space before it; as in Llama 2, decoding drops that space at the beginning of a
    text."""
    words = {"▁" + word for text in TEXTS for word in text.split(" ")}
    vocabulary = {word: i for i, word in enumerate(sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_tokenizer, word_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_tokens_are_together_the_response(make, text):
    """Fails if each token is decoded by itself, to "�" or without the space before it: the report would show what the
    model did not write."""
    tokenizer = make()
    prompt_ids = np.array(tokenizer("It is")["input_ids"], np.int32)
    response_ids = np.array(tokenizer(text)["input_ids"], np.int32)
    texts = token_record.token_texts(prompt_ids, response_ids, tokenizer)
    assert len(texts) == len(response_ids)
    whole = token_record.decode(tokenizer, [*prompt_ids, *response_ids])
    assert "It is" + "".join(texts) == whole
    assert make is word_tokenizer or whole == "It is" + text


def test_a_character_that_never_ends(tmp_path):
    """Fails if a response that was cut off within a character, or whose bytes are no characters, ends the run or takes
    for ever."""
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer("a你b🙂")["input_ids"], np.int32)
    assert token_record.token_texts(ids[:1], ids[1:-1], tokenizer) == ["", "", "你", "b", "", "", "\ufffd"]
    continuation_bytes = np.repeat(ids[-1:], 2000)
    texts = token_record.token_texts(ids[:1], continuation_bytes, tokenizer)
    assert len(texts) == 2000 and set("".join(texts)) == {"\ufffd"}


def test_a_file_is_replaced_whole_and_holds_no_pickle(tmp_path):
    """Fails if a step that is made again leaves a second or half a file, or if reading a record can load a pickle."""
    texts = np.frombuffer(json.dumps({"questions": ["</script>\ud800"]}).encode(), np.uint8)
    for values in (np.arange(3.0), np.arange(4.0)):
        token_record.write(tmp_path / "tokens", "step_1", {"values": values, "texts": texts})
    record = token_record.read(tmp_path / "tokens/step_1.npz")
    assert record["values"].tolist() == [0, 1, 2, 3] and record["questions"] == ["</script>\ud800"]
    assert [file.name for file in (tmp_path / "tokens").iterdir()] == ["step_1.npz"]
    np.savez(tmp_path / "pickled.npz", texts=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        token_record.read(tmp_path / "pickled.npz")


# ---- Of a whole run ------------------------------------------------------------------------------------------------


def samples_of(folder, name):
    return [json.loads(line) for line in open(folder / "samples" / f"{name}.jsonl", encoding="utf-8")]


def parts(record, name):
    """Split an array over tokens into one array for each response."""
    ends = np.cumsum(record["response_lens"])[:-1]
    return np.split(np.array(record[name]), ends)


@pytest.mark.parametrize("name", ["step_1", "step_6", "eval_eval_0", "eval_eval_6"])
def test_a_record_is_of_the_responses_that_it_names(undisturbed, name):
    """Fails if texts, verdicts or tokens of one response are recorded for another one."""
    samples = samples_of(undisturbed, name)
    record = token_record.read(undisturbed / f"tokens/{name}.npz")
    assert len(record["rows"]) == 32 and len(set(record["rows"].tolist())) == 32
    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "policy")
    token_ids, tokens = parts(record, "token_ids"), parts(record, "tokens")
    for i, row in enumerate(record["rows"]):
        sample = samples[row]
        assert token_ids[i].tolist() == sample["response_ids"]
        assert "".join(tokens[i]) == sample["response"]
        assert record["prompts"][i] == tokenizer.decode(sample["prompt_ids"])
        for field, of_sample in (
            ("prompt_indices", "prompt_index"),
            ("questions", "question"),
            ("answers", "answer"),
            ("correct", "correct"),
            ("rewards", "reward"),
            ("finish_reasons", "finish_reason"),
            ("graded", "graded"),
        ):
            assert record[field][i] == sample[of_sample], field
        group = [other["correct"] for other in samples if other["prompt_index"] == sample["prompt_index"]]
        assert record["question_accuracy"][i] == np.mean(group)


def test_each_step_records_other_responses_and_each_evaluation_the_same_questions(undisturbed):
    """Fails if evaluations record different questions, which cannot be compared, or if training always records the
    first responses."""
    rows = [token_record.read(undisturbed / f"tokens/step_{step}.npz")["rows"].tolist() for step in (1, 2)]
    assert rows[0] != rows[1] and rows[0] != list(range(32))
    questions = [
        token_record.read(undisturbed / f"tokens/eval_eval_{step}.npz")["questions"] for step in (0, 3, 6)
    ]
    assert questions[0] == questions[1] == questions[2] and len(set(questions[0])) == 32


@pytest.mark.parametrize("step", [1, 2, 6])
def test_numbers_of_tokens_are_those_that_trained(undisturbed, step):
    """Fails if the record has values after the critic's updates, a policy after its own update, or advantages of other
    tokens."""
    record = token_record.read(undisturbed / f"tokens/step_{step}.npz")
    row = metrics(undisturbed)[step]
    values, raw, lengths = record["values"], record["raw_advantages"], record["response_lens"]
    num_tokens = len(record["tokens"])
    for name in (
        *"values raw_advantages advantages policy_logprobs entropies".split(),
        "logprob_differences",
    ):
        assert record[name].shape == (num_tokens,) and np.isfinite(record[name]).all(), name
    # With γ = λ = 1 the advantage is the reward minus the value; fp16 has three digits.
    rewards = np.repeat(record["rewards"], lengths)
    assert np.allclose(raw, rewards - values, atol=2e-3)
    # Normalising maps all advantages of the batch by one straight line with a positive slope.
    slope, shift = np.polyfit(raw.astype(float), record["advantages"].astype(float), 1)
    assert slope > 1 and np.allclose(record["advantages"], slope * raw.astype(float) + shift, atol=1e-2)
    # After an update the policy would differ from vLLM by far more than the rounding that drift_max is here.
    differences = np.abs(record["logprob_differences"])
    assert 0 < differences.max() < 10 * row["drift_max"] < 1e-4
    assert (record["policy_logprobs"] <= 0).all() and (record["entropies"] >= 0).all()
    assert (record["importance_weights"] == 1).all()


def test_recording_changes_nothing_else(tmp_path, undisturbed):
    """Fails if choosing the responses, or the forward pass for them, draws random numbers or leaves another state
    behind."""
    code, out, err = run(tmp_path, "--name=a", *RUN, "--report_samples=0")
    assert code == 0, out + err
    assert without_timings(metrics(tmp_path / "a")) == without_timings(metrics(undisturbed))
    for file in sorted((undisturbed / "samples").iterdir()):
        assert (tmp_path / "a/samples" / file.name).read_bytes() == file.read_bytes(), file.name
    for kind in ("policy", "critic"):
        weights = [folder / kind / "model.safetensors" for folder in (tmp_path / "a", undisturbed)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), kind
    assert not (tmp_path / "a/tokens").exists()
    assert all("report" not in row["seconds"] for row in metrics(tmp_path / "a"))
    assert all("report" in row["seconds"] for row in metrics(undisturbed)[1:])
