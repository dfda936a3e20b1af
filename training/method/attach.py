"""Attach adapters to the input embeddings of a frozen model, and detach them without a trace.

The adapter acts on the *output* of the model's input embedding, through forward hooks. No weight and no module of the
model is replaced, so a tied output head, which shares only the matrix, is not affected.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adalink.runtime.errors import ConfigError, ModelError, RequestError
from adalink.runtime.storage.adapter import SOFT_PROMPT_NAME
from adalink.runtime.storage.adapter_spec import rank_of, show_rank
from adalink.training.method.adalink import AdaLink
from adalink.training.method.initialization import center_features
from adalink.training.method.soft_prompt import SoftPromptHooks, draw_soft_prompt
from adalink.training.models.loading import embedding_matrix, input_embedding
from adalink.training.models.vision import check_modalities, image_side

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from adalink.runtime.storage.adapter import Weights
    from adalink.training.method.config import AdaLinkConfig

_IN_USE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_IGNORED_LABEL = -100


class AdaLinkModel:
    """A frozen model with adapters at its input; made by ``attach``, undone by ``detach`` or by leaving the ``with``.

    Which positions are adapted:

    - Encoders, and the encoder of an encoder-decoder: every position. Decoder inputs of an encoder-decoder: none.
    - Decoders with scope ``"all"``: every position.
    - Decoders with scope ``"prompt"``: those of the prompt. A row's target starts at its first label other than -100;
      positions computed with a non-empty KV cache are generated ones. Generating without a cache needs ``positions``.

    ``inputs_embeds`` from the caller bypass the embedding and are not adapted.

    In a vision-language model, the adapter of the modality ``image`` acts on the projector's output, before the merge
    with the text embeddings. It does so with any scope, since images are part of a prompt. The adapter of ``text`` acts
    on every token but the placeholders that the model replaces by an image.

    A soft prompt (``config.soft_tokens``) is prepended to every row of a decoder or encoder, with any scope. No adapter
    acts on it, and the model's outputs are for the caller's positions (``adalink.training.method.soft_prompt``).

    Attributes:
        model: the base model.
        config: settings of the adapters.
        embedding: the module whose output is adapted; with the adapters' ``up`` at zero its output is unchanged.
        hidden_size: width ``d`` of the embeddings.
        vocab_size: size ``V`` of the vocabulary.
        adapters: one ``AdaLink`` per modality, none for rank 0; beside them the parameter ``soft_prompt`` of shape
            ``(n, d)``, if there is one. On the device of the embedding.
        head: from ``d`` numbers to a score for each label; ``None`` without ``config.head``. Nothing calls it here: see
            ``adalink.training.heads.classifier``.
    """

    def __init__(self, model: PreTrainedModel, config: AdaLinkConfig) -> None:
        self.model = model
        self.config = config
        # T5's decoder uses the same matrix and, in some versions of transformers, the same module.
        embedding = input_embedding(model.get_encoder() if model.config.is_encoder_decoder else model)
        if embedding in _IN_USE:
            raise ModelError(
                f"{type(model).__name__} already has an adapter attached: detach it first, or use a second copy"
            )
        check_modalities(model, config.modalities)
        self._images = image_side(model)
        matrix = embedding_matrix(model)
        self.embedding = embedding
        self.vocab_size, self.hidden_size = matrix.shape
        ranks = {name: rank_of(config.rank, name) for name in config.modalities}
        if max(ranks.values()) > self.hidden_size:
            raise ConfigError(
                f"rank is {show_rank(config.rank)} and the embeddings of {type(model).__name__} are {self.hidden_size} "
                f"wide: choose a rank of at most {self.hidden_size}"
            )
        adapters = {
            name: AdaLink(self.hidden_size, rank, config.activation, config.bias, config.dropout)
            for name, rank in ranks.items()
            if rank
        }
        if config.init == "centered" and "text" in adapters:
            center_features(adapters["text"].down, embedding, self.vocab_size)
        self.adapters = nn.ModuleDict(adapters).to(matrix.device)
        self._soft_prompt: SoftPromptHooks | None = None
        if config.soft_tokens:
            vectors = draw_soft_prompt(embedding, self.vocab_size, config.soft_tokens)
            self._soft_prompt = SoftPromptHooks(model, vectors)
            self.adapters.register_parameter(SOFT_PROMPT_NAME, vectors)
        self.head = None if config.head is None else _new_head(matrix, len(config.head.labels))
        self._prompt_mask: torch.Tensor | None = None
        self._modality: torch.Tensor | None = None
        self._labels: torch.Tensor | None = None
        self._past_length = 0
        self._in_encoder = False
        self._has_images = True
        self._frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)
        self._is_attached = True
        self._handles = self._hook()
        _IN_USE.add(embedding)

    def __enter__(self) -> AdaLinkModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove the adapters and restore ``requires_grad`` of all parameters; a second call does nothing."""
        if not self._is_attached:
            return
        for handle in self._handles:
            handle.remove()
        for parameter, requires_grad in self._frozen:
            parameter.requires_grad_(requires_grad)
        _IN_USE.discard(self.embedding)
        self._is_attached = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters, for an optimizer."""
        yield from self.adapters.parameters()
        if self.head is not None:
            yield from self.head.parameters()

    def weights(self) -> Weights:
        """A float32 copy of the trained weights by tensor name, such as ``text.down.weight``."""
        tensors = dict(self.adapters.state_dict())
        if self.head is not None:
            tensors |= {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}

    def load_weights(self, weights: Weights) -> None:
        """Take over weights as ``weights`` gives them."""
        tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
        head = {name.removeprefix("head."): tensors.pop(name) for name in list(tensors) if name.startswith("head.")}
        self.adapters.load_state_dict(tensors)
        if self.head is not None:
            self.head.load_state_dict(head)

    @contextmanager
    def positions(
        self, *, prompt_mask: torch.Tensor | None = None, modality: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Set prompt mask and modality map for the calls within; column ``j`` is for position ``j`` of the sequence.

        Positions past the last column are generated ones: not prompt, and of the modality ``text`` if there is one.

        Args:
            prompt_mask: bool with shape ``(batch, seq)``, true for the prompt; only scope ``"prompt"`` uses it.
            modality: int64 with shape ``(batch, seq)``, index in ``config.modalities``, -1 for a position without
                adapter.

        Raises:
            RequestError: wrong dtype or an index out of range.
        """
        if prompt_mask is not None and prompt_mask.dtype != torch.bool:
            raise RequestError(f"prompt_mask has dtype {prompt_mask.dtype}, expected torch.bool")
        if modality is not None:
            _check_modality(modality, len(self.config.modalities))
        before = self._prompt_mask, self._modality
        self._prompt_mask, self._modality = prompt_mask, modality
        try:
            yield
        finally:
            self._prompt_mask, self._modality = before

    def _hook(self) -> list[RemovableHandle]:
        handles = [self.embedding.register_forward_hook(self._adapt)]
        if self._images is not None and "image" in self.adapters:
            handles.append(self._images.projector.register_forward_hook(self._adapt_images))
        if self.model.config.is_encoder_decoder:
            encoder = self.model.get_encoder()
            handles.append(encoder.register_forward_pre_hook(self._enter_encoder))
            handles.append(encoder.register_forward_hook(self._leave_encoder, always_call=True))
            return handles
        for module in {id(module): module for module in (self.model, self.model.base_model)}.values():
            handles.append(module.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave_decoder, always_call=True))
        return handles if self._soft_prompt is None else handles + self._soft_prompt.install()

    def _enter_encoder(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._in_encoder = True

    def _leave_encoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._in_encoder = False

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        cache = call.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        self._past_length = max(0, cached - self.config.soft_tokens)
        # Images come with the prompt alone: a generated placeholder is a token like any other.
        encoded = (call.get("mm_encoder_outputs") or {}).values()
        self._has_images = any(value is not None for value in (call.get("pixel_values"), *encoded))
        if self._images is not None and call.get("pixel_values_videos") is not None:
            raise RequestError(
                f"pixel_values_videos was given to {type(self.model).__name__}, whose videos no adapter is for: leave "
                "videos out, or give their frames as images"
            )
        if self.model.can_generate() and module is self.model:
            self._labels = call.get("labels")

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._past_length, self._labels, self._has_images = 0, None, True

    def _adapt(self, module: nn.Module, args: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
        """Forward hook of the embedding; ``x`` has shape ``(batch, seq, d)``."""
        if self.model.config.is_encoder_decoder and not self._in_encoder:
            return x
        if self._images is not None and x.dim() < 3:
            return x  # the placeholder's own embedding, which LLaVA looks for in inputs_embeds
        selected = self._selected(x)
        modality = self._modality_of(x, args[0])
        result = x
        for index, (name, adapter) in enumerate(self.adapters.items()):
            if self._images is not None and name != "text":
                continue
            chosen = selected if modality is None else (modality == index) & selected
            result = torch.where(chosen.unsqueeze(-1), adapter(x), result)
        return result

    def _adapt_images(self, module: nn.Module, args: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
        """Forward hook of the projector; ``x`` has shape ``(images or tiles, tokens, d)`` or ``(tokens, d)``."""
        adapted: torch.Tensor = self.adapters["image"](x)
        return adapted

    def _selected(self, x: torch.Tensor) -> torch.Tensor:
        """Positions that the scope adapts: bool with shape ``(batch, seq)``."""
        everything = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if self.config.scope == "all" or self.model.config.is_encoder_decoder:
            return everything
        if self._prompt_mask is not None:
            return self._columns(self._prompt_mask, x, past_the_end=False)
        if self._past_length > 0:
            return ~everything
        if self._labels is not None:
            return (self._labels.to(x.device) != _IGNORED_LABEL).cumsum(dim=1) == 0
        return everything

    def _modality_of(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor | None:
        names = self.config.modalities
        if self._images is not None:
            if self._modality is not None:
                raise RequestError(
                    f"a modality map was given, but {type(self.model).__name__} knows its images by token "
                    f"{self._images.image_token_id}: leave the map out"
                )
            text = names.index("text") if "text" in names else -1
            replaced = (ids == self._images.image_token_id) & self._has_images
            return torch.where(replaced, -1, text)
        if self._modality is None:
            if len(names) > 1:
                raise RequestError(
                    f"the adapter has the modalities {', '.join(names)} and no map says which position is which: call "
                    "the model within `with attached.positions(modality=...)`"
                )
            return None
        return self._columns(self._modality, x, past_the_end=names.index("text") if "text" in names else -1)

    def _columns(self, table: torch.Tensor, x: torch.Tensor, past_the_end: int | bool) -> torch.Tensor:
        """The columns of ``table`` for the positions of ``x``, padded past its end."""
        batch, length = x.shape[:2]
        table = table.to(x.device)
        if table.shape[0] != batch:
            raise RequestError(
                f"the position map has {table.shape[0]} rows and the batch {batch}: expected one row each; with beams "
                "or several returned sequences repeat the map's rows"
            )
        window = table[:, self._past_length : self._past_length + length]
        return nn.functional.pad(window, (0, length - window.shape[1]), value=past_the_end)


def attach(model: PreTrainedModel, config: AdaLinkConfig) -> AdaLinkModel:
    """Freeze ``model`` and attach new adapters, which start as the identity; see ``AdaLinkModel``.

    Raises:
        ModelError: the model has no input embedding, has an adapter attached already, does not support the adapter's
            modalities, or does not support a soft prompt (encoder-decoders among others).
        ConfigError: the rank exceeds the embedding's width.
    """
    return AdaLinkModel(model, config)


def _new_head(matrix: torch.Tensor, labels: int) -> nn.Linear:
    """A head whose scores are all 0, on the device of the embedding matrix."""
    head = nn.Linear(matrix.shape[1], labels, device=matrix.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _check_modality(modality: torch.Tensor, count: int) -> None:
    if modality.dtype != torch.int64:
        raise RequestError(f"modality map has dtype {modality.dtype}, expected torch.int64")
    if modality.numel() and not (int(modality.min()) >= -1 and int(modality.max()) < count):
        raise RequestError(
            f"modality map holds {int(modality.min())} to {int(modality.max())}, expected -1 to {count - 1} "
            "(an index in the adapter's modalities, -1 for none)"
        )
