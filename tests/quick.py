"""Quick tests while editing: `make quick`, or python tests/quick.py [pytest's arguments]. Under a minute on two idle cores.

They cover formulas, packing, networks, settings, data, the plan, the log, the grader and the pages. They need torch,
transformers and the small packages of requirements.txt, but not Ray, vLLM or DeepSpeed: here the import of these fails,
installed or not. Tests that compare something with DeepSpeed are left out, and so are those that kill a grading process,
which wait seconds for its end. `make test` runs them all.
"""

import sys

for name in ("ray", "vllm", "deepspeed"):
    sys.modules[name] = None  # Python then raises ImportError for `import name`.

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

TESTS = Path(__file__).resolve().parent
FILES = [
    "test_cheating.py",
    "test_configs.py",
    "test_data.py",
    "test_docs.py",
    "test_evaluate.py",
    "test_forking.py",
    "test_lines.py",
    "test_log.py",
    "test_model.py",
    "test_plan.py",
    "test_ppo.py",
    "test_recipe.py",
    "test_reward.py",
]

if __name__ == "__main__":
    files = [str(TESTS / name) for name in FILES]
    sys.exit(
        pytest.main(
            ["-q", f"--rootdir={TESTS.parent}", "-k", "not deepspeed and not killed", *files, *sys.argv[1:]]
        )
    )
