"""The manifest that makes a folder of results valid, and the pointer to the newest one."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.alias_generators import to_camel

from tunewright_api.base import StatusModel

MANIFEST_NAME = "manifest.json"
LATEST_NAME = "latest.json"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024


class _Document(StatusModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class ManifestFile(_Document):
    """One file of a result; `path` is relative to the folder of the manifest."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    bytes: int = Field(ge=0)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in value or str(path) != value:
            raise ValueError(f"{value!r} leaves the folder of the manifest")
        return value


class Manifest(_Document):
    """Files of one published run. No manifest, no result."""

    version: Literal[1] = 1
    kind: Literal["Adapter", "Model"] = Field(description="An adapter for the base model, or a whole model.")
    run_key: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    writer: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    root: Annotated[str, Field(max_length=256)] = Field(
        description="Folder, relative to the manifest, that from_pretrained loads."
    )
    created_at: str
    files: list[ManifestFile]
    metrics: dict[str, Any] = Field(default_factory=dict)
    verification: dict[str, Any] | None = Field(default=None, description="What was proved of a merged model.")

    def to_bytes(self) -> bytes:
        """Return the document as it is stored."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2).encode() + b"\n"

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


class Latest(_Document):
    """`latest.json`: points to the newest published run of an output folder."""

    version: Literal[1] = 1
    run_key: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    manifest: Annotated[str, Field(max_length=256)] = Field(description="Manifest, relative to this file.")
    updated_at: str


def digest_of(manifest: bytes) -> str:
    """Return the digest that status.output carries."""
    return "sha256:" + hashlib.sha256(manifest).hexdigest()
