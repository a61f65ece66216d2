"""The process of a user's own reward function: `python -m tunewright_trainer.reward_child package.module:function`.

It imports the function, says so, and then answers each JSON line with a JSON line:

    {"ready": true}                                            once, after the import
    {"prompts": [...], "completions": [...], "columns": [...]}   ->  {"scores": [...]}

or {"error": "..."} in place of an answer. What the function prints goes to the run's log, never between these lines.
The standard library alone: nothing that is loaded here may stand in the way of the user's own packages.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1
Function = Callable[[list[Any], list[str], list[dict[str, Any]]], Sequence[Any]]


def main() -> int:
    """Serve one function until nobody asks any more."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    requests, replies = private_pipes()
    try:
        function = find(sys.argv[1])
    # Whatever the user's module does while it is imported, an exit included.
    except (Exception, SystemExit) as error:
        fail(replies, error)
        return 1
    reply(replies, {"ready": True})
    for line in requests:
        asked = json.loads(line)
        try:
            scores = [number(score) for score in function(asked["prompts"], asked["completions"], asked["columns"])]
        # The function is the user's own: it may raise anything.
        except (Exception, SystemExit) as error:
            fail(replies, error)
        else:
            reply(replies, {"scores": scores})
    return 0


def private_pipes() -> tuple[TextIO, TextIO]:
    """Take the pipes to the worker for ourselves: the function gets an empty input, and its output goes to the log."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # the process is killed in the end, with what it had not written
    return requests, replies


def find(name: str) -> Function:
    """Import the function that `package.module:function` names."""
    module, _, attribute = name.partition(":")
    function: Function = getattr(importlib.import_module(module), attribute)
    if not callable(function):
        raise TypeError(f"{attribute} of {module} is no function")
    return function


def number(score: Any) -> float:
    """Return a score as a float: numbers of any library are fine, text and None are not."""
    if not hasattr(score, "__float__"):
        raise TypeError(f"a score is {score!r}, which is no number")
    return float(score)


def fail(replies: TextIO, error: BaseException) -> None:
    """Say what was raised in a line; the traceback goes to the log."""
    traceback.print_exc()
    text = str(error).splitlines() or [""]
    reply(replies, {"error": f"{type(error).__name__}: {text[0]}"[:500]})


def reply(replies: TextIO, document: dict[str, Any]) -> None:
    """Send one line."""
    replies.write(json.dumps(document) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
