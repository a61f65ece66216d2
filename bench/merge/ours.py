"""One merge by tunewright: `python -m bench.merge.ours BASE ADAPTER TARGET`, from folder to folder or S3 to S3."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.machine import peak_bytes
from bench.merge.place import storage
from tunewright_trainer.merge.adapter import load_adapter
from tunewright_trainer.merge.checkpoint import Checkpoint
from tunewright_trainer.merge.readers import FolderReader, Reader, StorageReader
from tunewright_trainer.merge.sinks import FolderSink, Sink, StorageSink
from tunewright_trainer.merge.stream import merge


def main() -> None:
    """Merge, and print the peak of resident memory."""
    base, adapter, target = sys.argv[1:]
    reader: Reader = FolderReader(Path(base))
    sink: Sink = FolderSink(Path(target))
    if base.startswith("s3://"):
        store = storage()
        reader, sink = StorageReader(store, base, store.listing(base)), StorageSink(store, target)
    findings = merge(Checkpoint(reader), load_adapter(Path(adapter)), sink)
    assert findings.unchanged == (), findings.unchanged
    print(json.dumps({"peak_bytes": peak_bytes(), "bytes": sum(file.bytes for file in findings.files)}))


if __name__ == "__main__":
    main()
