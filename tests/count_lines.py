"""Count code lines against the limits of the design: blank lines, comments and docstrings do not count.

python tests/count_lines.py    prints the count, and exits 1 where a limit is broken
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ["launch.py", "ppo.py", "rollout.py", "reward.py", "model.py"]
HOMES = ["log.py", "configs/load.py", "configs/base.py", "data/load.py"]
LIMIT_CORE, LIMIT_ALL, LIMIT_FUNCTION = 1100, 1450, 60


def code_lines(source):
    """The numbers of the lines that hold code."""
    nothing = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                lines.difference_update(range(body[0].lineno, body[0].end_lineno + 1))
    return lines


def main():
    totals, wrong = {}, []
    for name in CORE + HOMES:
        source = (ROOT / name).read_text()
        lines = code_lines(source)
        totals[name] = len(lines)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = len(lines & set(range(node.lineno, node.end_lineno + 1)))
                if size > LIMIT_FUNCTION:
                    wrong.append(f"{name}: {node.name} has {size} lines, over {LIMIT_FUNCTION}")
    core, everything = sum(totals[name] for name in CORE), sum(totals.values())
    for name, count in totals.items():
        print(f"{count:6d}  {name}")
    print(f"{core:6d}  the five core files (limit {LIMIT_CORE})")
    print(
        f"{everything:6d}  everything a training run imports (limit {LIMIT_ALL}); a config of a model size adds its own"
    )
    stated = (
        f"{core:,} lines of code in the five core files, {everything:,} in everything a training run imports"
    )
    if stated not in " ".join((ROOT / "README.md").read_text().split()):
        wrong.append(f"README.md does not state: {stated}")
    for line in wrong:
        print(line)
    sys.exit(core > LIMIT_CORE or everything > LIMIT_ALL or bool(wrong))


if __name__ == "__main__":
    main()
