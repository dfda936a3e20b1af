"""An open deployment takes up what other processes write to its folder; texts are compared with PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.folds import export_folded
from helpers.runtime import TASKS, random_adapter, reseal
from helpers.versions import NEW_TOKENS, PROMPT, Versions, tokens

from adalink.export.deployment_lock import hold_lock
from adalink.export.writer import remove_task
from adalink.runtime import Deployment, Reload, Request
from adalink.runtime.errors import ContractError, DeploymentError, IntegrityError, RequestError, UnknownTaskError
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from adalink.runtime.tasks import reloader


def test_versions_differ(versions: Versions) -> None:
    """The negative control: each version has a text of its own, so that a mixed-up one shows."""
    texts = [versions.expected(task, version) for task in ("alpha", "beta") for version in (0, 1, 2)]
    assert len(set(texts)) == 6


def test_reload_takes_up_every_change_of_the_folder(versions: Versions, opened: Deployment) -> None:
    before = {task: tokens(opened, task) for task in (None, "alpha", "beta", "double")}
    versions.export(1, "alpha", "new")
    remove_task(versions.folder, "double")
    assert tokens(opened, "alpha") == versions.expected("alpha", 0), "until it is reloaded, nothing changes"
    assert opened.reload() == Reload(added=("new",), replaced=("alpha",), removed=("double",))
    assert opened.manifest == read_manifest(versions.folder)
    assert opened.tasks == tuple(sorted(opened.manifest.tasks))
    assert tokens(opened, "alpha") == versions.expected("alpha", 1)
    assert tokens(opened, "new") == versions.expected("new", 1)
    assert [tokens(opened, task) for task in (None, "beta")] == [before[None], before["beta"]]
    with pytest.raises(UnknownTaskError, match="'double' is not deployed"):
        tokens(opened, "double")
    assert opened.reload() == Reload()
    receipt = opened.receipt()
    assert receipt.unchanged
    assert receipt.engine_builds == 1
    assert set(receipt.task_digests) == {
        path for task in ("alpha", "beta", "new") for path in opened.manifest.tasks[task].files
    }


@pytest.mark.parametrize("fold", ["table", "rank"])
def test_the_same_adapter_with_a_fold_is_taken_up(versions: Versions, opened: Deployment, fold: str) -> None:
    text = tokens(opened, "alpha")
    export_folded(versions.adapter("alpha", 0), versions.folder, "alpha", fold)
    assert opened.reload() == Reload(replaced=("alpha",))
    assert tokens(opened, "alpha") == text
    assert opened._tasks.get("alpha").value._fold is not None


def test_a_task_not_in_memory_is_read_at_its_first_use(versions: Versions, opened: Deployment) -> None:
    versions.export(1, "alpha")
    with pytest.raises(IntegrityError, match="reload the deployment if another process"):
        tokens(opened, "alpha")
    assert opened.reload().replaced == ("alpha",)
    assert not opened._tasks._loaded.entries
    assert tokens(opened, "alpha") == versions.expected("alpha", 1)


def test_a_replaced_task_in_memory_is_loaded_with_the_reload(versions: Versions, opened: Deployment) -> None:
    """So no request waits for it, and none fails where the next writer has taken its files away."""
    tokens(opened, "alpha")
    versions.export(1, "alpha")
    opened.reload()
    versions.export(2, "alpha")
    assert tokens(opened, "alpha") == versions.expected("alpha", 1)


def test_requests_under_way_end_with_the_weights_they_began_with(versions: Versions, opened: Deployment) -> None:
    done: list[Reload] = []

    def reload(scores: Any, sequence: Any) -> None:
        if not done:
            versions.export(1, "alpha")
            remove_task(versions.folder, "beta")
            done.append(opened.reload())

    others = [opened.submit(Request(PROMPT, task=task, max_new_tokens=NEW_TOKENS)) for task in ("alpha", "beta")]
    running = opened.submit(Request(PROMPT, task="alpha", max_new_tokens=NEW_TOKENS, processors=[reload]))
    assert running.result(60).token_ids == versions.expected("alpha", 0)
    assert [other.result(60).token_ids for other in others] == [versions.expected("alpha"), versions.expected("beta")]
    assert done == [Reload(replaced=("alpha",), removed=("beta",))]
    assert tokens(opened, "alpha") == versions.expected("alpha", 1)


def test_tasks_added_in_the_process_stay(versions: Versions, opened: Deployment) -> None:
    opened.add_task(versions.adapter("mine", 1), "mine")
    opened.add_task(versions.adapter("alpha", 1), "alpha", replace=True)
    versions.export(2, "alpha", "mine", "new")
    assert opened.reload() == Reload(added=("new",))
    assert tokens(opened, "alpha") == versions.expected("alpha", 1)
    assert tokens(opened, "mine") == versions.expected("mine", 1)
    opened.remove_task("alpha")
    assert opened.reload() == Reload(added=("alpha",))
    assert tokens(opened, "alpha") == versions.expected("alpha", 2)
    remove_task(versions.folder, "mine")
    assert opened.reload() == Reload()
    assert tokens(opened, "mine") == versions.expected("mine", 1)


def test_a_prefix_of_the_replaced_adapter_is_not_used(versions: Versions, resumed: list[int]) -> None:
    with Deployment.open(versions.folder, threads=1, prefix_cache_bytes=1 << 20) as opened:
        for version in (0, 1):
            if version:
                versions.export(version, "alpha")
                opened.reload()
            assert tokens(opened, "alpha") == versions.expected("alpha", version)
            assert not resumed
        assert tokens(opened, "alpha") == versions.expected("alpha", 1)
        assert resumed == [len(PROMPT) - 1]


def change_base(folder: Path, **changes: Any) -> None:
    base = msgspec.structs.replace(read_manifest(folder).base, **changes)
    manifest = msgspec.structs.replace(read_manifest(folder), base=base)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))


def change_graph(folder: Path) -> None:
    variant = next(iter(read_manifest(folder).variants.values()))
    with (folder / variant.files[-1]).open("ab") as stream:
        stream.write(b"\0")
    reseal(folder)


def rename_variant_files(folder: Path) -> None:
    manifest = read_manifest(folder)
    (name, variant), *_ = manifest.variants.items()
    (folder / "base/other.onnx").write_bytes((folder / variant.graph).read_bytes())
    files = dict(manifest.files) | {"base/other.onnx": manifest.files[variant.graph]}
    del files[variant.graph]
    paths = tuple("base/other.onnx" if path == variant.graph else path for path in variant.files)
    moved = msgspec.structs.replace(variant, graph="base/other.onnx", files=paths)
    changed = msgspec.structs.replace(manifest, variants={**manifest.variants, name: moved}, files=files)
    (folder / "manifest.json").write_bytes(encode_manifest(changed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: change_base(folder, weights_digest="sha256:" + "0" * 64), "weights_digest is 'sha256:0000"),
        (lambda folder: change_base(folder, eos_token_ids=(3,)), r"eos_token_ids is \(3,\), expected \(2,\)"),
        (change_graph, r"base.* has digest sha256:.*, expected sha256:"),
        (rename_variant_files, "no variant with the graph"),
    ],
    ids=["weights", "end tokens", "graph's bytes", "graph's path"],
)
def test_another_base_is_refused_and_nothing_changes(
    versions: Versions, opened: Deployment, change: Callable[[Path], None], message: str
) -> None:
    manifest, text = opened.manifest, tokens(opened, "alpha")
    versions.export(1, "alpha", "new")
    change(versions.folder)
    with pytest.raises(ContractError, match=message + ".*nothing was changed: open the deployment again"):
        opened.reload()
    assert opened.manifest == manifest
    assert "new" not in opened.tasks
    assert tokens(opened, "alpha") == text == versions.expected("alpha", 0)


def test_another_variant_is_none_of_this_ones_business(versions: Versions, opened: Deployment) -> None:
    manifest = read_manifest(versions.folder)
    (_, variant), *_ = manifest.variants.items()
    more = {**manifest.variants, "further": msgspec.structs.replace(variant, backends=("onnxruntime-cuda",))}
    data = encode_manifest(msgspec.structs.replace(manifest, variants=more))
    (versions.folder / "manifest.json").write_bytes(data)
    assert opened.reload() == Reload()
    assert "further" in opened.manifest.variants


@pytest.mark.parametrize("full_check", [False, True])
def test_an_altered_task_is_refused_and_the_old_one_stays(versions: Versions, full_check: bool) -> None:
    """One in memory is read at once; else at its first use, or at once with ``full_check``."""
    with Deployment.open(versions.folder, threads=1, full_check=full_check) as opened:
        manifest, _ = opened.manifest, tokens(opened, "alpha")
        versions.export(1, "alpha", "new")
        changed = read_manifest(versions.folder).tasks["new" if full_check else "alpha"]
        data = bytearray((versions.folder / changed.weights).read_bytes())
        data[-1] ^= 1
        (versions.folder / changed.weights).write_bytes(data)
        with pytest.raises(IntegrityError, match="it was altered"):
            opened.reload()
        assert opened.manifest == manifest
        assert "new" not in opened.tasks
        assert tokens(opened, "alpha") == versions.expected("alpha", 0)


def test_a_folder_that_is_gone_or_damaged_changes_nothing(versions: Versions, opened: Deployment) -> None:
    tokens(opened, "alpha")
    path = versions.folder / "manifest.json"
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    with pytest.raises(DeploymentError, match=r"manifest\.json"):
        opened.reload()
    path.unlink()
    with pytest.raises(DeploymentError, match=r"holds no manifest\.json"):
        opened.reload()
    assert tokens(opened, "alpha") == versions.expected("alpha", 0)
    opened.close()
    with pytest.raises(RequestError, match="the deployment is closed"):
        opened.reload()


def test_a_writer_under_way_gives_the_old_state_or_the_new(
    versions: Versions, opened: Deployment, monkeypatch: Any
) -> None:
    """Reloaded at every rename of an export, while its lock is held and its journal is written."""
    from adalink.export import writer

    tokens(opened, "alpha")
    states: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    move = writer.move_file

    def look() -> None:
        opened.reload()
        states.append((opened.tasks, tokens(opened, "alpha")))

    def move_and_look(folder: Path, source: str, target: str) -> None:
        look()
        move(folder, source, target)
        look()

    old = opened.tasks
    monkeypatch.setattr(writer, "move_file", move_and_look)
    versions.export(1, "alpha", "new")
    before = (old, versions.expected("alpha", 0))
    after = (tuple(sorted((*old, "new"))), versions.expected("alpha", 1))
    assert states == [before] * (len(states) - 1) + [after]
    assert len(states) > 8
    with hold_lock(versions.folder, has_manifest=True):
        assert opened.reload() == Reload(), "a lock that is held holds up no reader"


def test_a_writer_that_comes_in_between_is_followed(versions: Versions, opened: Deployment, monkeypatch: Any) -> None:
    """The manifest was read, then its files were replaced: the newer one is read."""
    tokens(opened, "alpha")
    versions.export(1, "alpha")

    def read_late(folder: Path) -> Manifest:
        manifest = read_manifest(folder)
        if manifest.tasks["alpha"].adapter_digest != digests[2]:
            versions.export(2, "alpha")
        return manifest

    digests = {
        version: random_adapter(opened.manifest.base.fingerprint, 48, 100 + version, **TASKS["alpha"]).digest
        for version in (1, 2)
    }
    monkeypatch.setattr(reloader, "read_manifest", read_late)
    assert opened.reload() == Reload(replaced=("alpha",))
    assert tokens(opened, "alpha") == versions.expected("alpha", 2)


def test_replacing_in_the_process_is_for_those_who_say_so(versions: Versions, opened: Deployment) -> None:
    folder = versions.adapter("alpha", 1)
    with pytest.raises(RequestError, match=r"'alpha' is deployed already.*replace=True"):
        opened.add_task(folder, "alpha")
    with pytest.raises(RequestError, match="replace is 1, expected True or False"):
        opened.add_task(folder, "alpha", replace=1)  # type: ignore[arg-type]
    assert tokens(opened, "alpha") == versions.expected("alpha", 0)
    assert opened.add_task(folder, "alpha", replace=True) == "alpha"
    assert tokens(opened, "alpha") == versions.expected("alpha", 1)
    opened.unload_task("alpha")
    assert tokens(opened, "alpha") == versions.expected("alpha", 1)
    opened.add_task(versions.adapter("alpha", 2), "alpha", replace=True)
    assert tokens(opened, "alpha") == versions.expected("alpha", 2)
    assert opened.add_task(versions.adapter("fresh", 1), "fresh", replace=True) == "fresh"
    assert tokens(opened, "fresh") == versions.expected("fresh", 1)
