"""Make the example data set: questions about Python's standard library, answered by its own docstrings.

    python examples/data/make_docstrings.py [FOLDER]

Writes docstrings-train.jsonl (270 rows) and docstrings-validation.jsonl (30 rows), each row
{"prompt": "What does os.path.join do?", "completion": "Join two or more pathname components, ..."}.
The same Python release always writes the same bytes; another release may word a docstring differently.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TRAIN_ROWS = 270
VALIDATION_ROWS = 30

# Pure-Python modules that import without side effects, on every platform.
_MODULES = """
    argparse ast asyncio base64 bdb bisect calendar cmd code codecs collections colorsys concurrent.futures
    configparser contextlib copy csv ctypes.util dataclasses datetime decimal difflib dis doctest email.header
    email.message email.utils enum filecmp fileinput fnmatch fractions functools getpass gettext glob graphlib
    gzip hashlib heapq hmac html html.parser http.client http.cookiejar http.server imaplib importlib.metadata
    importlib.util inspect io ipaddress json linecache locale logging logging.config logging.handlers mailbox
    math mimetypes multiprocessing.pool netrc numbers operator optparse os os.path pathlib pdb pickle
    pickletools pkgutil platform plistlib poplib pprint profile pstats queue quopri random re sched secrets
    selectors shelve shlex shutil smtplib socket socketserver stat statistics string struct subprocess symtable
    sysconfig tarfile tempfile textwrap threading time timeit tokenize trace traceback types typing unittest
    unittest.mock urllib.parse urllib.request urllib.robotparser uuid warnings wave weakref xml.dom.minidom
    xml.etree.ElementTree xml.sax.saxutils xmlrpc.client zipapp zipfile zlib
"""
MODULES = _MODULES.split()

# One sentence of plain words: no markup, no examples, no list, nothing that looks like code.
_SENTENCE = re.compile(r"(?!.* -)[A-Z][a-z]+ [A-Za-z0-9 ,'/-]{20,110}[a-z]\.")


def summary(docstring: str | None) -> str | None:
    """Return the first paragraph of a docstring when it is one well-formed sentence, else None."""
    if not docstring:
        return None
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    text = " ".join(paragraph.split())
    return text if _SENTENCE.fullmatch(text) else None


def documented() -> Iterator[tuple[str, str]]:
    """Yield (qualified name, summary) of the public functions and methods of `MODULES`."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            thing = getattr(module, name)
            if name.startswith("_") or not (inspect.isroutine(thing) or inspect.isclass(thing)):
                continue
            # Only where it is at home: re-exports would ask about the same thing twice.
            home = (getattr(thing, "__module__", None) or module_name).replace("posixpath", "os.path")
            if home.lstrip("_") != module_name:
                continue
            members = {name: thing} if inspect.isroutine(thing) else _methods(name, thing)
            for path, member in members.items():
                if text := summary(member.__doc__):
                    yield f"{module_name}.{path}", text


def _methods(name: str, cls: type) -> dict[str, object]:
    methods = inspect.getmembers_static(cls, inspect.isfunction)
    return {f"{name}.{key}": value for key, value in methods if key in vars(cls) and not key.startswith("_")}


def rows() -> list[dict[str, str]]:
    """Return the rows in an order that mixes the modules and depends only on the names."""
    by_summary = {text: name for name, text in documented()}
    chosen = sorted(by_summary.items(), key=lambda item: hashlib.sha256(item[1].encode()).digest())
    made = [{"prompt": f"What does {name} do?", "completion": text} for text, name in chosen]
    if len(made) < TRAIN_ROWS + VALIDATION_ROWS:
        raise RuntimeError(f"only {len(made)} docstrings fit: add modules to MODULES")
    return made[: TRAIN_ROWS + VALIDATION_ROWS]


def write(folder: Path) -> None:
    """Write both files."""
    made = rows()
    parts = {"train": made[:TRAIN_ROWS], "validation": made[TRAIN_ROWS:]}
    for part, part_rows in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part_rows)
        (folder / f"docstrings-{part}.jsonl").write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
