"""Outputs of rows that begin alike: what is found is what a run would give, and nothing of another row."""

import numpy as np
import pytest
from helpers.tiny_deployments import make_deployment

from adalink.export.base.export import export_base
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.reference import known_outputs
from adalink.tools.parity.reference.known_outputs import KnownOutputs, RowKey
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.noise_floor import Outputs
from adalink.tools.parity.reference.quantized_weights import read_matrices


def made(positions):
    values = np.arange(positions * 3, dtype=np.float32).reshape(positions, 3)
    return Outputs(
        {"logits": values, "last_hidden_state": values[:2]},
        {"logits": values[:, 0], "last_hidden_state": values[:2, 0]},
    )


def test_rows_that_begin_a_known_one():
    known = KnownOutputs()
    known.add(RowKey((1, 2), (7, 8, 9)), made(5))
    found = known.find(RowKey((1, 2), (7,)))
    np.testing.assert_array_equal(found.values["logits"], made(5).values["logits"][:3])
    np.testing.assert_array_equal(found.noise["logits"], made(5).noise["logits"][:3])
    assert len(found.values["last_hidden_state"]) == 2


@pytest.mark.parametrize(
    "other", [((1, 2), (8,)), ((1, 3), (7,)), ((1, 2, 7), (8,)), ((1, 2), (7, 8, 9, 1)), ((1,), (2, 7))]
)
def test_rows_that_are_others(other):
    known = KnownOutputs()
    known.add(RowKey((1, 2), (7, 8, 9)), made(5))
    assert known.find(RowKey(*other)) is None


def test_the_oldest_rows_are_forgotten():
    known = KnownOutputs()
    for token in range(12):
        known.add(RowKey((token,), ()), made(1))
    assert known.find(RowKey((0,), ())) is None
    assert known.find(RowKey((11,), ())) is not None
    known.clear()
    assert known.find(RowKey((11,), ())) is None


def test_memory_for_rows_has_a_limit(monkeypatch):
    monkeypatch.setattr(known_outputs, "_MOST_BYTES", 3 * (5 * 12 + 24))
    known = KnownOutputs()
    for token in range(4):
        known.add(RowKey((token,), ()), made(5))
    assert [known.find(RowKey((token,), ())) is not None for token in range(4)] == [False, True, True, True]
    known.add(RowKey((7,), ()), made(500))  # the latest is kept, however large
    assert known.find(RowKey((7,), ())) is not None
    assert known.find(RowKey((3,), ())) is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_logits_behind_a_prompt_begin_at_its_last_position(tmp_path, family):
    model, folder = make_deployment(tmp_path, family, {"alpha": {"seed": 1}})
    manifest = read_manifest(folder)
    reference, ids = Reference(model, manifest.base), [5, 6, 7, 8, 9]
    for path in (None, (folder / manifest.tasks["alpha"].config).parent):
        with reference.adapted(path):
            whole = reference.outputs(ids, None)
            kept = reference.outputs(ids, None, prompt_length=3)
            one = reference.outputs(ids, None, prompt_length=5)
        assert (len(whole.values["logits"]), len(kept.values["logits"]), len(one.values["logits"])) == (5, 3, 1)
        np.testing.assert_allclose(kept.values["logits"], whole.values["logits"][2:], rtol=0, atol=1e-4)
        np.testing.assert_allclose(one.values["logits"], whole.values["logits"][4:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "t5"])
def test_the_reference_gives_a_beginning_what_it_has_alone(tmp_path, family):
    """Gemma 3 has a sliding window; an adapter that is attached meanwhile counts."""
    model, folder = make_deployment(tmp_path, family, {"alpha": {"seed": 1}})
    manifest = read_manifest(folder)
    row = ([5, 6, 7, 8, 9], [0, 3, 4, 5]) if family == "t5" else ([5, 6, 7, 8, 9], None)
    short = (row[0], row[1][:2]) if row[1] else (row[0][:4], None)
    length = None if row[1] else 3
    reference, fresh = Reference(model, manifest.base), Reference(model, manifest.base)
    reference.outputs(*row, prompt_length=length)
    alone = fresh.outputs(*short, prompt_length=length)
    found = reference.outputs(*short, prompt_length=length)
    for name, values in alone.values.items():
        np.testing.assert_allclose(found.values[name], values, rtol=0, atol=1e-4)
    with reference.adapted((folder / manifest.tasks["alpha"].config).parent):
        adapted = reference.outputs(*short, prompt_length=length)
    assert np.abs(adapted.values["logits"] - alone.values["logits"]).max() > 1e-2


def test_other_weights_are_another_model(tmp_path):
    model, folder = make_deployment(tmp_path, "llama", {})
    export_base(model, folder, quantization="int4")
    manifest = read_manifest(folder)
    reference, row = Reference(model, manifest.base), ([5, 6, 7, 8, 9], None)
    unrounded = reference.outputs(*row, prompt_length=3).values["logits"]
    matrices = list(read_matrices(folder / manifest.variants["int4"].graph))
    reference.quantize(matrices, manifest.variants["int4"].quantization)
    quantized = reference.outputs(*row, prompt_length=3).values["logits"]
    with reference.original_weights():
        original = reference.outputs(*row, prompt_length=3).values["logits"]
    again = reference.outputs(*row, prompt_length=3).values["logits"]
    assert np.abs(quantized - unrounded).max() > 1e-3
    np.testing.assert_allclose(original, unrounded, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(again, quantized)
