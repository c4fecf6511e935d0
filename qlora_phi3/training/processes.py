"""Several processes that train one adapter, each on a GPU of its own, and share every optimizer batch (data parallel).

Every process draws the same batch, computes the gradients of its share, and adds up those of all. DistributedDataParallel cannot
repeat a backward pass that ran out of memory. gloo exchanges through the computer's memory: it takes none of the GPU, and fails
at once where a process has died, while NCCL waits for its timeout. 100 MB, the gradients of r = 16 on Phi-3-mini, take 0.11 to
0.16 s between two processes (2 cores, torch 2.13).

The processes call `gather` in the same order. One that fails calls it once more, with its error, which the others then raise.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from qlora_phi3.errors import RunError, UserError, first_line

Result = TypeVar("Result")
#: How late a process may be: the others wait while process 0 tokenizes and saves. One that has died is noticed at once.
LONGEST_WAIT = timedelta(days=7)
#: Seconds in which another process takes the place of process 0; torchrun kills 30 s after it has sent SIGTERM.
TAKE_OVER_SECONDS = 20.0


class ProcessLost(RunError):  # noqa: N818 - the error of this process is that another one has gone
    """Another process of the run ended without an error that it could report."""

    is_shared = True


@contextmanager
def connected(rank: int, count: int) -> Iterator[None]:
    """Connect the processes of a run until the end of the block; RunError where that is impossible."""
    if sys.platform == "linux":  # all are on one computer, whose network may go
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        distributed.init_process_group("gloo", rank=rank, world_size=count, timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:  # ValueError: no MASTER_ADDR
        raise RunError(f"The processes cannot connect to each other: {first_line(error)}.", "Start all of them again.") from error
    try:
        yield
    except UserError as error:
        # After a Ctrl-C nobody is waited for: this process ends, and the others notice.
        if not error.is_shared and not isinstance(error.__cause__, KeyboardInterrupt):
            with suppress(ProcessLost):
                gather(None, error)
        raise
    finally:
        distributed.destroy_process_group()


def count_processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own_rank() -> int:
    """The number of this process. Process 0 writes the run directory and the terminal."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it now, and this process ends by itself
        raise ProcessLost("Another process of this run has ended.", "Its own output says why.") from error


def gather(value: Result, own_error: UserError | None = None) -> list[Result]:
    """The values of all processes, in the order of their ranks. UserError: what another process raised, or it has died."""
    messages: list[Any] = [(value, own_error)] * count_processes()
    if len(messages) > 1:
        with _peers_needed():
            distributed.all_gather_object(messages, messages[0])
    for error in (error for _, error in messages if error is not None):
        error.is_shared = True
        raise error
    return [value for value, _ in messages]


def from_first(make: Callable[[], Result]) -> Result:
    """What process 0 makes, for all processes."""
    made: Any = None if own_rank() else make()
    first: Result = gather(made)[0]
    return first


def first_then_others(make: Callable[[], Result]) -> Result:
    """What each process makes; process 0 begins, and the others find in the caches what it wrote there."""
    made = [] if own_rank() else [make()]
    gather(None)
    return made[0] if made else make()


@lru_cache(1)
def _buffer(size: int) -> Tensor:
    return torch.empty(size)  # kept, as fresh memory costs more than the sum


@torch.no_grad()
def add_up_gradients(model: nn.Module) -> None:
    """Replace the gradients by their sums over all processes, in fp32. Call it only after `gather`, as it passes on no error."""
    if count_processes() > 1:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for weight in trained:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        gradients = [weight.grad for weight in trained if weight.grad is not None]
        sizes = [gradient.numel() for gradient in gradients]
        sums = _buffer(sum(sizes))
        pairs = list(zip(torch.split(sums, sizes), gradients, strict=True))
        for part, gradient in pairs:
            part.view_as(gradient).copy_(gradient)
        with _peers_needed():
            distributed.all_reduce(sums)
        for part, gradient in pairs:
            gradient.copy_(part.view_as(gradient))
