"""What a browser compares when it has loaded a folder: tokens of texts, and logits of the kit under each task."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from adalink.export.pipeline.texts import TEXTS
from adalink.runtime.deployment import Deployment

PROMPT = "The capital of France is"
_LOGITS = 64
# Root mean square of differences, over the standard deviation of the logits. Kernels of 4 bits round activations to 8
# bits, each processor in its own way: SmolLM2's reach 0.38 in browsers. Another task is off by 1.17 and more.
_TOLERANCE, _QUANTIZED_TOLERANCE = 0.01, 0.6


def expected_results(deployment: Path, variant: str, tasks: Iterable[str]) -> dict[str, object]:
    """What the kit's runtime gives for one prompt and for ``TEXTS``.

    Args:
        deployment: the deployment.
        variant: the variant that was taken.
        tasks: the tasks that were taken.

    Returns:
        ``texts``, pairs of a text and its token ids; ``prompt``, token ids; ``logits``, for ``None`` and each task
        those of some tokens behind the prompt, and a tolerance, the most that the root mean square may be off.
    """
    with Deployment.open(deployment, variant=variant, threads=1) as opened:
        encode = opened.tokenizer.encode
        is_exact = opened.manifest.variants[variant].quantization is None
        share = _TOLERANCE if is_exact else _QUANTIZED_TOLERANCE
        prompt, logits = encode(PROMPT), []
        for task in (None, *tasks):
            row = opened.run(input_ids=[prompt], tasks=task)["logits"][0, -1].astype(np.float64)
            ids = np.unique(np.linspace(0, len(row) - 1, _LOGITS).astype(int))
            entry = {"ids": ids.tolist(), "values": row[ids].tolist(), "tolerance": share * float(row.std())}
            logits.append((task, entry))
        texts = [(text, encode(text)) for text in TEXTS]
    return {"texts": texts, "prompt": prompt, "logits": logits}
