"""The kit's log: which events it reports, and that it stays silent by itself."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.vision_deployments import VisionDeployment, picture

from adalink.runtime import Deployment
from adalink.runtime.logs import ROOT, get_logger


def messages(caplog: pytest.LogCaptureFixture, module: str, level: int = logging.INFO) -> list[str]:
    """What one module of the runtime has logged at a level since the log was cleared."""
    name = f"adalink.runtime.{module}"
    return [record.getMessage() for record in caplog.records if (record.name, record.levelno) == (name, level)]


def test_open_logs_path_variant_backend_and_time(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, ROOT), Deployment.open(llama.folder) as deployment:
        variant = next(iter(deployment.manifest.variants))
    (line,) = messages(caplog, "deployment")
    beginning, _, spent = line.rpartition(", ")
    assert beginning == f"opened {llama.folder}: variant {variant}, backend onnxruntime-cpu"
    number, unit = spent.split()
    assert int(number) > 0
    assert unit == "ms"


def test_task_logs_its_loading_and_unloading_once(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    size_bytes = llama.adapters["alpha"].size_bytes
    with caplog.at_level(logging.DEBUG, ROOT), Deployment.open(llama.folder) as deployment:
        deployment.run(input_ids=[[5, 9]], tasks="alpha")
        deployment.run(input_ids=[[5, 9]], tasks="alpha")
        deployment.unload_task("alpha")
        deployment.unload_task("alpha")
    assert messages(caplog, "tasks.registry") == [
        f"loaded task alpha: {size_bytes} bytes",
        f"unloaded task alpha: {size_bytes} bytes",
    ]


def test_decoding_logs_nothing_whatever_the_level(deployment: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    deployment.generate(["abc"], tasks="alpha", max_new_tokens=1)
    with caplog.at_level(logging.DEBUG, ROOT):
        deployment.generate(["abc", "de"], tasks=["alpha", None], max_new_tokens=12)
        deployment.generate(["abc abc abc"], tasks="alpha", max_new_tokens=12)
    assert not caplog.records


def test_prefix_hit_logs_the_positions_it_saved(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    with Deployment.open(llama.folder, prefix_cache_bytes=1 << 20) as deployment:
        tokens = len(deployment.tokenizer.encode("wheat prices"))
        with caplog.at_level(logging.DEBUG, ROOT):
            deployment.generate(["wheat prices"], max_new_tokens=1)
            assert messages(caplog, "generation.prefix_cache", logging.DEBUG) == []
            deployment.generate(["wheat prices"], max_new_tokens=1)
    hits = messages(caplog, "generation.prefix_cache", logging.DEBUG)
    assert hits == [f"prefix cache hit: {tokens - 1} of {tokens} positions"]


def test_known_digest_logs_that_the_file_is_not_read(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(llama.folder, tmp_path / "copy"))
    time.sleep(2.1)  # younger files are never remembered
    lines = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, ROOT), Deployment.open(folder) as deployment:
            files = {deployment.manifest.base.embeddings, *deployment.variant.files}
        lines.append(messages(caplog, "storage.verification_cache", logging.DEBUG))
    assert lines[0] == []
    assert {line.partition(" ")[0] for line in lines[1]} == {str(folder.resolve() / path) for path in files}


def test_image_logs_its_encoding_and_not_its_reuse(
    vision_deployment: VisionDeployment, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = picture(1, 30, 41), picture(2, 50, 24)
    with caplog.at_level(logging.INFO, ROOT), Deployment.open(vision_deployment.folder) as deployment:
        for images in ([first], [first, second], [second]):
            deployment.generate(["@" * len(images)], images=[images], max_new_tokens=1)
    encoded = [line.rpartition(",")[0] for line in messages(caplog, "vision.tower")]
    assert encoded == ["encoded 1 of 1 images", "encoded 1 of 2 images"]


def test_library_prints_nothing_without_a_handler() -> None:
    code = (
        "import sys\n"
        "from adalink.runtime.logs import get_logger\n"
        "get_logger('adalink.runtime.deployment').warning('heard')\n"
        "if sys.argv[1:]:\n"
        "    import logging\n"
        "    logging.basicConfig()\n"
        "    get_logger('adalink.runtime.deployment').warning('heard')\n"
    )
    for arguments, expected in (([], ""), (["listen"], "WARNING:adalink.runtime.deployment:heard\n")):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr == expected


def test_get_logger_names_a_child_of_the_kits_logger() -> None:
    assert get_logger("adalink.runtime.deployment").parent is logging.getLogger(ROOT)
