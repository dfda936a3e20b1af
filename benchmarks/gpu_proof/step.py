"""One step in its own process: ``python -m benchmarks.gpu_proof.step MODULE --record FILE ...``; the driver calls it.

A step is a module with ``run(record, plan)``. Without a GPU it answers "no device"; in a rehearsal it then runs on a
stand-in, so that its own lines are tried. A module that needs no GPU says ``NEEDS_GPU = False``.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_proof.record import MISSING, NO_DEVICE, PASSED, NotHereError, Record


@dataclass(frozen=True)
class Plan:
    """What a step is told.

    Attributes:
        work: folder of bases and deployments, shared by all steps.
        is_full: the real sizes; else tiny ones.
        has_gpu: whether there is a GPU; without one, a step that is called runs on its stand-in.
        ends_at: when the step must be done, by ``time.monotonic``.
    """

    work: Path
    is_full: bool
    has_gpu: bool
    ends_at: float

    @property
    def small(self) -> Path:
        """Checkpoint of the small base."""
        return self.work / ("135m" if self.is_full else "tiny")

    @property
    def large(self) -> Path:
        """Checkpoint of the large base."""
        return self.work / ("1b" if self.is_full else "tiny")

    def deployment(self, dtype: str) -> Path:
        """Deployment of the small base."""
        return self.work / f"deployment-{dtype}"

    @property
    def seconds_left(self) -> float:
        """Seconds until the step must be done; a measurement takes a share of them."""
        return self.ends_at - time.monotonic()


def missing_gpu() -> str:
    """Why there is no GPU; empty if there is one."""
    from adalink.runtime.device.gpus import find_gpus

    gpus = find_gpus()
    return "" if gpus.devices else gpus.reason


def main() -> None:
    """Run the step, and report however it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True, help="seconds")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    faulthandler.enable()
    record = Record(options.record)
    try:
        module = importlib.import_module(options.module)
        reason = missing_gpu()
        plan = Plan(options.work, options.full, not reason, time.monotonic() + options.limit)
        if not reason or not getattr(module, "NEEDS_GPU", True):
            module.run(record, plan)
            record.check_parts()
            record.finish(PASSED)
            return
        if options.rehearse:
            record.rehearse()
            module.run(record, plan)
            record.check_parts()
        record.finish(NO_DEVICE, reason)
    except NotHereError as error:
        record.finish(MISSING, str(error))
    except BaseException as error:  # whatever it is, it is what the step reports
        record.fail(error)


if __name__ == "__main__":
    main()
