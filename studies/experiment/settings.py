"""The study file: bases, data, methods, sizes and seeds, read from TOML and checked field by field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from adalink.runtime.errors import ConfigError
from adalink.runtime.extras import install_command
from adalink.runtime.storage.adapter_spec import ACTIVATIONS
from adalink.runtime.storage.decoding import decode_toml
from adalink.training.method.config import AdaLinkConfig, Init
from studies.experiment.data import DEFAULT_TEMPLATE, SOURCES

Count: TypeAlias = Annotated[int, Meta(ge=1)]
Seed: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 32)]
Rate: TypeAlias = Annotated[float, Meta(gt=0, lt=10)]
Name: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][\w.+ -]*$")]
Rates: TypeAlias = Annotated[tuple[Rate, ...], Meta(min_length=1)]
Size: TypeAlias = Count | Literal["all"]
Sizes: TypeAlias = Annotated[tuple[Size, ...], Meta(min_length=1)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An entry of a study file: a field that it does not know is an error."""


class _Method(_Entry, frozen=True, tag_field="kind", kw_only=True):
    """A method under a name of its own.

    Attributes:
        name: what it is called in tables.
        lr: learning rates to choose from.
        sizes: those of the study's sizes that it is run with; ``None`` for all.
        compare_to: a method that it is paired with besides the study's; ``None`` for no other.
    """

    name: Name
    lr: Rates
    sizes: Sizes | None = None
    compare_to: Name | None = None


class AdaLinkMethod(_Method, frozen=True, tag="adalink", kw_only=True):
    """AdaLink, and with ``tokens`` a soft prompt before the text: ``(2 r + tokens) d`` parameters.

    ``lr_ratio`` is the learning rate over that of ``down``.
    """

    rank: Count
    activation: str = AdaLinkConfig().activation
    tokens: Annotated[int, Meta(ge=0)] = 0
    init: Init = "kaiming"
    lr_ratio: Annotated[float, Meta(gt=0, lt=1e6)] = 1.0


class PromptTuningMethod(_Method, frozen=True, tag="prompt-tuning", kw_only=True):
    """Trained embeddings before the text, from random tokens' own: ``tokens d`` parameters."""

    tokens: Count


class PTuningMethod(_Method, frozen=True, tag="p-tuning", kw_only=True):
    """Trained embeddings before the text, through a network of three layers of width ``hidden``."""

    tokens: Count
    hidden: Count


class LoraMethod(_Method, frozen=True, tag="lora", kw_only=True):
    """LoRA with ``alpha = 2 r``, on queries and values, on all linear layers but the head, or on the embeddings."""

    rank: Count
    targets: Literal["attention", "all-linear", "embeddings"]


class FullMethod(_Method, frozen=True, tag="full", kw_only=True):
    """All parameters of the base."""


class ZeroShotMethod(_Entry, frozen=True, tag_field="kind", tag="zero-shot", kw_only=True):
    """The base as it is: nothing is trained."""

    name: Name


TrainedMethod: TypeAlias = AdaLinkMethod | PromptTuningMethod | PTuningMethod | LoraMethod | FullMethod
Method: TypeAlias = TrainedMethod | ZeroShotMethod


def describe_method(method: Method) -> dict[str, Any]:
    """What a method does: its settings, without its name and without what a study does with it."""
    settings: dict[str, Any] = msgspec.to_builtins(method)
    return {key: value for key, value in settings.items() if key not in ("name", "lr", "sizes", "compare_to")}


class Base(_Entry, frozen=True, kw_only=True):
    """A base model: ``model`` as for ``load_base``, or ``package:NAME`` for one that a Python package holds."""

    name: Name
    model: str
    seconds_per_step: Annotated[float, Meta(gt=0)] | None = None


class Data(_Entry, frozen=True, kw_only=True):
    """A data set of ``studies.experiment.data.SOURCES``, or of one's own in ``folder``.

    Attributes:
        name: one of ``SOURCES``, or, with a folder, any name.
        folder: with ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``, or others of ``folder_rows``.
        template: what a decoder is given for a row of the folder.
        words: how many words of a text are kept.
        test_rows: how many rows of test are scored; ``None`` for all.
        combine: names of other entries: this one is all of them together, each with its own wording, labels and
            ``test_rows``; it is learned in as many times the steps.
        methods: names of the methods that are run on it; ``None`` for all.
    """

    name: Name
    folder: str | None = None
    template: Annotated[str, Meta(pattern=r"\{text\}")] = DEFAULT_TEMPLATE
    words: Count = 32
    test_rows: Count | None = None
    combine: Annotated[tuple[Name, ...], Meta(min_length=2)] | None = None
    methods: Annotated[tuple[Name, ...], Meta(min_length=1)] | None = None


class Training(_Entry, frozen=True, kw_only=True):
    """How every method is trained: linear decay after a warm-up of 5 %, AdamW without weight decay.

    Attributes:
        max_steps: optimizer steps.
        batch_size: rows a step.
        precision: as in ``TrainSettings``, also while a rate is chosen. Rows are scored in float32.
    """

    max_steps: Count
    batch_size: Count = 8
    precision: Literal["float32", "bfloat16"] = "float32"


class Search(_Entry, frozen=True, kw_only=True):
    """How a learning rate is chosen: runs of ``max_steps`` with a seed of their own, on ``rows`` of validation."""

    max_steps: Count
    seed: Seed
    rows: Count = 200


class Study(_Entry, frozen=True, kw_only=True):
    """A study file; ``compare_to`` is the name of the method that all others are paired with."""

    name: Name
    description: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compare_to: str
    seeds: Annotated[tuple[Seed, ...], Meta(min_length=1)]
    sizes: Sizes = ("all",)
    training: Training
    search: Search
    bases: Annotated[tuple[Base, ...], Meta(min_length=1)]
    data: Annotated[tuple[Data, ...], Meta(min_length=1)]
    methods: Annotated[tuple[Method, ...], Meta(min_length=1)]

    def references(self, method: Method) -> tuple[str, ...]:
        """Names of the methods that a method is paired with: the study's, and one of its own; none for zero-shot."""
        if isinstance(method, ZeroShotMethod):
            return ()
        names = dict.fromkeys((self.compare_to, method.compare_to))
        return tuple(name for name in names if name is not None and name != method.name)

    def parts(self, entry: Data) -> tuple[Data, ...]:
        """The entries that a data set combines; none for one of its own."""
        return tuple(other for name in entry.combine or () for other in self.data if other.name == name)


def read_study(path: Path) -> Study:
    """Read and check a study file.

    Raises:
        ConfigError: no such file, no TOML, or a field is wrong; the message has its path, such as
            ``$.methods[2].rank``.
    """
    try:
        study = decode_toml(path.read_bytes(), Study)
    except ImportError as error:  # Python 3.10 has no parser of TOML
        raise ConfigError(f"study {path}: {error}: {install_command('study')}") from error
    except OSError as error:
        raise ConfigError(f"study {path}: cannot be read: {error.strerror}; expected a TOML file") from error
    except msgspec.DecodeError as error:  # a ValidationError is one too
        raise ConfigError(f"study {path}: {error}; correct the file, see studies/files/reduced.toml for one") from error
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    """What holds between fields."""
    for field in ("seeds", "sizes"):
        _refuse_twice(path, f"$.{field}", [str(value) for value in getattr(study, field)])
    for field in ("bases", "data", "methods"):
        _refuse_twice(path, f"$.{field}[...].name", [entry.name for entry in getattr(study, field)])
    names = [method.name for method in study.methods]
    trained = [method for method in study.methods if not isinstance(method, ZeroShotMethod)]
    _check_reference(f"study {path}: $.compare_to", study.compare_to, names, trained)
    if study.search.seed in study.seeds:
        raise ConfigError(
            f"study {path}: $.search.seed is {study.search.seed}, which is in $.seeds: a learning rate must not be "
            "chosen with a seed that is measured; take another"
        )
    single = [data.name for data in study.data if data.combine is None]
    for index, data in enumerate(study.data):
        field = f"study {path}: $.data[{index}]"
        if unknown := [name for name in data.methods or () if name not in names]:
            raise ConfigError(f"{field}.methods has {unknown[0]!r}, expected some of {', '.join(names)}")
        if data.combine is not None:
            _check_combined(data, field, single)
        elif data.folder is None and data.name not in SOURCES:
            raise ConfigError(
                f"{field}.name is {data.name!r}, expected one of {', '.join(SOURCES)}, or a `folder` with "
                "train.jsonl, validation.jsonl and test.jsonl, or .csv and others"
            )
        elif data.folder is None and data.template != DEFAULT_TEMPLATE:
            raise ConfigError(
                f"{field} has a template and no folder: {data.name} has a template of its own, and one is for a data "
                "set of yours; leave it out"
            )
    for index, method in enumerate(study.methods):
        if not isinstance(method, ZeroShotMethod):
            for size in set(method.sizes or ()) - set(study.sizes):
                raise ConfigError(
                    f"study {path}: $.methods[{index}].sizes has {size}, expected some of $.sizes: "
                    f"{', '.join(map(str, study.sizes))}"
                )
            if method.compare_to is not None:
                field = f"study {path}: $.methods[{index}].compare_to"
                if method.compare_to == method.name:
                    raise ConfigError(f"{field} is {method.name!r}, the method itself: expected another, or none")
                _check_reference(field, method.compare_to, names, trained)
        if isinstance(method, AdaLinkMethod) and method.activation not in ACTIVATIONS:
            raise ConfigError(
                f"study {path}: $.methods[{index}].activation is {method.activation!r}, expected one of "
                f"{', '.join(ACTIVATIONS)}"
            )


def _check_reference(field: str, name: str, names: Sequence[str], trained: Sequence[TrainedMethod]) -> None:
    """A method to pair others with is one of the study's, and has seeds, unless the study trains nothing."""
    if name not in names:
        raise ConfigError(f"{field} is {name!r}, expected a method: {', '.join(names)}")
    if trained and name not in (learning := [method.name for method in trained]):
        raise ConfigError(
            f"{field} is {name!r}, which learns nothing: others are paired with it seed by seed, and it has none; "
            f"expected one that is trained: {', '.join(learning)}"
        )


def _check_combined(data: Data, field: str, single: Sequence[str]) -> None:
    """A combined data set is made of others, each once, and has nothing of its own."""
    assert data.combine is not None
    if unknown := [name for name in data.combine if name not in single]:
        raise ConfigError(
            f"{field}.combine has {unknown[0]!r}, expected names of data sets of this study that combine none: "
            f"{', '.join(single)}"
        )
    if len(set(data.combine)) < len(data.combine):
        raise ConfigError(f"{field}.combine is {', '.join(data.combine)}: expected each once")
    for field_name in ("folder", "template", "words", "test_rows"):
        if getattr(data, field_name) != getattr(Data(name=data.name), field_name):
            raise ConfigError(
                f"{field} has both combine and {field_name}: leave {field_name} to the data sets that it combines"
            )


def _refuse_twice(path: Path, field: str, values: list[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"study {path}: {field} has {value!r} twice: expected each once")
