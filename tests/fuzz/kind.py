"""What a kind of input is: how it is mutated, and what the kit is asked with it.

A kind's ``make`` needs the corpus alone, so that any process can make an input again from its seed.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from fuzz.outcomes import Outcome
from numpy.random import Generator

Files = dict[str, bytes]
KINDS: dict[str, type[Kind]] = {}


class Kind:
    """One kind of input.

    Attributes:
        name: of the kind, by which it is chosen.
        weight: share of the inputs.
    """

    name: ClassVar[str] = ""
    weight: ClassVar[int] = 1

    def __init__(self, corpus: Path, work: Path) -> None:
        self.corpus, self.work = corpus, work

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.name:
            KINDS[cls.name] = cls

    def make(self, rng: Generator) -> Files:
        """The mutated files by relative path."""
        raise NotImplementedError

    def use(self, files: Files) -> Outcome:
        """Ask the kit with them."""
        raise NotImplementedError

    def read(self, path: str) -> bytes:
        return (self.corpus / path).read_bytes()


def generator_of(kind: str, seed: int) -> Generator:
    return np.random.default_rng([zlib.crc32(kind.encode()), seed])


def write_files(folder: Path, files: Files) -> Path:
    """Write a folder anew with these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
