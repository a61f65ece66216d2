"""GGUF files of a merged model, for llama.cpp and what is built on it.

    model folder --converter--> base file (the weights' own type, no loss) --quantization--> one file per type

Every file is proved before it counts: llama.cpp reads its header, which has the model's chat template, loads it and
runs it on a text; its logits are compared with those of the base file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunewright_trainer.errors import (
    DiskFull,
    InternalError,
    InvalidConfiguration,
    InvalidModel,
    Killed,
)
from tunewright_trainer.merge.gguf_check import Agreement, Header, check_header, compare, evaluate, read_header
from tunewright_trainer.merge.gguf_size import Weight, base_type, file_bytes, read_weights
from tunewright_trainer.merge.gguf_tools import Finished, Tools, check_architecture, converter_command, run_tool
from tunewright_trainer.transfer import Stop
from tunewright_trainer.worker import cpu_limit

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15}
"""Name and number in llama.cpp (llama_ftype). The types that need a calibration data set are left out."""
SPARE_BYTES = 32 * 1024 * 1024
"""Room for the logits of the check and for headers."""
ALMOST_FULL_BYTES = 1024 * 1024
MAX_THREADS = 16
MAX_LOG_LINES = 50
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_FALLBACK = re.compile(r"\(required for type +(\w+)\).*-> falling back to +(\w+)")
_SIDE_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors")
_CONFIGURATIONS = ("config.json", "tokenizer_config.json")

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the estimate of all."""


@dataclass(frozen=True)
class GgufFile:
    """A file that llama.cpp loads and runs."""

    path: Path
    type: str
    size_bytes: int
    bits_per_weight: float
    tensors: int
    fallbacks: Mapping[str, int]
    """Number of tensors that have another type than llama.cpp wanted because of their shape, as in
    {"q4_K -> q5_0": 150}."""
    divergence: float
    """Kullback-Leibler divergence of its predictions from those of the file in the weights' own type, in nats, mean
    over the positions of the probe text."""
    agreement: float
    """Share of these positions at which both find the same token most likely."""

    def note(self) -> str:
        """Say in one line what is worth knowing about it."""
        text = (
            f"{self.path.name}: {self.size_bytes / 1e6:.1f} MB, {self.bits_per_weight:.2f} bits per weight, divergence "
            f"{self.divergence:.2g} nats, same most likely token at {self.agreement:.0%} of positions"
        )
        if self.fallbacks:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.fallbacks.items()))
            text += (
                f"; {sum(self.fallbacks.values())} of {self.tensors} tensors have rows that do not suit {self.type} "
                f"and are larger ({kinds})"
            )
        return text


def export(
    model_folder: Path,
    types: Sequence[str],
    output_folder: Path,
    *,
    name: str,
    tools: Tools,
    stop: Stop,
    environment: Mapping[str, str],
    log: Callable[[str], None],
    progress: Progress = lambda done, total: None,
    uri: str | None = None,
) -> list[GgufFile]:
    """Write one GGUF file per type.

    Args:
        model_folder: A whole Hugging Face model: configuration, tokenizer, safetensors.
        types: Names in FILE_TYPES, each once.
        output_folder: Where `<name>-<TYPE>.gguf` go; made if missing. Needs room for all of them, and for one in the
            weights' own type. Nothing is left there by an export that fails.
        name: Of the model, in the file and in file names; characters that no file name should have become hyphens.
        tools: From `find_tools`.
        stop: Ends the export when it is requested.
        environment: Of the processes, less credentials.
        log: Told what is worth knowing of every file, and the end of what a process said that failed, line by line.
        progress: Told the bytes written.
        uri: The model's address, for messages; the folder by default.

    Returns:
        The files, in the order of `types`.

    Raises:
        InvalidConfiguration: A type is not known.
        InvalidModel: llama.cpp does not know the architecture, or the converter refuses the model.
        DiskFull: The files do not fit.
        VerificationFailed: llama.cpp does not load a file, or it is not the model.
        Killed: A process was killed, most likely for its memory.
        Preempted: A stop was requested.
    """
    unknown = [file_type for file_type in types if file_type not in FILE_TYPES]
    if unknown:
        raise InvalidConfiguration(f"export.gguf: unknown type {unknown[0]!r}: use {', '.join(FILE_TYPES)}")
    uri = uri or str(model_folder)
    check_architecture(uri, json.loads((model_folder / "config.json").read_bytes()), tools)
    output_folder.mkdir(parents=True, exist_ok=True)
    weights = read_weights(uri, model_folder)
    check_space(weights, types, output_folder)
    # In the output folder, because the results are moved out of it.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output_folder) as scratch:
        work = _Export(uri, name, tools, Path(scratch), stop, environment, log, progress)
        made = work.run(model_folder, weights, types)
        return [replace(file, path=file.path.rename(output_folder / file.path.name)) for file in made]


def file_name(name: str, file_type: str) -> str:
    """Return the name of a file: deterministic, and fit for every file system and every URL."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:120] or "model"
    return f"{stem}-{file_type}.gguf"


def space_needed(weights: Sequence[Weight], types: Sequence[str]) -> int:
    """Return the bytes that an export writes, at most: all files, and the base file where it is not one of them."""
    return sum(file_bytes(weights, file_type) for file_type in {*types, base_type(weights)}) + SPARE_BYTES


def check_space(weights: Sequence[Weight], types: Sequence[str], folder: Path) -> None:
    """Compare what an export writes with the room there is.

    Raises:
        DiskFull: It does not fit.
    """
    needed, free = space_needed(weights, types), shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFull(
            f"export.gguf writes {needed / 1e9:.3f} GB ({', '.join(types)}, from {base_type(weights)}), but {folder} "
            f"has {free / 1e9:.3f} GB left: raise resources.ephemeralStorage, or export fewer types"
        )


def chat_template(folder: Path) -> str | None:
    """Return the chat template of a tokenizer as transformers finds it: its own file comes first."""
    file = folder / CHAT_TEMPLATE_FILE
    if file.is_file():
        return file.read_text()
    config = folder / "tokenizer_config.json"
    template: Any = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template if isinstance(template, str) else None


@dataclass
class _Export:
    """One export at work."""

    uri: str
    name: str
    tools: Tools
    scratch: Path
    stop: Stop
    environment: Mapping[str, str]
    log: Callable[[str], None]
    progress: Progress
    done_bytes: int = 0
    total_bytes: int = 0

    def run(self, model_folder: Path, weights: Sequence[Weight], types: Sequence[str]) -> list[GgufFile]:
        """Write and check the base file, then all others from it."""
        base = base_type(weights)
        sizes = {file_type: file_bytes(weights, file_type) for file_type in (base, *types)}
        self.total_bytes = sum(sizes.values())
        template = chat_template(model_folder)
        base_path = self.scratch / file_name(self.name, base)
        self._convert(_view(model_folder, self.scratch / "model"), base, base_path, sizes[base])
        base_header = self._checked_header(base_path, base, template, None)
        _, reference_TV = evaluate(base_path, self.tools, _threads(), self._run)
        made = {base: _described(base_path, base, base_header, {}, compare(reference_TV, reference_TV))}
        for file_type in [file_type for file_type in types if file_type != base]:
            path = self.scratch / file_name(self.name, file_type)
            fallbacks = self._quantize(base_path, file_type, path, sizes[file_type])
            header = self._checked_header(path, file_type, template, base_header)
            _, logits_TV = evaluate(path, self.tools, _threads(), self._run)
            made[file_type] = _described(path, file_type, header, fallbacks, compare(reference_TV, logits_TV))
        files = [made[file_type] for file_type in types]
        for file in files:
            self.log(file.note())
        return files

    def _convert(self, model: Path, base: str, path: Path, size: int) -> None:
        command = converter_command(self.tools, model, self.name, base, path)
        finished = self._write(command, path, size)
        if finished.code != 0:
            raise InvalidModel(
                f"{self.uri}: llama.cpp's converter ({self.tools.version}) refuses the model: {finished.last_line()}: "
                "leave out export.gguf, or use a trainer image with a newer llama-cpp-python"
            )

    def _quantize(self, base_path: Path, file_type: str, path: Path, size: int) -> Counter[str]:
        arguments = [str(base_path), str(path), str(FILE_TYPES[file_type]), str(_threads())]
        command = [str(self.tools.program), "quantize", *arguments]
        finished = self._write(command, path, size)
        if finished.code != 0:
            raise InternalError(f"{self.uri}: the quantization to {file_type} failed: {finished.last_line()}")
        return Counter(f"{wanted} -> {taken}" for wanted, taken in _FALLBACK.findall(finished.log))

    def _checked_header(self, path: Path, file_type: str, template: str | None, base: Header | None) -> Header:
        header = read_header(path, self.tools, self._run)
        check_header(path, header, FILE_TYPES[file_type], template, base)
        return header

    def _write(self, command: list[str], path: Path, size: int) -> Finished:
        """Run what writes a file, telling how far it is."""

        def watch() -> None:
            written = path.stat().st_size if path.exists() else 0
            self.progress(self.done_bytes + min(written, size), self.total_bytes)

        finished = self._run(command, watch)
        self.done_bytes += size
        self.progress(self.done_bytes, self.total_bytes)
        return finished

    def _run(self, command: list[str], watch: Callable[[], None] = lambda: None) -> Finished:
        finished = run_tool(command, self.scratch, environment=self.environment, stop=self.stop, watch=watch)
        if finished.code != 0:
            for line in finished.log.splitlines()[-MAX_LOG_LINES:]:
                self.log(line)
            self._check_resources(finished)
        return finished

    def _check_resources(self, finished: Finished) -> None:
        """Say so if a failure is the machine's and not the model's."""
        free = shutil.disk_usage(self.scratch).free
        if os.strerror(errno.ENOSPC) in finished.log or free < ALMOST_FULL_BYTES:
            raise DiskFull(f"no space left in {self.scratch.parent} for export.gguf: raise resources.ephemeralStorage")
        if finished.is_killed():
            raise Killed(
                "a process of export.gguf was killed (SIGKILL), most likely because the container ran out of memory: "
                "raise resources.memory"
            )


def _described(
    path: Path, file_type: str, header: Header, fallbacks: Mapping[str, int], agreement: Agreement
) -> GgufFile:
    return GgufFile(
        path=path,
        type=file_type,
        size_bytes=path.stat().st_size,
        bits_per_weight=header.bits_per_weight,
        tensors=len(header.elements),
        fallbacks=fallbacks,
        divergence=agreement.divergence,
        agreement=agreement.same_token,
    )


def _view(model: Path, view: Path) -> Path:
    """Make a folder with what the converter may see of a model: no Python code, and nothing that names any.

    transformers would run code that the configuration names (auto_map), and the converter allows it to.
    """
    view.mkdir()
    for file in model.iterdir():
        if file.name in _CONFIGURATIONS:
            document = json.loads(file.read_bytes())
            document.pop("auto_map", None)
            if (model / CHAT_TEMPLATE_FILE).is_file():
                # The converter would prefer this one, which transformers ignores beside the file.
                document.pop("chat_template", None)
            (view / file.name).write_text(json.dumps(document))
        elif file.name.endswith(_SIDE_FILES):
            (view / file.name).symlink_to(file.resolve())
    return view


def _threads() -> int:
    return min(MAX_THREADS, cpu_limit())
