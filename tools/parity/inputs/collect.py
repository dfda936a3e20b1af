"""The inputs of a parity run: prompts, their token ids, and prompts with images.

Making them is a check too: of the tokenizer, of preprocessing and of the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import RequestError
from adalink.tools.parity.checks.batches import STEPS
from adalink.tools.parity.checks.vision import (
    ImagePrompts,
    check_tower_profile_limits,
    check_vision,
    make_image_prompts,
    reference_processor,
)
from adalink.tools.parity.inputs.labelled_rows import LabelledRows, collect_labelled_rows
from adalink.tools.parity.inputs.prompts import fitting_prompts, longest_prompt, seeded_rows
from adalink.tools.parity.reference.gguf_tokens import PROBES
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Report, at_most

# Generation is measured from the shortest prompts: each step costs as much after a long one.
_GENERATIONS = 4


@dataclass(frozen=True)
class ParityInputs:
    """The inputs of a parity run.

    Attributes:
        rows: token ids of each prompt.
        texts: prompts to generate from; ``None`` for an encoder, and without a tokenizer.
        image_prompts: prompts with images to run; ``None`` for a base of text alone, and where images leave no room.
        generated_images: prompts with images to generate from; likewise.
        labelled: rows with labels of their positions, of each kind that the base takes.
        pooled: texts to embed; empty for a decoder, and without a tokenizer.
    """

    rows: list[list[int]]
    texts: list[str] | None
    image_prompts: ImagePrompts | None = None
    generated_images: ImagePrompts | None = None
    labelled: Sequence[LabelledRows] = ()
    pooled: Sequence[str] = ()


def collect_inputs(
    report: Report,
    deployment: Deployment,
    reference: Reference,
    against: str,
    quick: bool,
    progress: Callable[[str], None],
) -> ParityInputs:
    """Make the inputs, and add the checks of how they are made to ``report``.

    Raises:
        RequestError: the model takes no prompt before the generated tokens.
    """
    prompts, rows = _encode_prompts(report, deployment, reference, quick)
    texts = None
    if prompts is not None and deployment.manifest.base.kind != "encoder":
        texts = sorted(prompts, key=len)[:_GENERATIONS]
    if deployment.manifest.base.vision is None:
        longest = longest_prompt(deployment, 0)
        labelled = collect_labelled_rows(report, deployment, reference, prompts, rows, longest)
        has_states = deployment.manifest.base.kind != "decoder"
        return ParityInputs(rows, texts, labelled=labelled, pooled=prompts or () if has_states else ())
    progress("pixel values and the vision tower")
    return ParityInputs(rows, texts, *_make_image_prompts(report, deployment, reference, against, rows))


def _encode_prompts(
    report: Report, deployment: Deployment, reference: Reference, quick: bool
) -> tuple[list[str] | None, list[list[int]]]:
    """Prompts and their token ids by the model's tokenizer; seeded ids where there is no tokenizer."""
    base = deployment.manifest.base
    steps = 0 if base.kind == "encoder" else STEPS
    longest = longest_prompt(deployment, steps)
    encode = None if base.tokenizer is None else deployment.tokenizer.encode
    prompts = [] if encode is None else fitting_prompts(quick, encode, longest)
    if longest < 1 or (encode is not None and not prompts):
        raise RequestError(
            f"{base.name} takes {longest + steps} positions here behind the longest soft prompt of its tasks, which "
            f"leaves none for a prompt before {steps} generated tokens: verify a base or an engine that takes more, or "
            "train a shorter soft prompt"
        )
    if encode is None:
        report.skipped.append(f"tokenizer and generation: {base.name} was exported without a tokenizer")
        return None, seeded_rows(base, longest)
    tokenizer = reference.tokenizer
    rows = [reference.prompt_ids(tokenizer, text) for text in prompts]
    texts = (*prompts, *PROBES)
    differing = [index for index, text in enumerate(texts) if encode(text) != reference.prompt_ids(tokenizer, text)]
    detail = f"of {len(texts)} texts; differing: {differing or 'none'}"
    report.checks.append(at_most("base/tokenizer", len(differing), 0, detail))
    if (tokens := reference.gguf_tokens) is not None:
        differing = [index for index, text in enumerate(texts) if encode(text) != tokens.encode(text)]
        detail = f"of {len(texts)} texts differ from llama.cpp's rules ({tokens.kind}): {differing or 'none'}"
        report.checks.append(at_most("base/gguf-tokens", len(differing), 0, detail))
    return prompts, rows


def _make_image_prompts(
    report: Report, deployment: Deployment, reference: Reference, against: str, rows: list[list[int]]
) -> tuple[ImagePrompts | None, ImagePrompts | None]:
    """Prompts with images, to run and to generate from; level 7 as far as no task takes part."""
    base = deployment.manifest.base
    assert base.vision is not None
    processor = reference_processor(against, base.vision)
    report.checks += check_vision(deployment, reference, processor)
    report.checks += check_tower_profile_limits(deployment, reference, processor)
    image_prompts = make_image_prompts(deployment, rows, longest_prompt(deployment, 0), processor)
    generated = make_image_prompts(deployment, rows, longest_prompt(deployment, STEPS), processor)
    if image_prompts is None:
        report.skipped.append("prompts with images: one alone takes up more positions than the model has")
    elif generated is None:
        report.skipped.append(f"generation with images: one and {STEPS} tokens after it are more than the model takes")
    text = [token for token in rows[0] if token != base.vision.image_token_id]
    return image_prompts, None if generated is None else generated.with_text(text or [base.pad_token_id])
