"""Convert other people's data to this project's JSONL: python data/prepare.py convert SOURCE [--key=value …]

    SOURCE              a file (JSON, JSON lines, CSV, Parquet or Arrow, also compressed) or the name of a Hugging Face data set
    --out=FILE          the file to write; by default SOURCE's name with .jsonl, in the current folder
    --question=NAME     the column of the question; a dot leads into a nested one: reward_model.ground_truth
    --answer=NAME       the column of the answer; where one of these two is not given, usual names are tried
    --extract=TEXT      the answer is what follows the last TEXT (GSM8K: ####)
    --extract=boxed     the answer is the content of the last \\boxed{…} (MATH)
    --choices=NAME      the column of the choices: a list, {letter: text} or {"text": […], "label": […]}
    --split=train       which part of a Hugging Face data set
    --subset=NAME       which of its configurations

    python data/prepare.py convert openai/gsm8k --subset=main --question=question --answer=answer --extract=####

Rows without a question or an answer are left out and counted. Choices are written into the question, which is all that a
model sees, and the answer becomes a letter. Only Parquet and Arrow files need the package pyarrow, only the hub datasets.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from types import SimpleNamespace

from configs.load import UserError
from data.load import ANSWER_NAMES, QUESTION_NAMES, load_questions, shows, to_question
from reward import extract_answer

OPTIONS = {
    "out": "",
    "question": "",
    "answer": "",
    "extract": "",
    "choices": "",
    "split": "train",
    "subset": "",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"  # first bytes
UNPACK = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}
WRAPPERS = ("data", "rows", "examples", "questions", "items")  # {"data": […]}


def read_arguments(argv):
    """The options and the source, as a namespace. Raises UserError where an argument is not one of OPTIONS."""
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "convert: name a file or a Hugging Face data set first; data/convert.py lists the options"
        )
    options = dict(OPTIONS)
    for argument in argv[1:]:
        key, _, value = argument.removeprefix("--").partition("=")
        if key not in options or not value:
            raise UserError(f"convert: {argument!r} is none of --{'=, --'.join(OPTIONS)}=")
        options[key] = value
    return SimpleNamespace(source=os.path.expanduser(argv[0]), **options)


def convert_file(options):
    """Write the questions of options.source to a file, atomically, and say how many they are.

    Raises UserError where the source cannot be read, no row has a question and an answer, or the file exists already.
    """
    rows = read_rows(options)
    questions, left_out = [], 0
    for row in rows:
        question = convert_row(row, options)
        if question:
            questions.append(question)
        else:
            left_out += 1
    if not questions:
        raise UserError(
            f"{options.source}: none of its {len(rows)} rows has a question and an answer; {columns_of(rows)}"
        )
    out = os.path.expanduser(options.out or f"{Path(options.source).name.split('.')[0]}.jsonl")
    write_questions(questions, out)
    print(f"{out}: {len(questions):,} questions of {options.source}, {left_out:,} rows left out")
    print(f"the first answer: {questions[0]['answer']!r}")


def write_questions(questions, out):
    if os.path.exists(out):
        raise UserError(f"{out} exists already: give another file with --out=FILE")
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
    part = f"{out}.part"
    try:
        Path(part).write_text("".join(lines), encoding="utf-8")
        load_questions(part)  # A file that a run would refuse is refused here.
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    finally:
        Path(part).unlink(missing_ok=True)


# ---- Rows --------------------------------------------------------------------------------------------------------


def read_rows(options):
    """The rows of the source, mostly dicts."""
    path = options.source
    if os.path.isfile(path):
        return rows_of(Path(path).read_bytes(), path)
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder: name a file in it")
    if path.count("/") > 1 or Path(path).suffix in (".json", ".jsonl", ".parquet", ".csv"):
        raise UserError(f"{path}: there is no such file")
    return hub_rows(options)


def rows_of(content, path):
    """The rows in the bytes of a file. Its path is used in messages only."""
    for start, unpack in UNPACK.items():
        if content.startswith(start):
            try:
                return rows_of(unpack(content), path)
            except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
                raise UserError(f"{path}: cannot be unpacked: {error}") from None
    if content.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        return table_rows(content, path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is neither Parquet, Arrow nor UTF-8 text: {error}") from None
    if text.lstrip()[:1] not in ("{", "["):
        return list(
            csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in text.partition("\n")[0] else ",")
        )
    return json_rows(text, path)


def json_rows(text, path):
    """The rows of a JSON text: an array, an object around an array, or objects one after another over any number of lines."""
    decoder, rows, position = json.JSONDecoder(), [], 0
    try:
        while text[position:].strip():
            position += len(text[position:]) - len(text[position:].lstrip())
            value, position = decoder.raw_decode(text, position)
            rows += value if isinstance(value, list) and not is_dialogue(value) else [value]
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, position) + getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: broken or truncated JSON: {getattr(error, 'msg', error)}") from None
    if len(rows) == 1 and isinstance(rows[0], dict):
        for name in WRAPPERS:
            if isinstance(rows[0].get(name), list):
                return rows[0][name]
    return rows


def is_dialogue(value):
    """Whether a list is one entry in ORZ's format (two messages), and not a list of rows."""
    return all(isinstance(item, dict) and "from" in item for item in value)


def table_rows(content, path):
    """The rows of a Parquet or an Arrow file."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet or Arrow needs pyarrow: pip install pyarrow") from None
    buffer = pyarrow.BufferReader(content)
    try:
        if content.startswith(PARQUET):
            table = pyarrow.parquet.read_table(buffer)
        elif content.startswith(ARROW_FILE):
            table = pyarrow.ipc.open_file(buffer).read_all()
        else:
            table = pyarrow.ipc.open_stream(buffer).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is not a whole Parquet or Arrow file: {reason}") from None
    return table.to_pylist()


def hub_rows(options):
    try:
        import datasets
    except ImportError:
        reason = "reading a Hugging Face data set needs datasets: pip install datasets"
        raise UserError(f"{options.source}: is no file here; {reason}") from None
    try:
        return list(datasets.load_dataset(options.source, options.subset or None, split=options.split))
    except Exception as error:  # The hub, the network and the file readers raise many kinds of exceptions.
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{options.source}: it cannot be fetched from the hub: {reason}") from None


# ---- One row -----------------------------------------------------------------------------------------------------


def convert_row(row, options):
    """{"question", "answer"}, and "choices" where there are some; None for a row without a question or an answer."""
    if not options.question and not options.answer:
        try:  # The row may be in this project's format or in one of ORZ's.
            question = to_question(row, options.source)
            row = {"question": question.question, "answer": question.answer, "choices": question.choices}
        except UserError:
            pass
    if not isinstance(row, dict):
        return None
    question = as_text(column(row, [options.question] if options.question else QUESTION_NAMES))
    answer = column(row, [options.answer] if options.answer else (*ANSWER_NAMES, "reward_model.ground_truth"))
    choices = as_choices(column(row, [options.choices or "choices"]))
    if choices:
        answer = as_letter(answer, column(row, [options.choices or "choices"]), choices)
    else:
        answer = extracted(as_text(answer), options.extract)
    if not question.strip() or not answer.strip():
        return None
    if not choices:
        return {"question": question, "answer": answer}
    if not shows(question, choices):
        question += "".join(f"\n{letter}. {text}" for letter, text in choices.items())
    return {"question": question, "answer": answer, "choices": choices}


def column(row, names):
    """The first of these columns that the row has; None if it has none. A dot leads into a nested column."""
    for name in names:
        value = row
        for part in [name] if name in row else name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def as_text(value):
    """A value of a column as a text: 3.0 becomes "3", a chat becomes its user's last message; "" if there is no text."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        asked = [
            message for message in value if message.get("role", message.get("from")) in ("user", "human")
        ]
        return as_text((asked or value)[-1].get("content", (asked or value)[-1].get("value")))
    if isinstance(value, list) and len(value) == 1:
        return as_text(value[0])
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None or isinstance(value, (list, dict)) else str(value)


def extracted(answer, marker):
    """The answer inside a solution: what follows the last marker, or stands in the last box; "" if there is none."""
    if not marker:
        return answer
    if marker == "boxed":
        return extract_answer(f"<answer>{answer}</answer>")
    _, found, rest = answer.rpartition(marker)
    return rest.strip() if found else ""


def as_choices(value):
    """{letter: text} of a column of choices, or None."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list):
        value = dict(zip(LETTERS, value))
    if not isinstance(value, dict) or not value:
        return None
    return {str(letter): as_text(text) for letter, text in value.items()}


def as_letter(answer, column_of_choices, choices):
    """The letter of the right choice, which a data set may give as a letter, a label, a number from 0, or its text."""
    labels = column_of_choices.get("label") if isinstance(column_of_choices, dict) else None
    letters = list(choices)
    if isinstance(labels, list) and answer in labels:
        return letters[labels.index(answer)]
    if type(answer) is int and 0 <= answer < len(letters):
        return letters[answer]
    text = as_text(answer).strip()
    if text in choices:
        return text
    for letter, choice in choices.items():
        if choice.strip() == text:
            return letter
    return ""


def columns_of(rows):
    """The names of the columns, for an error message."""
    if rows and isinstance(rows[0], dict):
        return f"its columns are {', '.join(map(str, rows[0]))}: name them with --question= and --answer="
    return "its rows have no columns"
