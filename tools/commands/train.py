"""``adalink train``: rows of prompt and completion become an adapter folder."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter_spec import ACTIVATIONS, SCOPES, Rank
from adalink.tools.common.console import say
from adalink.tools.common.options import is_given
from adalink.training.method.config import INITS, AdaLinkConfig, Init
from adalink.training.settings import DEVICES, PRECISIONS, RATES, SEARCHED_INIT, SearchSettings, TrainSettings

_METHOD = AdaLinkConfig()


@click.command(name="train", short_help="Train an adapter on prompt and completion rows.")
@click.option("--base", required=True, metavar="MODEL", help="Model folder, GGUF file or hub id.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSONL rows to learn from.")
@click.option("--eval", "eval_data", required=True, type=click.Path(path_type=Path), help="JSONL rows to measure on.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Adapter folder to write or replace.")
@click.option(
    "--rank",
    "ranks",
    multiple=True,
    default=[str(_METHOD.rank)],
    show_default=True,
    metavar="R | MODALITY=R",
    help="Width of the bottleneck; one for each modality if repeated; 0 for none.",
)
@click.option("--activation", default=_METHOD.activation, show_default=True, type=click.Choice(ACTIVATIONS))
@click.option(
    "--modality",
    "modalities",
    multiple=True,
    help="What is adapted: text, or image for a base that takes images; may be repeated. Text alone without it.",
)
@click.option("--bias", is_flag=True, help="Train biases too.")
@click.option("--dropout", default=_METHOD.dropout, show_default=True, help="Dropout in the bottleneck.")
@click.option(
    "--scope",
    default=_METHOD.scope,
    show_default=True,
    type=click.Choice(SCOPES),
    help="Adapt every position, or the prompt alone.",
)
@click.option(
    "--soft-tokens",
    default=_METHOD.soft_tokens,
    show_default=True,
    help="Trained vectors before each row's first token; alone with --rank 0.",
)
@click.option(
    "--init",
    show_default=f"{_METHOD.init}; {SEARCHED_INIT} where --search chooses the rate",
    type=click.Choice(INITS),
    help="How the bottleneck starts: uniform, centered on the base's embeddings, or along the gradient of some rows.",
)
@click.option(
    "--lr",
    type=float,
    show_default=", ".join(f"{rates[0]:g} if {init}" for init, rates in RATES.items()),
    help="Highest learning rate.",
)
@click.option("--max-steps", default=TrainSettings.max_steps, show_default=True, help="Optimizer steps.")
@click.option("--batch-size", default=TrainSettings.batch_size, show_default=True, help="Rows a step.")
@click.option("--max-length", default=TrainSettings.max_length, show_default=True, help="Most tokens a row may have.")
@click.option("--save-steps", default=TrainSettings.save_steps, show_default=True, help="Steps between checkpoints.")
@click.option("--seed", default=TrainSettings.seed, show_default=True, help="Seed of weights, order and dropout.")
@click.option("--device", default=TrainSettings.device, show_default=True, type=click.Choice(DEVICES))
@click.option(
    "--precision",
    default=TrainSettings.precision,
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="Of the products in a training step; bfloat16 is for hardware that has it.",
)
@click.option(
    "--search",
    "minutes",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MINUTES",
    help="First choose rate, rank and activation, those of them that are not given, within this time.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    base: str,
    data: Path,
    eval_data: Path,
    out: Path,
    ranks: tuple[str, ...],
    activation: str,
    modalities: tuple[str, ...],
    bias: bool,
    dropout: float,
    scope: str,
    soft_tokens: int,
    init: Init | None,
    lr: float | None,
    max_steps: int,
    batch_size: int,
    max_length: int,
    save_steps: int,
    seed: int,
    device: str,
    precision: str,
    minutes: float | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Train an AdaLink adapter for a frozen MODEL on rows of prompt and completion.

    Each line of the JSONL files is {"prompt": "...", "completion": "..."}; the loss is on the completion only. For a
    base that takes images a line may have "images": ["a.png"] too, paths from the file's own folder, with one
    placeholder in the prompt for each, which PaliGemma may do without. OUT gets the adapter and training.json: data
    digests, settings, loss curve, and exact-match accuracy of the base and of the adapter on the eval rows. Checkpoints
    lie in OUT.checkpoints until the run is done.

    --search holds out a tenth of the rows of --data (16 to 200 of them) and trains candidates on the others: all for a
    few steps, the better half for twice as many, and so on, as many as the machine can do in that time. The one with
    the lowest loss on the rows held out is then trained on all rows of --data, as if its settings had been given. The
    eval rows play no part in the choice. training.json has every trial.

    \b
    Examples:
      adalink train --base ./SmolLM2-135M-Instruct --data train.jsonl --eval eval.jsonl --out ./adapters/topics
      adalink train ... --search 30                                  # choose rate, rank and activation
      adalink train ... --search 10 --rank 16 --activation identity  # choose the rate alone
    """  # noqa: D301
    rank = _read_rank(ranks)
    if init is None:
        searched = minutes is not None and lr is None and rank != 0  # without a bottleneck there is nothing to start
        init = SEARCHED_INIT if searched else _METHOD.init
    config = AdaLinkConfig(
        rank=rank,
        activation=activation,
        bias=bias,
        dropout=dropout,
        scope=scope,
        soft_tokens=soft_tokens,
        modalities=modalities or _METHOD.modalities,
        init=init,
    )
    settings = TrainSettings(
        lr=RATES[init][0] if lr is None else lr,
        max_steps=max_steps,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        device=device,
        precision=precision,
        save_steps=save_steps,
    )
    space = None
    if minutes is not None:
        if isinstance(rank, dict):
            raise ConfigError(f"--rank is {' '.join(ranks)}, and --search takes one rank for all: give one, or none")
        fixed: dict[str, Any] = {"rates": RATES[init] if lr is None else (lr,)}
        if is_given("ranks"):
            fixed["ranks"] = (rank,)
        if is_given("activation") or rank == 0:
            fixed["activations"] = (activation,)
        space = SearchSettings(minutes=minutes, **fixed)
    from adalink.tools.common.quiet import quiet_libraries
    from adalink.training.run import train

    show_bar = sys.stderr is not None and sys.stderr.isatty()
    # The Trainer logs to stdout, which is for the result.
    with contextlib.redirect_stdout(sys.stderr), quiet_libraries():
        report = train(
            base, data, eval_data, out, config, settings, space=space, resume=resume, say=say, show_bar=show_bar
        )
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    accuracy = report["exact_match"]
    click.echo(
        f"adapter {out}: exact match {accuracy['adapter']:.1%} on {report['data']['eval']['rows']} eval rows "
        f"(base without it: {accuracy['base']:.1%}); last loss {report['loss_curve'][-1]['loss']:.3f}"
    )


def _read_rank(given: tuple[str, ...]) -> Rank:
    """``("16",)``, or ``("text=16", "image=64")``; raises ``ConfigError``."""
    named = [text.partition("=") for text in given]
    try:
        if len(given) == 1 and not named[0][1]:
            return int(given[0])
        ranks = {name: int(number) for name, _, number in named}
    except ValueError as error:
        raise ConfigError(
            f"--rank is {' '.join(given)}, expected one number, or MODALITY=NUMBER for each modality"
        ) from error
    if len(ranks) < len(given):
        raise ConfigError(f"--rank is {' '.join(given)}, expected each modality once")
    return ranks
