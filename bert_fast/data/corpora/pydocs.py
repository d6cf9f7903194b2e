"""Documentation strings of the Python standard library and of installed packages, one document per module."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bert_fast.data.corpora.base import Corpus, Document, Found, Piece, by_size
from bert_fast.data.docstrings import clean_docstring, documentation
from bert_fast.data.streams import Source
from bert_fast.data.text import split_sentences
from bert_fast.errors import UserError

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "idlelib", "lib2to3"}


class PyDocs(Corpus):
    suffixes = ()
    space = 3
    reads_packages = True

    def find(self, name: str, folder: str | None, packages: tuple[str, ...]) -> Found:
        """Modules of the standard library and of `packages`. Raises UserError for one that is not installed."""
        roots = [("python", Path(sysconfig.get_paths()["stdlib"]))]
        for package in packages:
            try:
                spec = importlib.util.find_spec(package)
            except (ImportError, ValueError, AttributeError):  # its parent is missing, broken or no package
                spec = None
            if spec is None:
                raise UserError(f"corpus {name}: package {package} is not installed; pip install {package}")
            if not spec.submodule_search_locations:
                raise UserError(f"corpus {name}: {package} is a single module; name a package, which is a folder")
            roots.append((package, Path(next(iter(spec.submodule_search_locations)))))
        return Found(
            [
                Source(f"{label}/{file.relative_to(root).as_posix()}", str(file))
                for label, root in roots
                for file in sorted(root.rglob("*.py"))
                if not _SKIPPED_FOLDERS.intersection(file.relative_to(root).parts)
            ]
        )

    def pieces(self, sources: list[Source], column: str) -> Iterator[Piece]:
        return by_size(sources, lambda source: os.path.getsize(source.path))

    def read(self, piece: list[Source], language: str) -> Iterator[Document]:
        for source in piece:
            for texts in documentation(source.path):
                blocks = [sentences for text in texts if (sentences := split_sentences(clean_docstring(text)))]
                if blocks:
                    yield Document(source.name, blocks)


CORPUS = PyDocs()
