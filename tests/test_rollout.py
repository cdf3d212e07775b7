"""vLLM inside a rank, next to a Learner: the same weights, the same tokens, the same log-probs.

Engines take seconds to build, so all checks run in two starts, `one_rank` on one rank and `tensor_parallel` on two; the
tests check what these return.
"""

import glob
import json
import zlib

import numpy as np
import pytest
import ranks
import tiny_models
import torch

import packing
import ppo
import rollout

TEMPERATURES = (0.6, 1.0)
SETTINGS = {"max_prompt_tokens": 64, "max_response_tokens": 24, "stop": ["a", "b1", "xy", "</"], "seed": 3}
# Every third prompt begins with the same block, whose keys and values vLLM caches. The cache must be used neither with
# other weights nor in a later call.
BLOCK = [(11 * k) % 90 for k in range(40)]
PROMPTS = [
    (BLOCK if i % 3 == 0 else []) + [(7 * i + 3 * k) % 90 for k in range(2 + i % 7)] for i in range(24)
]


def sample(engine, seed, temperature=1.0):
    """One response to each prompt, in the prompts' order, and a hash of their ids."""
    samples = [None] * len(PROMPTS)

    for response in engine.generate(PROMPTS, seed, temperature, 1.0, SETTINGS["max_response_tokens"]):
        index = response.index
        assert samples[index] is None, "finished twice"
        samples[index] = packing.Sample(
            prompt_index=index,
            prompt_ids=np.array(PROMPTS[index], np.int32),
            response_ids=response.token_ids,
            logprobs=response.logprobs,
            text=response.text,
            finish_reason=response.finish_reason,
            reward=float(index % 2),
        )
    ids_hash = zlib.crc32(b"".join(sample.response_ids.tobytes() for sample in samples))
    return samples, ids_hash


def train(learner, samples, check=True):
    """One policy update on these samples; with `check` the update may refuse them."""
    batch = packing.Batch(samples)
    batch.advantages = ppo.normalise(np.repeat(batch.rewards, batch.response_lens))
    learner.drift_limit = abs(learner.drift_limit) * (1 if check else -1)
    plan = packing.pack(batch.lengths, 256, torch.distributed.get_world_size(), 128)
    try:
        learner.update(batch, [plan], step=1)
    finally:
        learner.engine.optimizer.zero_grad()


def drift(learner, samples):
    """The largest and the mean |log-prob of the sampler − of the learner| over all sampled tokens."""
    batch, world_size = packing.Batch(samples), torch.distributed.get_world_size()
    packs = [[i] for i in range(len(samples))] + [[]] * (-len(samples) % world_size)  # one sample at a time
    whole = [packs[rank::world_size] for rank in range(world_size)]
    apart = np.abs(learner.forward(batch, whole) - batch.logprobs)
    return float(apart.max()), float(apart.mean())


ENGINES = []  # keeps them alive: an engine that is garbage-collected shuts torch.distributed down for the next one


def start(path, dtype=torch.float32, **overrides):
    cfg, cpu = ranks.settings(**SETTINGS | overrides), torch.device("cpu")
    learner = ppo.Learner("policy", cfg, path, cpu, dtype)
    ENGINES.append(rollout.Rollout(cfg, path, dtype, cpu))
    return learner, ENGINES[-1]


def in_sync(learner, engine):
    """Drift before training, after training without a sync, and after a sync."""
    samples, _ = sample(engine, 1)
    before = drift(learner, samples)
    for _ in range(3):
        train(learner, samples, check=False)
    stale = drift(learner, sample(engine, 2)[0])
    engine.load_weights(learner.weights())
    synced = drift(learner, sample(engine, 2)[0])
    return {"before": before, "stale": stale, "synced": synced}


def one_rank(tied, untied, bf16):
    results = {}
    learner, engine = start(untied)
    results["untied"] = in_sync(learner, engine)
    # At each temperature, what was sampled is what is trained on, and the same seed samples the same tokens.
    for temperature in TEMPERATURES:
        learner.cfg.temperature = temperature
        samples, ids_hash = sample(engine, 5, temperature)
        results["sampled", temperature] = samples, drift(learner, samples)
        again, same_hash = sample(engine, 5, temperature)
        other, other_hash = sample(engine, 6, temperature)
        results["seeds", temperature] = (samples, ids_hash), (again, same_hash), (other, other_hash)
    learner.cfg.temperature = 1.0
    results["bad syncs"] = bad_syncs(learner, engine)
    results["stale fp32"] = stale_sync(learner, engine)
    results["tied"] = in_sync(*start(tied))
    learner, engine = start(bf16, torch.bfloat16)
    results["healthy bf16"] = drift(learner, sample(engine, 1)[0])
    results["stale bf16"] = stale_sync(learner, engine)
    return results


def stale_sync(learner, engine):
    """Syncs that read all weights and keep the old ones: the error of the next update, and whether it was not
    applied."""
    engine.load_weights(learner.weights())
    train(learner, sample(engine, 8)[0])
    learner.cfg.policy_lr = 0.02
    for seed in (9, 10):
        engine.load_weights(learner.weights())
        train(learner, sample(engine, seed)[0])  # every sync was made, so no update is refused
    for _ in learner.weights():
        pass
    stale, before = sample(engine, 11)[0], learner.engine.global_steps
    try:
        train(learner, stale)
    except ppo.DriftError as error:
        return str(error), learner.engine.global_steps == before
    return None, False


def bad_syncs(learner, engine):
    """The messages of syncs that send nothing, or not all weights."""

    def outcome(weights):
        try:
            engine.load_weights(weights)
        except rollout.SyncError as error:
            return str(error)

    def without(part):
        return (pair for pair in learner.weights() if part not in pair[0])

    messages = {"none": outcome(iter(())), "norm": outcome(without("model.norm.weight"))}
    messages["layer"] = outcome(without("layers.1.mlp"))
    messages["whole"] = outcome(learner.weights())
    return messages, drift(learner, sample(engine, 4)[0])


def tensor_parallel(tied, untied):
    rank, results = torch.distributed.get_rank(), {}
    for name, path in (("tied", tied), ("untied", untied)):
        learner, engine = start(path, tensor_parallel=2)
        results[name] = in_sync(learner, engine)
    alike = sample(engine, 20)[1]
    # With one token each: if lengths differed, one rank would wait for ever for the other's next token.
    engine.cfg.max_response_tokens = 1
    results["hashes"] = {"alike": alike, "differently": sample(engine, 30 + rank)[1]}
    return results


# ---- The tests --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def make(**settings):
        # Heads of 32, which vLLM needs.
        return tiny_models.make_model(tmp_path_factory.mktemp("model"), hidden=128, **settings)

    return {"tied": make(tie=True), "untied": make(), "bf16": make(dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def one(folders, tmp_path_factory):
    return ranks.run_ranks("test_rollout", "one_rank", 1, tmp_path_factory.mktemp("ranks"), **folders)[0]


@pytest.fixture(scope="module")
def two(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    paths = {"tied": folders["tied"], "untied": folders["untied"]}
    return ranks.run_ranks("test_rollout", "tensor_parallel", 2, folder, **paths)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_sync_on_one_rank(one, kind):
    """With tied embeddings vLLM's CPU build keeps a stale output head after a reload, which looks like training that
    learns nothing."""
    check_sync(one[kind])


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_sync_with_tensor_parallel(two, kind):
    """Fails if a rank takes its shard of a weight from the other rank's half."""
    for rank in two:
        check_sync(rank[kind])


def check_sync(drifts):
    assert drifts["before"][0] < 1e-4
    assert drifts["stale"][1] > 1e-2  # the updates did change the policy; otherwise this would prove nothing
    assert drifts["synced"][0] < 1e-4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stale_sync_stops_the_next_update(one, dtype):
    """For months TRL sampled from the base weights while it trained (TRL#5312), without an error."""
    message, not_applied = one[f"stale {dtype}"]
    assert message and "stale weights in vLLM" in message and not_applied


def test_bf16_in_sync_is_not_refused(one):
    """Rounding in bf16 alone must give a drift far below the limit of 0.2, or healthy runs would be stopped."""
    assert one["healthy bf16"][1] < 0.05


def test_incomplete_sync_is_refused(one):
    """vLLM only warns about weights that were not sent. Fails if a sync is accepted that leaves old weights in
    place."""
    messages, (largest, _) = one["bad syncs"]
    assert "sent 0 tensors" in messages["none"]
    assert "model.norm.weight" in messages["norm"] and "embed" not in messages["norm"]
    assert "layers.1.mlp" in messages["layer"] and "layers.0" not in messages["layer"]
    assert messages["whole"] is None and largest < 1e-4  # a complete sync afterwards corrects it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checksum(dtype):
    """Fails if weights that vLLM merges and pads have another checksum, if a changed bit has the same one, or if a
    view is refused."""
    torch.manual_seed(0)
    memory = (10 * torch.randn(3 + 9 * 16)).to(dtype)
    # Neither part begins at a multiple of 8 bytes.
    query, key = memory[3:131].view(8, 16), memory[131:].view(1, 16)
    merged = torch.cat([query, key, torch.zeros(7, 16, dtype=dtype)])
    parts = rollout.checksum(query) + rollout.checksum(key)
    assert rollout.checksum(merged) == parts == rollout.checksum(merged.T.contiguous().T)
    for bit in range(8 * dtype.itemsize):
        changed = merged.clone()
        changed.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[5, 7] ^= 1 << bit
        assert rollout.checksum(changed) != parts, bit
    odd = memory[1:6]
    assert rollout.checksum(odd) == rollout.checksum(odd.clone()) == odd.clone().view(torch.uint8).sum()


def test_tensor_parallel_ranks_agree_or_the_hash_differs(two):
    """Ranks of one engine that are seeded differently return different tokens without an error: only the hash
    tells."""
    hashes = [rank["hashes"] for rank in two]
    assert hashes[0]["alike"] == hashes[1]["alike"]
    assert hashes[0]["differently"] != hashes[1]["differently"]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_trained_on_is_what_was_sampled(one, temperature):
    """Fails if text is tokenised again, if end tokens are cut off or added, or if log-probs are those before the
    temperature (TRL#4159): the learner would train on something that was not sampled."""
    samples, (largest, _) = one["sampled", temperature]
    assert largest < 1e-4
    endings = {check_ending(sample) for sample in samples}
    assert endings == {"stop string", "end token", "other end token", "length"}, endings


def check_ending(sample):
    """How a response ended; its ids, log-probs and text must agree with it."""
    characters = [*tiny_models.CHARACTERS, "<end>", "<other end>"]
    ids, ends = sample.response_ids.tolist(), (tiny_models.END, tiny_models.OTHER_END)
    assert 1 <= len(ids) <= SETTINGS["max_response_tokens"] and len(sample.logprobs) == len(ids)
    text = "".join(characters[i] for i in ids)
    found = [stop for stop in SETTINGS["stop"] if stop in text]
    assert not any(i in ends for i in ids[:-1])
    assert not any(stop in "".join(characters[i] for i in ids[:-1]) for stop in SETTINGS["stop"])
    if ids[-1] in ends:
        assert sample.finish_reason == "stop" and sample.text in (text, text[: text.rindex("<")])
        return "end token" if ids[-1] == ends[0] else "other end token"
    assert sample.text == text
    if found:
        assert sample.finish_reason == "stop" and any(text.endswith(stop) for stop in found)
        return "stop string"
    assert sample.finish_reason == "length" and len(ids) == SETTINGS["max_response_tokens"]
    return "length"


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_same_seed_samples_the_same(one, temperature):
    """Fails if something else has advanced the random generator, so that a run cannot be repeated."""
    (first, first_hash), (again, same_hash), (other, other_hash) = one["seeds", temperature]
    assert first_hash == same_hash != other_hash
    for a, b in zip(first, again):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        assert a.logprobs.tolist() == b.logprobs.tolist()
    assert any(a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(first, other))


def test_every_end_token_of_a_model_folder(tmp_path):
    """Chat models have two end tokens, one of which is only in generation_config.json (TRL#7039)."""
    for file, ids in (("config.json", 5), ("generation_config.json", [7, 5])):
        (tmp_path / file).write_text(json.dumps({"eos_token_id": ids}))
    assert rollout.end_tokens(str(tmp_path)) == [5, 7]
    (tmp_path / "generation_config.json").unlink()
    assert rollout.end_tokens(str(tmp_path)) == [5]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert rollout.end_tokens(str(tmp_path)) == []


def test_a_path_is_no_pattern(tmp_path):
    """vLLM looks for weights by a glob pattern: in a folder named run[lr=1e-6] it would find none."""

    folder = tmp_path / "run[lr=1e-6] *"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with rollout.plain_path(str(folder)) as path:
        assert glob.glob(f"{path}/*.json") == [f"{path}/config.json"]
    with rollout.plain_path(str(tmp_path)) as path:
        assert path == str(tmp_path)
    assert (folder / "config.json").exists()  # the link was removed, but not what it pointed to
