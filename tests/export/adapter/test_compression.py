"""Compressed adapters against PyTorch's float64: the best map of each rank, its rounding, and its graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.runtime import Tiny, build, random_adapter, write_adapter
from msgspec.structs import replace
from safetensors.numpy import load_file

from adalink.export.adapter.compression import Compressed, compress_adapter, second_moment
from adalink.export.adapter.export import export_adapter
from adalink.runtime import Deployment
from adalink.runtime.errors import ConfigError, RequestError, UnknownTaskError
from adalink.runtime.storage.adapter import Adapter, make_adapter
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.training.adapter_io import load_adapter, to_adapter

IDENTITY = {"rank": 12, "activation": "identity", "bias": True, "scope": "all"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("llama", tmp_path_factory.mktemp("compression"), ("text", "image"))


@pytest.fixture(scope="module")
def moment(tiny: Tiny) -> np.ndarray:
    manifest = read_manifest(tiny.folder)
    return second_moment(open_table(tiny.folder / manifest.base.embeddings, manifest.base))


def make(tiny: Tiny, **settings: Any) -> Adapter:
    base = read_manifest(tiny.folder).base
    return random_adapter(base.fingerprint, base.hidden_size, 7, **{**IDENTITY, **settings})


def table(tiny: Tiny) -> torch.Tensor:
    """The vocabulary as PyTorch's module returns it."""
    with torch.no_grad():
        return tiny.model.get_input_embeddings()(torch.arange(tiny.model.config.vocab_size)).double()


def delta(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """What an adapter adds, by PyTorch's own layers in float64."""
    weights = {name: torch.tensor(weight).double() for name, weight in adapter.weights.items()}
    hidden = torch.nn.functional.linear(x, weights["text.down.weight"], weights.get("text.down.bias"))
    return torch.nn.functional.linear(hidden, weights["text.up.weight"], weights.get("text.up.bias"))


def test_all_dimensions_are_the_same_map(tiny: Tiny, moment: np.ndarray) -> None:
    adapter, x = make(tiny), table(tiny)
    ordered = compress_adapter(adapter, moment, weight_dtype="float32").adapter
    torch.testing.assert_close(delta(ordered, x), delta(adapter, x), rtol=0, atol=2e-6)
    assert ordered.config.nested
    assert ordered.digest != adapter.digest


@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_first_dimensions_are_the_best_map_of_their_rank(tiny: Tiny, is_weighted: bool) -> None:
    adapter, x = make(tiny, bias=False), table(tiny)
    counts = np.random.default_rng(1).integers(0, 50, len(x)) if is_weighted else np.ones(len(x), np.int64)
    manifest = read_manifest(tiny.folder)
    weigh = second_moment(
        open_table(tiny.folder / manifest.base.embeddings, manifest.base), counts if is_weighted else None
    )
    roots = torch.tensor(counts).double().sqrt()[:, None]
    # Of all maps of rank k the least error is the tail of the singular values (Eckart and Young), over all tokens.
    changes = roots * delta(adapter, x)
    singular = torch.linalg.svdvals(changes)
    compressed = compress_adapter(adapter, weigh, weight_dtype="float32")
    for k in (1, 3, 8, 12):
        narrow = compress_adapter(adapter, weigh, rank=k, weight_dtype="float32").adapter
        error = (changes - roots * delta(narrow, x)).square().sum()
        least = singular[k:].square().sum()
        assert error <= least + 1e-9 * singular.square().sum()
        share = float(1 - least / singular.square().sum())
        assert compressed.energy[k - 1] == pytest.approx(share, abs=1e-9)
        by_share = compress_adapter(adapter, weigh, energy=share - 1e-6, weight_dtype="float32").adapter
        assert by_share.config.rank == k
        first = make_adapter(
            replace(compressed.adapter.config, rank=k),
            {
                "text.down.weight": compressed.adapter.weights["text.down.weight"][:k],
                "text.up.weight": compressed.adapter.weights["text.up.weight"][:, :k],
            },
        )
        assert first.digest == narrow.digest  # nested: each rank is the beginning of the others


def test_a_plain_decomposition_would_be_worse(tiny: Tiny, moment: np.ndarray) -> None:
    """The weights matter here: the planted fault is a moment that is forgotten."""
    adapter, x = make(tiny, bias=False), table(tiny)
    errors = {}
    for name, weigh in (("weighted", moment), ("forgotten", np.eye(len(moment)))):
        narrow = compress_adapter(adapter, weigh, rank=4, weight_dtype="float32").adapter
        errors[name] = float((delta(adapter, x) - delta(narrow, x)).square().sum())
    assert errors["weighted"] < 0.999 * errors["forgotten"]


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize(("weight_dtype", "most"), [("int8", 127), ("int4", 7)])
def test_rounding_is_of_each_dimension(
    tiny: Tiny, moment: np.ndarray, weight_dtype: str, most: int, activation: str
) -> None:
    adapter = make(tiny, activation=activation)
    exact = compress_adapter(adapter, moment, weight_dtype="float32").adapter
    rounded = compress_adapter(adapter, moment, weight_dtype=weight_dtype).adapter
    for name, axis in (("text.down.weight", 1), ("text.up.weight", 0)):
        step = np.abs(exact.weights[name]).max(axis=axis, keepdims=True) / most
        assert (np.abs(rounded.weights[name] - exact.weights[name]) <= 0.502 * step).all()
        assert not np.array_equal(rounded.weights[name], exact.weights[name])
    np.testing.assert_array_equal(rounded.weights["text.up.bias"], exact.weights["text.up.bias"])


@pytest.mark.parametrize(
    ("settings", "how", "message"),
    [
        ({"activation": "gelu"}, {"rank": 4}, "activation 'gelu': its dimensions cannot be put in another order"),
        ({"rank": 0, "bias": False, "soft_tokens": 2}, {}, "the adapter has no bottleneck"),
        ({"input": "ids", "bias": False}, {}, "a table of token ids"),
    ],
)
def test_what_cannot_be_compressed_is_refused(
    tiny: Tiny, moment: np.ndarray, settings: dict[str, Any], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compress_adapter(make(tiny, **settings), moment, **how, weight_dtype="int8")


@pytest.fixture(scope="module")
def deployed(tiny: Tiny, moment: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compressed]:
    """Tasks ``int8`` and ``int4`` of rank 8, and ``pair`` of two modalities, in the deployment."""
    root = tmp_path_factory.mktemp("small")
    made = {
        "int8": compress_adapter(make(tiny), moment, rank=8, weight_dtype="int8"),
        "int4": compress_adapter(make(tiny), moment, rank=8, weight_dtype="int4"),
        "pair": compress_adapter(
            make(tiny, rank={"text": 6, "image": 3}, modalities=("text", "image")), moment, weight_dtype="int8"
        ),
    }
    for name, small in made.items():
        export_adapter(write_adapter(root / name, small.adapter), tiny.folder, name=name)
    return made


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_task_graph_holds_codes_and_computes_their_numbers(
    tiny: Tiny, deployed: dict[str, Compressed], name: str
) -> None:
    task = read_manifest(tiny.folder).tasks[name]
    graph = onnx.load(tiny.folder / task.graph)
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert types["text.down.weight.codes"] == types["text.up.weight.codes"] == onnx.TensorProto.INT8
    assert "text.down.weight" not in types
    # The reference reads the file itself, and not through the kit.
    tensors = load_file(tiny.folder / task.weights)
    matrices = {}
    for matrix in ("text.down.weight", "text.up.weight"):
        codes = tensors[f"{matrix}.codes"].astype(np.int64)
        if name == "int4":
            codes = np.stack((codes % 16 - 8, codes // 16 - 8), axis=-1).reshape(len(codes), -1)
        matrices[matrix] = codes * tensors[f"{matrix}.scales"].astype(np.float64)[:, None]
    x = table(tiny)[:50].numpy()
    expected = x + (x @ matrices["text.down.weight"].T + tensors["text.down.bias"]) @ matrices["text.up.weight"]
    expected = expected + tensors["text.up.bias"]
    session = onnxruntime.InferenceSession(str(tiny.folder / task.graph))
    (received,) = session.run(None, {"inputs_embeds": x[None].astype(np.float32)})
    np.testing.assert_allclose(received[0], expected, atol=2e-6)
    halved = np.abs(expected - (x + (x @ matrices["text.down.weight"][:4].T) @ matrices["text.up.weight"][:4]))
    assert halved.max() > 1e-3  # half of the dimensions would be seen


def test_the_first_dimensions_of_a_task_are_tasks(tiny: Tiny, deployed: dict[str, Compressed]) -> None:
    ids = [[5, 9, 11, 40, 7]]
    with Deployment.open(tiny.folder, threads=1) as deployment:
        names: list[str | None] = ["int8", "int8@3", None, "int8@8", "pair@5"]
        received = deployment.run(input_ids=ids * 5, tasks=names)["logits"]
        for row, name in enumerate(names):
            adapter = None if name is None else deployed[name.partition("@")[0]].adapter
            width = {"int8@3": 3, "pair@5": 5}.get(name or "", 8)
            x = torch.nn.functional.embedding(torch.tensor(ids), table(tiny))
            if adapter is not None:
                weights = {key: torch.tensor(value).double() for key, value in adapter.weights.items()}
                hidden = x @ weights["text.down.weight"][:width].T + weights["text.down.bias"][:width]
                x = x + hidden @ weights["text.up.weight"][:, :width].T + weights["text.up.bias"]
            with torch.no_grad():
                expected = tiny.model(inputs_embeds=x.float()).logits[0].numpy()
            np.testing.assert_allclose(received[row], expected, atol=2e-4)
        assert np.abs(received[0] - received[1]).max() > 1e-2
        np.testing.assert_array_equal(received[0], received[3])
        for name, message in (
            ("int8@9", "has rank 8, expected 1 to 8"),
            ("alpha@2", "'alpha' is not nested"),
        ):
            with pytest.raises(RequestError, match=message):
                deployment.run(input_ids=ids, tasks=name)
        for name in ("int8@0", "int8@08", "int8@", "int8@x", "nothing@2", "@2", "int8@2@2"):
            with pytest.raises(UnknownTaskError):
                deployment.run(input_ids=ids, tasks=name)
        assert "int8@3" not in deployment.tasks
        deployment.remove_task("int8")
        with pytest.raises(UnknownTaskError):
            deployment.run(input_ids=ids, tasks="int8@3")


def test_another_adapter_of_the_name_replaces_its_first_dimensions_too(
    tiny: Tiny, moment: np.ndarray, tmp_path: Path
) -> None:
    ids = [[5, 9, 11, 40, 7]]
    folders = [
        write_adapter(
            tmp_path / str(seed),
            compress_adapter(
                random_adapter(read_manifest(tiny.folder).base.fingerprint, 48, seed, **IDENTITY),
                moment,
                weight_dtype="int8",
            ).adapter,
        )
        for seed in (1, 2)
    ]
    with Deployment.open(tiny.folder, threads=1) as deployment:
        rows = []
        for folder in folders:
            deployment.add_task(folder, "one", replace=True)
            rows.append(deployment.run(input_ids=ids, tasks="one@2")["logits"])
        assert np.abs(rows[0] - rows[1]).max() > 1e-2


def test_pytorch_takes_the_numbers_and_forgets_the_order(tiny: Tiny, deployed: dict[str, Compressed]) -> None:
    folder = (tiny.folder / read_manifest(tiny.folder).tasks["int8"].config).parent
    with load_adapter(folder, tiny.model) as attached:
        assert not attached.config.nested
        trained = to_adapter(attached, "tiny")
    np.testing.assert_array_equal(
        trained.weights["text.down.weight"], deployed["int8"].adapter.weights["text.down.weight"]
    )
    assert trained.config.weight_dtype == "float32"
