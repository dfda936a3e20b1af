"""Wheels in pieces: joined, compared and installed; each kind of damage is named and costs its own wheel."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu_proof import __main__ as command
from benchmarks.gpu_proof import wheels
from benchmarks.gpu_proof.schedule import Driver, step_environment
from benchmarks.gpu_proof.wheels import (
    Piece,
    Wheel,
    WheelError,
    find_or_join,
    install,
    lock,
    machines_own,
    name_the_kit,
    read_list,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
# A piece, the checkout's files and a margin.
MOST_BYTES, CHECKOUT_BYTES = 64 << 20, 14 << 20
PART = 400


def make_wheel(folder: Path, name: str) -> Path:
    """A wheel with one module, whose text does not compress."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    text = "".join(hashlib.sha256(f"{name}{number}".encode()).hexdigest() for number in range(20))
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f'VALUE = "{text}"\n')
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Wheel], Path]:
    """Two wheels of several pieces each, and the folder of their loads."""
    monkeypatch.setattr(wheels, "PART_BYTES", PART)
    whole, out = tmp_path / "whole", tmp_path / "loads"
    names = ("planted_one", "planted_two")
    for name in names:
        make_wheel(whole, name)
    locked = lock([Wheel(name, "1.0", "", "", "", 0, "", ()) for name in names], whole)
    for wheel in locked:
        wheels.cut(whole / wheel.file, wheel.parts, out)
    return locked, out


def piece(out: Path, wheel: Wheel, number: int) -> Path:
    return out / f"load-{wheel.parts[number].load:02}" / wheel.parts[number].file


def test_pieces_are_joined_to_the_same_wheel(pieces: tuple[list[Wheel], Path], tmp_path: Path) -> None:
    locked, out = pieces
    for wheel in locked:
        assert len(wheel.parts) > 2
        joined = find_or_join(wheel, out, tmp_path / "joined")
        assert joined is not None
        assert joined.read_bytes() == (tmp_path / "whole" / wheel.file).read_bytes()
    sizes = [sum(path.stat().st_size for path in load.iterdir()) for load in out.iterdir()]
    assert max(sizes) <= PART


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"part2: 399 bytes, expected 400: it was cut off"),
        (lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]), r"part2: its SHA-256 is .*, expected .*"),
        (lambda path: path.unlink(), r"1 of \d+ pieces are not there: planted_one-1.0-py3-none-any.whl.part2"),
    ],
)
def test_a_damaged_piece_is_named(damage, words, pieces, tmp_path) -> None:  # type: ignore[no-untyped-def]
    locked, out = pieces
    damage(piece(out, locked[0], 1))
    with pytest.raises(WheelError, match=words):
        find_or_join(locked[0], out, tmp_path / "joined")


def test_a_list_with_another_digest_of_the_whole_is_noticed(pieces: tuple[list[Wheel], Path], tmp_path: Path) -> None:
    locked, out = pieces
    wheel = locked[0]
    other = Wheel(wheel.name, "1.0", "", "", wheel.file, wheel.size, "0" * 64, wheel.parts)
    with pytest.raises(WheelError, match=r"planted_one.*its SHA-256 is .*, expected 0{64}"):
        find_or_join(other, out, tmp_path / "joined")


def test_damage_costs_its_own_wheel(
    pieces: tuple[list[Wheel], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, out = pieces
    path = piece(out, locked[0], 0)
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr(command, "read_list", lambda: locked)
    work = tmp_path / "work"
    driver = Driver([tmp_path / "report.json"], work, time.monotonic() + 60, step_environment(None, work))
    result = command.install_wheels(out, work, driver)
    assert result["status"] == "failed"
    assert result["reason"].startswith("planted_one: failed: planted_one-1.0-py3-none-any.whl.part1: 100 bytes")
    assert result["figures"]["planted_two"] == "installed"
    assert (work / "site" / "planted_two.py").is_file()
    assert not (work / "site" / "planted_one.py").exists()


def test_a_wheel_that_is_no_wheel_is_pips_to_name(tmp_path: Path) -> None:
    path = tmp_path / "planted_three-1.0-py3-none-any.whl"
    path.write_bytes(b"no archive")
    digest = hashlib.sha256(b"no archive").hexdigest()
    wheel = Wheel("planted_three", "1.0", "", "", path.name, 10, digest, (Piece(path.name, 10, digest, 1),))
    went = install([wheel], tmp_path, tmp_path / "work", dict(os.environ), 60)
    assert went["planted_three"].startswith("failed: planted_three-1.0-py3-none-any.whl: pip ended with code")


def test_what_is_not_there_is_no_fault(pieces: tuple[list[Wheel], Path], tmp_path: Path) -> None:
    locked, _ = pieces
    (tmp_path / "empty").mkdir()
    assert set(install(locked, tmp_path / "empty", tmp_path / "work", {}, 60).values()) == {"not there"}


def test_the_kit_has_metadata_where_it_is_not_installed(tmp_path: Path) -> None:
    """It runs from a checkout; without metadata every export fails."""
    name_the_kit(tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (found.metadata["Name"], found.version) == (project["name"], project["version"])


def test_the_machines_own_package_is_taken_where_it_will_do() -> None:
    own = Wheel("pytest", "0", "", ">=1", "", 0, "", ())
    assert machines_own(own) is not None
    assert machines_own(Wheel("pytest", "0", "", ">=9999", "", 0, "", ())) is None
    assert machines_own(Wheel("pytest", "0", "", "", "", 0, "", ())) is None
    assert machines_own(Wheel("no-such-package", "0", "", ">=1", "", 0, "", ())) is None


def test_the_committed_list_is_whole() -> None:
    for wheel in read_list():
        assert sum(part.size for part in wheel.parts) == wheel.size
        assert [part.file for part in wheel.parts] == (
            [wheel.file]
            if len(wheel.parts) == 1
            else [f"{wheel.file}.part{number}" for number in range(1, len(wheel.parts) + 1)]
        )
        assert len(wheel.sha256) == 64
    loads: dict[int, int] = {}
    for part in (part for wheel in read_list() for part in wheel.parts):
        loads[part.load] = loads.get(part.load, 0) + part.size
    assert sorted(loads) == list(range(1, len(loads) + 1))
    assert max(loads.values()) + CHECKOUT_BYTES <= MOST_BYTES


def test_the_committed_versions_are_allowed_by_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    models = (REPOSITORY / "examples" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    examples = [line for line in models if line and not line.startswith("#")]
    asked = [Requirement(text) for text in (*project["dependencies"], *extras, *examples)]
    for wheel in read_list():
        ranges = [entry.specifier for entry in asked if canonicalize_name(entry.name) == canonicalize_name(wheel.name)]
        assert ranges, f"{wheel.name} is no dependency"
        assert all(entry.contains(wheel.version) for entry in ranges), wheel.name


def test_a_run_without_wheels_uses_what_is_here(tmp_path: Path) -> None:
    work = tmp_path / "work"
    driver = Driver([tmp_path / "report.json"], work, time.monotonic() + 60, {})
    result = command.install_wheels(None, work, driver)
    assert result["status"] == "skipped"
