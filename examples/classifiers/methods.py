"""Ways to have a classifier on one encoder, each trained on the same rows for as many steps.

The kit's two, ``adalink`` and ``head``, are ``adalink.training.train`` itself. ``lora`` (PEFT) and ``full`` train the
same head with the same loss on an encoder that changes, so each task is a model of its own. ``logistic`` is
scikit-learn's logistic regression on the encoder's embeddings.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.storage.head_spec import MULTI_LABEL, SINGLE_LABEL, TOKENS, Head
from adalink.training import AdaLinkConfig, HeadSettings, TrainSettings, train
from adalink.training.adapter_io import load_adapter, save_adapter, to_adapter
from adalink.training.data.labelled_rows import LabelledRow, find_labels, read_labelled_rows
from adalink.training.heads.classifier import LabelCollator, TrainableClassifier, encode_labelled, features
from adalink.training.heads.linear_probe import fit_head
from adalink.training.heads.metrics import measure
from adalink.training.heads.run import classify_examples, predict
from adalink.training.loop.options import LoopOptions
from adalink.training.loop.trainer import trainer_arguments
from adalink.training.method.attach import AdaLinkModel, attach
from adalink.training.models.loading import load_base, load_tokenizer

if TYPE_CHECKING:
    from adalink.runtime.arrays import Array

# Peak learning rates of what is trained beside the head; the eval rows choose, with the first seed.
RATES = {"adalink": (1e-2, 3e-3), "lora": (1e-2, 3e-3), "full": (3e-4,), "head": (HeadSettings.lr,)}
RANK, LORA_RANK, LENGTH = 16, 8, 64
SETTINGS = TrainSettings(max_steps=100, batch_size=16, max_length=LENGTH, device="cpu", save_steps=10_000, eval_steps=0)
_STRENGTHS = (1.0, 10.0, 100.0)

Result = dict[str, Any]


class _CpuSeconds(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
    """Processor time of the training alone."""

    seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seconds = -time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seconds += time.process_time()


def train_with_kit(base: Path, rows: dict[str, Path], method: str, lr: float, seed: int, out: Path) -> Result:
    """``adalink`` or ``head``: writes the adapter folder ``out``; measures of the eval and the test rows."""
    clock = _CpuSeconds()
    report = train(
        base,
        rows["train"],
        rows["test"],
        out,
        AdaLinkConfig(rank=RANK),
        replace(SETTINGS, seed=seed, lr=lr),
        head=HeadSettings(alone=method == "head"),
        loop=LoopOptions(callbacks=(clock,), show_bar=False),
    )
    return {
        "metrics": report["evaluation"],
        "eval_metrics": measure_adapter(base, rows, out),
        "train_seconds": round(clock.seconds, 1),
    }


def measure_adapter(base: Path, rows: dict[str, Path], folder: Path) -> dict[str, float]:
    """Measures of an adapter on the eval rows, which ``train`` above does not see."""
    head, parts = _read(rows)
    tokenizer, model = load_tokenizer(base), load_base(base)
    with load_adapter(folder, model) as attached:
        module, collate = TrainableClassifier(attached), LabelCollator(head, tokenizer.pad_token_id)
        examples = encode_labelled(parts["eval"], tokenizer, head)
        scores = predict(module, examples, collate, SETTINGS.batch_size)
    return measure(head, parts["eval"], classify_examples(head, parts["eval"], examples, scores))


def train_own_model(base: Path, rows: dict[str, Path], method: str, lr: float, seed: int, out: Path | None) -> Result:
    """``lora`` or ``full``: a model of its own, exported as the deployment ``out`` where that is given."""
    head, parts = _read(rows)
    tokenizer, model = load_tokenizer(base), load_base(base)
    set_seed(seed)
    tuned = _with_lora(model) if method == "lora" else None
    metrics = {}
    with attach(model, _head_config(head)) as attached:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or "lora_" in name)
        module = _OwnModel(attached)
        examples = {split: encode_labelled(some, tokenizer, head) for split, some in parts.items()}
        collate = LabelCollator(head, tokenizer.pad_token_id)
        fit_head(module, examples["train"], collate, replace(SETTINGS, seed=seed))  # as the kit's own heads start
        seconds = _train(module, examples["train"], collate, replace(SETTINGS, seed=seed, lr=lr))
        for split in ("eval", "test"):
            scores = predict(module, examples[split], collate, SETTINGS.batch_size)
            said = classify_examples(head, parts[split], examples[split], scores)
            metrics[split] = measure(head, parts[split], said)
        weights = attached.weights()
    if out is not None:
        _export(model if tuned is None else tuned.merge_and_unload(), tokenizer, head, weights, out)
    return {"metrics": metrics["test"], "eval_metrics": metrics["eval"], "train_seconds": round(seconds, 1)}


class _OwnModel(TrainableClassifier):
    """The head and the loss of the kit, over a base that learns too."""

    def __init__(self, attached: AdaLinkModel) -> None:
        super().__init__(attached)
        self.base = attached.model


def _head_config(head: Head) -> AdaLinkConfig:
    return AdaLinkConfig(rank=0, head=head)


def _read(rows: dict[str, Path]) -> tuple[Head, dict[str, list[LabelledRow]]]:
    kind, training = read_labelled_rows(rows["train"])
    labels = find_labels(kind, training, rows["train"])
    pooling = "" if kind == TOKENS else "mean"
    head = Head(problem_type=kind, labels=labels, pooling=pooling, max_tokens=LENGTH)
    return head, {split: read_labelled_rows(path, kind)[1] for split, path in rows.items()}


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="FEATURE_EXTRACTION", r=LORA_RANK, lora_alpha=2 * LORA_RANK))


def _train(module: _OwnModel, examples: Sequence[Any], collate: LabelCollator, settings: TrainSettings) -> float:
    """Train; returns the processor seconds."""
    learned = [parameter for parameter in module.base.parameters() if parameter.requires_grad]
    groups = [{"params": learned, "lr": settings.lr}, {"params": list(module.head.parameters()), "lr": HeadSettings.lr}]
    clock = _CpuSeconds()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=module,
            args=trainer_arguments(folder, settings, save_strategy="no", logging_strategy="no", disable_tqdm=True),
            train_dataset=examples,
            data_collator=collate,
            callbacks=[clock],
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds


def _export(model: Any, tokenizer: Any, head: Head, weights: dict[str, Array], out: Path) -> None:
    """A deployment of the trained model, whose one task is its head."""
    shutil.rmtree(out, ignore_errors=True)
    folder = out.parent / f"{out.name}.model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = load_base(folder)
    with attach(saved, _head_config(head)) as attached:
        attached.load_weights(weights)
        save_adapter(out.parent / "head", to_adapter(attached, folder.name, tokenizer))
    export_base(folder, out)
    export_adapter(out.parent / "head", out)


def train_logistic(base: Path, rows: dict[str, Path], seed: int) -> Result:
    """Logistic regression on frozen embeddings; its strength is chosen on the eval rows."""
    head, parts = _read(rows)
    tokenizer, model = load_tokenizer(base), load_base(base)
    examples = {split: encode_labelled(some, tokenizer, head) for split, some in parts.items()}
    begun = time.process_time()
    vectors = {split: _vectors(model, some, head, tokenizer.pad_token_id) for split, some in examples.items()}
    metric = {SINGLE_LABEL: "accuracy", MULTI_LABEL: "micro_f1", TOKENS: "span_f1"}[head.problem_type]
    best: tuple[float, float, Any] | None = None
    for strength in _STRENGTHS:
        fitted = _fit(vectors["train"], examples["train"], head, strength, seed)
        value = _measure(fitted, vectors["eval"], examples["eval"], parts["eval"], head)[metric]
        if best is None or value > best[0]:
            best = value, strength, fitted
    assert best is not None
    seconds = time.process_time() - begun
    metrics = _measure(best[2], vectors["test"], examples["test"], parts["test"], head)
    return {"metrics": metrics, "train_seconds": round(seconds, 1), "strength": best[1]}


@torch.no_grad()
def _vectors(model: Any, examples: Sequence[Any], head: Head, pad: int) -> list[Array]:
    """Of each text its embedding, length 1, ``(1, d)``; or the states of its tokens, ``(tokens, d)``."""
    collate, made = LabelCollator(head, pad), []
    for start in range(0, len(examples), SETTINGS.batch_size):
        some = examples[start : start + SETTINGS.batch_size]
        batch = {name: tensor for name, tensor in collate(some).items() if name != "labels"}
        values = features(model, head, **batch)
        if head.pooling:
            values = torch.nn.functional.normalize(values)[:, None]
        made += [rows[: len(one.ids)].numpy() for rows, one in zip(values, some, strict=True)]
    return made


def _fit(vectors: Sequence[Array], examples: Sequence[Any], head: Head, strength: float, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    model = LogisticRegression(C=strength, max_iter=2000, random_state=seed)
    inputs = np.concatenate(vectors)
    if head.problem_type == MULTI_LABEL:
        return OneVsRestClassifier(model).fit(inputs, np.array([one.target for one in examples]))
    targets = np.concatenate([np.atleast_1d(one.target) for one in examples])
    return model.fit(inputs[targets >= 0], targets[targets >= 0])


def _measure(
    fitted: Any, vectors: Sequence[Array], examples: Sequence[Any], rows: Sequence[LabelledRow], head: Head
) -> dict[str, float]:
    """Measures on rows."""
    scores = [_scores(fitted, some, head) for some in vectors]
    return measure(head, rows, classify_examples(head, rows, examples, scores))


def _scores(fitted: Any, vectors: Array, head: Head) -> Array:
    """Scores as a head gives them; a label that training has none of has the lowest."""
    if head.problem_type == MULTI_LABEL:
        return np.asarray(fitted.decision_function(vectors)[0])
    scores = np.full((len(vectors), len(head.labels)), -1e9)
    scores[:, fitted.classes_] = fitted.predict_log_proba(vectors)
    return np.asarray(scores if head.problem_type == TOKENS else scores[0])
