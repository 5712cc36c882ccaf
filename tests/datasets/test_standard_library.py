import abc
import inspect
import json.encoder
import os
import platform
import zipfile
from pathlib import Path

import pytest

from mlreviews.datasets import TextCorpus, python_prose, python_source, standard_library

# A library in small: what is to be found, and what is to be left out.
WANTED = {
    "os.py": b'"""Miscellaneous."""\n',
    "abc.py": "naïve = 1\n".encode(),
    "json/decoder.py": b"x = 1\ny = 2\n",
    "enum.py": b"class Enum:\n    '''An enumeration.'''\n",
    "email/mime/text.py": b"pass\n",
}
UNWANTED = {
    "site-packages/json.py": b"no\n",
    "site-packages/json/decoder.py": b"no\n",
    "test/support.py": b"no\n",
    "unittest/test/testmock/support.py": b"no\n",
    "ctypes/tests/a.py": b"no\n",
    "idlelib/help.py": b"no\n",
    "lib2to3/main.py": b"no\n",
    "distutils/core.py": b"no\n",
    "encodings/cp037.py": b"no\n",
    "pydoc_data/topics.py": b"no\n",
    "turtledemo/tree.py": b"no\n",
    "json/__pycache__/decoder.py": b"no\n",
    "json/README.txt": b"no\n",
    "json/decoder.pyc": b"no\n",
    "sitecustomize.py": b"no\n",
    "_sysconfigdata__linux_x86_64-linux-gnu.py": b"no\n",
    "html/latin1.py": "# é\n".encode("latin-1"),
    "html/zero.py": b"x = '\0'\n",
    "html/empty.py": b"",
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small library as a folder, taken for the running Python's."""
    root = tmp_path / "lib"
    for path, raw in {**WANTED, **UNWANTED, "json/decoder.py": b"x = 1\r\ny = 2\r\n"}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(raw)
    monkeypatch.setattr(standard_library, "_LEAST_BYTES", sum(map(len, WANTED.values())))
    monkeypatch.setattr("os.__file__", str(root / "os.py"))
    return root


def _documents(corpus: TextCorpus) -> dict[str, bytes]:
    return {file: part.document(file) for part in (corpus.train, corpus.validation) for file in part.files}


class TestSource:
    def test_takes_the_library_and_nothing_else(self, library: Path) -> None:
        assert _documents(python_source()) == WANTED

    def test_reads_an_archive_as_well(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = library.with_suffix(".zip")
        with zipfile.ZipFile(archive, "w") as file:
            for path in library.rglob("*"):
                file.write(path, path.relative_to(library).as_posix())
        monkeypatch.setattr("os.__file__", str(archive / "os.pyc"))
        assert _documents(python_source()) == WANTED

    def test_an_incomplete_library_is_an_error(self, library: Path) -> None:
        (library / "email/mime/text.py").unlink()
        with pytest.raises(FileNotFoundError, match=r"incomplete in .*lib: 4 usable .py files with 82 bytes"):
            python_source()
        with pytest.raises(FileNotFoundError, match="expected at least 87;"):
            python_prose()

    def test_a_missing_library_is_an_error(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.__file__", str(library / "nowhere.zip" / "os.pyc"))
        with pytest.raises(FileNotFoundError, match=r"nowhere.zip: 0 usable .py files with 0 bytes"):
            python_source()

    def test_the_real_one(self) -> None:
        corpus = python_source()
        assert python_source() is corpus
        assert platform.python_version() in corpus.description
        assert "PSF License" in corpus.description
        assert corpus.train.document("os.py").decode() == Path(os.__file__).read_text(encoding="utf-8")
        assert "json/encoder.py" in corpus.validation.files
        total = len(corpus.train.data) + len(corpus.validation.data)
        assert 6e6 < total < 12e6
        assert 0.05 < len(corpus.validation.data) / total < 0.2


class TestProse:
    def test_docstrings_in_order_without_indentation(self, library: Path) -> None:
        (library / "abc.py").write_text(
            '''"""The module,
   on two lines.
"""
text = """not a docstring"""
class A:
    """A class."""
    def f(self):
        """A method.

            Indented.
        Not.
        """
        "nor this"
        async def inner(): "A nested coroutine."
    def g(self): pass
try:
    def h(): "In try."
except ImportError:
    def h(): "In except."
else:
    def i(): "In else."
finally:
    def j(): "In finally."
if text:
    def k(): "é and \\0 zero, \\ud800 surrogate."
'''
        )
        (library / "html/broken.py").write_text("def (:\n")
        documents = _documents(python_prose())
        assert documents["abc.py"].decode() == (
            "The module,\non two lines.\n\nA class.\n\nA method.\n\n    Indented.\nNot.\n\nA nested coroutine.\n\n"
            "In try.\n\nIn except.\n\nIn else.\n\nIn finally.\n\né and  zero, ? surrogate.\n"
        )
        # Files without docstrings, or that are not Python, are no documents.
        assert documents.keys() == {"abc.py", "os.py", "enum.py"}

    def test_a_file_is_on_the_same_side_as_its_source(self, library: Path) -> None:
        source, prose = python_source(), python_prose()
        assert python_prose() is prose
        assert platform.python_version() in prose.description
        assert (source.name, prose.name) == ("python-source", "python-prose")
        assert prose.validation.files == ("enum.py",)
        assert "enum.py" in source.validation.files
        assert set(prose.train.files) <= set(source.train.files)

    def test_old_escapes_do_not_warn(self, library: Path) -> None:
        (library / "os.py").write_text('"""Miscellaneous \\d."""\n')
        assert _documents(python_prose())["os.py"] == b"Miscellaneous \\d.\n"

    def test_agrees_with_inspect(self, library: Path) -> None:
        for module, path in ((abc, "abc.py"), (json.encoder, "json/encoder.py")):
            (library / path).write_text(inspect.getsource(module), encoding="utf-8")
        documents = _documents(python_prose())
        start = f"{inspect.getdoc(abc)}\n\n{inspect.getdoc(abc.abstractmethod)}\n\n"
        assert documents["abc.py"].decode().startswith(start)
        assert f"\n\n{inspect.getdoc(json.encoder.JSONEncoder.iterencode)}\n" in documents["json/encoder.py"].decode()

    @pytest.mark.slow
    def test_the_real_one(self) -> None:
        corpus = python_prose()
        assert python_prose() is corpus
        assert platform.python_version() in corpus.description
        assert "abc.py" in corpus.train.files
        assert "json/encoder.py" in corpus.validation.files
        total = len(corpus.train.data) + len(corpus.validation.data)
        assert 0.8e6 < total < 3e6
        assert 0.05 < len(corpus.validation.data) / total < 0.2
