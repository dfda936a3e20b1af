"""What a browser compares when it has loaded a folder: tokens of texts, and logits of the kit under each task."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from adalink.export.pipeline.texts import TEXTS
from adalink.runtime.deployment import Deployment

PROMPT = "The capital of France is"
_LOGITS = 8
# Of the distance between the highest and the mean logit. Kernels of 4 bits round activations to 8 bits and reach a
# hundredth; a wrong task, table or kernel is far beyond.
_TOLERANCE = 0.05


def expected_results(deployment: Path, variant: str, tasks: Iterable[str]) -> dict[str, object]:
    """What the kit's runtime gives for one prompt and for ``TEXTS``.

    Args:
        deployment: the deployment.
        variant: the variant that was taken.
        tasks: the tasks that were taken.

    Returns:
        ``texts``, pairs of a text and its token ids; ``prompt``, token ids; ``logits``, for ``None`` and each task
        the highest ones behind the prompt, by token id; ``tolerance``, how far they may be off.
    """
    with Deployment.open(deployment, variant=variant, threads=1) as opened:
        encode = opened.tokenizer.encode
        prompt, logits, spread = encode(PROMPT), [], np.inf
        for task in (None, *tasks):
            row = opened.run(input_ids=[prompt], tasks=task)["logits"][0, -1].astype(np.float64)
            ids = np.argsort(-row)[:_LOGITS]
            spread = min(spread, float(row.max() - row.mean()))
            logits.append((task, {"ids": ids.tolist(), "values": row[ids].tolist()}))
        texts = [(text, encode(text)) for text in TEXTS]
    return {"texts": texts, "prompt": prompt, "logits": logits, "tolerance": _TOLERANCE * spread}
