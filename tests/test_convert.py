"""data/prepare.py convert: common forms of data become this project's JSONL completely, or are refused in one line."""

import bz2
import gzip
import json
import lzma
import sys

import pytest

from configs.load import UserError
from data import prepare
from data.load import Question, load_questions


def converted(tmp_path, capsys, content, *options, name="in.json"):
    """The Questions that `convert` makes of a file with this content, and what it prints."""
    source, out = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert prepare.main(["convert", str(source), f"--out={out}", *options]) == 0, capsys.readouterr()
    return load_questions(str(out)), capsys.readouterr().out


def refused(capsys, *argv):
    """The one line that `convert` ends with."""
    assert prepare.main(["convert", *map(str, argv)]) != 0
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
    return err


ROW = {"question": "1+1", "answer": "2"}
GSM8K = {"question": "Mia?", "answer": "She has 3*6=<<3*6=18>>18 pens.\n#### 1,018"}
MATH = {"problem": "Solve.", "level": "1", "solution": "So $x = \\boxed{\\frac{1}{2}}$, not \\boxed."}
VERL = {
    "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1"}],
    "data_source": "x",
}
VERL["reward_model"] = {"style": "rule", "ground_truth": "2"}
ORZ = [{"from": "human", "value": "1+1"}, {"from": "assistant", "ground_truth": {"value": "2"}}]
LINES = json.dumps(ROW) + "\n" + json.dumps(ROW | {"question": "1 + 1"}) + "\n"
TWO = [Question("1+1", "2"), Question("1 + 1", "2")]

# name → (content of a file, options, the Questions)
FORMS = {
    "pretty": (json.dumps(ROW, indent=2), [], TWO[:1]),
    "several pretty ones": (json.dumps(ROW, indent=2) * 2, [], TWO[:1] * 2),
    "array": (json.dumps([ROW, ROW]), [], TWO[:1] * 2),
    "wrapped": (json.dumps({"version": 1, "data": [ROW]}), [], TWO[:1]),
    "lines": (LINES, [], TWO),
    "gz": (gzip.compress(LINES.encode()), [], TWO),
    "bz2": (bz2.compress(LINES.encode()), [], TWO),
    "xz": (lzma.compress(LINES.encode()), [], TWO),
    "csv": ('question,answer\n"1+1",2\n1 + 1,2\n', [], TWO),
    "tsv": ("question\tanswer\n1+1\t2\n", [], TWO[:1]),
    "orz": (json.dumps([ORZ, ORZ]), [], TWO[:1] * 2),
    "usual names": (json.dumps({"problem": "1+1", "solution": "2"}), [], TWO[:1]),
    "named": (json.dumps({"a": "1+1", "b": "2", "answer": "9"}), ["--question=a", "--answer=b"], TWO[:1]),
    "nested": (json.dumps(VERL), ["--answer=reward_model.ground_truth"], TWO[:1]),
    "nested, found": (json.dumps(VERL), [], TWO[:1]),
    "whole number": (json.dumps(ROW | {"answer": 2}), [], TWO[:1]),
    "float": (json.dumps(ROW | {"answer": 2.0}), [], TWO[:1]),
    "list of one": (json.dumps(ROW | {"answer": ["2"]}), [], TWO[:1]),
    "gsm8k": (json.dumps(GSM8K), ["--extract=####"], [Question("Mia?", "1,018")]),
    "math": (json.dumps(MATH), ["--extract=boxed"], [Question("Solve.", "\\frac{1}{2}")]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path, capsys):
    """Fails if a common form of data set is refused as broken."""
    content, options, expected = FORMS[form]
    questions, said = converted(tmp_path, capsys, content, *options)
    assert questions == expected
    assert f"{len(expected)} questions of {tmp_path}/in.json, 0 rows left out" in said


PLANETS = {"A": "Mars", "B": "Jupiter"}
CHOICES = {
    "letter": ({"choices": PLANETS, "answer": "B"}, []),
    "text": ({"choices": ["Mars", "Jupiter"], "answer": "Jupiter"}, []),
    "number": ({"options": ["Mars", "Jupiter"], "answer": 1}, ["--choices=options"]),
    "labels": ({"choices": {"text": ["Mars", "Jupiter"], "label": ["1", "2"]}, "answer": "2"}, []),
}


@pytest.mark.parametrize("form", CHOICES)
def test_choices_are_written_into_the_question(form, tmp_path, capsys):
    """Fails if only the grader knows the choices: the model would guess a letter, and learn to guess."""
    fields, options = CHOICES[form]
    ((question, answer, choices, _),), _ = converted(
        tmp_path, capsys, json.dumps({"question": "Largest?"} | fields), *options
    )
    assert (question, answer, choices) == ("Largest?\nA. Mars\nB. Jupiter", "B", PLANETS)


def test_choices_that_are_there_are_not_written_twice(tmp_path, capsys):
    row = {"question": "Largest? (A) Mars (B) Jupiter", "choices": PLANETS, "answer": "A"}
    (question,), _ = converted(tmp_path, capsys, json.dumps(row))
    assert question == Question(row["question"], "A", PLANETS)


def test_rows_without_an_answer_are_counted(tmp_path, capsys):
    """Fails if rows are lost without a message, or become questions that no answer can solve."""
    rows = [GSM8K, GSM8K | {"answer": "no marker"}, GSM8K | {"question": ""}, {"question": "1"}, "text"]
    questions, said = converted(tmp_path, capsys, json.dumps(rows), "--extract=####")
    assert len(questions) == 1 and "1 questions" in said and "4 rows left out" in said


def test_parquet_and_arrow(tmp_path, capsys):
    """Fails if the error about an Arrow file names a command that cannot read it."""
    reason = "pyarrow is optional: pip install -r requirements-extras.txt"
    pyarrow = pytest.importorskip("pyarrow", reason=reason)
    parquet = pytest.importorskip("pyarrow.parquet", reason=reason)
    table = pyarrow.Table.from_pylist([ROW, VERL["reward_model"] | ROW])
    parquet.write_table(table, tmp_path / "t")
    questions, _ = converted(tmp_path, capsys, (tmp_path / "t").read_bytes(), name="table.parquet")
    assert questions == TWO[:1] * 2
    for name, new_writer in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with new_writer(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        content = (tmp_path / name).read_bytes()
        (tmp_path / "out.jsonl").unlink()
        questions, _ = converted(tmp_path, capsys, content, name=f"{name}.arrow")
        assert questions == TWO[:1] * 2
        (tmp_path / "cut.arrow").write_bytes(content[:40])
        assert "cut.arrow: is not a whole Parquet or Arrow" in refused(capsys, tmp_path / "cut.arrow")
        with pytest.raises(UserError, match="cut.arrow: is an Arrow file, not JSON: .* convert"):
            load_questions(str(tmp_path / "cut.arrow"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1\xfe\xfe PAR1")
    assert "cut.parquet: is not a whole Parquet or Arrow" in refused(capsys, tmp_path / "cut.parquet")


def test_optional_packages_are_asked_for(tmp_path, capsys, monkeypatch):
    """Fails if a missing optional package ends in a ModuleNotFoundError instead of the command that installs it."""
    (tmp_path / "table.parquet").write_bytes(b"PAR1\xfe\xfe PAR1")
    monkeypatch.chdir(tmp_path)
    for package in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert "pip install pyarrow" in refused(capsys, "table.parquet")
    assert "pip install datasets" in refused(capsys, "openai/gsm8k", "--extract=####")


def test_what_cannot_be_converted(tmp_path, capsys, monkeypatch):
    """Fails if half a file is left behind, if an existing file is overwritten, or if a misspelt option is ignored."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{"q": "1", "a": "2"}]))
    (tmp_path / "cut.json").write_text('[\n{"question": "1",\n')
    (tmp_path / "cut.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    (tmp_path / "latin.csv").write_bytes("é".encode("latin-1"))
    (tmp_path / "good.json").write_text(json.dumps(ROW))
    (tmp_path / "good.jsonl").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "its columns are q, a: name them with --question= and --answer=" in refused(capsys, "rows.json")
    assert "cut.json:3: broken or truncated JSON" in refused(capsys, "cut.json")
    assert "cut.gz: cannot be unpacked" in refused(capsys, "cut.gz")
    assert "neither Parquet, Arrow nor UTF-8" in refused(capsys, "latin.csv")
    assert "good.jsonl exists already" in refused(capsys, "good.json")
    assert "cannot write /proc/x.jsonl" in refused(capsys, "good.json", "--out=/proc/x.jsonl")
    assert "there is no such file" in refused(capsys, "none.json")
    assert "is a folder: name a file in it" in refused(capsys, "/proc")
    assert "'--anwser=a' is none of" in refused(capsys, "rows.json", "--anwser=a")
    assert "name a file" in refused(capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
