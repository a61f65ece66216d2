"""llama.cpp's tools in the trainer image: where they are, and their processes.

trainer_image/gguf/build.sh makes the folder: the converter in Python, and the program `tunewright-gguf` with
llama.cpp's libraries.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright_trainer.errors import InvalidConfiguration, InvalidModel
from tunewright_trainer.run_log import without_credentials
from tunewright_trainer.transfer import Stop
from tunewright_trainer.worker_process import die_with_parent

TOOLS_VARIABLE = "TUNEWRIGHT_GGUF_TOOLS"
DEFAULT_FOLDER = Path("/opt/llama.cpp")
"""Where the trainer image has them."""
POLL_SECONDS = 0.1
_REMEDY = (
    "use a trainer image that was built with GGUF=1 (the default), or build the tools with "
    f"trainer_image/gguf/build.sh and name their folder in {TOOLS_VARIABLE}"
)
_WRITES_TEXT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of architectures that write text, which is what the check of a file does."""


@dataclass(frozen=True)
class Tools:
    """A folder with the tools that was seen to work."""

    folder: Path
    version: str
    """Of llama-cpp-python, whose release names one of llama.cpp; another version may write other files."""

    @property
    def program(self) -> Path:
        """The compiled program."""
        return self.folder / "bin/tunewright-gguf"

    @property
    def converter(self) -> Path:
        """The script that reads Hugging Face models."""
        return self.folder / "convert_hf_to_gguf.py"

    def architectures(self) -> frozenset[str]:
        """Return the names of all language models that the converter knows.

        They are read from its table without running it: running it imports PyTorch, which takes 20 s.
        """
        table = self.folder / "conversion/__init__.py"
        for statement in ast.parse(table.read_text()).body:
            if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "TEXT_MODEL_MAP":
                assert statement.value is not None
                return frozenset(ast.literal_eval(statement.value))
        raise AssertionError(f"{table} has no TEXT_MODEL_MAP")


@dataclass(frozen=True)
class Finished:
    """A process that ended."""

    code: int
    """Negative: the signal that killed it."""
    output: str
    log: str

    def last_line(self) -> str:
        """Return the last thing that it said, for a message."""
        return next((line.strip() for line in reversed(self.log.splitlines()) if line.strip()), "")[:400]

    def is_killed(self) -> bool:
        """Tell whether it was ended from outside, as the kernel does when memory runs out."""
        return self.code == -signal.SIGKILL


def find_tools(environment: Mapping[str, str]) -> Tools:
    """Find the tools and try them: a run that needs them fails before it fetches anything.

    Args:
        environment: TUNEWRIGHT_GGUF_TOOLS in it names the folder; the trainer image has /opt/llama.cpp.

    Raises:
        InvalidConfiguration: They are not there, or do not run on this machine.
    """
    folder = Path(environment.get(TOOLS_VARIABLE) or DEFAULT_FOLDER)
    tools = Tools(folder, _version(folder))
    missing = [path for path in (tools.program, tools.converter) if not path.is_file()]
    if missing:
        raise InvalidConfiguration(f"export.gguf needs llama.cpp's tools, but there is no {missing[0]}: {_REMEDY}")
    try:
        done = subprocess.run([tools.program, "check"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InvalidConfiguration(f"export.gguf: {tools.program} does not run: {error.strerror}: {_REMEDY}") from error
    if done.returncode != 0:
        said = done.stderr.strip()[-400:] or f"exit code {done.returncode}"
        raise InvalidConfiguration(
            f"export.gguf: {tools.program} does not run on this node: {said}: choose other nodes in pod.nodeSelector"
        )
    return tools


def check_architecture(uri: str, config: Mapping[str, Any], tools: Tools) -> str:
    """Return the architecture of a model that llama.cpp can convert.

    Args:
        uri: The model, for messages.
        config: Its config.json.
        tools: The tools to convert it with.

    Raises:
        InvalidModel: llama.cpp does not know it, or it does not write text.
    """
    # A model for images and text has its language model in a part of its own, as the converter reads it too.
    for part in (config.get("text_config"), config):
        named = part.get("architectures") if isinstance(part, Mapping) else None
        if named:
            break
    else:
        raise InvalidModel(f"{uri}/config.json names no architectures, so it cannot be exported to GGUF")
    name = str(named[0])
    if not name.endswith(_WRITES_TEXT):
        raise InvalidModel(
            f"{uri}: a model of architecture {name} writes no text and is not exported to GGUF: leave out export.gguf"
        )
    if name not in tools.architectures():
        raise InvalidModel(
            f"{uri}: llama.cpp ({tools.version}) does not know the architecture {name}: leave out export.gguf, or use "
            "a trainer image with a newer llama-cpp-python"
        )
    return name


def run_tool(
    command: list[str],
    scratch: Path,
    *,
    environment: Mapping[str, str],
    stop: Stop,
    watch: Callable[[], None] = lambda: None,
) -> Finished:
    """Run a process to its end.

    It gets no credentials, no hub and no cache of hub code: a tokenizer's configuration may name Python code, and the
    converter would run it.

    Args:
        command: The program and its arguments.
        scratch: A folder of the run's own, for the output.
        environment: Where the process's environment is taken from.
        stop: Kills the process when it is requested.
        watch: Called a few times per second meanwhile.

    Raises:
        Preempted: A stop was requested.
    """
    output, log = scratch / "output", scratch / "log"
    private = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hub"), "PYTHONDONTWRITEBYTECODE": "1"}
    with output.open("wb") as output_file, log.open("wb") as log_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output_file,
            stderr=log_file,
            env=without_credentials(environment) | private,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            while process.poll() is None:
                watch()
                stop.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    # A progress bar overwrites its line with carriage returns; only its last state is worth keeping.
    lines = [line.rpartition("\r")[2] for line in log.read_bytes().decode(errors="replace").split("\n")]
    return Finished(process.returncode, output.read_text(), "\n".join(lines))


def converter_command(tools: Tools, model: Path, name: str, file_type: str, target: Path) -> list[str]:
    """Return the command that converts a Hugging Face folder without quantizing it."""
    arguments = [str(model), "--outfile", str(target), "--outtype", file_type.lower(), "--model-name", name]
    return [sys.executable, str(tools.converter), *arguments]


def _version(folder: Path) -> str:
    file = folder / "VERSION"
    return file.read_text().strip() if file.is_file() else "unknown version"
