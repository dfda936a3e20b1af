"""No progress bar of a library gets into a log: not in this process, not in a study's workers."""

import sys

import pytest
from click.testing import CliRunner
from helpers.tiny_deployments import make_model_folder
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging

from adalink.tools.cli import main
from adalink.tools.terminal.quiet import quiet_libraries


def read_gguf():
    """What transformers does with the tensors of a GGUF file."""
    return list(modeling_gguf_pytorch_utils.tqdm(range(3), desc="Converting"))


def test_gguf_bar_is_for_terminals_and_comes_back(capsys, monkeypatch):
    with quiet_libraries():
        assert read_gguf() == [0, 1, 2]
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        read_gguf()
        assert "Converting" in capsys.readouterr().err
        monkeypatch.undo()
    assert logging.is_progress_bar_enabled()
    read_gguf()
    assert "Converting" in capsys.readouterr().err


@pytest.mark.parametrize("isatty", [False, True])
def test_workers_of_a_study_show_none(isatty, warm_torch):
    code = (
        "import sys\n"
        "from transformers import modeling_gguf_pytorch_utils as gguf\n"
        "from studies import schedule\n"
        "schedule._end_with_parent = lambda: None\n"
        f"sys.stderr.isatty = lambda: {isatty}\n"
        "schedule._begin_worker(1)\n"
        "list(gguf.tqdm(range(3), desc='Converting'))\n"
    )
    done = warm_torch.run([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (0, "")


def test_inspect_of_a_model_says_nothing_but_its_result(tmp_path):
    model = make_model_folder(tmp_path / "tiny", "llama")
    result = CliRunner().invoke(main, ["inspect", str(model), "--json"])
    assert result.exit_code == 0
    assert result.stderr == ""
