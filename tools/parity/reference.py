"""The other side of every comparison: the checkpoint in PyTorch float32, and float64 to measure float32's noise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adalink.export.bounds import UNIT_ROUNDOFF, Float64
from adalink.runtime.errors import ContractError
from adalink.runtime.manifest import Base
from adalink.tools.environment import available_cores

if TYPE_CHECKING:
    import torch

# How many times float32's own noise a correct float32 engine may deviate by: docs/parity.md, "the noise floor".
NOISE_FACTOR = 16.0


class Reference:
    """A base model in PyTorch, alone or with an adapter attached by ``adalink.training``.

    Attributes:
        base: the contract of the deployment it is compared with.
    """

    def __init__(self, spec: str | Path, base: Base) -> None:
        """Load the checkpoint twice, in float32 and in float64.

        Raises:
            ModelError: it cannot be loaded.
            ContractError: it is another model than the deployment's.
        """
        from adalink.training.base_model import base_fingerprint, display_name, load_base

        self.base = base
        self._model = load_base(spec)
        fingerprint = base_fingerprint(self._model)
        if fingerprint != base.fingerprint:
            raise ContractError(
                f"{display_name(spec)} has fingerprint {fingerprint}, the deployment was exported from {base.name} "
                f"with {base.fingerprint}: verify it against the model it was made from"
            )
        self._exact = copy.deepcopy(self._model).double()
        self._attached: Any = None

    @contextmanager
    def adapted(self, folder: Path | None) -> Iterator[None]:
        """Attach an adapter folder until the block ends; ``None`` is the plain base."""
        from adalink.training.storage import load_adapter

        with ExitStack() as stack:
            if folder is not None:
                self._attached = [
                    stack.enter_context(load_adapter(folder, model)) for model in (self._model, self._exact)
                ]
            try:
                yield
            finally:
                self._attached = None

    def embedding_table(self) -> Float64:
        """What the embedding module returns for every id, shape ``(vocab, d)``."""
        import torch

        with torch.no_grad():
            table = self._model.get_input_embeddings()(torch.arange(self.base.vocab_size))
        return np.asarray(table.double().numpy())

    def outputs(
        self,
        ids: list[int],
        decoder_ids: list[int] | None,
        *,
        prompt_length: int | None = None,
    ) -> Outputs:
        """Run one row.

        Args:
            ids: the row's tokens.
            decoder_ids: decoder tokens of an encoder-decoder, else ``None``.
            prompt_length: how many of ``ids`` are the prompt; the rest counts as generated. All by default.
        """
        values = self._run(self._model, 0, ids, decoder_ids, prompt_length)
        exact = self._run(self._exact, 1, ids, decoder_ids, prompt_length)
        return Outputs(values, {name: np.abs(value - exact[name]).max(axis=1) for name, value in values.items()})

    def _run(
        self, model: Any, side: int, ids: list[int], decoder_ids: list[int] | None, prompt_length: int | None
    ) -> dict[str, Float64]:
        import torch

        row = torch.tensor([ids])
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._attached is not None and prompt_length is not None:
                mask = (torch.arange(len(ids)) < prompt_length)[None]
                stack.enter_context(self._attached[side].positions(prompt_mask=mask))
            if self.base.kind == "encoder-decoder":
                found = model(input_ids=row, decoder_input_ids=torch.tensor([decoder_ids]))
                return {
                    "last_hidden_state": _float64(found.encoder_last_hidden_state),
                    "logits": _float64(found.logits),
                }
            name = "logits" if self.base.kind == "decoder" else "last_hidden_state"
            return {name: _float64(getattr(model(input_ids=row), name))}


class Outputs:
    """Outputs of one row, float64 with shapes ``(seq, vocab)`` or ``(seq, d)``, and the noise of computing them.

    Attributes:
        values: the float32 model's outputs by name.
        noise: by name, the largest deviation of the float32 model from the float64 one at each position, ``(seq,)``.
    """

    def __init__(self, values: dict[str, Float64], noise: dict[str, Float64]) -> None:
        self.values = values
        self.noise = noise


@contextmanager
def half_the_cores() -> Iterator[None]:
    """Give PyTorch half of the cores until the block ends.

    Its threads and the engine's wait by spinning: on the same cores they take turns, and both get many times slower.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, available_cores() // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def limit_of(noise: Float64, typical: float, dtype: str) -> Float64:
    """Largest deviation of a correct engine, position by position.

    Args:
        noise: what float32 itself loses at each position.
        typical: what it loses at most positions; one that lost less was lucky, and its limit is no smaller for it.
        dtype: the engine's; a larger unit roundoff allows more in proportion.
    """
    scale = UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF["float32"]
    return np.asarray(NOISE_FACTOR * scale * np.maximum(noise, typical))


def _float64(tensor: torch.Tensor) -> Float64:
    return np.asarray(tensor[0].double().numpy())
