"""docs/forks: each patch fits today's code, is shown in docs/forking.md, is clean for CI, and does what the page says."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_ppo
import tiny_models
import torch
from transformers import AutoTokenizer

import model
import ppo
from configs.load import ROOT, load

PAGE = (ROOT / "docs" / "forking.md").read_text(encoding="utf-8")
PATCHES = {path.stem: path for path in sorted((ROOT / "docs" / "forks").glob("*.patch"))}
EIGHT = [  # the patches in the page's table
    "opo",
    "cispo",
    "format_bonus",
    "solved_prompts",
    "reward_model",
    "two_turns",
    "lion",
    "chat_family",
]
# Files that are no part of the project, or too large to be copied.
NOT_COPIED = (".git", ".venv*", "runs", "models", "orz", "__pycache__", ".*_cache", ".hypothesis")


def apply(name, folder, *options):
    """Apply a patch in the folder with `git apply`; whether it fits."""
    done = subprocess.run(["git", "apply", *options, PATCHES[name]], cwd=folder, capture_output=True)
    return done.returncode == 0


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A copy of the project. If the project is a fork itself, those patches that it has applied are taken out of the
    copy."""
    folder = tmp_path_factory.mktemp("clean") / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for name in PATCHES:
        if not apply(name, folder, "--check"):
            apply(name, folder, "--reverse")
    return folder


@pytest.fixture
def fork(clean, tmp_path):
    """A function that makes a copy of the clean project with these patches applied."""

    def make(*names):
        for name in names:
            if name not in PATCHES:
                pytest.skip(f"docs/forks/{name}.patch was removed")
        folder = tmp_path / "fork"
        shutil.copytree(clean, folder)
        for name in names:
            way_out = "remove it, if the reason is a change of your own; else bring it up to date"
            assert apply(name, folder), f"docs/forks/{name}.patch does not fit this code: {way_out}"
        return folder

    return make


def module_of(folder, file):
    """A file of a fork as a module; what it imports is the project's own."""
    module = types.ModuleType(f"{Path(file).stem}_of_a_fork")
    exec(compile((folder / file).read_text(encoding="utf-8"), file, "exec"), vars(module))
    return module


def changed_lines(patch):
    """The lines that a patch adds and removes, without the blank ones."""
    lines = re.findall(r"^[+-](?!\+\+ |-- )(.*)$", patch, re.MULTILINE)
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("name", PATCHES)
def test_patch_fits_and_is_on_the_page(name, fork, clean):
    """Fails if the code has moved on, so that a patch fits nowhere or in two places, or if the page shows another
    patch."""
    fork(name)
    patch = PATCHES[name].read_text(encoding="utf-8")
    assert f"```diff\n{patch}```\n" in PAGE
    changed = re.findall(r"^--- a/(.*)\n\+\+\+ .*\n((?:[@ +-].*\n)*?)(?=--- |\Z)", patch, re.MULTILINE)
    assert changed or "--- /dev/null" in patch  # A patch may consist of new files only.
    for file, hunks in changed:
        source = (clean / file).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] != "+")
            assert source.count(old) == 1, f"{file} has not once:\n{old}"


def test_the_table_counts_what_the_patches_change():
    """Fails if a patch has grown, and the page still gives the old number of lines."""
    for name in set(EIGHT) & set(PATCHES):
        patch = PATCHES[name].read_text(encoding="utf-8")
        num_lines, num_files = len(changed_lines(patch)), len(re.findall(r"^\+\+\+ ", patch, re.MULTILINE))
        assert num_lines <= 15 and num_files <= 2
        assert f"forks/{name}.patch) | {num_lines} in {num_files} |" in PAGE


def test_the_eight_together_are_clean_and_pass_the_tests_of_the_algorithm(fork):
    """Fails if two patches collide, if the formatter wraps a line so that its rule is lost, or if the linter refuses a
    name."""
    folder = fork(*EIGHT)
    ruff = Path(sys.executable).parent / "ruff"
    if ruff.exists():
        for command in (["format", "--check", "."], ["check", "."]):
            done = subprocess.run([ruff, *command, "--no-cache"], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
    tests = ["tests/test_ppo.py", "tests/test_configs.py", "-k", "advantage or loss or setting and not torch"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


# ---- The eight ---------------------------------------------------------------------------------------------------


def test_opo(fork):
    """Fails if long responses weigh no more than short ones, if weights are another group's, or if advantages are
    fp64."""
    changed = module_of(fork("opo"), "ppo.py")
    rewards, lens = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]], [[2, 5, 1], [4, 0, 3]]
    advantages = changed.GROUP_ADVANTAGES["opo"](np.array(rewards, np.float32), np.array(sum(lens, [])))
    expected = []
    for group, group_lens in zip(rewards, lens):
        weighted_sum = sum(length * reward for length, reward in zip(group_lens, group))
        for length, reward in zip(group_lens, group):
            expected += [reward - weighted_sum / sum(group_lens)] * length
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


def test_cispo(fork):
    """Fails if tokens over the clip lose their gradient, as in PPO, or if the weight has a gradient of its own."""
    changed = module_of(fork("cispo"), "ppo.py")
    ratios = torch.tensor([0.5, 1.0, 1.19, 1.3, 3.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0], dtype=torch.float64)
    old_logprobs = torch.linspace(-2, -0.5, 5, dtype=torch.float64)
    logprobs = (old_logprobs + ratios.log()).requires_grad_()
    loss, _ = changed.cispo_loss(logprobs, old_logprobs, advantages, 0.2, 0.28)
    loss.sum().backward()
    for t in range(5):
        weight = min(ratios[t].item(), 1.28)
        assert loss[t].item() == pytest.approx(-weight * advantages[t].item() * logprobs[t].item())
        assert logprobs.grad[t].item() == pytest.approx(-weight * advantages[t].item())


FORMS = {  # response → whether it has the form
    "2+2\n</think> <answer>4</answer>": True,
    "2+2</think><answer>4</answer>\n": True,
    " \n</think><answer>4</answer>": False,
    "2+2</think><answer>4": False,
    "2+2</think> so <answer>4</answer>": False,
    "2+2</think><answer>4</answer> and more": False,
}


def test_format_bonus(fork):
    """Fails if a wrong answer with the form gets no bonus, or if a right one without it, or a response that was cut
    off, gets one."""
    bonus = module_of(fork("format_bonus"), "examples/bonus.py")
    for response, has_form in FORMS.items():
        for correct in (False, True):
            assert bonus.reward(response, {}, correct, "stop") == pytest.approx(correct + 0.2 * has_form)
        assert bonus.reward(response, {}, False, "length") == 0


def test_two_turns(fork, tmp_path):
    """Fails if the earlier turns are left out or come after the question, or if a question without them is refused."""
    changed = module_of(fork("two_turns"), "data/load.py")
    path = Path(tiny_models.make_model(tmp_path / "model"))
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    row = {"question": "2+2", "answer": "4"}
    for entry, before in ((row | {"history": turns}, "[user] 1+1\n[assistant] 2\n"), (row, "")):
        file = tmp_path / "questions.jsonl"
        file.write_text(json.dumps(entry))
        (prompt,), _ = changed.encode_prompts(changed.load_questions(str(file)), tokenizer, 100)
        expected = tokenizer(f"{before}[user] 2+2\n", add_special_tokens=False)["input_ids"]
        assert prompt.ids.tolist() == expected


def test_chat_family(fork):
    """Fails if the config does not load, or if an answer is not found, with or without tags."""
    folder = fork("chat_family")
    cfg = load([str(folder / "configs/smollm3.py"), f"--task={folder}/examples/boxed.py"])
    assert (cfg.prompt_template, cfg.stop, cfg.advantage) == ("chat", [], "gae")
    boxed = module_of(folder, "examples/boxed.py")
    question = {"answer": "1/2", "choices": None}
    verdicts = {
        r"So it is \boxed{0.5}.": True,
        r"\boxed{0.5}, no: \boxed{2}": False,
        r"<answer>\boxed{\frac12}</answer>": True,
        "0.5": False,
    }
    for response, correct in verdicts.items():
        assert boxed.is_correct(response, question) == correct, response


# ---- Variants ----------------------------------------------------------------------------------------------------


def test_gspo(fork, tmp_path):
    """Fails if the ratio is taken per token or over the whole pack, or if tokens are clipped one by one."""
    path = tiny_models.make_model(tmp_path / "model")
    cfg = test_ppo.settings_with(
        clip_eps=0.05, clip_eps_high=0.1, loss_average="response", policy_updates_per_step=2
    )
    lens = [3, 5, 1, 4]
    batch = test_ppo.make_batch(lens, [1, 0, 1, 0])
    batch.tokens = batch.tokens % tiny_models.VOCABULARY
    batch.advantages = np.repeat([0.7, -0.4, 1.1, -1.3], lens).astype(np.float32)
    network = model.load_network("policy", path, torch.float32)
    pack = ppo.make_pack(batch, range(4), "cpu")
    with torch.no_grad():
        logprobs, _ = network(pack)
    batch.old_logprobs = logprobs.numpy() + np.random.default_rng(0).normal(0, 0.2, 13).astype(np.float32)
    expected, start = [], 0
    for i, length in enumerate(lens):
        place = slice(start, start + length)
        difference = logprobs[place].double() - torch.from_numpy(batch.old_logprobs[place]).double()
        ratio = math.exp(difference.sum().item() / length)
        clipped = min(max(ratio, 0.95), 1.1)
        advantage = float(batch.advantages[start])
        expected += [-min(ratio * advantage, clipped * advantage) / length] * length
        start += length
    learner = SimpleNamespace(cfg=cfg, device="cpu", engine=network)
    changed = module_of(fork("gspo"), "ppo.py").Learner
    learner.vary_loss = types.MethodType(changed.vary_loss, learner)
    loss, _ = changed.policy_terms(learner, batch, [0, 1, 2, 3], is_first=True)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-4)
    learner.vary_loss = types.MethodType(ppo.Learner.vary_loss, learner)
    plain, _ = ppo.Learner.policy_terms(learner, batch, [0, 1, 2, 3], is_first=True)
    assert not np.allclose(plain.detach().numpy(), expected, rtol=1e-2)


def test_lambda_by_length(fork):
    """Fails if the returns, whose λ is 1, change with the advantages, or if a short response gets a negative λ."""
    gae = module_of(fork("length_lambda"), "ppo.py").gae
    lengths = [30, 5, 100]
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 135))
    advantages, _ = gae(rewards, values, lengths, 1.0, 0.95)
    start = 0
    for length in lengths:
        part, lam = slice(start, start + length), max(0.0, 1 - 1 / (0.05 * length))
        written = test_ppo.gae_as_written(rewards[part], values[part], [length], 1.0, lam)
        np.testing.assert_allclose(advantages[part], written, atol=1e-5)
        start += length
    for same, plain in zip(gae(rewards, values, lengths), ppo.gae(rewards, values, lengths)):
        assert np.array_equal(same, plain)


def test_batch_invariance(fork):
    """Fails if the variable is set where there is no GPU, or is not set where there is one."""
    changed = module_of(fork("batch_invariant"), "workers.py")
    cfg = SimpleNamespace(**copy.copy(vars(test_ppo.settings_with())))
    assert changed.worker_environment(cfg, on_gpu=True)["VLLM_BATCH_INVARIANT"] == "1"
    assert "VLLM_BATCH_INVARIANT" not in changed.worker_environment(cfg, on_gpu=False)
