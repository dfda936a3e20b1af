"""The reference of every comparison: the checkpoint in PyTorch, in float32 and in float64.

Float64 measures the noise of float32. For a quantised engine the reference uses the engine's weights, dequantised; the
cost of quantising is measured apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adalink.export.adapter.error_bound import Float64
from adalink.runtime.arrays import Array
from adalink.runtime.errors import ContractError
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.manifest import Base, Quantization
from adalink.runtime.storage.pooling_schema import Pooling
from adalink.tools.parity.check_checkpoint import check_files
from adalink.tools.parity.gguf_tokens import GgufTokens
from adalink.tools.parity.gguf_weights import check_layers
from adalink.tools.parity.known_outputs import KnownOutputs, RowKey
from adalink.tools.parity.noise_floor import ACTIVATIONS_FACTOR, Outputs, deviations, limit_of
from adalink.tools.parity.position_labels import NO_LABELS, PositionLabels, position_maps
from adalink.tools.parity.quantized_weights import Layer, Matrix, find_layers, rounded_inputs
from adalink.tools.parity.reference_images import Pixels, image_features, pixel_tensors
from adalink.tools.parity.report import Check
from adalink.tools.parity.soft_prompt_reference import InputSide, without_input_side

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from adalink.training.data.rows import Example


class Reference:
    """A base model in PyTorch, alone or with an adapter attached by ``adalink.training``.

    Attributes:
        base: the contract of the deployment it is compared with.
        file_checks: the checkpoint's files, compared with the model that was loaded from them.
    """

    def __init__(self, spec: str | Path, base: Base, assume_pretokenizer: str | None = None) -> None:
        """Load the checkpoint twice, in float32 and in float64.

        Raises:
            ModelError: it cannot be loaded.
            ContractError: it is another model than the deployment's.
        """
        from adalink.tools.parity.stored_weight import in_float64, store
        from adalink.training.models.loading import base_fingerprint, load_base, weights_digest
        from adalink.training.models.source import display_name

        self.base = base
        self._spec, self._assumed = spec, assume_pretokenizer
        self._model = load_base(spec)
        self.file_checks, places = check_files(spec, self._model)
        digests = {"fingerprint": base_fingerprint(self._model), "weights_digest": weights_digest(self._model)}
        for field, digest in digests.items():
            exported = getattr(base, field)
            if exported and exported != digest:
                raise ContractError(
                    f"{display_name(spec)} has {field} {digest}, the deployment was exported from {base.name} with "
                    f"{exported}: verify it against the model it was made from"
                )
        matrices = {name: tensor for name, tensor in places.items() if tensor.is_float32 and len(tensor.shape) > 1}
        store(self._model, matrices)
        self._exact = in_float64(self._model)
        self._attached: Any = None
        self._input_side: InputSide | None = None
        self._layers: list[Layer] = []
        self._twins: dict[str, Any] = dict(self._exact.named_modules())
        self._originals: list[torch.nn.Parameter] = []
        self._is_rounding = False
        self._known = KnownOutputs()

    @property
    def model(self) -> Any:
        """The float32 model."""
        return self._model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; raises ``ModelError``."""
        from adalink.training.models.loading import load_tokenizer

        return load_tokenizer(self._spec, assume_pretokenizer=self._assumed)

    @cached_property
    def pooling(self) -> Pooling | None:
        """How the checkpoint's own files pool, read anew; raises ``ModelError``."""
        from adalink.training.models.sentence_files import read_pooling

        tokenizer = None if self.base.tokenizer is None else self.tokenizer
        return read_pooling(self._spec, tokenizer, self._model.config)

    @cached_property
    def gguf_tokens(self) -> GgufTokens | None:
        """Tokens by llama.cpp's rules; ``None`` for a checkpoint that is no GGUF file with byte-level BPE."""
        from adalink.training.models.source import gguf_file

        path = gguf_file(self._spec)
        tokens = None if path is None else GgufTokens(path, self._assumed)
        return tokens if tokens is not None and tokens.kind is not None else None

    @contextmanager
    def adapted(self, folder: Path | None) -> Iterator[None]:
        """Attach an adapter folder until the block ends; ``None`` is the base model."""
        from adalink.training.adapter_io import load_adapter, save_adapter

        with ExitStack() as stack:
            if folder is not None:
                adapter = read_adapter(folder)
                if adapter.config.soft_tokens or adapter.config.input == "ids":
                    self._input_side = InputSide(adapter)
                    bottleneck, folder = without_input_side(adapter), None
                    if bottleneck is not None:
                        folder = (
                            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adalink-"))) / "bottleneck"
                        )
                        save_adapter(folder, bottleneck)
            if folder is not None:
                self._attached = [
                    stack.enter_context(load_adapter(folder, model)) for model in (self._model, self._exact)
                ]
            self._known.clear()
            try:
                yield
            finally:
                self._attached = self._input_side = None
                self._known.clear()

    def quantize(self, matrices: list[Matrix], quantization: Quantization) -> list[Check]:
        """Replace the weights of quantised layers by the graph's dequantised ones, for good; other weights stay.

        Args:
            matrices: the quantised matrices of the graph.
            quantization: what the manifest says of them.

        Returns:
            Checks that the matrices are this model's weights, quantised.

        Raises:
            ContractError: they are codes of a GGUF file, and the model is not loaded from one.
        """
        import torch

        self._layers = find_layers(self._model, matrices)
        checks = check_layers(self._layers, matrices, quantization, self._spec)
        for layer in self._layers:
            # New parameters: the head may share its weight with the embedding table.
            parameters = layer.module._parameters
            self._originals.append(parameters["weight"])
            parameters["weight"] = layer.weight(torch.float32)
            self._twins[layer.name]._parameters["weight"] = layer.weight(torch.float64)
        self._known.clear()
        return checks

    @contextmanager
    def original_weights(self) -> Iterator[None]:
        """Let ``values`` compute with the checkpoint's weights until the block ends."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @contextmanager
    def rounded_activations(self) -> Iterator[None]:
        """Measure noise as the effect of rounded inputs of quantised products, until the block ends."""
        self._is_rounding = True
        self._known.clear()
        try:
            yield
        finally:
            self._is_rounding = False
            self._known.clear()

    @property
    def noise_source(self) -> str:
        """The source of the noise, as the subject of "is itself typically ... away"."""
        return "PyTorch with rounded activations" if self._is_rounding else "PyTorch float32"

    def limit(self, noise: Float64, typical: float) -> Float64:
        """Largest deviation of a correct engine, position by position.

        Args:
            noise: the reference's noise at each position.
            typical: its 90th percentile over all positions.
        """
        if self._is_rounding:
            return np.asarray(ACTIVATIONS_FACTOR * np.maximum(noise, typical))
        return limit_of(noise, typical, self.base.embedding_dtype)

    def values(self, ids: list[int], decoder_ids: list[int] | None) -> dict[str, Float64]:
        """Float32 outputs of one row by name, without their noise."""
        return self._run(self._model, 0, ids, decoder_ids, None, None)

    def exact_match(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], batch_rows: int
    ) -> float:
        """Exact match in float32 (``adalink.training.evaluation``), as a share of the examples.

        The adapter in ``folder`` is attached as it was trained, with its soft prompt. Do not call this in ``adapted``.
        """
        from adalink.training.adapter_io import load_adapter
        from adalink.training.evaluation import exact_match

        with load_adapter(folder, self._model):
            return exact_match(self._model, tokenizer, examples, batch_rows)

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Token ids of a prompt without images, by the model's tokenizer or processor."""
        from adalink.training.models.prefix_lm import has_bidirectional_prompt

        if has_bidirectional_prompt(self._model):  # as PaliGemmaProcessor would, were it to take a text alone
            return list(tokenizer(f"{tokenizer.bos_token}{text}\n", add_special_tokens=False)["input_ids"])
        return list(tokenizer(text)["input_ids"])

    def embeddings(self, ids: Array) -> Float64:
        """Outputs of the embedding module for ``ids``, shape ``(len(ids), d)``."""
        import torch

        with torch.no_grad():
            rows = self._model.get_input_embeddings()(torch.from_numpy(ids))
        return np.asarray(rows.double().numpy())

    def image_embeds(self, pixels: Pixels) -> tuple[list[Float64], list[Float64]]:
        """Image embeddings of the vision tower and the projector, before any adapter.

        Args:
            pixels: images as the model takes them.

        Returns:
            For each image, or each row of a model that takes tiles, the float32 model's embeddings with shape
            ``(positions, d)``, and the largest deviation of each position, ``(positions,)``, from the float64 model's.
        """
        import torch

        with torch.no_grad():
            single, double = (
                [
                    np.asarray(embeds.double().numpy().reshape(-1, embeds.shape[-1]))
                    for embeds in image_features(model, pixel_tensors(model, pixels))
                ]
                for model in (self._model, self._exact)
            )
        return single, [np.abs(one - other).max(axis=1) for one, other in zip(single, double, strict=True)]

    def outputs(
        self,
        ids: list[int],
        decoder_ids: list[int] | None,
        *,
        prompt_length: int | None = None,
        pixels: Pixels | None = None,
        labels: PositionLabels = NO_LABELS,
    ) -> Outputs:
        """Run one row.

        Args:
            ids: the row's tokens.
            decoder_ids: decoder tokens of an encoder-decoder, else ``None``.
            prompt_length: length of the prompt within ``ids``; the rest is generated. All of them by default.
            pixels: the row's images as the model takes them.
            labels: labels of the row's positions.
        """
        key = None
        if pixels is None and labels is NO_LABELS:
            key = self._key(ids, decoder_ids, prompt_length)
        if key is None:
            return self._outputs(ids, decoder_ids, prompt_length, pixels, labels)
        outputs = self._known.find(key)
        if outputs is None:
            outputs = self._outputs(ids, decoder_ids, prompt_length, pixels, labels)
            self._known.add(key, outputs)
        return outputs

    def _key(self, ids: list[int], decoder_ids: list[int] | None, prompt_length: int | None) -> RowKey | None:
        """What tells a row with generated tokens; ``None`` for one without."""
        if decoder_ids is not None:
            return RowKey(tuple(ids), tuple(decoder_ids))
        if self.base.kind != "decoder" or prompt_length is None:
            return None
        return RowKey(tuple(ids[:prompt_length]), tuple(ids[prompt_length:]))

    def _outputs(self, *row: Any) -> Outputs:
        values = self._run(self._model, 0, *row)
        if not self._is_rounding:
            return Outputs(values, deviations(values, self._run(self._exact, 1, *row)))
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(rounded_inputs(layer, layer.module))
                stack.enter_context(rounded_inputs(layer, self._twins[layer.name]))
            # In both precisions: on the edge between two codes they round apart, as two engines would.
            single = deviations(values, self._run(self._model, 0, *row))
            double = deviations(values, self._run(self._exact, 1, *row))
        return Outputs(values, {name: np.maximum(single[name], double[name]) for name in values})

    def _exchange(self) -> None:
        for index, layer in enumerate(self._layers):
            parameters = layer.module._parameters
            parameters["weight"], self._originals[index] = self._originals[index], parameters["weight"]

    def _run(
        self,
        model: Any,
        side: int,
        ids: list[int],
        decoder_ids: list[int] | None,
        prompt_length: int | None,
        pixels: Pixels | None,
        labels: PositionLabels = NO_LABELS,
    ) -> dict[str, Float64]:
        import torch

        from adalink.training.models.prefix_lm import prompt_inputs

        row, input_side = torch.tensor([ids]), self._input_side
        images = {} if pixels is None else pixel_tensors(model, pixels)
        if "image_grid_thw" in images:  # from embeddings alone the model cannot count its positions
            is_image = (row == model.config.image_token_id).int()
            images["position_ids"] = model.base_model.get_rope_index(row, is_image, images["image_grid_thw"])[0]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._attached is not None:
                attached = self._attached[side]
                maps = position_maps(attached.config.modalities, self.base, len(ids), prompt_length, labels)
                stack.enter_context(attached.positions(**maps))
            inputs, soft_tokens = {"input_ids": row}, 0
            if input_side is not None:
                is_text = torch.tensor([labels.is_text(len(ids))])
                if pixels is not None and self.base.vision is not None:
                    is_text = row != self.base.vision.image_token_id
                inputs = {"inputs_embeds": input_side.embeds(model, row, prompt_length, is_text, **images)}
                soft_tokens = input_side.soft_tokens
            if labels.token_types is not None:
                inputs["token_type_ids"] = torch.tensor([[0] * soft_tokens + labels.token_types])
            prompt = soft_tokens + (len(ids) if prompt_length is None else prompt_length)
            inputs |= prompt_inputs(model, (torch.arange(soft_tokens + len(ids)) < prompt)[None])
            if self.base.kind == "encoder-decoder":
                outputs = model(**inputs, decoder_input_ids=torch.tensor([decoder_ids]))
                return {
                    "last_hidden_state": _float64(outputs.encoder_last_hidden_state)[soft_tokens:],
                    "logits": _float64(outputs.logits),
                }
            name = "logits" if self.base.kind == "decoder" else "last_hidden_state"
            return {name: _float64(getattr(model(**inputs, **images), name))[soft_tokens:]}


def _float64(tensor: torch.Tensor) -> Float64:
    return np.asarray(tensor[0].double().numpy())
