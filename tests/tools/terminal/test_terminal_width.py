"""Answers for people in a real terminal of 80 columns, in one that is narrower, and without colours."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

SCRIPT = """
from adalink.tools.bench.terminal import print_report as print_bench
from adalink.tools.commands.doctor import _show_findings
from adalink.tools.terminal.console import print_fields, print_table
from adalink.tools.terminal.verbose import verbosity
from adalink.tools.parity.report import Report, at_most
from adalink.tools.parity.terminal import print_report
from adalink.tools.commands import doctor

name = "adapter/a-task-with-a-name-that-is-too-long/vocabulary"
checks = [at_most("base/logits", 1e-5, 3.2e-4, "a detail " * 20), at_most(name, 2.0, 1.0, "a worst case " * 20)]
report = Report(checks, receipt={"tour": ["base", "alpha"] * 9}, skipped=["an engine: " + "no GPU " * 20])
report.cost["perplexity"] = {"float32": 12.345678, "weights": 12.5, "deployed": 12.6}
print_report(report)
with verbosity(1):
    print_report(report)
print("quiet")
with verbosity(-1):
    print_report(report)
print("end")
entry = {"works": False, "detail": "a reason " * 20, "advice": "", "install": "pip install 'adalink-kit[gpu,tensorrt]'"}
works = {**entry, "works": True}
environment = {"platform": "Linux-" + "x" * 40, "packages": {f"package-{n}": "1.2.3" for n in range(20)}}
_show_findings({
    "backends": {"onnxruntime-cpu": works, "tensorrt": entry, "tensorrt-rtx": {**entry, "advice": "update it " * 20}},
    "jobs": {"train": works}, "environment": environment, "gpus": {"devices": [], "reason": "no driver " * 20},
})
ratios = [{"name": f"{n}_ratio", "value": 1.0123, "unit": "1"} for n in ("prefill", "decode", "mixed_batch", "open")]
medians = {f"{n}_{s}_ms": 123.456 for n, s in (
    ("prefill", "base"), ("prefill", "task"), ("decode", "base"), ("decode", "task"),
    ("mixed_batch", "single"), ("mixed_batch", "mixed"))}
print_bench("base, task", [*ratios, {"name": "task_bytes", "value": 74000.0, "unit": "bytes"}], medians, 64, 32)
print_fields({"name": "x", "adapter_digest": "sha256:" + "0" * 64, "tasks": {"a": {"labels": ["one", "two"] * 20}}})
print_table("Cost", ("", "value"), [("a name " * 9, "a value " * 9)])
"""


def shown(columns: int, variables: dict[str, str]) -> str:
    """What the script shows in a terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment = plain | {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)} | variables
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    output = b""
    while True:
        try:
            piece = os.read(leader, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        output += piece
    os.close(leader)
    assert process.wait(60) == 0, output.decode()
    return output.decode().replace("\r\n", "\n")


COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize(
    ("columns", "variables", "widest", "is_coloured"),
    [(80, {}, 80, True), (80, {"NO_COLOR": "1"}, 80, False), (132, {"COLUMNS": "80", "TERM": "dumb"}, 80, False)],
)
def test_lines_fit_the_terminal(columns: int, variables: dict[str, str], widest: int, is_coloured: bool) -> None:
    text = shown(columns, variables)
    lines = COLOUR.sub("", text).splitlines()
    assert [line for line in lines if len(line) > widest] == []
    assert bool(re.search(r"\x1b\[[0-9;]*3[12]m", text)) == is_coloured
    # The verdict is first and last; a check that passes has one line, one that fails its detail too.
    ends = [number for number, line in enumerate(lines) if line.startswith("1 of 2 checks failed: ")]
    assert ends[0] == 0
    assert lines[1].startswith("pass  base/logits")
    assert lines[1].endswith("1e-05 ≤ 0.00032")
    assert lines[2].startswith("FAIL  adapter/a-task")
    assert "…" in lines[2]
    assert lines[3].startswith("      a worst case")
    # With -v the other detail and the receipt.
    assert "a detail" not in "\n".join(lines[: ends[1]])
    assert "a detail" in "\n".join(lines[ends[1] :])
    # With -q a verdict, and what failed.
    quiet = lines[lines.index("quiet") + 1 : lines.index("end")]
    assert [line for line in quiet if line.startswith("pass")] == []
    assert len([line for line in quiet if line.startswith("1 of 2 checks failed: ")]) == 1
    # A command is whole, on one line; so is a digest.
    assert "pip install 'adalink-kit[gpu,tensorrt]'" in {line.strip() for line in lines}
    assert f"sha256:{'0' * 64}" in {line.strip() for line in lines}
    assert "8.1 tokens/s" in text  # a decode step of 123.456 ms
