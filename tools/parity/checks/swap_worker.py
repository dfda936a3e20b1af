"""Worker process of level 4: opens a deployment, runs tasks one after another, and digests the outputs.

``python -m adalink.tools.parity.checks.swap_worker`` reads ``{"path", "backend", "variant", "threads", "ids",
"decoder_ids", "tasks"}`` from stdin. It prints ``{"digests": [...], "builds", "builder_calls", "files": {...},
"unchanged"}``.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import BackendError
from adalink.tools.common.child_process import child_environment, python_command

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment


def run_fresh(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request in a new process; raises ``BackendError`` if that process fails."""
    done = subprocess.run(
        python_command(module="adalink.tools.parity.checks.swap_worker"),
        input=json.dumps(request),
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"a fresh process for tasks {request['tasks']} ended with code {done.returncode}: {cause}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from adalink.runtime.deployment import Deployment

    with Deployment.open(
        request["path"], request["backend"], variant=request["variant"], threads=request["threads"]
    ) as deployment:
        before = deployment.receipt()
        with _opened_files() as opened:
            digests = [_digest(deployment, request, task) for task in request["tasks"]]
        after = deployment.receipt()
    return {
        "digests": digests,
        "builds": max(after.engine_builds - before.engine_builds, len(opened)),
        "builder_calls": after.builder_calls - before.builder_calls,
        "files": after.digests,
        "unchanged": after.unchanged and before.digests == after.digests,
    }


@contextmanager
def _opened_files() -> Iterator[list[str]]:
    """Graphs that ONNX Runtime opens from files while the block runs: a witness beside the runtime's own receipt.

    Adapter graphs of the bank do not count: they are opened from bytes, with the first task of their kind.
    """
    opened: list[str] = []
    try:
        from onnxruntime import InferenceSession
    except ImportError:  # engines of TensorRT alone
        yield opened
        return
    right = InferenceSession.__init__

    def watched(self: Any, model: Any, *args: Any, **options: Any) -> None:
        if not isinstance(model, bytes):
            opened.append(str(model))
        right(self, model, *args, **options)

    InferenceSession.__init__ = watched
    try:
        yield opened
    finally:
        InferenceSession.__init__ = right


def _digest(deployment: Deployment, request: dict[str, Any], task: str | None) -> str:
    outputs = deployment.run(input_ids=request["ids"], tasks=task, decoder_input_ids=request["decoder_ids"])
    state = hashlib.sha256()
    for name in sorted(outputs):
        state.update(f"{name} {outputs[name].shape} {outputs[name].dtype};".encode())
        state.update(outputs[name].tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
