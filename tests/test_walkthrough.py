"""docs/walkthrough.md: every number in it follows from the recorded step, computed by the project's own functions."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import walkthrough  # noqa: E402

PAGE = walkthrough.PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def step():
    return walkthrough.recorded_step()


def test_every_block_is_what_the_code_computes(step):
    """Fails if GAE, a loss or a pack changes and the page that explains it still shows the old numbers."""
    assert walkthrough.with_blocks(PAGE, step) == PAGE


def test_every_number_in_the_prose_stands_in_a_block_or_is_a_setting(step):
    """Fails if a sentence quotes a number of an older record."""
    blocks = "\n".join(block(step) for block in walkthrough.BLOCKS)
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    settings = {str(value) for value in vars(step.cfg).values()}
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]|\s*million)", prose)
    assert numbers
    for number in numbers:
        assert number in settings or re.search(rf"(?<![\d.]){number}(?!\d)", blocks), number


def test_the_record_agrees_with_what_the_run_measured(step):
    """The record is made from checkpoints after the run. Fails if a wrong checkpoint gives another step's values."""
    measured = step.recorded["metrics"]
    assert measured["step"] == walkthrough.STEP
    for name in ("explained_var", "value_mean", "advantage_abs"):
        assert step.metrics[name] == pytest.approx(measured[name], rel=1e-4), name
    assert step.batch.rewards.mean() == pytest.approx(measured["reward"], abs=1e-6)
    assert int(step.batch.lengths.sum()) == measured["tokens"]
    assert float(step.entropies.mean(dtype=np.float64)) == pytest.approx(measured["entropy"], rel=1e-3)


def test_the_update_followed_the_advantages(step):
    """Fails if the record has the log-probs before and after the update swapped, or those of another step."""
    change = step.logprobs_after - step.logprobs  # [N]
    assert float((change * step.batch.advantages).sum()) > 0


def test_what_the_page_says_of_the_four_responses(step):
    """Fails if the sentences around the blocks describe another record."""
    wrong, guess, right, lucky = walkthrough.FOLLOWED
    assert [step.samples[i].reward for i in walkthrough.FOLLOWED] == [0.0, 0.0, 1.0, 1.0]
    of_right = step.batch.advantages[list(walkthrough.tokens_of(step, right))]
    assert of_right[0] > 0 and (of_right[1:] < of_right[0] / 2).all()
    line_break = walkthrough.tokens_of(step, wrong)[0]
    assert step.batch.advantages[line_break] < 0
    assert step.logprobs_after[line_break] > step.logprobs[line_break]
