"""The model card of an adapter folder: ``README.md``, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from adalink.runtime.storage.head_spec import TOKENS
from adalink.training.outcome import ClassifiedRows

if TYPE_CHECKING:
    from adalink.runtime.storage.adapter import AdapterConfig
    from adalink.training.outcome import Outcome

CARD_FILE = "README.md"
_LIBRARY = "adalink-kit"
# Names of the hub's metrics; the others are given as they are.
_METRICS = {
    "macro_f1": "f1",
    "micro_f1": "f1",
    "span_f1": "f1",
    "mean_squared_error": "mse",
    "mean_absolute_error": "mae",
}
# Of answers that need no text: no result of the adapter.
_BASELINES = ("majority_accuracy", "mean_squared_error_of_the_mean")


def make_card(outcome: Outcome, config: AdapterConfig) -> str:
    """The card's text: metadata as YAML, then what the adapter is, how good it is, and how it is used."""
    report = outcome.report
    measures = _measures(report)
    kind = _pipeline_tag(outcome, config)
    task_type = kind or "other"
    data = ModelCardData(
        base_model=report["base"],
        library_name=_LIBRARY,
        tags=["adalink", "adapter", "input-adapter"],
        pipeline_tag=kind,
        model_name=outcome.name,
        eval_results=[
            EvalResult(
                task_type=task_type,
                dataset_type="local",
                dataset_name=report["data"]["eval"]["file"],
                metric_type=_METRICS.get(name, name),
                metric_name=name.replace("_", " "),
                metric_value=round(value, 6),
            )
            for name, value in measures.items()
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(outcome, config, measures)}"


def _measures(report: dict[str, Any]) -> dict[str, float]:
    """What was measured of the adapter on the eval rows."""
    if "exact_match" in report:
        return {"exact_match": report["exact_match"]["adapter"]}
    return {name: value for name, value in report["evaluation"].items() if name not in _BASELINES}


def _pipeline_tag(outcome: Outcome, config: AdapterConfig) -> str:
    """The hub's name of what the task does."""
    if config.head is not None:
        return "token-classification" if config.head.problem_type == TOKENS else "text-classification"
    has_images = "images" in outcome.report
    return "image-text-to-text" if has_images else "text-generation"


def _body(outcome: Outcome, config: AdapterConfig, measures: dict[str, float]) -> str:
    report, name = outcome.report, outcome.name
    files = report["data"]
    what = "text" if config.head is None else config.head.problem_type.replace("_", " ")
    table = "\n".join(f"| {key.replace('_', ' ')} | {value:.4f} |" for key, value in measures.items())
    baseline = _baseline(report)
    verb = "classify" if isinstance(outcome.answers, ClassifiedRows) or config.labels is not None else "run"
    settings = "\n".join(f"- {key}: {value}" for key, value in report["settings"].items())
    return f"""# {_escape(name)}

An AdaLink adapter for the frozen model {_escape(report["base"])} ({what}). It acts on the model's input embeddings
alone, so one compiled model serves it beside any other adapter.

## Results

On {files["eval"]["rows"]} eval rows of `{_code(files["eval"]["file"])}`{baseline}:

| measure | value |
| --- | --- |
{table}

`training.json` has the curves, all settings and the digests of the data.

## Use

With AdaLink Kit and its extras `cpu` and `export`:

```text
adalink export base MODEL --out deployment
adalink export adapter {_code(name)} --out deployment
adalink {verb} deployment "..." --task {_code(name)}
```

## Training

{files["train"]["rows"]} rows of `{_code(files["train"]["file"])}`, AdaLink Kit {report["kit_version"]}.

{settings}
"""


def _baseline(report: dict[str, Any]) -> str:
    if "exact_match" in report:
        return f" (the base model alone: {report['exact_match']['base']:.4f})"
    majority = report["evaluation"].get("majority_accuracy")
    return "" if majority is None else f" (always their commonest label: {majority:.4f})"


def _escape(text: str) -> str:
    """Text without markup."""
    return "".join(f"\\{mark}" if mark in "\\`*_[]<>#|" else mark for mark in " ".join(text.split()))


def _code(text: str) -> str:
    """Text for a code span or block."""
    return " ".join(text.replace("`", "'").split())
