"""The reward: extract the answer of a response, decide if it equals the reference, in limited processes.

In:   the text of a response, the reference answer, the reason why generation ended.
Out:  1.0 or 0.0 (ORZ's rule: 1.0 only if generation ended by itself and the boxed answer is right).

This file knows nothing of the others. `python reward.py` is one process of the Grader's pool.
"""

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
            if begin is not None:
                answer = block[begin : token.start()]
        elif token[0].endswith("{") and token[0] != "\\{":
            opened.append(token.end() if token[0].startswith("\\boxed") else None)
    return answer


def normalise(text: str) -> str:
    """One spelling for the same characters: no math delimiters, no outer box, spaces or final full stop."""
    text = re.sub(r"\\boxed\{(.*)\}$", r"\1", text.strip().strip("$").strip(), flags=re.DOTALL)
    text = re.sub(r"\\(?:left|right|,|!|;|:)(?![a-zA-Z])", "", text.strip("$ ")).replace("−", "-")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).rstrip(".")


def rational(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction, None for anything else."""
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    try:
        return Fraction(text) if len(text) < 100 and "e" not in text.lower() else None
    except (ValueError, ZeroDivisionError):
        return None


def is_equal(answer: str, reference: str, choices: dict[str, str] | None = None) -> bool:
    """Whether a careful human grader would accept `answer` for `reference`. Deterministic, never raises."""
    answer, reference = normalise(answer), normalise(reference)
    if answer == reference:
        return answer != ""
    values = rational(answer), rational(reference)
    return None not in values and values[0] == values[1]


def grade(response: str, reference: str, finish_reason: str = "stop") -> float:
    """ORZ's rule: 1.0 only if generation stopped by itself and the extracted answer is equal."""
    return float(finish_reason == "stop" and is_equal(extract_answer(response), reference))


def serve() -> None:
    """One process of the pool: items in as JSON lines, verdicts out, each within its own CPU time."""
    import ctypes

    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG: die with the parent, even if that is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        signal.setitimer(
            signal.ITIMER_PROF, CPU_SECONDS
        )  # no handler: SIGPROF ends the process, even inside C
        verdict = is_equal(**json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([verdict, "number"]), flush=True)


class Grader:
    """A pool of grading processes: `submit` returns a Future of 1.0 or 0.0; a hung or crashed item is 0.0.

    Processes are plain `python reward.py`, each owned by one thread: nothing of the parent (Ray, torch,
    its __main__) is inherited or imported, and the clock of an item starts when its process starts it.
    """

    def __init__(self, num_processes: int = 2):
        self.items = queue.SimpleQueue()
        self.counts = Counter()
        self.lock = threading.Lock()
        self.closed = False
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_processes)]
        for thread in self.threads:
            thread.start()

    def submit(self, response: str, reference: str, finish_reason: str = "stop", choices=None) -> Future:
        """Grade one response. What needs no arithmetic is decided here, the rest in a process."""
        future = Future()
        answer = extract_answer(response) if finish_reason == "stop" else ""
        if not answer:
            self._finish(future, 0.0, "no_answer" if finish_reason == "stop" else "cut_off")
        elif answer == reference:
            self._finish(future, 1.0, "by_string")
        else:
            self.items.put((future, {"answer": answer, "reference": reference, "choices": choices}))
        return future

    def stats(self) -> dict[str, int]:
        """Counts so far: graded, cut_off, no_answer, by_…, timed_out (CPU), backstop (wall), crashed."""
        names = "graded cut_off no_answer by_string by_number timed_out backstop crashed"
        with self.lock:
            return {name: self.counts[name] for name in names.split()}

    def close(self) -> None:
        """Finish what was submitted, then end every process."""
        if not self.closed:
            self.closed = True
            for _ in self.threads:
                self.items.put(None)
            for thread in self.threads:
                thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _finish(self, future: Future, reward: float, outcome: str) -> None:
        with self.lock:
            self.counts.update(("graded", outcome))
        future.set_result(reward)

    def _run(self) -> None:
        """One thread and its process, which is replaced when it dies."""
        process = None
        while (item := self.items.get()) is not None:
            future, request = item
            if process is None:
                command = [sys.executable, os.path.abspath(__file__)]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
                )
            reward, outcome = self._ask(process, request)
            if process.returncode is not None:
                process = None
            self._finish(future, reward, outcome)
        if process is not None:
            process.stdin.close()
            process.wait()

    @staticmethod
    def _ask(process: subprocess.Popen, request: dict) -> tuple[float, str]:
        """Send one item and wait for its verdict; a process that gives none has ended when this returns."""
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: there will be no line either
        if not select.select([process.stdout], [], [], WALL_SECONDS)[0]:
            process.kill()
            process.wait()
            return 0.0, "backstop"
        line = process.stdout.readline()
        if line:
            verdict, stage = json.loads(line)
            return float(verdict), "by_" + stage
        return 0.0, "timed_out" if process.wait() == -signal.SIGPROF else "crashed"


if __name__ == "__main__":
    serve()
