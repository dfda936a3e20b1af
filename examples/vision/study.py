"""Adapters per modality compared: two tasks on one frozen vision-language base, measured as deployed.

    python examples/vision/study.py --work build/vision            # the adapters beside this file
    python examples/vision/study.py --work build/vision --train    # adapters trained anew

Each task has an adapter on the text, one on the image, and one on both, with equally many parameters. All are tasks of
one deployment. The base model and each adapter answer every test row through ``Deployment.generate``. A reply counts
if it is the answer and nothing else. Writes ``WORK/results.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adalink.export.adapter.export import export_adapters
from adalink.export.base.export import export_base
from adalink.runtime import Deployment, SamplingParams
from adalink.runtime.storage.adapter import read_adapter
from adalink.training.data.rows import TrainingRow, read_rows
from adalink.training.loop.options import LoopOptions
from adalink.training.method.config import AdaLinkConfig
from adalink.training.run import train
from adalink.training.settings import TrainSettings

HERE = Path(__file__).parent
TASKS = ("even", "above-five")
# Half the rank each where both are adapted: the same number of parameters.
VARIANTS: dict[str, tuple[tuple[str, ...], int]] = {
    "text": (("text",), 64),
    "image": (("image",), 64),
    "both": (("text", "image"), 32),
}
SETTINGS = TrainSettings(max_steps=200, batch_size=8)
BATCH_ROWS = 50
# As accuracy is measured in training, whatever the generation config of the base says.
GREEDY = SamplingParams(temperature=0, base_defaults=False)


def train_all(base: Path, data: Path, adapters: Path) -> None:
    """Train every missing adapter; an interrupted run resumes."""
    for task in TASKS:
        for variant, (modalities, rank) in VARIANTS.items():
            out = adapters / f"{task}-{variant}"
            if out.exists():
                continue
            config = AdaLinkConfig(rank=rank, modalities=modalities)
            resume = (adapters / f"{out.name}.checkpoints").exists()
            rows, held_out = data / task / "train.jsonl", data / task / "eval.jsonl"
            train(base, rows, held_out, out, config, SETTINGS, loop=LoopOptions(resume=resume, progress=print))


def share_right(deployment: Deployment, rows: list[TrainingRow], data: Path, task: str | None) -> float:
    """Share of rows that are answered with the expected text and nothing else."""
    right = 0
    for start in tqdm(range(0, len(rows), BATCH_ROWS), desc=task or "base model", unit="batch"):
        batch = rows[start : start + BATCH_ROWS]
        images = [[data / name for name in row.images] for row in batch]
        prompts = [row.prompt for row in batch]
        replies = deployment.generate(prompts, images=images, tasks=task, max_new_tokens=4, sampling=GREEDY)
        right += sum(reply.text.strip() == row.completion.strip() for reply, row in zip(replies, batch, strict=True))
    return right / len(rows)


def share_likelier(deployment: Deployment, rows: list[TrainingRow], data: Path) -> float:
    """Share of rows for which the base model's most likely answer is right."""
    vision = deployment.manifest.base.vision
    answers = sorted({row.completion for row in rows})
    first_tokens = [deployment.tokenizer.encode(answer)[0] for answer in answers]
    prompt = deployment.tokenizer.encode(rows[0].prompt)  # that of every row
    ids = [t for token in prompt for t in [token] * (vision.tokens_per_image if token == vision.image_token_id else 1)]
    right = 0
    for start in tqdm(range(0, len(rows), BATCH_ROWS), desc="base model, likelier answer", unit="batch"):
        batch = rows[start : start + BATCH_ROWS]
        images = [[data / name for name in row.images] for row in batch]
        logits = deployment.run(input_ids=[ids] * len(batch), images=images)["logits"][:, -1]
        likeliest = logits[:, first_tokens].argmax(axis=1)
        right += sum(answers[index] == row.completion for index, row in zip(likeliest, batch, strict=True))
    return right / len(rows)


def commonest(rows: list[TrainingRow]) -> float:
    """Accuracy of the most common answer for every row."""
    answers = [row.completion for row in rows]
    return max(answers.count(answer) for answer in set(answers)) / len(answers)


def measure(deployment_folder: Path, data: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Accuracy of the base model and of every adapter on all test rows."""
    results: dict[str, Any] = {"tasks": {}}
    with Deployment.open(deployment_folder) as deployment:
        rows = read_rows(data / "name" / "test.jsonl")
        results["test rows"] = len(rows)
        results["base names the digit"] = share_right(deployment, rows, data / "name", None)
        for task in TASKS:
            rows = read_rows(data / task / "test.jsonl")
            results["tasks"][task] = {
                "always the commonest answer": commonest(rows),
                "base": share_right(deployment, rows, data / task, None),
                "base, the likelier of the two answers": share_likelier(deployment, rows, data / task),
                **{name: share_right(deployment, rows, data / task, f"{task}-{name}") for name in VARIANTS},
            }
        results["images encoded"] = deployment.images_encoded
    reports = {name: json.loads((folder / "training.json").read_text()) for name, folder in folders.items()}
    results["adapters"] = {
        name: {
            "parameters": read_adapter(folder).size_bytes // 4,
            "digest": reports[name]["adapter_digest"],
            "training seconds": reports[name]["wall_seconds"],
        }
        for name, folder in folders.items()
    }
    results["versions"] = {name: version(name) for name in ("onnxruntime", "torch", "transformers")}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=Path("build/vision"), help="with data/ and base/; the rest goes here"
    )
    parser.add_argument("--train", action="store_true", help="train the adapters anew, into WORK/adapters (20 minutes)")
    arguments = parser.parse_args()
    work = arguments.work
    adapters = work / "adapters" if arguments.train else HERE / "adapters"
    if arguments.train:
        train_all(work / "base", work / "data", adapters)
    deployment = work / "deployment"
    shutil.rmtree(deployment, ignore_errors=True)  # it may be of another projector
    export_base(work / "base", deployment, progress=print)
    folders = {name: adapters / name for name in (f"{task}-{variant}" for task in TASKS for variant in VARIANTS)}
    export_adapters(folders, deployment, replace=True)
    results = measure(deployment, work / "data", folders)
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
