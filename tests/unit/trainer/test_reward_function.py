"""Reward functions of users' own, in real processes: what they are given, what they may do, and what ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tunewright_api.v1alpha1.reinforcement import RewardSource
from tunewright_trainer import reward_function
from tunewright_trainer.errors import InvalidConfiguration, RewardFunctionFailed, fate_of
from tunewright_trainer.reward_function import started
from tunewright_trainer.rewards import Answer, build_rewards

ASKED = [Answer(f"What is {n}?", f"It is {n}.", 4, {"answer": n}, f"training row {n + 1}") for n in range(4)]
Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the module `own`, which every Python process started here can import."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))

    def go(code: str) -> None:
        (tmp_path / "own.py").write_text(textwrap.dedent(code))

    return go


def source(timeout_seconds: int = 20, name: str = "own:score") -> RewardSource:
    """Return a reward of a spec."""
    given = {"type": "Function", "function": {"module": name, "timeoutSeconds": timeout_seconds}}
    return RewardSource.model_validate(given)


def scored(answers: Sequence[Answer] = ASKED, timeout_seconds: int = 20) -> list[float]:
    """Start the function, score answers, end it."""
    with started([RewardSource(type="JSON"), source(timeout_seconds)]) as functions:
        (score,) = functions
        return score(answers)


def test_a_function_sees_rows_and_answers(write: Write) -> None:
    """Prompts as the data has them, texts, and all further columns; any kind of number is a score."""
    write(
        """
        import fractions

        def score(prompts, completions, columns):
            assert prompts == [f"What is {n}?" for n in range(4)]
            assert completions == [f"It is {n}." for n in range(4)]
            assert [row["answer"] for row in columns] == [0, 1, 2, 3]
            return (1, True, 0.5, fractions.Fraction(1, 4))
        """
    )
    assert scored() == [1.0, 1.0, 0.5, 0.25]


def test_one_process_serves_the_run(write: Write) -> None:
    """It is started once, is not this process, and is gone afterwards."""
    write("import os\ndef score(prompts, completions, columns): return [os.getpid()] * len(prompts)")
    with started([source(), source()]) as functions:
        first, second = (score(ASKED)[0] for score in functions)
        assert [score(ASKED[:1])[0] for score in functions] == [first, second]
        assert len({first, second, float(os.getpid())}) == 3
    assert not psutil.pid_exists(int(first))
    assert not psutil.pid_exists(int(second))


def test_names_and_weights_are_those_of_the_spec(write: Write) -> None:
    """A function takes its place among the other rewards."""
    write("def score(prompts, completions, columns): return [0.5] * len(prompts)")
    sources = [RewardSource(type="ExactMatch"), source().model_copy(update={"weight": 2.0})]
    with started(sources) as functions:
        rewards = build_rewards(sources, (), functions)
        assert [(reward.name, reward.weight) for reward in rewards] == [("ExactMatch", 1.0), ("Function", 2.0)]
        assert rewards[1].score(ASKED) == [0.5] * 4


def test_no_credentials_and_no_pipes(
    write: Write, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Credentials are not there to be read; what is printed goes to the log, and nothing can be read from the input."""
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    write(
        """
        import os, subprocess, sys

        def score(prompts, completions, columns):
            print("from the function")
            os.write(1, b"past Python\\n")
            subprocess.run(["echo", "from a child"], check=True)
            assert sys.stdin.read() == ""
            return [sum("secret" in value for value in os.environ.values())] * len(prompts)
        """
    )
    assert scored() == [0.0] * 4
    said = capfd.readouterr().err
    assert all(text in said for text in ("from the function", "past Python", "from a child"))


FAILING: dict[str, tuple[str, str]] = {
    "an exception": ("raise ValueError('odd one')", "raised ValueError: odd one"),
    "an exit": ("sys.exit(3)", "raised SystemExit: 3"),
    "the end of the process": ("os._exit(3)", "ended its process with exit code 3"),
    "a crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "ended its process with SIGSEGV"),
    "text": ("return ['1.0']", "raised TypeError: a score is '1.0', which is no number"),
    "nothing": ("return None", "raised TypeError: 'NoneType' object is not iterable"),
    "too little": ("return []", "gave 0 scores for 1 answers"),
    "no number": ("return [float('nan')]", "gave a score that is not finite"),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_ends_the_run(case: str, write: Write) -> None:
    """The message names the function, the row and what happened; the same would happen again."""
    code, message = FAILING[case]
    write(
        f"""
        import os, signal, sys

        def score(prompts, completions, columns):
            if "What is 2?" in prompts:
                {code}
            return [1.0] * len(prompts)
        """
    )
    with pytest.raises(RewardFunctionFailed) as caught:
        scored()
    found = str(caught.value)
    assert found.startswith(f"rewards[1].function own:score {message}, for training row 3 (answer 'It is 2.'): "), found
    assert fate_of(caught.value) == (20, "RewardFunctionFailed")


def test_a_function_that_takes_too_long(write: Write, tmp_path: Path) -> None:
    """It is ended with its own children when the time is over, and so is the search for the row."""
    write(
        f"""
        import pathlib, subprocess, time

        def score(prompts, completions, columns):
            child = subprocess.Popen(["sleep", "600"])
            pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
            time.sleep(600)
        """
    )
    began = time.monotonic()
    with pytest.raises(RewardFunctionFailed, match=r"own:score took longer than 1 s, for training row 1 .* within 1 s"):
        scored(timeout_seconds=1)
    assert time.monotonic() - began < 20
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_answers_that_fail_only_together(write: Write) -> None:
    """Then the call is named; a function that fails on a single answer names that."""
    write(
        """
        def score(prompts, completions, columns):
            assert len(prompts) < 4, "too many"
            return [1.0] * len(prompts)
        """
    )
    with pytest.raises(
        RewardFunctionFailed, match=r"AssertionError: too many, for a call with 4 answers, the first of"
    ):
        scored()
    assert scored(ASKED[:3]) == [1.0] * 3


MISSING: dict[str, tuple[str, str, str]] = {
    "module": ("", "absent.module:score", "raised ModuleNotFoundError: No module named 'absent'"),
    "function": ("", "own:score", "raised AttributeError: module 'own' has no attribute 'score'"),
    "something else": ("score = 1", "own:score", "raised TypeError: score of own is no function"),
    "what it imports": ("import absent", "own:score", "raised ModuleNotFoundError: No module named 'absent'"),
    "syntax": ("def score(:", "own:score", "raised SyntaxError"),
    "an exit": ("raise SystemExit(1)", "own:score", "raised SystemExit: 1"),
    "a crash": ("import os; os._exit(7)", "own:score", "ended its process with exit code 7"),
    "a long import": ("import time; time.sleep(600)", "own:score", "took longer than 1 s"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_cannot_be_imported(case: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told when the function is started, with the remedy."""
    code, name, message = MISSING[case]
    write(code)
    if case == "a long import":
        monkeypatch.setattr(reward_function, "IMPORT_SECONDS", 1)
    with pytest.raises(InvalidConfiguration) as caught, started([source(name=name)]):
        raise AssertionError("it was started")
    found = str(caught.value)
    assert found.startswith(f"rewards[0].function {name} cannot be imported: its module {message}"), found
    assert "pod.image" in found


def test_the_process_ends_with_the_worker(write: Write) -> None:
    """A worker that is killed leaves nothing behind."""
    write("import os, time\ndef score(prompts, completions, columns): print(os.getpid()); time.sleep(600)")
    code = """
        from tests.unit.trainer.test_reward_function import ASKED, source, started
        with started([source()]) as functions:
            functions[0](ASKED)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True) as worker:
        assert worker.stderr is not None
        child = psutil.Process(int(worker.stderr.readline()))
        worker.kill()
        assert child.wait(10) is None or not child.is_running()
