"""The examples of docs/grader.md are run, so that the page cannot say what the grader does not do."""

from pathlib import Path

import pytest

from equality import is_equal

PAGE = Path(__file__).resolve().parent.parent / "docs/grader.md"
EXAMPLES = [line for line in PAGE.read_text().splitlines() if line.startswith(("✓ ", "✗ "))]


def test_the_page_has_examples():
    assert len(EXAMPLES) > 60 and all(line.count("  for  ") == 1 for line in EXAMPLES)


@pytest.mark.parametrize("line", EXAMPLES)
def test_example(line):
    answer, reference = line[2:].split("  for  ")
    assert is_equal(answer, reference) is line.startswith("✓")
