"""An export that is killed, between weights too, leaves the deployment that was there, and nothing half."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from helpers.warm_python import WarmPython

from adalink.export.base.export import export_base
from adalink.export.writer import STAGING_FOLDER
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest_io import read_manifest

# Forks one child for each share of the calls that change the disk; each child kills itself at that call.
KILLED = """
import os, signal, sys
from pathlib import Path
from helpers.tiny_models import FAMILIES
from adalink.export.base.export import export_base
from adalink.export.tracing.external_data import DataFile

model = FAMILIES["llama"]()

def watch(k):
    calls = []
    def watched(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for owner, names in ((os, ("replace", "fsync", "mkdir")), (Path, ("write_bytes", "replace")), (DataFile, ("add",))):
        for name in names:
            setattr(owner, name, watched(name, getattr(owner, name)))
    return calls

def change(folder):
    export_base(model, folder, quantization="int4")

top, shares = Path(sys.argv[1]), [float(share) for share in sys.argv[2:]]
reader, writer = os.pipe()
if os.fork() == 0:
    calls = watch(0)
    change(top / "0")
    os.write(writer, ",".join(calls).encode())
    os._exit(0)
os.wait()
calls = os.read(reader, 1 << 16).decode().split(",")
for number, share in enumerate(shares, 1):
    k = max(1, round(share * len(calls)))
    child = os.fork()
    if child == 0:
        watch(k)
        change(top / str(number))
        os._exit(0)
    print(os.waitpid(child, 0)[1], calls[k - 1])
"""


@pytest.mark.slow
def test_kill_between_weights_leaves_the_deployment_as_it_was(
    pristine: Path, tmp_path: Path, warm_torch: WarmPython
) -> None:
    shares = (0.2, 0.5, 0.7, 1.0)
    for number in range(len(shares) + 1):
        shutil.copytree(pristine / "deployment", tmp_path / str(number))
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, shares)]
    result = warm_torch.run(command, env=os.environ | {"PYTHONPATH": paths})
    assert result.returncode == 0, result.stderr
    ends = [line.split() for line in result.stdout.splitlines()]
    assert [int(status) for status, _ in ends] == [signal.SIGKILL] * len(shares), result.stderr
    assert "add" in {call for _, call in ends}, "some are killed between two weights"
    old, new = (read_manifest(folder) for folder in (pristine / "deployment", tmp_path / "0"))
    assert set(new.variants) - set(old.variants) == {"int4"}
    for number in range(1, len(shares) + 1):
        folder = tmp_path / str(number)
        verify_files(folder, read_manifest(folder))
        assert read_manifest(folder) in (old, new)
    # The next export works, and removes what the killed ones left.
    from helpers.tiny_models import FAMILIES

    final = export_base(FAMILIES["llama"](), tmp_path / "2", quantization="int4")
    assert final.variants == new.variants
    assert not (tmp_path / "2" / STAGING_FOLDER).exists()
    there = {path.relative_to(tmp_path / "2").as_posix() for path in (tmp_path / "2").rglob("*") if path.is_file()}
    assert set(final.files) <= there
    assert not {path for path in there - set(final.files) if ".onnx" in path}
