"""Text that every Python brings along: the source code of its standard library, and the prose in its docstrings.

::

    source, prose = python_source(), python_prose()
    print(source.description)       # version of Python, files and bytes; the text differs between versions
"""

from __future__ import annotations

import ast
import os
import platform
import sys
import warnings
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mlreviews.datasets.text import TextCorpus, text_corpus

__all__ = ["python_prose", "python_source"]

# Tests, demonstrations, generated tables, and what later versions of Python no longer have.
_SKIPPED_PACKAGES = {"distutils", "encodings", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
_SKIPPED_FOLDERS = {"__pycache__", "idle_test", "test", "tests"}
# A whole library has about 8 million bytes after the above (3.11 to 3.13).
_LEAST_BYTES = 4_000_000


def python_source() -> TextCorpus:
    """The source code of the running Python's standard library, about 8 MB in 400 files. Read once a process, in 0.1 s.

    Left out are tests, IDLE, lib2to3, distutils, generated tables (encodings, pydoc_data), demonstrations, whatever is
    not part of the library (site-packages, settings of the machine), and files that are not UTF-8. Lines end with
    one newline character on every system.

    The text differs between versions of Python, so the description names the version; a file is on the same side of
    the split in all of them.

    Raises:
        FileNotFoundError: the library's source is not there, or mostly missing.
    """
    return _source(_library_root())


def python_prose() -> TextCorpus:
    """The English in the standard library: the docstrings of `python_source`, about 1.5 MB. Parsed once, in seconds.

    A document holds all docstrings of one file, in order and without their indentation, a blank line between two. A
    file is on the same side of the split as in `python_source`: a model trained on one can be evaluated on the other.

    Raises:
        FileNotFoundError: the library's source is not there, or mostly missing.
    """
    return _prose(_library_root())


def _library_root() -> Path:
    return Path(os.__file__).parent  # a folder, or an archive such as python313.zip


@cache
def _source(root: Path) -> TextCorpus:
    origin = f"Source code of Python {platform.python_version()}'s standard library, PSF License"
    return text_corpus("python-source", _library(root), origin)


@cache
def _prose(root: Path) -> TextCorpus:
    origin = f"Docstrings of Python {platform.python_version()}'s standard library, PSF License"
    return text_corpus("python-prose", {path: _docstrings(text) for path, text in _library(root).items()}, origin)


@cache
def _library(root: Path) -> dict[str, bytes]:
    files = _folder(root) if root.is_dir() else _archive(root) if zipfile.is_zipfile(root) else iter(())
    documents = {path: raw.replace(b"\r\n", b"\n") for path, raw in files if raw and _is_text(raw)}
    size = sum(map(len, documents.values()))
    if size < _LEAST_BYTES:
        raise FileNotFoundError(
            f"the standard library's source is missing or incomplete in {root}: {len(documents)} usable .py files "
            f"with {size:,} bytes, expected at least {_LEAST_BYTES:,}; minimal and embedded Pythons leave it out"
        )
    return documents


def _folder(root: Path) -> Iterator[tuple[str, bytes]]:
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if _is_wanted((inside / name / "_.py").as_posix())]
        for path in (inside / name for name in names):
            if _is_wanted(path.as_posix()):
                yield path.as_posix(), (root / path).read_bytes()


def _archive(root: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(root) as archive:
        for path in filter(_is_wanted, archive.namelist()):
            yield path, archive.read(path)


def _is_wanted(path: str) -> bool:
    *folders, _ = parts = path.split("/")
    module = parts[0].removesuffix(".py")
    in_library = module in sys.stdlib_module_names and module not in _SKIPPED_PACKAGES
    return path.endswith(".py") and in_library and _SKIPPED_FOLDERS.isdisjoint(folders)


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in raw


def _docstrings(source: bytes) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old files are not ours to report
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return b""
    texts = [text for node in _definitions(tree) if (text := ast.get_docstring(node))]
    prose = "".join(f"{text}\n\n" for text in texts).removesuffix("\n")
    return prose.encode("utf-8", "replace").replace(b"\0", b"")


def _definitions(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        # Only statements hold definitions; going through expressions as well (ast.walk) takes several times as long.
        for branch in ("finalbody", "orelse", "handlers", "body"):
            pending.extend(reversed(getattr(node, branch, ())))
