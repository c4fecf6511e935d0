"""Several processes that train one adapter, each on a GPU of its own, and share every optimizer batch (data parallel).

Every process draws the same batch, computes the gradients of its share of the rows, and adds up the gradients of all of them. The
libraries do not know of the other processes: accelerate would shard the batches, average the losses, and wrap the model in
DistributedDataParallel, which cannot repeat a backward pass that ran out of memory. Everything is exchanged through gloo and the
computer's memory: it takes no GPU memory, and it fails at once where a process has died, while NCCL waits for its timeout. An
exchange of 100 MB, the gradients of r = 16 on Phi-3-mini, takes 0.11 to 0.16 s between two processes (2 cores, torch 2.13).

The processes call `gather` equally often and in the same order. One that fails calls it once more, with its error, which all
others then raise.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from qlora_phi3.errors import RunError, UserError, first_line
from qlora_phi3.hardware.gpu import LaunchedProcess

Result = TypeVar("Result")
#: The slowest process may be late by as much: process 0 tokenizes and saves while the others wait. A dead one is noticed at once.
LONGEST_WAIT = timedelta(days=7)
#: Seconds after which a process gives up to become the one that writes, below torchrun's 30 between SIGTERM and SIGKILL.
TAKE_OVER_SECONDS = 20.0


class ProcessLost(RunError):  # noqa: N818 - the error of this process is that another one has gone
    """Another process of the run ended without an error that it could report."""


@dataclass(frozen=True, slots=True)
class _Message:
    value: Any
    error: UserError | None = None


@contextmanager
def connected(launch: LaunchedProcess) -> Iterator[None]:
    """Connect the processes of a run until the end of the block.

    Raises:
        RunError: they cannot be connected.
        UserError: what another process raised.
    """
    try:
        distributed.init_process_group("gloo", rank=launch.rank, world_size=launch.count, timeout=LONGEST_WAIT)
    except RuntimeError as error:
        raise RunError(f"The processes cannot connect to each other: {first_line(error)}.", "Start all of them again.") from error
    try:
        yield
    except UserError as error:
        # After a Ctrl-C nobody is waited for: this process ends, and the others notice.
        if not error.is_shared and not isinstance(error.__cause__, KeyboardInterrupt):
            with suppress(ProcessLost):
                _exchange(_Message(None, error))
        raise
    finally:
        distributed.destroy_process_group()


def count_processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own_rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is process 0, which writes the run directory and the terminal."""
    return own_rank() == 0


@contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it now, and this process ends by itself
        lost = ProcessLost("Another process of this run has ended.", "Its own output says why.")
        lost.is_shared = True
        raise lost from error


def _exchange(message: _Message) -> list[_Message]:
    if count_processes() == 1:
        return [message]
    messages: list[Any] = [None] * count_processes()
    with _peers_needed():
        distributed.all_gather_object(messages, message)
    return messages


def gather(value: Result) -> list[Result]:
    """The values of all processes, in the order of their ranks.

    Raises:
        UserError: what another process raised.
        ProcessLost: another process has died.
    """
    messages = _exchange(_Message(value))
    for error in (message.error for message in messages):
        if error is not None:
            error.is_shared = True
            raise error
    return [message.value for message in messages]


def from_first(make: Callable[[], Result]) -> Result:
    """What process 0 makes, for all processes."""
    made: Any = make() if is_first() else None
    return gather(made)[0]


def first_then_others(make: Callable[[], Result]) -> Result:
    """What each process makes; process 0 begins, and the others find in the caches what it wrote there."""
    made = [make()] if is_first() else []
    gather(None)
    return made[0] if made else make()


def add_up(values: Sequence[float]) -> list[float]:
    """The sums over all processes; call it only right after `gather`, as it passes on no error."""
    sums = torch.tensor(values, dtype=torch.float64)
    if count_processes() > 1:
        with _peers_needed():
            distributed.all_reduce(sums)
    return [float(value) for value in sums]


@torch.no_grad()
def add_up_gradients(model: nn.Module) -> None:
    """Replace the gradients by their sums over all processes, in fp32; a missing one counts as zero. See `add_up`."""
    if count_processes() == 1:
        return
    trained = list(_trained(model))
    parts = [(torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten().float().cpu() for weight in trained]
    sums = torch.cat(parts)
    with _peers_needed():
        distributed.all_reduce(sums)
    for weight, part in zip(trained, sums.split([weight.numel() for weight in trained]), strict=True):
        weight.grad = torch.empty_like(weight) if weight.grad is None else weight.grad
        weight.grad.copy_(part.view_as(weight))


@torch.no_grad()
def copy_from_first(model: nn.Module) -> None:
    """Give every process the trained weights of process 0."""
    if count_processes() == 1:
        return
    gather(None)
    with _peers_needed():
        for weight in _trained(model):
            sent = weight.cpu()
            distributed.broadcast(sent, src=0)
            weight.copy_(sent)


def _trained(model: nn.Module) -> Iterable[Tensor]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def seed_step(seed: int, step: int) -> None:
    """Let each of several processes draw its own dropout in a step, whichever process it resumed from."""
    if count_processes() > 1:
        digest = sha256(f"{seed} {step} {own_rank()}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
