"""The reward: extract the answer of a response, and let limited processes decide whether it equals the reference.

In:   the text of a response, the reference answer, the reason why generation ended.
Out:  (correct, outcome): whether the response is correct, and how that was found. ORZ's rule: a response is correct
      only if generation stopped by itself and its boxed answer equals the reference.

    response → extract_answer → Grader → a process of its pool → equality.decide

The processes are `python reward.py`. Only they import equality.py and the libraries that read mathematics. Why not
pebble: it took 13 s for 8,192 fractions on two processes, and a process killed at rest breaks its pool for good.
"""

import ctypes
import json
import re
import resource
import select
import signal
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from subprocess import PIPE, Popen

# Limits of a grading process. CPU time per request, however busy the machine is; wall-clock time per request, for a
# process that neither works nor ends (0 such requests in a healthy run); address space.
CPU_SECONDS = 2.0
WALL_SECONDS = 30.0
MEMORY_BYTES = 1 << 30


def extract_answer(response: str) -> str:
    """Returns the content of the last `\\boxed{…}` inside the last complete `<answer> … </answer>`, or ""."""
    before, _, _ = response.rpartition("</answer>")
    _, tag, block = before.rpartition("<answer>")
    if not tag:
        return ""
    block = block.partition("</answer>")[0]
    answer = ""
    opened = []  # the stack of open braces makes this one pass, linear however the braces are nested
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", block, re.DOTALL):
        if token[0] == "{" or token[0].startswith("\\boxed"):
            opened.append(token)
        elif token[0] == "}" and opened:
            begin = opened.pop()
            if begin[0] != "{":
                answer = block[begin.end() : token.start()]
    return answer


# ORZ's five reflection patterns. ORZ counts them case-sensitively and so misses "Wait,".
REFLECTION = {
    "wait": "wait,",
    "recheck": r"recheck[,\s]",
    "retry": "retry",
    "alternatively": "alternatively,",
    "however": "however,",
}


def response_stats(response: str) -> dict[str, float]:
    """Returns counts of the reflection patterns, think_format and repetition.

    think_format is 1.0 if `</think>` is followed by a complete answer block. repetition is the share of windows of
    8 words that occur again in the response.
    """
    lower = response.lower()
    stats = {}
    for name, pattern in REFLECTION.items():
        stats[name] = float(len(re.findall(pattern, lower)))
    _, _, after_think = response.partition("</think>")
    _, _, after_answer = after_think.partition("<answer>")
    stats["think_format"] = float("</answer>" in after_answer)
    words = response.split()
    windows = [tuple(words[start : start + 8]) for start in range(len(words) - 7)]
    distinct_share = len(set(windows)) / max(1, len(windows))
    stats["repetition"] = 1 - distinct_share if windows else 0.0
    return stats


class Grader:
    """A pool of grading processes.

    A request is one JSON object on a line with a "kind", and a reply is one JSON line [result, outcome]:

        {"kind": "grade", "answer": …, "reference": …, "choices": …}    whether the answer equals the reference
        {"kind": "readable", "text": …}                                 whether the text can be read as an answer

    Where a process gives no reply, the result is False and the outcome is timed_out (CPU time), backstop (wall-clock
    time) or crashed (twice); the next request then starts another process. Each process is used by one thread at a
    time. It inherits and imports nothing of the parent (Ray, torch, its __main__). Processes end with the Grader, or
    with the process that has it.
    """

    def __init__(self, num_processes: int = 2):
        self.threads = ThreadPoolExecutor(num_processes)
        self.idle = deque(
            [None] * num_processes
        )  # processes that wait for a request; None is yet to be started

    def submit(self, response: str, reference: str, finish_reason: str = "stop", choices=None) -> Future:
        """Grades one response by ORZ's rule. Returns a Future of (correct: bool, outcome: str).

        choices maps the letters of a multiple-choice question to their contents. Outcomes besides those of a process
        without a reply: cut_off, no_answer, by_string, by_number, by_value, refused (not read, or too large).
        """
        return self.threads.submit(self._grade, response, reference, finish_reason, choices)

    def readable(self, text: str) -> Future:
        """Returns a Future of (readable: bool, outcome: str): as a value, as words, as a choice, or unread."""
        request = {"kind": "readable", "text": text}
        return self.threads.submit(self._request, request)

    def _grade(self, response: str, reference: str, finish_reason: str, choices) -> tuple[bool, str]:
        if finish_reason != "stop":
            return False, "cut_off"
        answer = extract_answer(response)
        if not answer:
            return False, "no_answer"
        request = {"kind": "grade", "answer": answer, "reference": reference, "choices": choices}
        return self._request(request)

    def _request(self, request: dict) -> tuple[bool, str]:
        """A process that crashed may have been killed from outside: ask once more, in a new process."""
        result, outcome = self._ask(request)
        if outcome == "crashed":
            result, outcome = self._ask(request)
        return result, outcome

    def _ask(self, request: dict) -> tuple[bool, str]:
        process = self.idle.pop()
        if process is None or process.poll() is not None:
            command = [sys.executable, __file__]
            process = Popen(command, bufsize=0, stdin=PIPE, stdout=PIPE, process_group=0)
        ready = True
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            ready = select.select([process.stdout], [], [], WALL_SECONDS)[0]
            return tuple(json.loads(process.stdout.readline() if ready else ""))
        except (BrokenPipeError, json.JSONDecodeError):
            process.kill()  # does nothing if the process has died
            if process.wait() == -signal.SIGPROF:
                return False, "timed_out"
            return False, "crashed" if ready else "backstop"
        finally:
            self.idle.append(process)


def serve():
    """Runs one process of the pool: requests in as JSON lines, replies out."""
    import equality

    for line in sys.stdin:
        signal.setitimer(
            signal.ITIMER_PROF, CPU_SECONDS
        )  # unhandled, SIGPROF ends the process, even inside C
        request = json.loads(line)
        if request["kind"] == "grade":
            reply = equality.decide(request["answer"], request["reference"], request["choices"])
        else:
            how = equality.how_read(request["text"])
            reply = how != "", how or "unread"
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent, however that ends
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    serve()
