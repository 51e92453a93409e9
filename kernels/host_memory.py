"""Operators that take tensors to the memory of the host, and back, and what is computed there.

On a GPU both directions are copies on a stream of their own, from and to pinned memory, while the
computation goes on. On a CPU they are copies, so that the same graph runs there. In a graph,
``prefetch`` starts early, and ``wait_prefetch`` stands before the first use.

What the host computes of such tensors runs in a thread of its own, one function after another
(``run_on_host``). It waits there for the copies that it takes, and a ``prefetch`` of what it makes
is started there, behind it; whoever starts either goes on at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "finish_copies",
    "offload",
    "offload_into",
    "prefetch",
    "run_on_host",
    "wait_prefetch",
]

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


def run_on_host(
    run: Callable[..., Any], operands: Sequence[Tensor], results: Sequence[Tensor]
) -> None:
    """Start a function of tensors on the host, which writes ``results``, some of its operands.

    It runs once the operands are there, after all that was started so.

    Ensures: a ``prefetch`` of a result brings what the function wrote; what it raised is raised by
    the ``wait_prefetch``.
    """
    before = [_away.pop(x.data_ptr()) for x in operands if x.data_ptr() in _away]

    def work() -> None:
        for each in before:
            _finish(each)
        with torch.no_grad():
            run(*operands)

    started = _thread(os.getpid()).submit(work)
    _away.update((x.data_ptr(), started) for x in results)


def finish_copies() -> None:
    """Wait until what was started is done, copies and functions, so that the host may read it."""
    if _thread.cache_info().currsize:
        _thread(os.getpid()).submit(_finish).result()
    for stream in _streams.values():
        stream.synchronize()


# The copies of a device to the host and back run beside each other, so each way has a stream.
_streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}
# When something is complete: a copy, or what the thread was given, which may have started one.
_Done: TypeAlias = "torch.cuda.Event | Future[Any]"
# By address: what is on the host, and not complete yet; and what is on its way to the device.
_away: dict[int, _Done] = {}
_back: dict[int, _Done] = {}


@cache
def _thread(process: int) -> ThreadPoolExecutor:
    """The thread for functions on the host; a process that was forked has its own."""
    return ThreadPoolExecutor(1, thread_name_prefix="moptrace-host")


def _finish(done: _Done | None = None) -> None:
    """Wait here, and not on a stream."""
    if isinstance(done, Future):
        _finish(done.result())
    elif done is not None:
        done.synchronize()


def _stream(device: torch.device, way: str) -> torch.cuda.Stream:
    if (device, way) not in _streams:
        _streams[device, way] = torch.cuda.Stream(device)
    return _streams[device, way]


def _copy(to: Tensor, x: Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Copy on a stream, after everything that was put on it."""
    with torch.cuda.stream(stream):
        to.copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
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
    stream = _stream(x.device, "away")
    stream.wait_stream(torch.cuda.current_stream(x.device))
    _away[host.data_ptr()] = _copy(host, x, stream)
    x.record_stream(stream)


@torch.library.impl(_LIBRARY, "prefetch", "CompositeExplicitAutograd")
def _(x: Tensor, *, device: torch.device) -> Tensor:
    done = _away.pop(x.data_ptr(), None)
    back = torch.empty_like(x, device=device)
    if back.device.type != "cuda" and not isinstance(done, Future):
        return back.copy_(x)
    bring = _bringing(back, x, done)
    _back[back.data_ptr()] = (
        _thread(os.getpid()).submit(bring) if isinstance(done, Future) else bring()
    )
    return back


def _bringing(back: Tensor, x: Tensor, done: _Done | None) -> Callable[[], Any]:
    """What copies from the host; on a GPU, after everything that is computed so far."""
    if back.device.type != "cuda":

        def copy() -> None:
            _finish(done)
            back.copy_(x)

        return copy
    stream = _stream(back.device, "back")
    free = torch.cuda.Event()  # what had the memory before
    free.record(torch.cuda.current_stream(back.device))

    def bring() -> torch.cuda.Event:
        for event in (free, done.result() if isinstance(done, Future) else done):
            if event is not None:
                stream.wait_event(event)
        return _copy(back, x, stream)

    return bring


@torch.library.impl(_LIBRARY, "wait_prefetch", "CompositeExplicitAutograd")
def _(x: Tensor) -> Tensor:
    done = _back.pop(x.data_ptr(), None)
    if isinstance(done, Future):
        done = done.result()
    if done is not None:
        torch.cuda.current_stream(x.device).wait_event(done)
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
