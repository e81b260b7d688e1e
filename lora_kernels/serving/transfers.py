"""Copies between the host's adapters and the slots: on a GPU on a stream of their own, ordered by
events with the batches that read them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .slots import Resident
from .slotted_model import SlottedModel


class Transfers:
    """Called under the store's lock.

    A copy into a slot waits, on its GPU, for what the slot's last batches had begun; a batch waits
    likewise for the copies of its adapters. No thread waits for either.
    """

    def __init__(self, model: SlottedModel) -> None:
        self._model = model
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._ready: dict[tuple[int, torch.device], torch.cuda.Event] = {}
        # By the stream that a batch ran on: of its events the last one is enough.
        self._used: dict[tuple[int, torch.device], dict[int, torch.cuda.Event]] = defaultdict(dict)
        # Slots that a backward, or an optimizer's step, may read or write after their batch.
        self._open: set[int] = set()

    def fill(self, resident: Resident, slot: int) -> None:
        copies = [
            (there, here)
            for path, weights in resident.host.layers.items()
            for there, here in zip(
                self._model.layers[path].slot(slot, weights.rank),
                (weights.a, weights.b),
                strict=True,
            )
        ]
        for path, weights in resident.host.layers.items():
            if weights.ratio is not None:
                copies.append((self._model.layers[path].ratio_of(slot), weights.ratio))
        self._copy(copies, slot)
        self._open.discard(slot)

    def write_back(self, resident: Resident) -> None:
        assert resident.slot is not None
        self._open.add(resident.slot)
        copies: list[tuple[Tensor, Tensor]] = []
        for path, weights in resident.host.layers.items():
            views = self._model.layers[path].slot(resident.slot, weights.rank)
            copies += zip((weights.a, weights.b), views, strict=True)
        self._copy(copies, resident.slot)
        for (slot, _), event in self._ready.items():
            if slot == resident.slot:
                event.synchronize()

    def begin(self, slots: Sequence[int]) -> None:
        """A batch with these slots comes next on this thread's streams."""
        for (slot, device), event in self._ready.items():
            if slot in slots:
                torch.cuda.current_stream(device).wait_event(event)

    def end(self, slots: Sequence[int]) -> None:
        """All kernels of the batch are enqueued, except those of a later backward."""
        if torch.is_grad_enabled():
            self._open.update(slots)
        for device in self._model.devices():
            if device.type == "cuda" and slots:
                stream = torch.cuda.current_stream(device)
                event = stream.record_event()
                for slot in slots:
                    self._used[slot, device][stream.cuda_stream] = event

    def _copy(self, copies: Sequence[tuple[Tensor, Tensor]], slot: int) -> None:
        by_device = defaultdict(list)
        for there, here in copies:
            device = there.device if there.device.type != "cpu" else here.device
            by_device[device].append((there, here))
        with torch.inference_mode(False), torch.no_grad():
            for device, pairs in by_device.items():
                with self._own_stream(device, slot):
                    for there, here in pairs:
                        there.copy_(here, non_blocking=True)

    @contextlib.contextmanager
    def _own_stream(self, device: torch.device, slot: int) -> Iterator[None]:
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        for event in self._used.pop((slot, device), {}).values():
            stream.wait_event(event)
        if slot in self._open:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
        self._ready[slot, device] = stream.record_event()
