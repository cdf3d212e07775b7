"""The reward: extract a response's answer, and let processes of limited time and memory compare it with the reference.

In:   the text of a response, the reference answer, the reason why generation ended.
Out:  (correct, outcome): whether the response is correct, and how that was found. ORZ's rule: a response is correct
      only if generation stopped by itself and its boxed answer equals the reference.

    response → extract_answer → Grader → a process of its pool → equality.decide

The processes are `python reward.py`. Only they import equality.py and the libraries that read mathematics, and only
they run a task file (own_task.py), which may replace the rule and the reward. The package pebble is not used: it took
13 s for 8,192 fractions on two processes, and one idle process that is killed breaks its pool for good.
"""

import ctypes
import json
import os
import re
import resource
import select
import signal
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, Popen
from typing import NamedTuple

from configs.load import UserError

# Limits of a grading process: CPU time per request, which does not depend on how busy the machine is; wall-clock time per
# request, for a process that waits without end (a healthy run has none); address space, where there is no task file.
CPU_SECONDS = 2.0
WALL_SECONDS = 30.0
MEMORY_BYTES = 1 << 30
# The wall-clock limit for loading a task file, with all that it imports, and for writing the questions of a split.
TASK_SECONDS = 600.0


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

    think_format is 1.0 if `</think>` is followed by a complete answer block. repetition is the share of the windows of
    8 words that repeat an earlier window of the response.
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


class TaskFile(NamedTuple):
    """A task file, as it was when the run began."""

    path: str
    text: str
    memory_gb: float  # GiB of address space for each of its processes


def task_file(cfg, path=None) -> TaskFile | None:
    """The task file of a run; None where it has none. Its text is read from `path`, or else from the run's own copy."""
    if not cfg.task:
        return None
    path = path or task_copy(cfg)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task file {path} cannot be read as UTF-8 text: {error}") from None
    return TaskFile(cfg.task, text, cfg.task_memory_gb)


def task_copy(cfg) -> Path:
    """The copy of the task file that a run keeps in its folder."""
    return Path(cfg.out_dir, cfg.name, "task.py")


class Reply(NamedTuple):
    """What a grading process answers."""

    result: object
    outcome: str
    error: str = ""  # of a task file, with the file and the line


class Verdict(NamedTuple):
    """How a response was judged."""

    correct: bool
    reward: float
    outcome: str
    error: str = ""  # of a task file, with the file and the line


class Grader:
    """A pool of grading processes.

    A request is one JSON object on a line with a "kind", and a reply is one JSON line [result, outcome, error]:

        {"kind": "grade", "answer": …, "reference": …, "choices": …}    whether the answer equals the reference
        {"kind": "readable", "text": …}                                 whether the text can be read as an answer
        {"kind": "load", "path": …, "text": …}                          load a task file: the first request, if there is one
        {"kind": "functions"}                                           which functions the task file defines
        {"kind": "is_correct" or "reward", "response": …, …}            call that function with these arguments
        {"kind": "questions", "split": …, "path": …}                    write the questions of a split to this file

    Where a process gives no reply, the result is False and the outcome is timed_out (CPU time), backstop (wall-clock
    time) or crashed (in both of two attempts); the next request then starts another process. Each process is used by one
    thread at a time. It inherits and imports nothing of the parent (Ray, torch, its __main__). Processes end with the
    Grader, or with the process that made it.
    """

    def __init__(self, num_processes: int = 2, task: TaskFile | None = None):
        """Raises UserError where the task file cannot be loaded, or defines no function of a task."""
        self.threads = ThreadPoolExecutor(num_processes)
        # Processes that wait for a request; None stands for one that is yet to be started.
        self.idle = deque([None] * num_processes)
        self.task = task
        self.memory_bytes = int(task.memory_gb * 2**30) if task else MEMORY_BYTES
        self.task_functions = self._load_task() if task else []

    def _load_task(self) -> list[str]:
        """The names of the functions that the task file defines."""
        reply = self._request({"kind": "functions"})
        if reply.error:
            raise UserError(f"task file {reply.error}")
        if reply.outcome != "by_task":
            limits = f"{TASK_SECONDS:.0f} s and task_memory_gb={self.task.memory_gb:g} GiB of address space"
            raise UserError(
                f"task file {self.task.path}:1: loading it ended with the outcome {reply.outcome}; limits: {limits}"
            )
        return reply.result

    def submit(self, response: str, reference: str, finish_reason: str = "stop", choices=None) -> Future:
        """Grades one response by ORZ's rule. Returns a Future of (correct: bool, outcome: str).

        choices maps the letters of a multiple-choice question to their contents. Outcomes besides those of a process
        without a reply: cut_off, no_answer, by_string, by_number, by_value, refused (not read, or too large).
        """
        return self.threads.submit(self._grade, response, reference, finish_reason, choices)

    def readable(self, text: str) -> Future:
        """Returns a Future of (readable: bool, outcome: str): as a value, as words, as a choice, or unread."""
        return self.threads.submit(self._readable, text)

    def judge(self, response: str, question: dict, finish_reason: str, with_reward: bool) -> Future:
        """Judges one response, by the task file's functions where it has them. Returns a Future of a Verdict.

        question has the keys question, answer, choices and further ones. Without with_reward the task file's reward is
        not asked for, and the reward is 1 where correct, else 0. Outcomes besides those of submit: by_task, task_error.
        """
        return self.threads.submit(self._judge, response, question, finish_reason, with_reward)

    def write_questions(self, split: str, path: str) -> int:
        """Writes the task file's questions of a split to `path`, as JSONL. Returns how many. Raises UserError."""
        request = {"kind": "questions", "split": split, "path": path}
        reply = self._request(request, TASK_SECONDS)
        if reply.outcome != "by_task":
            reason = reply.error or f"{self.task.path}: questions({split!r}) had the outcome {reply.outcome}"
            raise UserError(f"task file {reason}")
        return reply.result

    def _judge(self, response: str, question: dict, finish_reason: str, with_reward: bool) -> Verdict:
        request = {"response": response, "question": question}
        if finish_reason == "stop" and "is_correct" in self.task_functions:
            correct, outcome, error = self._request({"kind": "is_correct"} | request)
            if outcome != "by_task":
                return Verdict(False, 0.0, outcome, error)
        else:
            correct, outcome = self._grade(response, question["answer"], finish_reason, question["choices"])
        if not with_reward or "reward" not in self.task_functions:
            return Verdict(correct, float(correct), outcome)
        request |= {"kind": "reward", "correct": correct, "finish_reason": finish_reason}
        reward, reward_outcome, error = self._request(request)
        if reward_outcome != "by_task":
            outcome = reward_outcome
        return Verdict(correct, float(reward), outcome, error)

    def _readable(self, text: str) -> tuple[bool, str]:
        return self._request({"kind": "readable", "text": text})[:2]

    def _grade(self, response: str, reference: str, finish_reason: str, choices) -> tuple[bool, str]:
        if finish_reason != "stop":
            return False, "cut_off"
        answer = extract_answer(response)
        if not answer:
            return False, "no_answer"
        request = {"kind": "grade", "answer": answer, "reference": reference, "choices": choices}
        return self._request(request)[:2]

    def _request(self, request: dict, seconds: float | None = None) -> Reply:
        """Ask, and after a crash once more in a new process: the first one may have been killed from outside."""
        reply = self._ask(request, seconds)
        if reply.outcome == "crashed":
            reply = self._ask(request, seconds)
        return reply

    def _ask(self, request: dict, seconds: float | None) -> Reply:
        process = self.idle.pop()
        try:
            if process is None or process.poll() is not None:
                process = self._start()
                if self.task:
                    load = {"kind": "load", "path": self.task.path, "text": self.task.text}
                    loaded = exchange(process, load, TASK_SECONDS)
                    if loaded.error:
                        process.kill()
                        return loaded
            return exchange(process, request, seconds or WALL_SECONDS)
        except (BrokenPipeError, json.JSONDecodeError, TimeoutError) as error:
            process.kill()  # does nothing if the process has died
            if process.wait() == -signal.SIGPROF:
                return Reply(False, "timed_out")
            return Reply(False, "backstop" if isinstance(error, TimeoutError) else "crashed")
        finally:
            self.idle.append(process)

    def _start(self) -> Popen:
        command = [sys.executable, __file__, str(self.memory_bytes)]
        # A task file may import torch, which must neither take a GPU's memory nor start a thread per core.
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return Popen(command, bufsize=0, stdin=PIPE, stdout=PIPE, process_group=0, env=environment)


def exchange(process: Popen, request: dict, seconds: float) -> Reply:
    """Send a process one request and return its reply. Raises TimeoutError, or what reading from a dead process raises."""
    process.stdin.write(json.dumps(request).encode() + b"\n")
    if not select.select([process.stdout], [], [], seconds)[0]:
        raise TimeoutError
    return Reply(*json.loads(process.stdout.readline()))


def serve():
    """Runs one process of the pool: requests in as JSON lines, replies out.

    A task file may print and read: what it prints goes to standard error, which is a Worker's log, and its standard input
    is empty.
    """
    import equality

    requests, replies = open(os.dup(0)), open(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)
    task = None
    for line in requests:
        request = json.loads(line)
        kind = request["kind"]
        if kind not in ("load", "questions"):
            # SIGPROF is not handled, so that it ends the process even inside C code.
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        if kind == "grade":
            reply = equality.decide(request["answer"], request["reference"], request["choices"])
        elif kind == "readable":
            how = equality.how_read(request["text"])
            reply = how != "", how or "unread"
        elif kind == "load":
            import own_task

            task = own_task.OwnTask(request["path"], request["text"])
            reply = None, "by_task", task.error
        else:
            reply = task.answer(request)
        print(json.dumps(reply), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent, however that ends
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    serve()
