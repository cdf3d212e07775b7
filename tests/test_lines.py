"""`make lines` measures the code and fails no build."""

import subprocess
import sys

from count_lines import ROOT, measure

SOURCE = '''"""A docstring
of two lines."""

x = 1  # a comment


def f(a):
    """Another."""
    text = f"{a + x!r:>{a}} and {f'{a}'}"
    return text, """first
    second"""
'''


def test_tokens_and_lines_are_counted():
    tokens_on_line, functions = measure(SOURCE)
    # x = 1 | def f ( a ) : | text = "…", an f-string is one token | return text , "…" | second
    assert dict(tokens_on_line) == {4: 3, 7: 6, 9: 3, 10: 4, 11: 0}
    assert functions == {"f": 4}


def test_the_measure_fails_nothing():
    done = subprocess.run([sys.executable, ROOT / "tests/count_lines.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "launch.py" in done.stdout
