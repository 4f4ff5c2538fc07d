"""Batches on their way to the device, and what the host knows of them there.

Where the padding is and which positions are scored are decisions of the host. Asked of a GPU, every one of them would
wait for all work before it; so the integers of a batch keep a twin on the CPU, which goes along when rows are taken.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_twins = WeakTensorKeyDictionary()  # tensor of a device -> the same numbers on the CPU, and the versions of both


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of ``tensor`` on the CPU: itself, its twin, or (waiting for the device, once) a copy."""
    if tensor.device.type == "cpu":
        return tensor
    twin = _twin(tensor)
    if twin is None:
        twin = tensor.cpu()
        _pair(tensor, twin)
    return twin


def along(function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """Return ``function(tensor)``, whose twin is then ``function`` of the twin if ``tensor`` has one."""
    result = function(tensor)
    if tensor.device.type != "cpu" and (twin := _twin(tensor)) is not None:
        _pair(result, function(twin))
    return result


def onto(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return ``tensor`` on ``device``, copied from pinned memory while the host goes on where both can be; integers
    that come from the CPU keep it as their twin."""
    device = torch.device(device)
    if tensor.device.type == device.type:
        return tensor
    source = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    moved = source.to(device, non_blocking=True)
    if tensor.device.type == "cpu" and not tensor.is_floating_point():
        _pair(moved, tensor)
    return moved


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return ``batch`` with its tensors on ``device``: :func:`onto`."""
    return {name: onto(value, device) if torch.is_tensor(value) else value for name, value in batch.items()}


def prefetched(batches: Iterable[Mapping[str, Any]], device: torch.device | str) -> Iterator[dict[str, Any]]:
    """Yield the batches on ``device``; a thread makes the next one and starts its copy while the caller uses this one.

    Every batch must have tensors of its own: buffers that are filled again would change while they are used.
    On a GPU copies run on a stream of their own, which the caller's stream waits for.
    """
    device, source = torch.device(device), iter(batches)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make():
        batch = next(source, None)
        if batch is None:
            return None, None
        if stream is None:
            return to_device(batch, device), None
        with torch.cuda.stream(stream):
            return to_device(batch, device), stream.record_event()

    with ThreadPoolExecutor(1, "adazeta-prefetch") as pool:
        following = pool.submit(make)
        while (made := following.result())[0] is not None:
            following = pool.submit(make)
            batch, copied = made
            if copied is not None:
                user = torch.cuda.current_stream(device)
                user.wait_event(copied)
                for value in batch.values():
                    if torch.is_tensor(value) and value.is_cuda:
                        value.record_stream(user)  # its memory is not handed out again before the user is done
            yield batch


def _pair(tensor: torch.Tensor, twin: torch.Tensor) -> None:
    _twins[tensor] = (twin, tensor._version, twin._version)


def _twin(tensor: torch.Tensor) -> torch.Tensor | None:
    twin, *versions = _twins.get(tensor, (None,))
    return twin if twin is not None and versions == [tensor._version, twin._version] else None  # written to since
