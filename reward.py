"""The reward: extract the answer of a response, decide if it equals the reference, in limited processes.

In:   the text of a response, the reference answer, the reason why generation ended.
Out:  1.0 or 0.0 (ORZ's rule: 1.0 only if generation ended by itself and the boxed answer is right).

    extract_answer → normalise (one spelling) → the same text, or the same exact number → grade → Grader

This is a first grader: it accepts nothing wrong that it is known of, and misses what only algebra can see
(`2\\sqrt{2}` for `\\sqrt{8}`, sets in another order, units). Nothing of an answer is ever run as code.

This file knows nothing of the others. `python reward.py` is one process of the Grader's pool.
"""

import ctypes
import json
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import Future
from fractions import Fraction

CPU_SECONDS = 2.0  # of a grading process per item: independent of how busy the machine is
WALL_SECONDS = 30.0  # backstop against a process that neither works nor ends; 0 such items in a healthy run
MEMORY_BYTES = 1 << 30  # address space of one grading process


def extract_answer(response: str) -> str:
    """Content of the last `\\boxed{…}` inside the last complete `<answer> … </answer>`, "" if none."""
    start = response.rfind("<answer>", 0, max(response.rfind("</answer>"), 0))
    if start < 0:
        return ""
    block = response[start : response.find("</answer>", start)]
    answer, opened = "", []  # one pass with a stack: linear however the braces are nested
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", block, re.DOTALL):
        if token[0] == "}":
            begin = opened.pop() if opened else None
            answer = answer if begin is None else block[begin : token.start()]
        elif token[0] == "{" or token[0].startswith("\\boxed"):
            opened.append(None if token[0] == "{" else token.end())
    return answer


def normalise(text: str) -> str:
    """One spelling for the same characters: no math delimiters, no outer box, spaces or final full stop."""
    text = re.sub(r"\\boxed\{(.*)\}$", r"\1", text.strip().strip("$").strip(), flags=re.DOTALL)
    text = re.sub(r"\\(?:left|right|,|!|;|:)(?![a-zA-Z])", "", text.strip("$ ")).replace("−", "-")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    return re.sub(r"(?<![\d,])\s+|\s+(?!\d)", "", text).rstrip(".")


def rational(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction, None for anything else."""
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+", text):
        text = text.replace(",", "")
    if len(text) > 100 or not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+|\d+/0*[1-9]\d*)", text):
        return None
    return Fraction(text)


def decide(answer: str, reference: str, choices: dict[str, str] | None = None) -> tuple[bool, str]:
    """The verdict, and the stage that reached it: "string" or "number"."""
    answer, reference = normalise(answer), normalise(reference)
    if answer == reference or (choices and answer.strip("().").upper() == reference.strip("().").upper()):
        return answer != "", "string"
    values = rational(answer), rational(reference)
    return None not in values and values[0] == values[1], "number"


def is_equal(answer: str, reference: str, choices: dict[str, str] | None = None) -> bool:
    """Whether a careful human grader would accept `answer` for `reference`. Deterministic, never raises."""
    return decide(answer, reference, choices)[0]


def grade(response: str, reference: str, finish_reason: str = "stop") -> float:
    """ORZ's rule: 1.0 only if generation stopped by itself and the extracted answer is equal."""
    return float(finish_reason == "stop" and is_equal(extract_answer(response), reference))


# -- Grader: a pool of processes ----------------------------------------------------------------------------------


def serve() -> None:
    """One process of the pool: items in as JSON lines, verdicts out, each within its own CPU time."""
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG: die with the parent, even if that is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        signal.setitimer(
            signal.ITIMER_PROF, CPU_SECONDS
        )  # no handler: SIGPROF ends the process, even inside C
        verdict = decide(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


OUTCOMES = "graded cut_off no_answer by_string by_number timed_out backstop crashed".split()


class Grader:
    """A pool of grading processes: `submit` returns a Future of 1.0 or 0.0; a hung or crashed item is 0.0.

    Processes are plain `python reward.py`, each owned by one thread: nothing of the parent (Ray, torch, its
    __main__) is inherited or imported, and the clock of an item starts when its process starts it.
    """

    def __init__(self, num_processes: int = 2):
        self.items, self.lock = queue.SimpleQueue(), threading.Lock()
        self.counts = Counter(dict.fromkeys(OUTCOMES, 0))
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_processes)]
        for thread in self.threads:
            thread.start()

    def submit(self, response: str, reference: str, finish_reason: str = "stop", choices=None) -> Future:
        """Grade one response. What needs no reading is decided here, the rest in a process."""
        future = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        answer = extract_answer(response) if finish_reason == "stop" else ""
        if answer and answer != reference:
            self.items.put((future, [answer, reference, choices]))
        elif answer:
            self._finish(future, 1.0, "by_string")
        else:
            self._finish(future, 0.0, "no_answer" if finish_reason == "stop" else "cut_off")
        return future

    def stats(self) -> dict[str, int]:
        """Counts so far: graded, and of these each outcome; timed_out is CPU time, backstop is wall clock."""
        with self.lock:
            return dict(self.counts)

    def close(self) -> None:
        """Finish what was submitted, then end every process."""
        for _ in self.threads:
            self.items.put(None)
        for thread in self.threads:
            thread.join()
        self.threads = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _finish(self, future: Future, reward: float, outcome: str) -> None:
        with self.lock:
            self.counts.update(("graded", outcome))
        future.set_result(reward)

    def _run(self) -> None:
        """One thread and its process, which is replaced when it has died."""
        process, command = None, [sys.executable, os.path.abspath(__file__)]
        while (item := self.items.get()) is not None:
            future, request = item
            try:
                if process is None or process.poll() is not None:
                    process = subprocess.Popen(command, stdin=-1, stdout=-1, process_group=0)
                self._finish(future, *ask(process, request))
            except OSError as error:  # no process could be started
                future.set_exception(error)
        if process is not None:
            process.stdin.close()
            process.wait()


def ask(process: subprocess.Popen, request: list) -> tuple[float, str]:
    """Send one item and wait for its verdict; a process that gives none has ended when this returns."""
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has died, so that the line below is empty
    if not select.select([process.stdout], [], [], WALL_SECONDS)[0]:
        process.kill()
        process.wait()
        return 0.0, "backstop"
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        return 0.0, "timed_out" if process.wait() == -signal.SIGPROF else "crashed"
    verdict, stage = json.loads(line)
    return float(verdict), "by_" + stage


if __name__ == "__main__":
    serve()
