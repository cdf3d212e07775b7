"""README.md and docs/*.md: links lead somewhere, files and settings that are named exist, every metric is explained."""

import ast
import json
import re
from pathlib import Path

import pytest

from configs.load import BASE, MAY_CHANGE, MAY_MOVE, read_file
from log import EVALUATION_COLUMNS, STEP_COLUMNS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def name_of(page):
    return str(page.relative_to(ROOT))


def code_blocks(text):
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def backticked(text):
    """What stands in single backticks outside code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page):
    """The names by which GitHub links to the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """Fails if a page is renamed and another one still links to it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}"


def test_the_responses_shown_are_recorded():
    """Fails if the front page shows two responses that no recorded run of the demo gave."""
    shown = next(block for block in code_blocks(README) if block.startswith("before "))
    for row in json.loads((ROOT / "docs/demo/responses.json").read_text()):
        before, after = row["before"], row["after"]
        words = f"before {before['response']} reward {before['reward']:.0f}"
        words += f" after {after['response']} reward {after['reward']:.0f}"
        if shown.split() == words.split():
            return
    raise AssertionError("docs/demo/responses.json has no such pair")


def test_the_tree_of_files_exists():
    """The front page shows where things are. Fails if a file was moved and the page was not."""
    tree = next(block for block in code_blocks(README) if block.startswith("launch.py "))
    found = set()
    for line in tree.splitlines():
        first, *others = re.findall(r"[\w./]+(?:\.(?:py|lark|md)|/)(?=[\s,:;)]|$)", line)
        for name in [first, *others]:
            places = [ROOT / name]
            if first.endswith("/"):
                places.append(ROOT / first / name)  # the line of a folder names files in it
            assert any(place.exists() for place in places), f"{name} in the line {line!r}"
            found.add(name)
    assert {"launch.py", "ppo.py", "base.py", "plan.py", "docs/"} <= found


FOLDERS = "configs|data|tools|tests|bench|docs|docker|examples"
# Files in a folder of the project, or Python files beside launch.py. data/orz/ and models/ are made by data/prepare.py.
FILES = re.compile(rf"(?<![\w./])(?!data/orz/)((?:{FOLDERS})/[\w./]*\w\.\w+|\w+\.py)\b")
# Files of examples on the pages, and files that the patches in docs/forks make.
OF_THE_READER = {"mine.py", "longer.py", "sums.py", "make_sums.py", "easy_countdown.py", "task.py"}
OF_THE_READER |= {"bonus.py", "boxed.py", "smollm3.py"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    """Fails if a command or a sentence names a file that no longer exists, as plot.py after it became
    tools/plot.py."""
    text = page.read_text(encoding="utf-8")
    for part in [*code_blocks(text), *backticked(text)]:
        for name in FILES.findall(part):
            inside = [ROOT / name, *(ROOT / folder / name for folder in FOLDERS.split("|"))]
            is_pattern = "NAME" in name  # ablation_NAME.json stands for several files
            is_there = Path(name).name in OF_THE_READER or any(path.exists() for path in inside)
            assert is_there or is_pattern, f"{name_of(page)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_of_commands_exist(page):
    """Fails if a command on a page would end in "unknown setting"."""
    known = set(read_file(BASE))
    for patch in (ROOT / "docs/forks").glob("*.patch"):  # Some bring a setting of their own.
        known.update(re.findall(r"^\+([a-z]\w*) = ", patch.read_text(encoding="utf-8"), re.MULTILINE))
    commands = re.findall(r"launch\.py[^\n|]*", page.read_text(encoding="utf-8"))
    for command in commands:
        for key in re.findall(r"--(\w+)=", command):
            assert key in known, f"{name_of(page)}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_targets_of_make_exist(page):
    """Fails if a page says `make` and a target that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE)) | {"soak"}
    text = page.read_text(encoding="utf-8")
    for part in [*code_blocks(text), *backticked(text)]:
        for target in re.findall(r"\bmake ([a-z-]+)", part):
            assert target in targets, f"{name_of(page)}: make {target}"


def test_the_loop_on_the_front_page_is_that_of_train():
    """The front page shows the loop in ten lines; launch.train makes the same calls in the same order."""
    block = next(block for block in code_blocks(README) if block.startswith("for step in range("))
    train = function_in("launch.py", "train")
    calls = re.findall(r"(?<![\w.])(?:\w+\.)?\w+(?=\()(?<!range)", re.sub(r"#.*", "", block))
    assert len(calls) >= 8
    position = 0
    for call in calls:
        position = train.find(f"{call}(", position)
        assert position >= 0, f"{call} is not in launch.train, or not there in this order"


# ---- Metrics -----------------------------------------------------------------------------------------------------


def source_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def function_in(file, name):
    """The source of a function."""
    source = source_of(file)
    nodes = ast.walk(ast.parse(source))
    found = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    return ast.get_source_segment(source, found)


# The names of the dicts that the code fills with metrics.
DICTS = {"metrics", "vectors", "shares", "sums", "results", "means"}
NO_METRICS = {"deepspeed_config"}  # functions that make dicts of other things
PARTS = {  # the texts that an expression in the braces of a key may stand for
    "kind": ["policy", "critic"],
    "name": ["response_tokens", "response_tokens_right", "response_tokens_wrong"],
}


def keys_of(node):
    """The keys that an expression may stand for; [] if only a run knows them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if not isinstance(node, ast.JoinedStr):
        return []
    keys = [""]
    for part in node.values:
        texts = [part.value] if isinstance(part, ast.Constant) else PARTS.get(ast.unparse(part.value), [])
        keys = [key + text for key in keys for text in texts]
    return keys


def keys_made_in(file):
    """The literal keys of the dicts that the functions of a file make or fill."""
    keys = set()
    for function in ast.walk(ast.parse(source_of(file))):
        if not isinstance(function, ast.FunctionDef) or function.name in NO_METRICS:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Dict):
                for key in node.keys:
                    keys.update(keys_of(key))
            is_store = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
            if is_store and isinstance(node.value, ast.Name) and node.value.id in DICTS:
                keys.update(keys_of(node.slice))
    return keys


def metrics_in_the_code():
    import launch
    from reward import response_stats

    keys = {*response_stats(""), *launch.UNGRADED}
    return keys | keys_made_in("launch.py") | keys_made_in("ppo.py")


def phases_in_the_code():
    """The phases of `seconds`: the first arguments of WorkerGroup's call() and sample(). Start and export belong to no
    step."""
    source = source_of("workers.py")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    group = next(node for node in classes if node.name == "WorkerGroup")
    phases = set(re.findall(r"self\.(?:call|sample)\(\s*\"(\w+)\"", ast.get_source_segment(source, group)))
    # The phase of WorkerGroup.update is the name of the network.
    return phases - {"setup", "load", "export"} | {"policy", "critic"}


def metrics_of_stored_rows():
    keys = set()
    for line in source_of("tests/old_run/metrics.jsonl").splitlines():
        row = json.loads(line)
        keys |= row.keys() | row["seconds"].keys()
        for result in row.get("eval", {}).values():
            keys |= result.keys()
    return keys


def test_every_metric_is_explained():
    """Fails if metrics.jsonl has a metric that docs/metrics.md does not explain. A new one needs a row there."""
    made, phases = metrics_in_the_code(), phases_in_the_code()
    explained = set(backticked((ROOT / "docs/metrics.md").read_text(encoding="utf-8")))
    missing = (made | phases | metrics_of_stored_rows()) - explained
    assert not missing, f"docs/metrics.md does not explain {sorted(missing)}"
    # These must be among them, or the code is no longer found as this test expects.
    assert {"entropy", "lr_critic", "response_tokens_wrong_std", "update_kl", "kl_loss", "epoch"} <= made
    assert {"generate", "eval", "values", "save", "sync"} <= phases


def test_every_column_is_explained():
    """The printed table has titles of its own; docs/metrics.md says which metric each of them is."""
    explained = set(backticked((ROOT / "docs/metrics.md").read_text(encoding="utf-8")))
    for column in [*STEP_COLUMNS, *EVALUATION_COLUMNS]:
        assert column.title in explained, column.title


def test_settings_that_may_change_are_listed():
    """Fails if docs/operations.md lists other settings than the code as those that may differ when a run is
    resumed."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    for kind, settings in (("may change", MAY_CHANGE), ("may move", MAY_MOVE)):
        (row,) = re.findall(rf"^\| {kind} \|.*$", text, re.MULTILINE)
        assert sorted(backticked(row)) == sorted(settings)
