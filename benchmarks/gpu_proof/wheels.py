"""The wheels that a machine without a network needs, cut into pieces that travel one at a time.

    python -m benchmarks.gpu_proof.wheels fetch --out build/gpu-wheels

fetches them with pip and cuts them into folders ``load-01`` and so on; ``--lock`` writes their digests into
``wheels.json`` instead of comparing. The driver joins the pieces, compares digests and installs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.process import last_line, run_limited

LIST = Path(__file__).with_name("wheels.json")
_REPOSITORY = Path(__file__).parents[2]
# Of a piece, and of a load.
PART_BYTES = 50_000_000
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_PYTHON = "312"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Piece:
    """A file that travels: a wheel, or a part of one.

    Attributes:
        file: its name.
        size: its bytes.
        sha256: its digest.
        load: number of the folder that it is in.
    """

    file: str
    size: int
    sha256: str
    load: int


@dataclass(frozen=True)
class Wheel:
    """A wheel.

    Attributes:
        name: the package.
        version: its version.
        use: what it is for.
        unless: versions with which the machine's own is taken instead; empty for none.
        file: the wheel's name.
        size: its bytes.
        sha256: its digest.
        parts: its pieces, in order.
    """

    name: str
    version: str
    use: str
    unless: str
    file: str
    size: int
    sha256: str
    parts: tuple[Piece, ...]


class WheelError(Exception):
    """A wheel cannot be had; the message says which one, and why."""


def read_list(path: Path = LIST) -> list[Wheel]:
    """The wheels, most valuable first."""
    entries = json.loads(path.read_text(encoding="utf-8"))["wheels"]
    return [Wheel(**{**entry, "parts": tuple(Piece(**part) for part in entry["parts"])}) for entry in entries]


def install(wheels: Sequence[Wheel], folder: Path, work: Path, environment: Mapping[str, str], limit_s: float) -> Any:
    """Join, compare and install into ``work/site``, one wheel after another.

    Returns:
        For each package how it went: ``installed``, ``the machine's ...``, ``not there: ...`` or ``failed: ...``.
    """
    found: dict[str, str] = {}
    for wheel in wheels:
        if own := machines_own(wheel):
            found[wheel.name] = f"the machine's {own}"
            continue
        try:
            path = find_or_join(wheel, folder, work / "wheels")
            found[wheel.name] = "not there" if path is None else _pip_install(path, work, environment, limit_s)
        except (WheelError, OSError) as error:
            found[wheel.name] = f"failed: {error}"
    return found


def name_the_kit(site: Path) -> None:
    """Write the kit's own metadata: it runs from the checkout, and exports record its version."""
    project = (_REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', project, flags=re.MULTILINE)
    version = found[1] if found else "0"
    folder = site / f"adalink_kit-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    metadata_text = f"Metadata-Version: 2.1\nName: adalink-kit\nVersion: {version}\n"
    (folder / "METADATA").write_text(metadata_text, encoding="utf-8")


def machines_own(wheel: Wheel) -> str | None:
    """The version that this Python has and that will do; ``None`` if there is none."""
    if not wheel.unless:
        return None
    try:
        from packaging.specifiers import SpecifierSet

        version = metadata.version(wheel.name)
    except (ImportError, metadata.PackageNotFoundError):
        return None
    return version if SpecifierSet(wheel.unless).contains(version, prereleases=True) else None


def find_or_join(wheel: Wheel, folder: Path, joined: Path) -> Path | None:
    """The whole wheel; ``None`` if neither it nor any of its pieces is there. Raises ``WheelError``."""
    whole = next(iter(sorted(folder.rglob(wheel.file))), None)
    if whole is None:
        places = {part.file: next(iter(sorted(folder.rglob(part.file))), None) for part in wheel.parts}
        if not any(places.values()):
            return None
        if missing := [name for name, place in places.items() if place is None]:
            raise WheelError(f"{wheel.file}: {len(missing)} of {len(places)} pieces are not there: {missing[0]}")
        joined.mkdir(parents=True, exist_ok=True)
        whole = joined / wheel.file
        with whole.open("wb") as stream:
            for part in wheel.parts:
                place = places[part.file]
                assert place is not None
                check_file(place, part.size, part.sha256)
                with place.open("rb") as source:
                    shutil.copyfileobj(source, stream, _BLOCK)
    check_file(whole, wheel.size, wheel.sha256)
    return whole


def check_file(path: Path, size: int, sha256: str) -> None:
    """Compare a file with its size and digest; raises ``WheelError``."""
    received = path.stat().st_size
    if received != size:
        raise WheelError(f"{path.name}: {received} bytes, expected {size}: it was cut off, send it again")
    digest = sha256_of(path)
    if digest != sha256:
        raise WheelError(f"{path.name}: its SHA-256 is {digest}, expected {sha256}: send it again")


def sha256_of(path: Path) -> str:
    """Digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _pip_install(wheel: Path, work: Path, environment: Mapping[str, str], limit_s: float) -> str:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(work / "site")]
    ended = run_limited([*command, str(wheel)], limit_s, environment, work / "logs" / wheel.name.partition("-")[0])
    if ended.code is None:
        raise WheelError(f"{wheel.name}: pip took more than {limit_s:.0f} s")
    if ended.code:
        raise WheelError(f"{wheel.name}: pip ended with code {ended.code}: {last_line(ended.stderr)}")
    return "installed"


def fetch(out: Path, *, locks: bool) -> None:
    """Download the pinned wheels, compare or lock their digests, and cut them into loads."""
    wheels = read_list()
    whole = out / "whole"
    whole.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        if locks or not (whole / wheel.file).is_file():
            _pip_download(wheel, whole)
    if locks:
        wheels = lock(wheels, whole)
        content = {"python": _PYTHON, "part_bytes": PART_BYTES, "wheels": [asdict(wheel) for wheel in wheels]}
        LIST.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for stale in out.glob("load-*"):
        shutil.rmtree(stale)
    for wheel in wheels:
        check_file(whole / wheel.file, wheel.size, wheel.sha256)
        cut(whole / wheel.file, wheel.parts, out)
    for line in summary(wheels):
        print(line)


def _pip_download(wheel: Wheel, out: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(out),
    ]
    command += ["--python-version", _PYTHON, "--implementation", "cp"]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, f"{wheel.name}=={wheel.version}"], check=True)


def lock(wheels: Sequence[Wheel], whole: Path) -> list[Wheel]:
    """The list with files, sizes, digests and pieces as they are in ``whole``."""
    locked = []
    filled = [0]  # bytes in each load; a piece goes into the first that has room
    for wheel in wheels:
        stem = f"{wheel.name.replace('-', '_')}-{wheel.version}-"
        path = next(iter(sorted(whole.glob(f"{stem}*.whl"))), None)
        if path is None:
            raise WheelError(f"{wheel.name} {wheel.version} was not downloaded")
        parts = []
        size = path.stat().st_size
        for number, start in enumerate(range(0, size, PART_BYTES), 1):
            length = min(PART_BYTES, size - start)
            load = next((at for at, used in enumerate(filled) if used + length <= PART_BYTES), len(filled))
            filled += [0] * (load == len(filled))
            filled[load] += length
            name = path.name if size <= PART_BYTES else f"{path.name}.part{number}"
            parts.append(Piece(name, length, hashlib.sha256(_slice(path, start, length)).hexdigest(), load + 1))
        locked.append(
            Wheel(wheel.name, wheel.version, wheel.use, wheel.unless, path.name, size, sha256_of(path), tuple(parts))
        )
    return locked


def cut(wheel: Path, parts: Sequence[Piece], out: Path) -> None:
    """Write a wheel's pieces into their loads."""
    start = 0
    for part in parts:
        target = out / f"load-{part.load:02}" / part.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_slice(wheel, start, part.size))
        start += part.size


def _slice(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def summary(wheels: Sequence[Wheel]) -> list[str]:
    """What travels, in a few lines."""
    pieces = [part for wheel in wheels for part in wheel.parts]
    total = sum(part.size for part in pieces)
    loads = max((part.load for part in pieces), default=0)
    return [
        *(f"{wheel.file}: {wheel.size / 1e6:.1f} MB, {len(wheel.parts)} pieces" for wheel in wheels),
        f"{len(wheels)} wheels, {total / 1e6:.0f} MB, {len(pieces)} pieces in {loads} loads",
    ]


def main() -> None:
    """Fetch and cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("fetch",))
    parser.add_argument("--out", type=Path, default=Path("build/gpu-wheels"))
    parser.add_argument("--lock", action="store_true", help="write the digests of what was fetched into the list")
    options = parser.parse_args()
    fetch(options.out, locks=options.lock)


if __name__ == "__main__":
    main()
