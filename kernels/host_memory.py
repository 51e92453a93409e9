"""Operators that take tensors to the memory of the host, and back.

On a GPU both directions are copies on a stream of their own, from and to pinned memory, while the
computation goes on. On a CPU they are copies, so that the same graph runs there. In a graph,
``prefetch`` starts early, and ``wait_prefetch`` stands before the first use.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["offload", "prefetch", "wait_prefetch"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define("offload(Tensor x) -> Tensor")
_LIBRARY.define("prefetch(Tensor x, *, Device device) -> Tensor")
_LIBRARY.define("wait_prefetch(Tensor(a) x) -> Tensor(a)")


def offload(x: Tensor) -> Tensor:
    """Start to copy a tensor to the memory of the host; returns the copy.

    Ensures: the memory of ``x`` is not used for anything else before the copy is done.
    Nothing but ``prefetch`` may read the copy.
    """
    return torch.ops.moptrace.offload.default(x)


def prefetch(x: Tensor, device: torch.device) -> Tensor:
    """Start to copy a tensor that was offloaded to a device; returns the copy.

    Nothing but ``wait_prefetch`` may read the result.
    """
    return torch.ops.moptrace.prefetch.default(x, device=device)


def wait_prefetch(x: Tensor) -> Tensor:
    """The tensor that ``prefetch`` began to copy; what is computed from it comes after the copy."""
    return torch.ops.moptrace.wait_prefetch.default(x)


# One stream for each device takes both directions: a copy back starts after the copy out is done.
_streams: dict[torch.device, torch.cuda.Stream] = {}
_copied: dict[int, torch.cuda.Event] = {}  # by address, from prefetch to wait_prefetch


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The device's stream for copies, after everything that is computed so far."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    _streams[device].wait_stream(torch.cuda.current_stream(device))
    return _streams[device]


@torch.library.impl(_LIBRARY, "offload", "CompositeExplicitAutograd")
def _(x: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return x.clone()
    host = torch.empty_like(x, device="cpu", pin_memory=True)
    stream = _side_stream(x.device)
    with torch.cuda.stream(stream):
        host.copy_(x, non_blocking=True)
    x.record_stream(stream)
    return host


@torch.library.impl(_LIBRARY, "prefetch", "CompositeExplicitAutograd")
def _(x: Tensor, *, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return x.clone()
    back = torch.empty_like(x, device=device)
    stream = _side_stream(back.device)
    with torch.cuda.stream(stream):
        back.copy_(x, non_blocking=True)
    _copied[back.data_ptr()] = event = torch.cuda.Event()
    event.record(stream)
    return back


@torch.library.impl(_LIBRARY, "wait_prefetch", "CompositeExplicitAutograd")
def _(x: Tensor) -> Tensor:
    event = _copied.pop(x.data_ptr(), None) if x.device.type == "cuda" else None
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
