"""An engine whose memory stays on the device, with the front that gives it its embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.device.bank import DeviceBank
from adalink.runtime.device.decoding import DeviceDecoding, piece_length, prompt_pieces
from adalink.runtime.device.forward import EngineSpace, Pass
from adalink.runtime.device.inputs import Inputs
from adalink.runtime.device.pool import Pool
from adalink.runtime.device.protocols import NUMPY, Device, Lease, as_numbers
from adalink.runtime.device.workspace import PREFILL, Common, Executors, FrontSpace, Plans
from adalink.runtime.engine import Fed, Front
from adalink.runtime.generation.padding import positions_of
from adalink.runtime.profile import Profile, pieces
from adalink.runtime.storage.manifest import Base
from adalink.runtime.tasks.adapter_mapping import PLAIN, Selection
from adalink.runtime.tasks.host_embedder import HostFront


class DeviceFront:
    """See ``adalink.runtime.engine.Front``; what it gives is a recipe that the engine carries out."""

    def __init__(self, common: Common, table: Array) -> None:
        self._common = common
        self._table = table
        self._spaces: Pool[_ReadSpace] = Pool(lambda: _ReadSpace(common))

    def lookup(self, ids: Array, tasks: Selection, modality: Array | None = None) -> Inputs:
        """See ``adalink.runtime.engine.Front``; what tasks have for token ids is added in main memory."""
        if tasks.needs_ids:
            return Inputs(None, tasks.embed(self._table, ids, modality), modality, tasks)
        return Inputs(ids, None, modality, tasks)

    def apply(self, embeds: Array, tasks: Selection, modality: Array | None = None) -> Inputs:
        """See ``adalink.runtime.engine.Front``."""
        return Inputs(None, embeds, modality, tasks)

    def decoding(self, tasks: Selection) -> Selection:
        """See ``adalink.runtime.engine.Front``; nothing is stacked, since a row picks its task by index."""
        return tasks.generated()

    def read(self, fed: Inputs) -> Array:
        """See ``adalink.runtime.engine.Front``; bfloat16 is given as its bits, uint16."""
        profile, base = self._common.plans.profile, self._common.base
        batch, seq = fed.shape
        result = np.zeros((batch, seq, base.hidden_size), NUMPY[base.embedding_dtype])
        with self._spaces.lend() as space:
            for first in range(0, batch, profile.batch.largest):
                rows = fed.rows(first, min(first + profile.batch.largest, batch))
                for start, stop in pieces(seq, profile.seq.largest):
                    result[first : first + rows.shape[0], start:stop] = space.read(rows.columns(start, stop))
        return result

    def close(self, at_end: Callable[[], None]) -> None:
        """Give its memory back, then call ``at_end``."""
        self._spaces.close(at_end)


class HostFedFront:
    """See ``adalink.runtime.engine.Front``: tasks are applied in main memory, for want of fronts."""

    def __init__(self, table: Array) -> None:
        self._host = HostFront(table)

    def lookup(self, ids: Array, tasks: Selection, modality: Array | None = None) -> Inputs:
        """See ``adalink.runtime.engine.Front``."""
        return Inputs(None, self._host.lookup(ids, tasks, modality), None, PLAIN)

    def apply(self, embeds: Array, tasks: Selection, modality: Array | None = None) -> Inputs:
        """See ``adalink.runtime.engine.Front``."""
        return Inputs(None, self._host.apply(embeds, tasks, modality), None, PLAIN)

    def decoding(self, tasks: Selection) -> Selection:
        """See ``adalink.runtime.engine.Front``."""
        return self._host.decoding(tasks)

    def read(self, fed: Inputs) -> Array:
        """See ``adalink.runtime.engine.Front``."""
        assert fed.embeds is not None
        return fed.embeds


class _ReadSpace:
    def __init__(self, common: Common) -> None:
        self._common = common
        self._lease = Lease(common.device)
        self._executors = Executors(common.plans, self._lease, PREFILL)
        try:
            self._front = FrontSpace(common, self._lease)
        except BaseException:
            self.close()
            raise

    def read(self, inputs: Inputs) -> Array:
        batch, seq = inputs.shape
        choice = self._common.bank.choose(inputs.tasks, batch)
        try:
            self._front.write(inputs, choice)
            address = self._front.enqueue(self._executors, inputs, choice)
            return self._front.read(address, batch, seq, self._common.base.hidden_size)
        finally:
            choice.release()

    def close(self) -> None:
        self._executors.close()
        self._lease.close()


class DeviceEngine:
    """See ``adalink.runtime.engine.Engine``."""

    def __init__(
        self, device: Device, plans: Plans, base: Base, table: Array | None = None, front: Front | None = None
    ) -> None:
        """Copy the embedding table to the device, unless a front is given that applies tasks before."""
        self._device = device
        self.profile: Profile | None = plans.profile
        self._plans = plans
        self._base = base
        bank = DeviceBank(device, base.hidden_size, plans.largest_rank, plans.largest_slots)
        self._common = Common(device, plans, bank, 0 if table is None else upload_table(device, table), base)
        if front is None:
            assert table is not None, "a front of its own looks token ids up"
            front = DeviceFront(self._common, table)
        self.front: Front = front
        self._spaces: Pool[EngineSpace] = Pool(lambda: EngineSpace(self._common))
        # What is wrong with the plan is found when it is opened, not at the first request.
        self._spaces.give(self._spaces.take())

    def run(self, feeds: Mapping[str, Fed]) -> Array:
        """See ``adalink.runtime.engine.Engine``."""
        inputs, mask = feeds["inputs_embeds"], feeds["attention_mask"]
        batch, seq = mask.shape
        profile = self._plans.profile
        profile.check_length(seq)
        width = self._base.hidden_size if self._base.cache is None else self._base.vocab_size
        result: Array | None = None
        with self._spaces.lend() as space:
            at_once = profile.batch.largest
            if self._base.bidirectional_prompt:  # fewer rows, so that each goes in whole
                at_once = max(1, min(at_once, profile.places // seq))
            for first in range(0, batch, at_once):
                last = min(first + at_once, batch)
                profile.check_batch(last - first)
                for columns, output in self._passes(space, inputs.rows(first, last), mask[first:last]):
                    numbers = as_numbers(output, self._base.embedding_dtype)
                    if result is None:
                        result = np.zeros((batch, seq, width), numbers.dtype)
                    result[first:last, columns] = numbers.reshape(last - first, -1, width)
        assert result is not None
        return result

    def start(self, feeds: Mapping[str, Fed], room: int) -> DeviceDecoding:
        """See ``adalink.runtime.engine.Engine``."""
        inputs, mask = feeds["inputs_embeds"], feeds["attention_mask"]
        profile = self._plans.profile
        profile.check_batch(len(mask))
        profile.check_length(mask.shape[1] + room)
        space = self._spaces.take()
        decoding = DeviceDecoding(space, self._common.bank, self._base, profile, lambda: self._spaces.give(space))
        try:
            decoding.read(inputs, mask)
        except BaseException:
            decoding.close()
            raise
        return decoding

    def close(self) -> None:
        """See ``adalink.runtime.engine.Engine``; what a call that runs still reads goes when it has ended."""
        self._spaces.close(self._close_front)

    def _close_front(self) -> None:
        if isinstance(self.front, DeviceFront):
            self.front.close(self._close_common)
        else:
            self._close_common()

    def _close_common(self) -> None:
        self._common.bank.close()
        self._device.free(self._common.table)
        self._plans.close()

    def _passes(self, space: EngineSpace, inputs: Inputs, mask: Array) -> Iterator[tuple[slice, Array]]:
        """Whole rows, in as many passes as they take: which columns, and what the engine gives for them."""
        batch, seq = mask.shape
        positions = positions_of(mask)
        is_decoder = space.cache is not None
        if space.cache is not None:
            space.cache.length = 0
        choice = self._common.bank.choose(inputs.tasks, batch)
        try:
            most = piece_length(self._plans.profile, batch)
            for start, stop in prompt_pieces(seq, most, self._base) if is_decoder else [(0, seq)]:
                places = np.arange(batch * (stop - start) if is_decoder else 0)
                piece = inputs.columns(start, stop)
                yield (
                    slice(start, stop),
                    space.prompt(Pass(piece, choice, mask[:, :stop], positions[:, start:stop], places)),
                )
        finally:
            choice.release()


def upload_table(device: Device, table: Array) -> int:
    """Copy the embedding table to the device through a window of pinned memory; its address."""
    rows = max(1, (8 << 20) // table[0].nbytes)
    window = device.pinned((min(rows, len(table)), table.shape[1]), table.dtype)
    address, queue = device.allocate(table.nbytes), device.open_queue()
    try:
        for first in range(0, len(table), len(window)):
            part = table[first : first + len(window)]
            window[: len(part)] = part
            queue.upload(address + first * table[0].nbytes, window[: len(part)])
            queue.wait()
    finally:
        queue.close()
    return address
