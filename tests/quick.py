"""The tests for whoever edits: `make quick`, or python tests/quick.py [pytest's arguments]. Under a minute on two quiet cores.

They cover formulas, packing, networks, settings, data, the plan, the log, the grader and the pages, and need torch,
transformers and the small packages of requirements.txt, but neither Ray nor vLLM nor DeepSpeed: importing one of these
fails here, whether it is installed or not. Left out are the tests that compare something with DeepSpeed, and those that
kill a grading process, since they wait for seconds until it is gone. `make test` runs them all.
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
