"""A deployment is the old one or the new one, whatever happens to the process that changes it."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest
from helpers.tiny_models import FAMILIES

from adalink.export import writer as writers
from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.export.deployment_lock import LOCK_FILE, DeploymentLock
from adalink.export.writer import STAGING_FOLDER, open_writer, remove_task
from adalink.runtime.errors import BusyError, DeploymentError, WriteError
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.runtime.storage.manifest_io import read_manifest


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, the lock and leftovers of a killed writer aside."""
    return {
        path.relative_to(folder).as_posix(): digest_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_FILE and STAGING_FOLDER not in path.parts
    }


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


# One process imports, then forks one child for each k, which kills itself at its k-th call that changes the disk:
# nothing after that is run, no handler, no `finally`. Prints the wait status of each, or how many calls there are.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    import onnx, onnxruntime
    from adalink.export.adapter.export import export_adapter
    from adalink.export.writer import remove_task
    from adalink.runtime.storage import verification_cache

    # It is written where files are older than two seconds: runs would not make the same calls.
    verification_cache._memory_file = lambda folder: None

    def change(action, root):
        if action == "replace":
            export_adapter(root / "two", root / "deployment", name="topics", replace=True)
        else:
            remove_task(root / "deployment", "topics")

    def watch(k):
        calls = [0]

        def watched(real):
            def call(*args, **kwargs):
                calls[0] += 1
                if calls[0] == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call

        # What pathlib and shutil call to change a disk.
        for name in ("replace", "unlink", "rmdir", "mkdir", "fsync", "pwrite", "ftruncate"):
            setattr(os, name, watched(getattr(os, name)))
        Path.write_bytes = watched(Path.write_bytes)
        return calls

    action, top, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    for k in range(1, steps + 1):
        child = os.fork()
        if child == 0:
            watch(k)
            change(action, top / str(k))
            os._exit(0)
        print(os.waitpid(child, 0)[1])
    if not steps:
        calls = watch(0)
        change(action, top / "0")
        print(calls[0])
"""


@pytest.mark.parametrize("action", ["replace", "remove"])
def test_kill_at_every_step_leaves_the_old_or_the_new_deployment(action: str, pristine: Path, tmp_path: Path) -> None:
    old = read_manifest(pristine / "deployment")
    shutil.copytree(pristine, tmp_path / "0")
    finished = child(KILLED, action, tmp_path, 0)
    assert finished.returncode == 0, finished.stderr
    steps, new = int(finished.stdout), read_manifest(tmp_path / "0" / "deployment")
    assert new != old
    assert steps >= 4  # Python 3.10 removes folders in fewer
    for k in range(1, steps + 1):
        shutil.copytree(pristine, tmp_path / str(k))
    result = child(KILLED, action, tmp_path, steps)
    assert [int(line) for line in result.stdout.split()] == [signal.SIGKILL] * steps, result.stderr
    seen = []
    for k in range(1, steps + 1):
        folder = tmp_path / str(k) / "deployment"
        manifest = read_manifest(folder)
        assert manifest in (old, new)
        seen.append(manifest == new)
        verify_files(folder, manifest)
        # The next writer works, and removes what the killed one left.
        final = export_adapter(tmp_path / str(k) / "two", folder, name="topics", replace=True)
        verify_files(folder, final)
        assert final.tasks["topics"].adapter_digest == export_digest(tmp_path / str(k) / "two")
        assert contents(folder).keys() == {*final.files, MANIFEST_FILE}
        assert not (folder / STAGING_FOLDER).exists()
    assert seen == sorted(seen), "once committed, it stays"
    assert set(seen) == {False, True}, "some kills come before the commit and some after it"


def export_digest(adapter: Path) -> str:
    from adalink.runtime.storage.adapter import read_adapter

    return read_adapter(adapter).digest


def test_kill_test_would_see_a_writer_that_overwrites_in_place(pristine: Path, tmp_path: Path) -> None:
    """The check above must fail for a writer that is not atomic: here files replace those in use, manifest last."""
    root = shutil.copytree(pristine, tmp_path / "root")
    manifest = read_manifest(root / "deployment")
    graph = root / "deployment" / manifest.tasks["topics"].graph
    graph.write_bytes(graph.read_bytes()[:-1])  # as if killed in the middle of it
    with pytest.raises(DeploymentError, match="it was truncated or altered"):
        verify_files(root / "deployment", read_manifest(root / "deployment"))


LIMITED = """
    import resource, signal, sys
    from pathlib import Path
    import onnxruntime, onnx  # before the limit: what is tested is the writer, not the loader
    from adalink.export.adapter.export import export_adapter
    from adalink.runtime.errors import WriteError

    root, size_bytes = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))
    try:
        export_adapter(root / "two", root / "deployment", name="second")
    except WriteError as error:
        print("WriteError:", error)
"""


@pytest.mark.parametrize("size_bytes", [16, 1000, 2600])
def test_disk_that_refuses_to_grow_leaves_the_deployment_as_it_was(size_bytes: int, root: Path) -> None:
    before = contents(root / "deployment")
    result = child(LIMITED, root, size_bytes)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("WriteError: deployment ")
    assert "the deployment is as it was. Free space" in result.stdout
    assert contents(root / "deployment") == before
    assert not (root / "deployment" / STAGING_FOLDER).exists()
    assert "second" in export_adapter(root / "two", root / "deployment", name="second").tasks


# From a disk too small for the embedding table (first) to one on which only the fused graph does not fit (last).
@pytest.fixture(params=[4, 24, 60, 160, 320, 420], ids="{}kB".format)
def small_disk(request: pytest.FixtureRequest, tmp_path: Path):
    """A real file system of so many kB; the tiny base needs 520 of them while it is exported."""
    point = tmp_path / "disk"
    point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", point],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


def test_full_disk_during_a_base_export_is_a_write_error(small_disk: Path) -> None:
    folder = small_disk / "deployment"
    with pytest.raises(WriteError, match=r"[Nn]o space left on device.*[Ff]ree space"):
        export_base(FAMILIES["llama"](), folder)
    assert {path.name for path in folder.rglob("*")} <= {LOCK_FILE}, "it leaves no files behind"


def test_new_folders_are_on_the_disk_before_the_manifest_that_needs_them(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "deployment"
    remove_task(folder, "topics")
    old, flushed, flush = (folder / MANIFEST_FILE).read_bytes(), set(), writers.sync

    def note(path: Path) -> None:
        flush(path)
        if (folder / MANIFEST_FILE).read_bytes() == old:
            flushed.add(path)

    monkeypatch.setattr(writers, "sync", note)
    export_adapter(root / "two", folder, name="second")
    assert {folder, folder / "tasks", folder / "tasks" / "second"} <= flushed


def test_every_file_is_on_the_disk_before_the_manifest_that_needs_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inodes keep their number when files are renamed into place."""
    folder, flush, flushed = root / "deployment", os.fsync, set[int]()
    old = (folder / MANIFEST_FILE).read_bytes()

    def note(descriptor: int) -> None:
        flush(descriptor)
        if (folder / MANIFEST_FILE).read_bytes() == old:
            flushed.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", note)
    manifest = export_adapter(root / "two", folder, name="second")
    needed = [folder / name for name in (MANIFEST_FILE, LOCK_FILE, *manifest.tasks["second"].files)]
    assert {path.name for path in needed if path.stat().st_ino not in flushed} == set()


def test_manifest_is_read_again_under_the_lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: another writer adds a task between the first look at the deployment and the lock."""
    folder, hold = root / "deployment", writers.hold_lock

    def late(path: Path, **options: bool) -> AbstractContextManager[DeploymentLock]:
        monkeypatch.setattr(writers, "hold_lock", hold)
        export_adapter(root / "one", path, name="between")
        return hold(path, **options)

    monkeypatch.setattr(writers, "hold_lock", late)
    assert set(export_adapter(root / "two", folder, name="second").tasks) == {"topics", "between", "second"}
    verify_files(folder, read_manifest(folder))


def test_two_writers_at_once_are_refused_and_the_holder_is_named(root: Path) -> None:
    folder = root / "deployment"
    with open_writer(folder):
        with pytest.raises(BusyError, match=f"being changed by process {os.getpid()}"):
            remove_task(folder, "topics")
        result = child(
            "import sys\nfrom adalink.export.writer import remove_task\nremove_task(sys.argv[1], 'topics')", folder
        )
        assert "BusyError" in result.stderr
    assert remove_task(folder, "topics").tasks == {}


def test_lock_of_a_dead_process_does_not_block(root: Path) -> None:
    (root / "deployment" / LOCK_FILE).write_text("999999")
    assert remove_task(root / "deployment", "topics").tasks == {}


@pytest.fixture
def read_only(root: Path):
    """The deployment, made unwritable for this process: by permissions, or for root by a read-only bind mount."""
    folder = root / "deployment"
    if os.geteuid() != 0:
        modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
        for path in modes:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield folder
        for path, mode in modes.items():
            path.chmod(mode)
        return
    bind = ctypes.CDLL(None, use_errno=True)
    flags_bind, flags_read_only = 4096, 4096 | 32 | 1
    target = str(folder).encode()
    if bind.mount(target, target, b"none", flags_bind, None) != 0:
        reason = os.strerror(ctypes.get_errno())
        pytest.skip(f"this process is root, whom permissions do not stop, and it may not mount: {reason}")
    assert bind.mount(b"none", target, None, flags_read_only, None) == 0
    yield folder
    assert bind.umount(target) == 0


def test_read_only_deployment_is_a_write_error(read_only: Path, root: Path) -> None:
    before = contents(read_only)
    with pytest.raises(WriteError, match=r"cannot write .*; the deployment is as it was. .* writable folder"):
        export_adapter(root / "two", read_only, name="second")
    with pytest.raises(WriteError):
        remove_task(read_only, "topics")
    assert contents(read_only) == before
    verify_files(read_only, read_manifest(read_only))


def test_leaving_without_commit_changes_nothing(root: Path) -> None:
    folder = root / "deployment"
    before = contents(folder)
    with open_writer(folder) as writer:
        writer.stage("tasks/never/adapter.onnx").write_bytes(b"never")
    assert contents(folder) == before
    assert not (folder / STAGING_FOLDER).exists()


def test_file_in_use_is_never_overwritten(root: Path) -> None:
    with open_writer(root / "deployment") as writer:
        path = writer.current.tasks["topics"].graph
        assert writer.fresh_folder("tasks/topics") == "tasks/topics.2"
        assert writer.fresh_folder("tasks/Topics") == "tasks/Topics.3"  # one folder on disks that fold case
        writer.stage(path).write_bytes(b"other")
        with pytest.raises(AssertionError, match="take a fresh folder"):
            writer.commit(writer.current)
    verify_files(root / "deployment", read_manifest(root / "deployment"))


def test_commit_returns_what_is_on_disk(root: Path) -> None:
    with open_writer(root / "deployment") as writer:
        committed = writer.commit(msgspec.structs.replace(writer.current, tasks={}))
    assert committed == read_manifest(root / "deployment")


def test_every_file_has_the_mode_of_a_new_file(root: Path) -> None:
    fresh = root / "fresh"
    fresh.write_bytes(b"")
    deployed = read_manifest(root / "deployment").files
    modes = {name: oct((root / "deployment" / name).stat().st_mode) for name in [MANIFEST_FILE, *deployed]}
    assert set(modes.values()) == {oct(fresh.stat().st_mode)}, modes


def test_new_deployment_over_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(DeploymentError, match="is a file: choose a folder"), open_writer(path, create=True):
        raise AssertionError("must not be reached")
