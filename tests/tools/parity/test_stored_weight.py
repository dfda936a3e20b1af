"""Matrices that stay in their files compute what they compute in memory; PyTorch itself is the reference."""

import copy

import pytest
import torch
from helpers.tiny_models import FAMILIES

from adalink.tools.parity.reference import stored_weight
from adalink.tools.parity.reference.stored_model import load_stored
from adalink.tools.parity.reference.stored_weight import StoredWeight, TensorSource, in_float64
from adalink.training.models.loading import load_base


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(stored_weight, "PIECE_BYTES", 1000)


def outputs(model):
    row = {"input_ids": torch.tensor([[5, 7, 9, 11, 7]])}
    if model.config.is_encoder_decoder:
        row["decoder_input_ids"] = torch.tensor([[1, 3, 4]])
    with torch.no_grad():
        result = model(**row)
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_its_files_is_the_model(tmp_path, family):
    FAMILIES[family]().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40kB")
    whole, model = load_base(tmp_path), load_stored(tmp_path)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    assert matrices
    assert all(isinstance(parameter, StoredWeight) for parameter in matrices)
    names = [[name for name, _ in each.named_parameters()] for each in (model, whole)]
    assert names[0] == names[1]  # what is tied stays tied
    for (name, buffer), (_, expected) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert buffer.dtype == expected.dtype, name  # float32: rounded frequencies are those of another model
        assert torch.equal(buffer, expected), name
    torch.testing.assert_close(outputs(model), outputs(whole), rtol=1e-5, atol=1e-5)
    exact = outputs(in_float64(model))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, outputs(copy.deepcopy(whole).double()), rtol=1e-12, atol=1e-12)


def test_a_byte_that_changes_in_the_file_changes_the_outputs(tmp_path):
    """So the values are the file's, and no copy of them."""
    FAMILIES["llama"]().save_pretrained(tmp_path)
    model = load_stored(tmp_path)
    before = outputs(model)
    tensor = model.model.layers[0].mlp.up_proj.weight.source
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + 3)
        file.write(b"\x42")
    assert (outputs(model) - before).abs().max() > 1


def test_what_reads_past_the_files_gives_no_number():
    weight = StoredWeight(TensorSource(torch.ones(3, 4)), torch.float32)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.Tensor.sum(weight).isnan()


VALUES = torch.arange(24, dtype=torch.float32).reshape(6, 4)


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight[2],
        lambda weight: weight[-1],
        lambda weight: weight[1:5:2],
        lambda weight: weight.T,
        lambda weight: weight.data + 1,
        lambda weight: weight.norm(dim=1),
        lambda weight: torch.addmm(torch.ones(4), torch.ones(2, 6), weight),
        lambda weight: torch.nn.functional.linear(torch.ones(2, 3, 4), weight, torch.arange(6.0)),
        lambda weight: torch.nn.functional.embedding(torch.tensor([[5, 0], [5, 2]]), weight, padding_idx=0),
        lambda weight: torch.tensor(weight.shape),
        lambda weight: torch.stack([piece.sum() for _, piece in stored_weight.pieces_of(weight)]),
        lambda weight: weight.detach().requires_grad_(False).double(),
    ],
)
def test_each_use_of_a_weight_is_that_of_a_tensor(use):
    received = use(StoredWeight(TensorSource(VALUES.to(torch.float16)), torch.float32))
    assert type(received) is torch.Tensor
    torch.testing.assert_close(received, use(VALUES), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_float32_rounds_is_read(tmp_path, dtype):
    FAMILIES["llama"]().to(dtype).save_pretrained(tmp_path)
    model, whole = load_stored(tmp_path), load_base(tmp_path)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert isinstance(weight, StoredWeight) == (dtype == torch.float32)
    assert torch.equal(weight[:], whole.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.zero_(),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: weight.__iadd__(1.0),
        torch.nn.init.ones_,
    ],
)
def test_a_change_that_would_be_lost_is_refused(change):
    with pytest.raises(RuntimeError, match="would change a weight that lies in a file"):
        change(StoredWeight(TensorSource(VALUES), torch.float32))
