"""The code of users' own reward functions, as far as the supervisor looks at it: it is there, and it has a digest.

The digest is part of the run key: another function under the same name makes another run. Nothing is imported here.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from tunewright_api.run_config import TrainRun
from tunewright_trainer.errors import InvalidConfiguration


def function_digests(run: TrainRun) -> dict[str, str]:
    """Return the digest of the code of each reward of type Function, by its name.

    Raises:
        InvalidConfiguration: There is no such package or module.
    """
    return {
        source.function.module: digest_of(source.function.module, f"rewards[{index}].function")
        for index, source in enumerate(run.objective.rewards)
        if source.function is not None
    }


def digest_of(function: str, field: str) -> str:
    """Return a digest of all files of the package, or of the one module, that has a function.

    Raises:
        InvalidConfiguration: There is none.
    """
    top = function.partition(":")[0].partition(".")[0]
    # Of a name without dots nothing is imported.
    spec = importlib.util.find_spec(top) if top != "__main__" else None
    if spec is None:
        raise InvalidConfiguration(
            f"{field} {function}: there is no module {top} in this image: put it into an image of your own (pod.image) "
            "and on its PYTHONPATH"
        )
    digest = hashlib.sha256()
    for root in map(Path, spec.submodule_search_locations or [spec.origin or ""]):
        files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
        for path in files:
            if "__pycache__" not in path.parts and path.is_file():
                digest.update(f"{path.relative_to(root.parent)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return "sha256:" + digest.hexdigest()
