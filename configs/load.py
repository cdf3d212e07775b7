"""Settings: read base.py, then the config file, then the command line; strictly, and before anything heavy is imported.

In:   ["configs/tiny.py", "--steps=3", …].   Out: a namespace with every setting of base.py.
Whatever is wrong raises UserError: one line that says what, where, and what to do.
"""

import ast
import difflib
import os
import re
import runpy
import sys
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "configs" / "base.py"
MODES = ("debug", "eval_only")  # each a file beside base.py, read after the config
TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", list: "a list"}


class UserError(Exception):
    """Something the user can put right. Its text is the one line that is printed; exit code 2."""


def load(argv):
    """The settings of a run. Prints the help, which is base.py itself, and exits where it is asked for."""
    if "--help" in argv or "-h" in argv:
        print(f"usage: python launch.py CONFIG [--key=value …]\n\n{BASE.read_text(encoding='utf-8')}")
        sys.exit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError("the config file comes first: python launch.py CONFIG --key=value …, or --help")
    base = read_file(BASE)
    settings = dict(base)
    for path in [argv[0], *(ROOT / f"configs/{mode}.py" for mode in MODES if f"--{mode}=True" in argv)]:
        for key, value in read_file(path).items():
            settings[key] = checked(key, value, base, path)
    for argument in argv[1:]:
        key, equals, text = argument.removeprefix("--").partition("=")  # key=a=b splits at the first
        if not argument.startswith("--") or not equals:
            raise UserError(f"command line: {argument!r} is not of the form --key=value")
        settings[key] = checked(key, parse(text, base.get(key)), base, "command line")
    settings["name"] = settings["name"] or "_".join([Path(argv[0]).stem, *filter(settings.get, MODES)])
    check_rules(settings)
    for key in ("model", "critic_model", "train_data", "eval_data"):
        settings[key] = find(settings[key])
    settings["out_dir"] = os.path.abspath(settings["out_dir"])  # Workers may be started in another folder
    return SimpleNamespace(**settings)


def read_file(path):
    """What a config file assigns: its names without underscore that are no modules, functions or classes."""
    if not os.path.isfile(path):
        raise UserError(f"config file {str(path)!r} does not exist")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # a config is a program: anything can go wrong in it
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", 1)
        reason = " ".join(str(error).split())
        raise UserError(f"{path}:{line}: {type(error).__name__}: {reason}") from None
    hidden = [name for name, x in names.items() if name[0] == "_" or callable(x) or isinstance(x, ModuleType)]
    return {name: value for name, value in names.items() if name not in hidden}


def parse(text, default):
    """A value on the command line. Texts need no quotes; a list is a Python list, or its items between commas."""
    if isinstance(default, str):
        return text
    if isinstance(default, list) and not text.startswith("["):
        return [parse(item, default[0] if default else "") for item in text.split(",") if item]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text  # of a wrong type, then


def checked(key, value, base, place):
    """The value, if there is such a setting and the type is its default's."""
    if key not in base:
        near = difflib.get_close_matches(key, base, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        raise UserError(f"{place}: there is no setting {key!r}; {hint}")
    if not fits(value, base[key]):
        comment, _ = documentation()[key]
        raise UserError(f"{place}: {key} must be {TYPES[type(base[key])]}, not {value!r} ({comment})")
    return value


def fits(value, default):
    """Whether a value has its default's type: an int is a fine float, nothing else is converted."""
    if isinstance(default, list):
        return isinstance(value, list) and all(fits(item, default[0] if default else "") for item in value)
    return type(value) is type(default) or (type(value) is int and type(default) is float)


def documentation():
    """base.py's own words: setting → (comment, what is legal)."""
    pattern = r"^([a-z]\w*) = .*?  # (.*?)(?: \[([^][]+)\])?$"
    found = re.findall(pattern, BASE.read_text(encoding="utf-8"), re.MULTILINE)
    return {key: (comment, legal) for key, comment, legal in found}


def check_rules(settings):
    """What no single type says: the rules in base.py's brackets, some of which bind settings to each other."""
    for key, (comment, legal) in documentation().items():
        if legal and not eval(legal, {"x": settings[key], **settings}):
            rule = re.sub(r"\bx\b", key, legal)
            others = [f", {name}={settings[name]}" for name in re.findall(r"\w+", legal) if name in settings]
            raise UserError(f"{key}={settings[key]!r}{''.join(others)}: it must be that {rule} ({comment})")


def find(path):
    """An absolute path, or a list of them: from here if it exists, else from the project's folder; else as it is."""
    if isinstance(path, list):
        return list(map(find, path))
    places = [os.path.abspath(path), str(ROOT / path)]
    return next((place for place in places if path and os.path.exists(place)), path)
