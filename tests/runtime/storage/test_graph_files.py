"""A graph names no file that was not verified with it, however the name is written into it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from helpers.runtime import reseal
from onnx import TensorProto, helper
from onnx.external_data_helper import uses_external_data

from adalink.runtime import Deployment
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.graph_files import check_graph_files
from adalink.runtime.storage.manifest_io import read_manifest

GRAPH = "base/x/model.onnx"
OUTSIDE = "../../../etc/passwd"


def external(location: str, name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*, initializers: Any = (), nodes: Any = (), functions: Any = (), sparse: Any = ()) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", [], [], initializer=list(initializers), sparse_initializer=list(sparse))
    return helper.make_model(graph, functions=list(functions))


def in_branch(tensor: TensorProto) -> onnx.NodeProto:
    """A tensor in the branch of a branch."""
    inner = helper.make_graph([], "inner", [], [], initializer=[tensor])
    node = helper.make_node("If", ["c"], [], then_branch=inner)
    return helper.make_node("If", ["c"], [], else_branch=helper.make_graph([node], "outer", [], []))


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[2])


PLACES: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "initializer": lambda tensor: model(initializers=[tensor]),
    "second initializer": lambda tensor: model(initializers=[external("model.onnx.data"), tensor]),
    "constant": lambda tensor: model(nodes=[helper.make_node("Constant", [], ["y"], value=tensor)]),
    "list of tensors": lambda tensor: model(nodes=[helper.make_node("Any", [], ["y"], values=[tensor])]),
    "branch": lambda tensor: model(nodes=[in_branch(tensor)]),
    "function": lambda tensor: model(
        functions=[helper.make_function("d", "f", [], [], [helper.make_node("Constant", [], ["y"], value=tensor)], [])]
    ),
    "sparse values": lambda tensor: model(sparse=[sparse(tensor, external("model.onnx.data"))]),
    "sparse indices": lambda tensor: model(sparse=[sparse(external("model.onnx.data"), tensor)]),
    "sparse attribute": lambda tensor: model(
        nodes=[helper.make_node("Constant", [], ["y"], sparse_value=sparse(tensor, tensor))]
    ),
}
LOCATIONS = (
    OUTSIDE,
    "/etc/passwd",
    "other.data",
    "../y/model.onnx.data",
    "./model.onnx.data",
    "sub/../model.onnx.data",
    "..\\secret",
    "*/_ORT_MEM_ADDR_/*",
    "",
    "model.onnx",
)


@pytest.mark.parametrize("place", PLACES)
def test_reference_is_found_wherever_it_lies(place: str) -> None:
    whole = PLACES[place](external("model.onnx.data")).SerializeToString()
    assert check_graph_files(GRAPH, whole, [f"{GRAPH}.data"]) == (f"{GRAPH}.data",)
    with pytest.raises(GraphError, match=r"base/x/model\.onnx refers to .*etc/passwd"):
        check_graph_files(GRAPH, PLACES[place](external(OUTSIDE)).SerializeToString(), [f"{GRAPH}.data"])


@pytest.mark.parametrize("location", LOCATIONS)
def test_only_files_that_were_verified_are_accepted(location: str) -> None:
    with pytest.raises(GraphError, match="expected only files that the manifest lists with it"):
        check_graph_files(GRAPH, model(initializers=[external(location)]).SerializeToString(), [f"{GRAPH}.data"])


def varint(value: int, extra: int = 0) -> bytes:
    """A number, with so many bytes more than it needs."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    if not extra:
        return bytes([*data, value])
    return bytes([*data, value | 0x80, *[0x80] * (extra - 1), 0])


def field(number: int, data: bytes, extra: int = 0) -> bytes:
    return varint(number << 3 | 2, extra) + varint(len(data), extra) + data


KEY, VALUE = field(1, b"location"), field(2, OUTSIDE.encode())
UNKNOWN = field(9, b"x") + varint(8 << 3) + b"\x01"
ENTRIES = {
    "value first": VALUE + KEY,
    "long numbers": field(1, b"location", 3) + field(2, OUTSIDE.encode(), 2),
    "unknown fields between": KEY + UNKNOWN + VALUE,
    "last value counts": field(1, b"offset") + KEY + field(2, b"model.onnx.data") + VALUE,
    "not UTF-8": KEY + field(2, b"\xff/../" + OUTSIDE.encode()),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_unusual_encodings_hide_nothing(entry: bytes) -> None:
    tensor = TensorProto(name="w", data_type=1, dims=[2], data_location=1).SerializeToString() + field(13, entry)
    whole = model().SerializeToString() + field(7, field(5, tensor))
    if b"\xff" not in entry:  # protobuf's own reader agrees that this is what the bytes say
        (read,) = onnx.ModelProto.FromString(whole).graph.initializer
        assert [(item.key, item.value) for item in read.external_data] == [("location", OUTSIDE)]
    with pytest.raises(GraphError, match="etc/passwd"):
        check_graph_files(GRAPH, whole, [f"{GRAPH}.data"])


def test_engine_in_a_graph_is_refused() -> None:
    node = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context="../../engine.plan")
    with pytest.raises(GraphError, match="holds a compiled engine"):
        check_graph_files(GRAPH, model(nodes=[node]).SerializeToString(), ())


@pytest.mark.parametrize("data", [b"\x3a\xff", b"\x3a\x05ab", b"\x0b\x0c", b"\xff" * 20, b"\x0d\x00", b"not a graph"])
def test_what_is_no_graph_is_an_error(data: bytes) -> None:
    with pytest.raises(GraphError, match="is not an ONNX graph"):
        check_graph_files(GRAPH, data, ())


def test_nesting_has_a_limit() -> None:
    data = b""
    for _ in range(200):
        data = field(1, field(5, field(6, data)))
    with pytest.raises(GraphError, match="nested too deeply"):
        check_graph_files(GRAPH, field(7, data), ())


def test_references_are_those_that_onnx_finds(llama: Any) -> None:
    """An independent reader: the onnx package."""
    manifest = read_manifest(llama.folder)
    graphs = [path for path in manifest.files if path.endswith(".onnx")]
    found = 0
    for path in graphs:
        loaded = onnx.load(llama.folder / path, load_external_data=False)
        tensors = [tensor for tensor in loaded.graph.initializer if uses_external_data(tensor)]
        expected = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
        folder = path.rpartition("/")[0]
        paths = check_graph_files(path, (llama.folder / path).read_bytes(), manifest.files.keys())
        assert set(paths) == {f"{folder}/{location}" for location in expected}
        found += len(paths)
    assert found > 0


def redirect(folder: Path, location: str) -> None:
    """Let the base's graph read its weights elsewhere, in a deployment whose seals are right."""
    path = folder / next(iter(read_manifest(folder).variants.values())).graph
    loaded = onnx.load(path, load_external_data=False)
    for tensor in loaded.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(loaded.SerializeToString())
    reseal(folder)


@pytest.mark.parametrize("full_check", [False, True])
def test_sealed_graph_that_reads_other_files_is_not_opened(llama: Any, tmp_path: Path, *, full_check: bool) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "copy"))
    weights = next(path for path in folder.rglob("model.onnx.data"))
    shutil.copy(weights, weights.with_name("unlisted.data"))
    redirect(folder, "unlisted.data")
    with pytest.raises(GraphError, match=r"refers to 'base/.*/unlisted\.data'"):
        Deployment.open(folder, full_check=full_check)


def test_graph_that_was_seen_before_is_held_to_the_manifest_of_today(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of checks says what a graph refers to, not whether that was right."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(llama.folder, tmp_path / "copy"))
    time.sleep(2.1)  # no one can set the change time of a file back
    Deployment.open(folder).close()
    manifest = read_manifest(folder)
    name, variant = next(iter(manifest.variants.items()))
    fewer = msgspec.structs.replace(variant, files=(variant.graph,))
    elsewhere = msgspec.structs.replace(manifest.base, embeddings=manifest.base.tokenizer, table=None)
    reseal(folder, variants={name: fewer}, base=elsewhere)  # the data are listed no more, as the table neither
    with pytest.raises(GraphError, match=r"refers to .*model\.onnx\.data"):
        Deployment.open(folder)


def test_shared_adapter_graph_refers_to_no_file(llama: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "copy"))
    for path in read_manifest(folder).base.bank.values():
        loaded = onnx.load(folder / path)
        loaded.graph.initializer.append(external(OUTSIDE, "unused"))
        (folder / path).write_bytes(loaded.SerializeToString())
    reseal(folder)
    with Deployment.open(folder) as opened, pytest.raises(GraphError, match="etc/passwd"):
        opened.run(input_ids=[[5, 6]], tasks="alpha")
