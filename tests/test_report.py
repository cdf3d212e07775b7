"""The report shows all that was recorded, and what a model wrote stays text. Some tests open it in headless Chromium."""

import base64
import gzip
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import browser
import numpy as np
import pytest

import token_record
from configs.load import ROOT
from log import Log
from tools import report

HOSTILE = (
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"><!--"
)
WORDS = ["7", "+", "8", "=", "15", "\n", "so ", "wait, ", "</think>", "\\boxed{15}", " é", "<b>"]


def make_run(folder, steps=3, responses=8, hostile=False, critic=True, seed=0):
    """The folder that a run leaves: metrics, and per-token records of its training steps and of two evaluations."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for step in range(steps + 1):
        row = {"step": step, "seconds": {"generate": 1.5, "policy": 0.25}}
        row |= {
            "reward": step / 10,
            "accuracy": step / 10,
            "response_tokens": 10.0 + step,
            "clipfrac_low": None,
        }
        if step in (0, steps):
            scores = {"accuracy": 0.2 + step / 10, "reward": 0.2, "response_tokens": 9.0, "cut_off": 0.0}
            row["eval"] = {"math": scores}
            write_record(folder, f"eval_math_{step}", rng, 4, hostile, ["sampler_logprobs"])
        if step > 0:
            names = [
                "advantages",
                "policy_logprobs",
                "entropies",
                "logprob_differences",
                "importance_weights",
            ]
            names += ["values", "raw_advantages"] if critic else []
            write_record(folder, f"step_{step}", rng, responses, hostile, names)
        rows.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(rows))
    settings = {"model": "tiny", "policy_lr": 1e-6 * (1 + seed), "versions": ["a==1"]}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_record(folder, name, rng, count, hostile, quantities):
    """A record of `count` responses; the first is right and the longest, the second is cut off."""
    lengths = rng.integers(1, 30, count).astype(np.int32)
    lengths[0] = 31
    words = [WORDS[i] for i in rng.integers(0, len(WORDS), lengths.sum())]
    questions = [f"{i}+8" for i in range(count)]
    if hostile:
        words[3] = questions[0] = HOSTILE
    texts = {
        "questions": questions,
        "answers": [HOSTILE if hostile else "15"] * count,
        "prompts": [f"User: {question}" for question in questions],
        "finish_reasons": ["length" if i == 1 else "stop" for i in range(count)],
        "graded": ["by_number"] * count,
        "tokens": words,
    }
    arrays = {
        "rows": np.arange(count, dtype=np.int32) * 2,
        "prompt_indices": np.arange(count, dtype=np.int32),
        "response_lens": lengths,
        "rewards": (np.arange(count) % 2 == 0).astype(np.float32),
        "correct": np.arange(count) % 2 == 0,
        "question_accuracy": np.full(count, 0.5, np.float32),
        "token_ids": np.zeros(lengths.sum(), np.int32),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
    }
    for quantity in quantities:
        numbers = rng.normal(0, 1, lengths.sum())
        if "logprobs" in quantity:
            numbers = -np.abs(numbers)
        arrays[quantity] = numbers.astype(np.float32 if quantity == "logprob_differences" else np.float16)
    token_record.write(folder / "tokens", name, arrays)


def command(*arguments):
    words = [sys.executable, ROOT / "tools" / "report.py", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def payloads(path):
    """The index of a report, and {payload id: its bytes, unpacked}."""
    page = path.read_text(encoding="utf-8")
    index = re.search(r'<script type="application/json" id="index">(.*?)</script>', page)[1]
    found = re.findall(r'<script type="text/plain" id="(\w+)">([\w+/=]*)</script>', page)
    return json.loads(index), {name: gzip.decompress(base64.b64decode(text)) for name, text in found}


# ---- The file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", [True, False], ids=["with a critic", "without"])
def test_it_holds_as_many_numbers_as_tokens(tmp_path, critic):
    """Fails if tokens and their numbers get out of step, so that the report colours a token by the advantage of
    another one."""
    folder = make_run(tmp_path / "a", critic=critic)
    assert report.main([str(folder)]) == 0
    index, found = payloads(folder / "report.html")
    run = json.loads(found[index["runs"][0]])
    assert [(file["set"], file["step"]) for file in run["files"]] == [
        ("math", 0),
        (None, 1),
        (None, 2),
        (None, 3),
        ("math", 3),
    ]
    columns = run["responses"]
    assert len({len(column) for column in columns.values()}) == 1 and len(columns["file"]) == 3 * 8 + 2 * 4
    for i, file in enumerate(run["files"]):
        name = f"step_{file['step']}" if file["set"] is None else f"eval_{file['set']}_{file['step']}"
        record = token_record.read(folder / f"tokens/{name}.npz")
        tokens = np.frombuffer(found[file["tokens"]], "<u4")
        numbers = np.frombuffer(found[file["numbers"]], "<f4").reshape(len(file["quantities"]), -1)
        assert [run["vocabulary"][place] for place in tokens] == record["tokens"]
        assert numbers.shape[1] == len(tokens) == file["num_tokens"] == record["response_lens"].sum()
        assert ("values" in file["quantities"]) == (critic and file["set"] is None)
        for quantity, shown in zip(file["quantities"], numbers):
            assert np.allclose(shown, record[quantity], rtol=1e-3), quantity
        here = [place for place, of_file in enumerate(columns["file"]) if of_file == i]
        assert [columns["length"][place] for place in here] == record["response_lens"].tolist()
        asked = [run["questions"][columns["question"][place]] for place in here]
        assert [question for question, _, _ in asked] == record["questions"]
    assert run["metrics"]["eval/math/accuracy"] == [0.2, None, None, 0.5]
    assert run["metrics"]["seconds/policy"] == [0.25] * 4 and "clipfrac_low" not in run["metrics"]


def test_nothing_that_a_model_wrote_is_part_of_the_page(tmp_path):
    """Fails if text that a model wrote reaches the page unencoded: `</script>` in a response would end the script, and
    what follows it would be run."""
    folder = make_run(tmp_path / "<script>{{data}}", hostile=True)
    assert report.main([str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "owned" not in page and "<script>{{" not in page
    assert page.count("</script>") == page.count("<script")
    # Two scripts are run, uPlot's and the page's own; all others hold data.
    assert len(re.findall(r"<script>", page)) == 2
    # Nothing is fetched from elsewhere.
    assert not re.findall(r'(?:src|href)="?http|@import|url\(', page)


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    """Fails if a wrong folder ends in a traceback, or if one damaged file prevents the whole report."""
    folder = make_run(tmp_path / "a")
    for arguments, expected in (
        ([], "python tools/report.py RUN"),
        ([str(tmp_path)], "there is no metrics.jsonl in"),
        ([str(folder), "--most=3"], "'--most=3' is neither --out=FILE nor --max_tokens=NUMBER"),
        ([str(folder), f"--out={tmp_path}/no/such.html"], None),
    ):
        code = report.main(arguments)
        err = capsys.readouterr().err
        assert code in (1, 2) and err.count("\n") == 1 and (expected or "cannot be written") in err
    old = folder / "tokens/step_2.npz"
    old.write_bytes(old.read_bytes()[:300])
    (folder / "tokens/step_4.npz").write_bytes(b"")
    (folder / "tokens/step_5.npz.tmp").write_bytes(b"half")
    assert report.main([str(folder)]) == 0
    index, found = payloads(folder / "report.html")
    run = json.loads(found[index["runs"][0]])
    assert [file["step"] for file in run["files"]] == [0, 1, 3, 3]
    assert [note.split()[0] for note in run["notes"]] == ["step_2.npz", "step_4.npz"]
    assert not list(folder.glob("*.tmp"))


def test_a_run_without_records_still_has_curves(tmp_path):
    """Fails if a run without per-token records (an older run, or report_samples = 0) gets no report, or an empty one
    without a reason."""
    folder = make_run(tmp_path / "a")
    for file in folder.glob("tokens/*"):
        file.unlink()
    (folder / "config.json").unlink()
    assert report.main([str(folder)]) == 0
    index, found = payloads(folder / "report.html")
    run = json.loads(found[index["runs"][0]])
    assert run["metrics"]["reward"] and "report_samples = 0" in run["notes"][0]


@pytest.mark.parametrize("most_tokens", [0, 200, 1000, 10**9])
def test_of_too_many_tokens_steps_are_left_out_evenly(tmp_path, most_tokens):
    """Fails if the report of a long run grows too large for a browser, or leaves out the first or last step or an
    evaluation."""
    folder = make_run(tmp_path / "a", steps=20)
    files = report.token_files(folder)
    shown, note = report.choose_files(files, most_tokens)
    steps = [step for set_name, step in map(report.name_and_step, shown) if set_name is None]
    assert steps[0] == 1 and steps[-1] == 20 and len(shown) - len(steps) == 2
    gaps = set(np.diff(steps)[:-1].tolist())
    assert len(gaps) <= 1
    assert len(steps) <= 2 or sum(report.num_tokens(path) for path in shown) <= most_tokens
    assert (note is None) == (len(steps) == 20)


# ---- Made by a run -------------------------------------------------------------------------------------------------


def settings(tmp_path, **more):
    own = {"out_dir": str(tmp_path), "name": "a", "seed": 1, "steps": 3, "task": "", "wandb": False}
    return SimpleNamespace(**own | {"report_samples": 8} | more)


def test_a_report_that_fails_does_not_end_the_run(tmp_path, capsys):
    """Fails if a report that cannot be written ends the run, or if nothing says that there is none."""
    log = Log(settings(tmp_path))
    (log.dir / "metrics.jsonl").unlink()
    log.report()
    log.check_report(300)
    assert "report.html cannot be written (exit code 2, see" in capsys.readouterr().out
    assert "there is no metrics.jsonl" in (log.dir / "logs/report.log").read_text()
    assert log.failed_writes["report.html"] == 1 and log.report_process is None
    log.metrics.close()


def test_a_newer_report_takes_the_place_of_one_that_is_being_made(tmp_path):
    """Fails if an older report that takes longer overwrites the newer one, or leaves a half-written file behind."""
    log = Log(settings(tmp_path))
    (log.dir / "metrics.jsonl").write_text(json.dumps({"step": 0, "seconds": {}}) + "\n")
    log.report()
    first = log.report_process
    half = log.dir / f"report.html.{first.pid}.tmp"
    half.write_text("half")
    log.report()
    assert first.returncode is not None and log.report_process is not first and not half.exists()
    log.check_report(300)
    assert payloads(log.dir / "report.html")[0]["runs"] and not log.failed_writes
    log.metrics.close()


def test_without_recorded_samples_a_run_makes_no_report(tmp_path):
    log = Log(settings(tmp_path, report_samples=0))
    log.report()
    assert log.report_process is None
    log.metrics.close()


def test_a_run_leaves_a_report(undisturbed):
    """Fails if the run ends before the report of the last evaluation is written."""
    index, found = payloads(undisturbed / "report.html")
    run = json.loads(found[index["runs"][0]])
    assert run["steps"] == list(range(7)) and [file["step"] for file in run["files"]].count(6) == 2
    assert run["notes"] == []


# ---- In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser for all tests of this file. On a machine without one these tests are skipped; in CI they fail."""
    if browser.CHROMIUM is None:
        reason = "no chromium: `apt-get install chromium`"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, as .ci/run does")
        pytest.skip(reason)
    with browser.Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def opened(chromium):
    """A function that opens a report. When the test ends, the page must have reported no error and requested nothing
    but itself."""
    chromium.errors.clear()
    chromium.requests.clear()

    def open_report(path, fragment=""):
        chromium.send("Page.navigate", url="about:blank")
        chromium.open(path, fragment)
        return chromium

    yield open_report
    assert chromium.errors == []
    assert {address.split(":")[0] for address in chromium.requests} <= {"file", "about"}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A report of two runs: the first has hostile samples, and the second has no critic."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "first", hostile=True)
    second = make_run(folder / "second", critic=False, seed=1)
    out = folder / "both.html"
    code, printed, err = command(first, second, f"--out={out}")
    assert (code, printed.strip(), err) == (0, str(out), "")
    return out


def count_of(page):
    return int(page.text("#count").split()[0].replace(",", ""))


def test_the_first_screen(opened, two_runs):
    """The first screen shows responses to the same questions at an early and a late step side by side; its table has
    the first and last scores of each evaluation set."""
    page = opened(two_runs)
    table = page.text("#sets")
    assert re.search(r"math\s+20\.0% → 50\.0%\s+0\.200 → 0\.200\s+9 → 9", table), table
    assert "policy_lr" in page.text("#summary")  # the setting in which the runs differ
    assert page.count(".asked") == 4 and page.count(".response") == 8
    assert page.text(".response .facts").startswith("step 0") and page.run(
        "document.querySelectorAll('.response .facts')[1].innerText.startsWith('step 3')"
    )
    page.choose("select.to", "0")
    assert page.run("document.querySelectorAll('.response .facts')[1].innerText.startsWith('step 0')")


def test_curves_of_two_runs_lie_over_each_other(opened, two_runs):
    """Fails if only one of two runs is drawn, or if hovering over a curve shows no numbers."""
    page = opened(two_runs)
    page.click("nav button", 1)
    panels = page.run("[...document.querySelectorAll('#curves h3')].map((title) => title.textContent)")
    assert {
        "reward · Reward",
        "seconds/policy · Seconds per phase",
        "eval/math/accuracy · Accuracy (mean over samples)",
    } <= set(panels)
    labels = page.text("#curves .chart[data-metrics='seconds/policy'] .u-legend")
    assert "first" in labels and "second" in labels
    length = "#curves .chart[data-metrics='response_tokens']"
    assert re.search(r"first\s*13", page.text(length))  # the value of the last step
    x, y = page.middle(f"{length} .u-over")
    left, width = page.run(
        f'(() => {{ const b = document.querySelector("{length} .u-over").getBoundingClientRect(); return [b.x, b.width]; }})()'
    )
    page.move(left + width * 0.34, y)  # over step 1; the axis goes from 0 to 3
    page.wait(f'/step\\s*1/.test(document.querySelector("{length}").innerText)')
    assert re.search(r"first\s*11(?!\d).*second\s*11(?!\d)", page.text(length), re.DOTALL)
    page.type("#find-metric", "seconds")
    assert page.count("#curves .chart:not([hidden])") == 2


def test_samples_are_filtered_and_sorted(opened, two_runs):
    """Fails if a filter shows what it should hide.

    Training has 2 runs of 3 steps with 8 responses each: half of them are right, and one of each step is cut off.
    """
    page = opened(two_runs, "#samples")
    assert count_of(page) == 48
    page.choose("#filter-set", "")
    assert count_of(page) == 64
    page.choose("#filter-verdict", "right")
    assert count_of(page) == 32 and page.count("#list .row .right") == page.count("#list .row") > 0
    page.choose("#filter-verdict", "cut")
    assert count_of(page) == 10
    page.choose("#filter-verdict", "")
    page.choose("#filter-step", "2")
    assert count_of(page) == 16
    page.choose("#filter-run", "1")
    assert count_of(page) == 8
    page.choose("#order", "longest first")
    assert "31 tokens" in page.text("#list .row")
    page.choose("#order", "shortest first")
    lengths = page.run(
        "[...document.querySelectorAll('#list .row')].map((row) => Number(row.innerText.match(/(\\d+) tokens/)[1]))"
    )
    assert len(lengths) == 8 and lengths == sorted(lengths)
    page.type("#filter-text", "3+8")
    assert count_of(page) == 1 and "3+8" in page.text("#list .row")
    page.type("#filter-text", " is in no response")
    assert count_of(page) == 0 and "No response matches" in page.text("#reader")


def test_hovering_a_token_shows_all_its_numbers(opened, two_runs):
    """Fails if a token shows the numbers of another one, or has no colour."""
    record = token_record.read(two_runs.parent / "first/tokens/step_1.npz")
    page = opened(two_runs, "#samples")
    page.choose("#filter-run", "0")
    page.click("#list .row", 0)
    number = record["response_lens"][0]
    page.wait(
        "[...document.querySelectorAll('#reader .token')].every((token) => token.dataset.value !== undefined)"
    )
    assert page.count("#reader .token") == number == 31
    # There are as many advantages as tokens.
    assert page.count("#reader .token[data-value]") == number
    for t in (0, 5, 30):
        page.hover("#reader .token", t)
        page.wait(f"document.getElementById('tip').innerText.includes('token {t + 1} of 31')")
        tip = page.text("#tip")
        shown = dict(re.findall(r"^(.+?)\t(\S+)$", tip, re.MULTILINE))
        for title, name in (
            ("V(s_t)", "values"),
            ("advantage", "advantages"),
            ("… before normalising", "raw_advantages"),
            ("log π", "policy_logprobs"),
            ("entropy", "entropies"),
            ("importance weight", "importance_weights"),
            ("log π − log π_vLLM", "logprob_differences"),
        ):
            assert float(shown[title]) == pytest.approx(float(record[name][t]), rel=2e-2), (title, tip)
        assert float(shown["probability"]) == pytest.approx(
            np.exp(float(record["policy_logprobs"][t])), rel=2e-2
        )
    before = page.run("document.querySelector('#reader .token').style.background")
    page.choose("#reader select.quantity", "values")
    page.wait("document.querySelector('#reader .token[data-value]') !== null")
    assert page.run("document.querySelector('#reader .token').style.background") != before
    # Without a critic there are no values to choose.
    page.choose("#filter-run", "1")
    assert "values" not in page.run(
        "[...document.querySelectorAll('#reader option')].map((one) => one.value)"
    )


def test_a_hostile_sample_does_nothing(opened, two_runs):
    """Fails if a model's text is run, or becomes an HTML element, wherever it is shown: as question, answer, prompt or
    token."""
    page = opened(two_runs)
    title = page.run("document.title")
    for view in range(4):
        page.click("nav button", view)
        page.wait(
            "document.querySelector('section:not([hidden])').innerText.includes('owned') || location.hash === '#curves'"
        )
    page.click("nav button", 2)
    page.type("#filter-text", "onerror")
    assert count_of(page) == 3
    page.wait("document.querySelector('#reader .token[data-value]') !== null")
    page.click("#reader summary")
    assert page.text("#reader").count(HOSTILE) == 4  # question, answer, prompt, token
    page.hover("#reader .token", 3)
    page.wait("document.getElementById('tip').innerText.includes('owned')")
    page.click("#reader .over")
    assert HOSTILE in page.text("#answers")
    assert page.run("document.title") == title and "owned" not in title
    assert page.count("img") == 0
    assert page.run("[...document.scripts].filter((script) => script.type === '').length") == 2


def test_one_question_over_the_steps(opened, two_runs):
    """Fails if the list holds answers to other questions, or has them out of order."""
    page = opened(two_runs, "#question")
    page.type("#find-question", "2+8")
    assert "2+8" in page.text("#answers .question")
    steps = page.run(
        "[...document.querySelectorAll('#answers .facts')].map((line) => Number(line.innerText.match(/step (\\d+)/)[1]))"
    )
    assert steps == [0, 1, 2, 3, 3]


def test_dark_and_light(opened, two_runs):
    page = opened(two_runs)
    color = "getComputedStyle(document.body).backgroundColor"
    first = page.run(color)
    page.click("#theme")
    second = page.run(color)
    page.click("#theme")
    assert first != second and page.run(color) == first


def test_ten_thousand_responses(opened, tmp_path):
    """Fails if every response gets an HTML element of its own, which makes the page slow to open, scroll and
    filter."""
    folder = make_run(tmp_path / "many", steps=20, responses=500)
    assert report.main([str(folder)]) == 0
    page = opened(folder / "report.html", "#samples")
    assert count_of(page) == 10_000 and 0 < page.count("#list .row") < 60
    page.run("document.getElementById('list').scrollTop = 46 * 9990")
    page.wait("document.getElementById('list').innerText.includes('step 20')")
    assert 0 < page.count("#list .row") < 60
    page.type("#filter-text", "499+8")
    assert count_of(page) == 20
    assert page.run("document.querySelectorAll('*').length") < 3000
