"""What keeps a process from mapping device memory, and how that is said. CUDA's own part needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
import torch
from flume_kernels.gpu import shared_memory
from flume_kernels.gpu.shared_memory import MappingFailed, map_shared

OURS = torch.device("cuda:0")
HANDLE = msgspec.msgpack.encode([b"memory", 4096, 512, b"references", 3, b"event", True])


@pytest.fixture
def cards(monkeypatch):
    """Those that this process sees, in its order."""
    seen = ["one", "two"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: SimpleNamespace(uuid=seen[at]))
    return seen


@pytest.fixture
def opened(monkeypatch):
    """What CUDA was asked to open; it gives host memory."""
    asked = []

    def open_(*words):
        asked.append(words)
        return torch.zeros(words[2], dtype=torch.uint8).untyped_storage()

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", open_)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: torch.zeros(*size, dtype=dtype))
    return asked


def test_memory_of_our_card_is_opened_with_all_that_its_maker_said_and_our_number(cards, opened):
    memory = map_shared(OURS, "GPU-one", HANDLE)
    assert opened == [(0, b"memory", 4096, 512, b"references", 3, b"event", True)]
    assert memory.dtype is torch.uint8 and len(memory) == 4096


def test_memory_of_a_card_that_is_not_visible_is_not_mapped(cards, opened):
    with pytest.raises(MappingFailed, match="the card GPU-three is not visible to this process"):
        map_shared(OURS, "GPU-three", HANDLE)
    assert not opened


def test_memory_of_another_card_is_mapped_for_ours_if_flags_can_be_raised_there(cards, opened, monkeypatch):
    reach = []
    monkeypatch.setattr(shared_memory, "_takes_atomics", lambda *pair: bool(reach.append(pair)))
    with pytest.raises(MappingFailed, match="no atomic operations in the memory of GPU-two"):
        map_shared(OURS, "GPU-two", HANDLE)
    assert reach == [(0, 1)] and not opened
    monkeypatch.setattr(shared_memory, "_takes_atomics", lambda *pair: True)
    map_shared(OURS, "GPU-two", HANDLE)
    assert opened[0][0] == 0


@pytest.mark.parametrize("handle", [b"", b"nonsense", msgspec.msgpack.encode([b"memory"])])
def test_bytes_that_are_no_handle_are_not_mapped(cards, opened, handle):
    with pytest.raises(MappingFailed, match="GPU-one"):
        map_shared(OURS, "GPU-one", handle)
    assert not opened


def test_what_cuda_says_against_it_is_passed_on(cards, monkeypatch):
    def refuse(*words):
        raise RuntimeError("CUDA error: invalid device context")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", refuse)
    with pytest.raises(MappingFailed, match="invalid device context"):
        map_shared(OURS, "GPU-one", HANDLE)
