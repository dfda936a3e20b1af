"""The footprint lists what an edge installation holds: all of it, and nothing of the workstation's."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from click.testing import CliRunner

from adalink.tools.cli import main
from adalink.tools.doctor import footprint
from adalink.tools.doctor.footprint import installed_bytes, runtime_packages


def test_lists_the_runtime_and_only_that():
    result = CliRunner().invoke(main, ["doctor", "--footprint", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    sizes = {entry["package"].lower(): entry["bytes"] for entry in report["packages"]}
    assert {"adalink-kit", "numpy", "onnxruntime", "tokenizers", "msgspec", "markupsafe"} <= sizes.keys()
    assert not {"torch", "transformers", "onnx", "optimum", "pytest", "accelerate"} & sizes.keys()
    assert report["total_bytes"] == sum(sizes.values())
    assert all(size > 0 for size in sizes.values())
    assert sizes["numpy"] > 10e6
    shown = CliRunner().invoke(main, ["doctor", "--footprint"])
    assert "onnxruntime" in shown.stdout
    assert f"{report['total_bytes'] / 1e6:.1f}" in shown.stdout


def test_every_import_of_the_runtime_is_counted():
    """Every file of an installed package that running a deployment imports belongs to a listed package."""
    code = (
        "import sys, adalink.runtime, onnxruntime, tokenizers, jinja2, safetensors.numpy\n"
        "print(*filter(None, (getattr(module, '__file__', None) for module in list(sys.modules.values()))), sep='\\n')"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    installed = {path for path in map(Path, output.splitlines()) if "site-packages" in path.parts}
    packages = runtime_packages().values()
    listed = {Path(str(package.locate_file(file))) for package in packages for file in package.files or []}
    assert len(installed & listed) > 100
    # Start-up files of Python's installer, and ml_dtypes, which safetensors loads where it is installed.
    known = {"_distutils_hack", "distutils-precedence.pth", "_virtualenv.py", "ml_dtypes"}
    foreign = [path for path in installed - listed if not known & {*path.parts}]
    assert [path for path in foreign if not path.name.startswith("__editable__")] == []


def test_size_is_that_of_the_files_on_disk(tmp_path: Path):
    """A package of known size, installed by hand beside a missing and a repeated record."""
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "a.py").write_bytes(b"#" * 1234)
    (tmp_path / "known" / "b.so").write_bytes(b"\0" * 4321)
    info = tmp_path / "known-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: known\nVersion: 1.0\n")
    record = "known/a.py,,1\nknown/b.so,,1\nknown/gone.py,,1\nknown/../known/a.py,,1\n"
    (info / "RECORD").write_text(record)
    assert installed_bytes(metadata.PathDistribution(info)) == 1234 + 4321


def install(folder: Path, name: str, size: int, *requires: str) -> None:
    (folder / f"{name}.py").write_bytes(b"#" * size)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}")
    (info / "RECORD").write_text(f"{name}.py,,\n")


def test_what_runtime_extras_need_is_followed_and_nothing_else(tmp_path: Path, monkeypatch):
    """Made-up packages: what a marker or an extra leaves out is not counted, and the largest comes first."""
    install(tmp_path, footprint.KIT, 10, "always", "engine[fast]; extra == 'cpu'", "trainer; extra == 'train'", "gone")
    install(tmp_path, "always", 500, "modern; python_version >= '3'", "old; python_version < '3'", footprint.KIT)
    install(tmp_path, "engine", 30, "speed; extra == 'fast'", "slowness; extra == 'slow'")
    for name, size in (("modern", 40), ("speed", 200), ("old", 1), ("slowness", 1), ("trainer", 1)):
        install(tmp_path, name, size)
    found = {path.name.partition("-1.0")[0]: path for path in tmp_path.glob("*.dist-info")}

    def distribution(name: str) -> metadata.Distribution:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return metadata.PathDistribution(found[name])

    monkeypatch.setattr(footprint.metadata, "distribution", distribution)
    monkeypatch.setattr(footprint, "_is_editable", lambda package: False)
    rows = [(row["package"], row["bytes"]) for row in footprint.measure_footprint()]
    assert rows == [("always", 500), ("speed", 200), ("modern", 40), ("engine", 30), (footprint.KIT, 10)]
