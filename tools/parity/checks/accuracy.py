"""The cost of quantising for a task: exact match on the task's rows, before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.deployment import Deployment
from adalink.runtime.sampling.sampler import PLAIN_GREEDY
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.tools.common.environment import available_cores
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.torch_threads import torch_threads
from adalink.tools.rows.answers import batch_rows

if TYPE_CHECKING:
    from adalink.training.data.rows import TrainingRow

_BATCH_ROWS = 16


def measure_accuracy(
    deployment: Deployment,
    reference: Reference,
    task: str,
    folder: Path,
    rows: list[TrainingRow],
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Exact match of greedy replies, end token included, as ``adalink train`` counts it.

    Args:
        deployment: as it is deployed.
        reference: PyTorch with the dequantised weights.
        task: name of the task in the deployment.
        folder: its adapter folder, for the reference.
        rows: what ``read_rows`` returned.
        progress: called with a line now and then.

    Returns:
        The share of ``float32`` (PyTorch with the checkpoint's weights), ``weights`` (dequantised, in PyTorch) and
        ``deployed``.

    Raises:
        DataError: a row is longer than the model allows, behind the task's soft prompt.
    """
    from adalink.training.data.rows import encode_rows

    tokenizer, manifest = reference.tokenizer, deployment.manifest
    longest = (manifest.base.max_positions or 1 << 20) - manifest.tasks[task].prepended_positions
    examples = encode_rows(rows, tokenizer, longest, f"rows of {task}")
    with torch_threads(available_cores()):
        progress(f"task {task}: {len(rows)} rows, the checkpoint's weights")
        with reference.original_weights():
            exact = reference.exact_match(folder, tokenizer, examples, _BATCH_ROWS)
        progress(f"task {task}: {len(rows)} rows, the quantised weights")
        dequantized = reference.exact_match(folder, tokenizer, examples, _BATCH_ROWS)
    progress(f"task {task}: {len(rows)} rows, as deployed")
    return {"float32": exact, "weights": dequantized, "deployed": deployed_accuracy(deployment, task, rows)}


def _conversation(tokenizer: Tokenizer, messages: str) -> Sequence[int]:
    return tokenizer.encode_messages(decode_json(messages, list[dict[str, Any]]))


def deployed_accuracy(deployment: Deployment, task: str, rows: list[TrainingRow]) -> float:
    """Share of ``rows`` whose reply is the row's completion and then an end token."""
    tokenizer = deployment.tokenizer
    longest = max(len(tokenizer.encode(row.completion)) for row in rows) + 1
    prompts_of = [row.prompt if row.messages is None else _conversation(tokenizer, row.messages) for row in rows]
    lengths = [len(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) for prompt in prompts_of]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    right = 0
    size = batch_rows(deployment, _BATCH_ROWS, lengths)
    for start in range(0, len(order), size):
        places = order[start : start + size]
        prompts, batch = [prompts_of[place] for place in places], [rows[place] for place in places]
        # As the reference generates, and training measures: without the base's own sampling and penalties.
        replies = deployment.generate(prompts, tasks=task, max_new_tokens=longest, sampling=PLAIN_GREEDY)
        right += sum(
            reply.finish_reason == "stop" and reply.text.strip() == row.completion.strip()
            for reply, row in zip(replies, batch, strict=True)
        )
    return right / len(rows)
