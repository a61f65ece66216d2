"""Rewards by a function of the user's own, which runs in a process of its own: what it does cannot harm the training,
it has a time limit, and it sees no credentials."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tunewright_api.v1alpha1.reinforcement import FunctionReward, RewardSource
from tunewright_trainer.errors import InvalidConfiguration, RewardFunctionFailed
from tunewright_trainer.rewards import Answer, Score
from tunewright_trainer.run_log import without_credentials

IMPORT_SECONDS = 120
"""Time for importing the module: libraries such as PyTorch take half a minute on a slow disk."""
END_SECONDS = 5.0


class _Failure(Exception):
    """The function gave no scores; the message says what it did instead."""


@contextmanager
def started(sources: Sequence[RewardSource]) -> Iterator[list[Score]]:
    """Start a process for each reward of type Function and give their scoring functions, in order.

    Raises:
        InvalidConfiguration: A module cannot be imported, or has no such function.
        RewardFunctionFailed: By the scoring functions: one raised, ended its process, took too long, or gave something
            else than one number for each answer.
    """
    with ExitStack() as processes:
        functions: list[Score] = []
        for index, source in enumerate(sources):
            if source.function is not None:
                process = _FunctionProcess(f"rewards[{index}].function {source.function.module}", source.function)
                processes.callback(process.kill)
                process.start()
                functions.append(process.score)
        yield functions


class _FunctionProcess:
    """One process for the run; it is started again only to find out which row was too much for it."""

    def __init__(self, name: str, settings: FunctionReward) -> None:
        self._name = name
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process and wait until it has imported the function."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunewright_trainer.reward_child", self._settings.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=without_credentials(os.environ),
            # Its own children end with it.
            start_new_session=True,
        )
        try:
            self._receive(IMPORT_SECONDS)
        except _Failure as failure:
            raise InvalidConfiguration(
                f"{self._name} cannot be imported: its module {failure}. Put it with all that it needs into the image "
                "(pod.image) and on its PYTHONPATH; the log has the traceback"
            ) from None

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Let the function score answers."""
        try:
            return self._scores(answers)
        except _Failure as failure:
            place, why = self._culprit(answers, failure)
            raise RewardFunctionFailed(
                f"{self._name} {why}, for {place}: a reward function gives one number for each answer, within "
                f"{self._settings.timeout_seconds} s (timeoutSeconds) for all of a call; the log has what it said"
            ) from None

    def kill(self) -> None:
        """End the process and its children."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A child in a session of its own may still hold the pipes.
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=END_SECONDS)

    def _culprit(self, answers: Sequence[Answer], failure: _Failure) -> tuple[str, str]:
        """Find the first answer that fails by itself, and say where it is and why it fails.

        No further answer is tried once the time for a call is over again.
        """
        deadline = time.monotonic() + self._settings.timeout_seconds
        for answer in answers if len(answers) > 1 else ():
            if self._process is None:
                self.start()
            if time.monotonic() > deadline:
                break
            try:
                self._scores([answer])
            except _Failure as alone:
                return _place(answer), str(alone)
        call = f"a call with {len(answers)} answers, the first of them to " if len(answers) > 1 else ""
        return call + _place(answers[0]), str(failure)

    def _scores(self, answers: Sequence[Answer]) -> list[float]:
        assert self._process is not None, "started"
        request = {
            "prompts": [answer.prompt for answer in answers],
            "completions": [answer.text for answer in answers],
            "columns": [dict(answer.columns) for answer in answers],
        }
        reply = self._receive(self._settings.timeout_seconds, json.dumps(request) + "\n")
        scores: list[float] = reply["scores"]
        if len(scores) != len(answers):
            raise _Failure(f"gave {len(scores)} scores for {len(answers)} answers")
        if not all(map(math.isfinite, scores)):
            raise _Failure("gave a score that is not finite")
        return scores

    def _receive(self, limit: int, request: str = "") -> dict[str, Any]:
        """Send a request and return its reply. The process is gone when it ended itself or the time was over."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def expire() -> None:
            late.set()
            # The pipes are the reader's: they end with the process.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, expire)
        timer.start()
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(request)
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set() or not line:
            self.kill()  # does nothing to one that ended itself
            raise _Failure(f"took longer than {limit} s" if late.is_set() else _end(process.returncode))
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise _Failure(f"raised {reply['error']}")
        return reply


def _end(code: int) -> str:
    if code < 0:
        return f"ended its process with {signal.Signals(-code).name}"
    return f"ended its process with exit code {code}"


def _place(answer: Answer) -> str:
    text = answer.text if len(answer.text) <= 120 else answer.text[:117] + "..."
    return f"{answer.place} (answer {text!r})"
