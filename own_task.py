"""A task file (--task=FILE.py): which functions it may define, and how a grading process calls them.

    is_correct(response, question) -> bool                         the verdict; without it ORZ's rule decides
    reward(response, question, correct, finish_reason) -> float    what PPO maximises; without it 1 where correct, else 0
    questions(split) -> iterable of dicts                          split is "train" or "eval"; without it train_data, eval_data

response is the text of a response. question is a dict: question, answer, choices (or None), and every other field that
the question has. finish_reason is "stop" or "length". docs/own_task.md shows how to write one.

Only grading processes (reward.py) load a task file. Each reply is a list [result, outcome, error]: the outcome is
"by_task", or "task_error" with an error that names the file and the line.
"""

import inspect
import json
import numbers
import os
import sys
from types import ModuleType

from configs.load import failing_line

PARAMETERS = {
    "is_correct": ["response", "question"],
    "reward": ["response", "question", "correct", "finish_reason"],
    "questions": ["split"],
}
# The critic squares its error in fp32: with this limit the sum of all squares of a batch is finite.
LARGEST_REWARD = 1e12
MOST_QUESTIONS = 10_000_000  # of a split; a generator that never ends would fill the disk


class TaskError(Exception):
    """A task file lacks a function or has a wrong one, or a function returned a wrong value. The text says which."""


class OwnTask:
    """The functions of one task file."""

    def __init__(self, path, text):
        """Run the task file's text. Because the text is given, editing the file during a run does not change that run.

        If the file has an error, `error` says which, and the functions must not be called.
        """
        self.path = path
        self.functions = {}
        self.error = ""
        try:
            self.load(text)
        except (Exception, SystemExit) as error:  # A task file is a program: anything can go wrong in it.
            self.error = self.describe(error)

    def load(self, text):
        sys.path.append(os.path.dirname(self.path))  # It may import files that stand beside it.
        module = sys.modules["task_file"] = ModuleType("task_file")
        module.__file__ = self.path
        exec(compile(text, self.path, "exec"), vars(module))
        for name, parameters in PARAMETERS.items():
            if name in vars(module):
                function = self.functions[name] = vars(module)[name]
                if not takes(function, parameters):
                    reason = f"{name} must be a function of ({', '.join(parameters)})"
                    self.error = self.describe(TaskError(reason), name)
        if not self.functions:
            raise TaskError(f"defines none of {', '.join(PARAMETERS)}")

    def describe(self, error, name=None):
        """An error as one line, with the file and the line where it happened, or else the line of the function `name`."""
        line = failing_line(error, self.path)
        code = getattr(inspect.unwrap(self.functions.get(name)), "__code__", None)
        if line == 1 and code:
            line = code.co_firstlineno
        reason = getattr(error, "msg", None) or str(error)  # A SyntaxError's text repeats file and line.
        if not isinstance(error, TaskError):
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        return " ".join(f"{self.path}:{line}: {reason}".split())[:600]

    # ---- Requests ----------------------------------------------------------------------------------------------

    def answer(self, request):
        """The reply to a request, which is a dict with a "kind" as reward.Grader lists them."""
        name = request["kind"]
        if name == "functions":
            return [list(self.functions), "by_task", ""]
        try:
            if name == "questions":
                result = self.write_questions(request["split"], request["path"])
            else:
                arguments = [request[parameter] for parameter in PARAMETERS[name]]
                value = self.functions[name](*arguments)
                result = as_bool(value) if name == "is_correct" else as_number(value)
            return [result, "by_task", ""]
        except (Exception, SystemExit) as error:
            return [0, "task_error", self.describe(error, name)]

    def write_questions(self, split, path):
        """Write the questions of a split to a JSONL file. Returns how many there are."""
        found = self.functions["questions"](split)
        if not hasattr(found, "__iter__"):
            raise TaskError(f"questions({split!r}) returned {found!r:.80}, not an iterable of dicts")
        count = 0
        with open(path, "w", encoding="utf-8") as file:
            for question in found:
                count += 1
                if count > MOST_QUESTIONS:
                    raise TaskError(f"questions({split!r}) gives over {MOST_QUESTIONS:,} questions")
                file.write(as_json(question, f"question {count} of {split!r}") + "\n")
        return count


def takes(function, parameters):
    """Whether this is a function that can be called with these parameters in this order."""
    try:
        inspect.signature(function).bind(*parameters)
        return True
    except TypeError:
        return False


def as_json(question, place):
    """A question as one line of JSON. Raises TaskError, which names the place, where it is no dict or has no JSON form."""
    if not isinstance(question, dict):
        raise TaskError(f"{place} is {question!r:.80}, not a dict")
    try:
        return json.dumps(question)
    except (TypeError, ValueError) as error:
        raise TaskError(f"{place} cannot be written as JSON: {error}") from None


def as_bool(value):
    """True or False. Raises TaskError where the value equals neither, as None does not."""
    if value not in (True, False):
        raise TaskError(f"is_correct returned {value!r:.80}, not True or False")
    return bool(value)


def as_number(value):
    """A finite float. Raises TaskError where the value is not a number, not finite or too large."""
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TaskError(f"reward returned {value!r:.80}, not a number")
    if not abs(value) <= LARGEST_REWARD:  # also refuses NaN, which is neither below nor above it
        raise TaskError(f"reward returned {value!r:.80}: it must be finite, at most {LARGEST_REWARD:g}")
    return float(value)
