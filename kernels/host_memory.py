"""Operators that take tensors to the memory of the host, and back.

On a GPU both directions are copies on a stream of their own, from and to pinned memory, while the
computation goes on. On a CPU they are copies, so that the same graph runs there. In a graph,
``prefetch`` starts early, and ``wait_prefetch`` stands before the first use.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["finish_copies", "offload", "offload_into", "prefetch", "wait_prefetch"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define("offload(Tensor x) -> Tensor")
_LIBRARY.define("offload_into(Tensor(a!) host, Tensor x) -> ()")
_LIBRARY.define("prefetch(Tensor x, *, Device device) -> Tensor")
_LIBRARY.define("wait_prefetch(Tensor(a) x) -> Tensor(a)")


def offload(x: Tensor) -> Tensor:
    """Start to copy a tensor to the memory of the host; returns the copy.

    Ensures: the memory of ``x`` is not used for anything else before the copy is done.
    Nothing but ``prefetch`` may read the copy.
    """
    return torch.ops.moptrace.offload.default(x)


def offload_into(host: Tensor, x: Tensor) -> None:
    """Start to copy a tensor into memory of the host that is there already.

    Requires: ``host`` is pinned, if ``x`` is on a GPU. Ensures: as ``offload``; a ``prefetch`` of
    ``host`` that comes later brings the new values.
    """
    torch.ops.moptrace.offload_into.default(host, x)


def prefetch(x: Tensor, device: torch.device) -> Tensor:
    """Start to copy a tensor that was offloaded to a device; returns the copy.

    Nothing but ``wait_prefetch`` may read the result.
    """
    return torch.ops.moptrace.prefetch.default(x, device=device)


def wait_prefetch(x: Tensor) -> Tensor:
    """The tensor that ``prefetch`` began to copy; what is computed from it comes after the copy."""
    return torch.ops.moptrace.wait_prefetch.default(x)


def finish_copies() -> None:
    """Wait until the copies that were started are done, so that the host may read them."""
    for stream in _streams.values():
        stream.synchronize()


# The copies of a device to the host and back run beside each other, so each way has a stream.
_streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}
# By address: copies on the host that are not complete yet, and those on the device.
_away: dict[int, torch.cuda.Event] = {}
_back: dict[int, torch.cuda.Event] = {}


def _copy(to: Tensor, x: Tensor, device: torch.device, way: str) -> torch.cuda.Event:
    """Copy on the stream of this way, after everything that is computed so far."""
    if (device, way) not in _streams:
        _streams[device, way] = torch.cuda.Stream(device)
    stream = _streams[device, way]
    stream.wait_stream(torch.cuda.current_stream(device))
    if x.data_ptr() in _away:
        stream.wait_event(_away.pop(x.data_ptr()))
    with torch.cuda.stream(stream):
        to.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record(stream)
    return event


@torch.library.impl(_LIBRARY, "offload", "CompositeExplicitAutograd")
def _(x: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return x.clone()
    host = torch.empty_like(x, device="cpu", pin_memory=True)
    offload_into(host, x)
    return host


@torch.library.impl(_LIBRARY, "offload_into", "CompositeExplicitAutograd")
def _(host: Tensor, x: Tensor) -> None:
    if x.device.type != "cuda":
        host.copy_(x)
        return
    _away[host.data_ptr()] = _copy(host, x, x.device, "away")
    x.record_stream(_streams[x.device, "away"])


@torch.library.impl(_LIBRARY, "prefetch", "CompositeExplicitAutograd")
def _(x: Tensor, *, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return x.clone()
    back = torch.empty_like(x, device=device)
    _back[back.data_ptr()] = _copy(back, x, back.device, "back")
    return back


@torch.library.impl(_LIBRARY, "wait_prefetch", "CompositeExplicitAutograd")
def _(x: Tensor) -> Tensor:
    event = _back.pop(x.data_ptr(), None) if x.device.type == "cuda" else None
    if event is not None:
        torch.cuda.current_stream(x.device).wait_event(event)
    return torch.ops.aten.alias.default(x)


@torch.library.register_fake("moptrace::offload", lib=_LIBRARY)
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu")


@torch.library.register_fake("moptrace::prefetch", lib=_LIBRARY)
def _(x: Tensor, *, device: torch.device) -> Tensor:
    return torch.empty_like(x, device=device)


@torch.library.register_fake("moptrace::wait_prefetch", lib=_LIBRARY)
def _(x: Tensor) -> Tensor:
    return torch.ops.aten.alias.default(x)
