"""What the host decides for a device: profiles, pieces of prompts, rounded totals, and places of tasks."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from helpers.host_device import HostDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from adalink.runtime.device.adapter_weights import AdapterWeightPools, DeviceSharedAdapterGraph
from adalink.runtime.device.decode_state import piece_length
from adalink.runtime.device.kv_cache import DynamicDeviceCache, StaticDeviceCache
from adalink.runtime.device.protocols import DeviceArena, as_numbers
from adalink.runtime.device.slots import SlotTable
from adalink.runtime.errors import BackendError, ConfigError, RequestError
from adalink.runtime.profile import Profile, ShapeRange, default_profile, parse_profile, pieces, rounded_total
from adalink.runtime.request import check_embeds
from adalink.runtime.storage.manifest import Base, Cache
from adalink.runtime.storage.safetensors import as_stored
from adalink.runtime.tasks.adapter_mapping import AdapterGroup, AdapterMapping


def base(**changes: object) -> Base:
    fields = {
        "name": "tiny",
        "architecture": "llama",
        "kind": "decoder",
        "fingerprint": "sha256:" + "0" * 64,
        "vocab_size": 96,
        "hidden_size": 8,
        "embedding_dtype": "float32",
        "modalities": ("text",),
        "max_positions": 2048,
        "cache": Cache(layers=2, kv_heads=2, head_dim=4),
        "eos_token_ids": (),
        "pad_token_id": 0,
        "embeddings": "base/embeddings.safetensors",
        "tokenizer": None,
        "bank": {},
    }
    return Base(**(fields | changes))


@given(st.integers(1, 5000), st.integers(1, 600))
def test_pieces_cover_a_prompt_once_and_in_order(length: int, largest: int) -> None:
    found = pieces(length, largest)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == length
    assert all(1 <= stop - start <= largest for start, stop in found)
    assert len(found) == -(-length // largest)


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_rounded_totals(total: int, capacity: int) -> None:
    total = min(total, capacity)
    rounded = rounded_total(total, capacity)
    assert total <= rounded <= capacity
    assert rounded - total < max(64, total / 8 + 1)
    # All totals between are rounded to the same: one record serves them.
    assert rounded_total(rounded, capacity) == rounded


def test_few_records_serve_all_lengths() -> None:
    assert len({rounded_total(total, 4096) for total in range(1, 4097)}) <= 36


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 600))
def test_a_pass_fits_its_buffers(batch: int, most: int, seq: int) -> None:
    profile = Profile(batch=ShapeRange(1, 1, most), seq=ShapeRange(1, 1, seq), past=ShapeRange(0, 1, 2000))
    batch = min(batch, most)
    length = piece_length(profile, batch)
    assert 1 <= length <= seq
    assert batch * length <= profile.logits_capacity


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch=1:2", "not one of"),
        ("rows=1:2:3", "not one of"),
        ("batch=1:2:3,batch=1:2:3", "not one of"),
        ("batch=3:2:1", "rising order"),
        ("batch=0:2:4", "rising order from 1"),
        ("seq=1:128:4096", "rising order from 1 to 2048"),
        ("past=0:1:2048", "from 0 to 2047"),
        ("batch=2:2:4", "begin it at 1"),
        ("seq=4:8:16", "begin it at 1"),
        ("past=2:8:16", "begin it at 1"),
        ("seq=1:8:512,past=0:8:100", "let past end at 511"),
        ("", "not one of"),
    ],
)
def test_wrong_profiles_say_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_profile(text, base())


def test_profiles_are_read_as_they_are_written() -> None:
    profile = parse_profile("batch=1:4:8,seq=1:128:512,past=0:512:1023", base())
    assert (profile.capacity, profile.logits_capacity) == (1024, 512)
    assert parse_profile(str(profile), base()) == profile
    assert parse_profile("batch=1:4:6", base()).seq == default_profile(base()).seq
    encoder = base(kind="encoder", cache=None)
    assert parse_profile("batch=2:4:6,seq=8:8:8", encoder).capacity == 8
    with pytest.raises(ConfigError, match="encoder and has no cache"):
        parse_profile("past=0:1:2", encoder)
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile


@given(st.lists(st.tuples(st.sampled_from(["take", "release"]), st.integers(0, 9)), max_size=200), st.integers(2, 6))
def test_places_belong_to_one_task_at_a_time(steps: list[tuple[str, int]], size: int) -> None:
    """Against a plain model: contents written when told to, users counted."""
    table: SlotTable[int] = SlotTable(size)
    contents: dict[int, int] = {}
    users: dict[int, list[int]] = {}
    order: list[int] = []
    for action, key in steps:
        if action == "take":
            taken = table.take(key)
            if taken is None:
                assert len(users) == size - 1
                assert key not in users
                continue
            slot, is_new = taken
            assert 1 <= slot < size
            if is_new:
                victim = contents.get(slot)
                assert victim not in users, "a place in use was given away"
                if victim is not None:
                    assert len(contents) == size - 1, "a place was taken from one while others were free"
                    idle = [old for old in order if old not in users]
                    assert victim == idle[0], "not the one unused for the longest time"
                    order.remove(victim)
                contents[slot] = key
            assert contents[slot] == key
            users.setdefault(key, []).append(slot)
            order[:] = [old for old in order if old != key] + [key]
        elif key in users:
            table.release(key)
            users[key].pop()
            if not users[key]:
                del users[key]


def weights(seed: int, rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"down": rng.normal(size=(1, rank, 8)).astype("f4"), "up": rng.normal(size=(1, 8, rank)).astype("f4")}


def part(seed: int, rank: int = 3, kind: str = "gelu", rows: list[int] | None = None) -> AdapterGroup:
    return AdapterGroup(
        None if rows is None else np.array(rows),
        0,
        "all",
        f"d{seed}",
        DeviceSharedAdapterGraph(kind),
        weights(seed, rank),
    )


def stored(bank: AdapterWeightPools, layer: object, row: int) -> dict[str, np.ndarray]:
    """What an embedder would read for a row."""
    import ctypes

    found = {}
    for name, shape in layer.pool.shapes.items():
        size = 4 * int(np.prod(shape[1:]))
        slot = int(layer.task_index[row])
        raw = ctypes.string_at(layer.pool.addresses[name] + slot * size, size)
        found[name] = np.frombuffer(raw, np.float32).reshape(shape[1:])
    return found


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), max_size=30))
def test_every_row_finds_its_own_weights(batches: list[list[int]]) -> None:
    """More tasks than places, ranks that grow, batches that overlap in time."""
    bank = AdapterWeightPools(HostDevice(), 8, 64, 8)
    held = []
    for seeds in batches:
        parts = [part(seed, 1 + 7 * (seed % 5), rows=[row]) for row, seed in enumerate(seeds) if seed]
        if len({seed for own in (seeds, *(own for _, own in held)) for seed in own if seed}) > 7:
            for reservation, _ in held:
                reservation.release()
            held.clear()
        reservation = bank.reserve(AdapterMapping(parts), len(seeds))
        held.append((reservation, seeds))
        if len(held) > 2:
            held.pop(0)[0].release()
        for own, own_seeds in held:
            for row, seed in enumerate(own_seeds):
                for layer in own.adapter_passes:
                    assert (layer.task_index[row] == 0) == (seed == 0)
                    if seed:
                        rank = 1 + 7 * (seed % 5)
                        kept = stored(bank, layer, row)
                        expected = weights(seed, rank)
                        assert (kept["down"][:rank] == expected["down"][0]).all()
                        assert (kept["up"][:, :rank] == expected["up"][0]).all()
                        assert not kept["down"][rank:].any()
                        assert not kept["up"][:, rank:].any()


def test_a_rank_beyond_the_fronts_is_refused() -> None:
    bank = AdapterWeightPools(HostDevice(), 8, 16, 8)
    with pytest.raises(BackendError, match="rank 17, this engine's embedders take at most 16"):
        bank.reserve(AdapterMapping([part(1, 17)]), 1)


def test_a_full_device_makes_room_instead_of_growing() -> None:
    device = HostDevice()
    bank = AdapterWeightPools(device, 8, 64, 1024)
    for seed in range(15):
        bank.reserve(AdapterMapping([part(seed)]), 1).release()
    device.limit_bytes = device.allocated_bytes
    for seed in range(15, 40):
        reservation = bank.reserve(AdapterMapping([part(seed)]), 1)
        assert (stored(bank, reservation.adapter_passes[0], 0)["down"][:3] == weights(seed, 3)["down"][0]).all()
        reservation.release()


def test_when_all_places_are_in_use_the_error_says_so() -> None:
    bank = AdapterWeightPools(HostDevice(), 8, 64, 4)
    held = bank.reserve(AdapterMapping([part(seed, rows=[seed]) for seed in range(3)]), 3)
    with pytest.raises(BackendError, match="all 3 device slots of this activation"):
        bank.reserve(AdapterMapping([part(9)]), 1)
    held.release()
    bank.reserve(AdapterMapping([part(9)]), 1)


def test_bfloat16_is_its_bits_on_the_host() -> None:
    import torch

    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = values.view(torch.uint16).numpy()
    assert (as_numbers(bits, "bfloat16") == values.float().numpy()).all()
    assert (as_stored(values.float().numpy(), "bfloat16") == bits).all()
    own = base(embedding_dtype="bfloat16", hidden_size=5)
    assert check_embeds(bits[None], own) is not None
    with pytest.raises(RequestError, match="pass its bits as uint16"):
        check_embeds(values.float().numpy()[None], own)
    with pytest.raises(RequestError, match="NaN or infinity"):
        check_embeds(torch.full((1, 2, 5), torch.inf).bfloat16().view(torch.uint16).numpy(), own)


@pytest.mark.parametrize("kind", [StaticDeviceCache, DynamicDeviceCache])
def test_moving_a_row_moves_what_it_cached(kind: type) -> None:
    """Rows written and read back through what was bound, against arrays."""
    import ctypes

    cache_shape, batch, capacity = Cache(layers=2, kv_heads=2, head_dim=4), 3, 6
    device = HostDevice()
    arena = DeviceArena(device)
    cache = kind(arena, cache_shape, "float32", batch, capacity)
    rng = np.random.default_rng(0)
    known = rng.normal(size=(4, batch, 2, capacity, 4)).astype("f4")

    class Bound:
        def __init__(self) -> None:
            self.at: dict[str, tuple[int, tuple[int, ...]]] = {}

        def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
            self.at[name] = (address, shape)

    bound = Bound()
    cache.bind(bound, batch, 5)
    names = [name for name in bound.at if name.startswith("present")]
    for index, name in enumerate(names):
        address, shape = bound.at[name]
        rows = np.ascontiguousarray(known[index][:, :, : shape[2]])
        assert rows.shape == shape
        ctypes.memmove(address, rows.ctypes.data, rows.nbytes)
    cache.advance(5)
    cache.move(arena.queue, 2, 0)
    cache.bind(bound, 2, 1)
    assert cache.length == 5
    for index, name in enumerate(name.replace("present", "past_key_values") for name in names):
        address, shape = bound.at[name]
        raw = np.frombuffer(ctypes.string_at(address, 4 * int(np.prod(shape))), np.float32).reshape(shape)
        assert (raw[0][:, :5] == known[index][2][:, :5]).all()
        assert (raw[1][:, :5] == known[index][1][:, :5]).all()
    arena.close()
    assert device.allocated_bytes == 0
