"""Runs of several processes on the CPU: forks of the test's process, connected by the variables that torchrun sets."""

import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Ended:
    """A process that has ended: its exit code (the signal's number below 0) and what it printed."""

    code: int
    stdout: str
    stderr: str


def run_processes(shop, *words, count=2, environ=None, in_each=None, timeout=60):
    """`qlora-phi3 run mine.toml …` in `count` processes, which call `in_each(rank)` first.

    A fork costs no imports. What must be patched in the product is patched by `in_each`, in the child alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environ or {})}
    pids = [_fork(shop.path, {**shared, "RANK": rank, "LOCAL_RANK": rank}, words, rank, in_each) for rank in range(count)]
    codes, deadline = {}, time.monotonic() + timeout
    while len(codes) < count:
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, 9)
            deadline = float("inf")
        time.sleep(0.02)
    shown = [[(shop.path / f"{rank}.{name}").read_text(encoding="utf-8") for name in ("out", "err")] for rank in range(count)]
    return [Ended(codes[pid], *texts) for pid, texts in zip(pids, shown, strict=True)]


def _fork(folder: Path, environ, words, rank, in_each):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - until the fork ends
        os.chdir(folder)
        os.environ.update({name: str(value) for name, value in environ.items()})
        from qlora_phi3.cli.main import main

        if in_each is not None:
            in_each(rank)
        main(["run", "mine.toml", *words])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
