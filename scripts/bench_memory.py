"""Compare predicted memory with measured memory.

    python scripts/bench_memory.py cpu                        # mid-size models on the CPU, about 10 minutes of a free core
    python scripts/bench_memory.py cuda                       # Phi-3-mini and -medium with random weights, on the GPU
    python scripts/bench_memory.py cuda --budget-seconds 540  # stop in time; the next call goes on from there
    python scripts/bench_memory.py cuda --dry                 # the same program on small models and the CPU, without figures
    python scripts/bench_memory.py emulated --random 200      # on emulated GPUs, by way of scripts/test_cuda.py --bench
    python scripts/bench_memory.py table                      # write the tables of docs/memory.md again

Every configuration runs in a process of its own, and its row goes to benchmarks/memory.csv at once. The `cpu` half follows the
CPU's path and the `cuda` half the GPU's, through the same code. On a GPU each configuration runs without a limit first, and
then from the start under each of several: what torch's allocator may reserve there, without the CUDA context.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench_train import processor_name
from memory_bench.cases import Case, count_parameters
from memory_bench.grid import CPU_GRID, CUDA_GRID, shrink
from memory_bench.rows import (
    GIB,
    MIB,
    TABLE,
    Row,
    append_row,
    error_percent,
    read_rows,
    refresh_page,
    rows_of_gpu,
    side_by_side,
    start_row,
    summary,
    versions,
    yes_no,
)

from qlora_phi3.errors import DeviceError
from qlora_phi3.hardware.gpu import Gpu, find_gpu, gpu_of_size, read_gpu
from qlora_phi3.memory.report import MemoryReport

CAPS_GIB = (4, 6, 8, 12, 16)


def main() -> None:
    """Read the command line and do what it says."""
    arguments = parse_arguments()
    warnings.simplefilter("ignore")  # of the libraries, about each other
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if arguments.command == "table":
        refresh_page()
    elif arguments.command == "cpu":
        bench_cpu(chosen(CPU_GRID, arguments.only), arguments.csv)
    elif arguments.command == "emulated":
        bench_emulated(arguments)
    elif arguments.measure:
        measure_in_this_process(arguments.measure, arguments.caps, arguments.out, dry=arguments.dry)
    else:
        bench_cuda(arguments)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table", help="write the tables of docs/memory.md again")
    cpu = commands.add_parser("cpu", help="measure on the CPU")
    cuda = commands.add_parser("cuda", help="measure on the first GPU")
    emulated = commands.add_parser("emulated", help="measure on emulated GPUs: scripts/test_cuda.py --bench")
    emulated.add_argument("--random", type=int, metavar="COUNT", help="configurations drawn at random instead of the grid")
    emulated.add_argument("--seed", type=int, default=12, help="for --random")
    emulated.add_argument("--cards", nargs="+", metavar="CARD", help="of runtime.cpp's list; all seven unless given")
    emulated.add_argument("--part", default="1/1", metavar="K/N", help="every N-th configuration, from the K-th on")
    for command in (cpu, cuda, emulated):
        command.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="configurations whose name holds this")
        command.add_argument("--csv", type=Path, default=TABLE, help="the table to add rows to")
    cuda.add_argument(
        "--budget-seconds", type=float, default=float("inf"), help="stop in time; what was measured is in the table"
    )
    for command in (cuda, emulated):
        command.add_argument("--caps", type=int, nargs="*", default=CAPS_GIB, metavar="GIB", help="limits to try")
        command.add_argument("--plain-segments", action="store_true", help="without expandable segments")
    cuda.add_argument("--dry", action="store_true", help="without a GPU: everything on small models and the CPU")
    cuda.add_argument("--measure", help=argparse.SUPPRESS)  # the measuring process: the name of a configuration
    cuda.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def chosen(grid: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """The configurations whose name contains one of the texts; without texts, all."""
    return [case for case in grid if not only or any(text.lower() in case.name.lower() for text in only)]


def bench_cpu(cases: Sequence[Case], table: Path) -> None:
    """Compare configurations on the CPU with one thread, each in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import memory_bench.truth  # noqa: F401  # here, so that a forked process need not import torch again

    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    rows, started = [], time.perf_counter()
    with multiprocessing.get_context(method).Pool(1, maxtasksperchild=1) as pool:
        for row in pool.imap(compare_on_cpu, cases):
            append_row(table, row)
            rows.append(row)
            print(
                f"{row['configuration']:45} {row['predicted_bytes'] / MIB:7.1f} MiB predicted, "
                f"{row['measured_bytes'] / MIB:7.1f} measured: {row['error_percent']:+.2f} % "
                f"(against the process {row['process_error_percent']} %)",
                flush=True,
            )
    print(f"\n{summary(rows)}\n{time.perf_counter() - started:.0f} seconds")


def compare_on_cpu(case: Case) -> Row:
    """One row: measured, then predicted."""
    import torch
    from memory_bench.truth import measure_phases, measure_rise

    torch.set_num_threads(1)
    with silenced():
        rise = measure_rise(case)
        measured = measure_phases(case)
        memory, seconds = predict(case)
    process = None if rise is None else measured["loaded"] + rise
    # On a CPU bitsandbytes quantizes by way of 64-bit tables that no GPU has: loading is not compared.
    both = [name for name in memory.by_phase if name in measured and name != "load"]
    predicted_phase, measured_phase = max(both, key=memory.by_phase.__getitem__), max(both, key=measured.__getitem__)
    peak = memory.by_phase[predicted_phase]
    return {
        **start_row(case, "cpu", processor_name()),
        "parameters": count_parameters(case),
        "predicted_bytes": peak,
        "measured_bytes": measured[measured_phase],
        "error_percent": error_percent(peak, measured[measured_phase]),
        "predicted_phase": predicted_phase,
        "measured_phase": measured_phase,
        "phases": side_by_side({name: memory.by_phase[name] for name in both}, measured),
        "process_bytes": process,
        "process_error_percent": error_percent(peak, process),
        "simulation_seconds": round(seconds, 2),
    }


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing on standard error: torch's profiler writes there past Python."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def predict(case: Case, gpu: Gpu | None = None) -> tuple[MemoryReport, float]:
    """What is predicted for a configuration on a GPU, or on a CPU, and the seconds that it took."""
    import torch
    from memory_bench.truth import step_shape

    from qlora_phi3.memory.predict import Predictor
    from qlora_phi3.memory.simulate import simulate

    started = time.perf_counter()
    model, dtype = (case.recipe, dict(case.config), case.architecture), getattr(torch, case.compute)
    step = case.execution, step_shape(case)
    if gpu is None:
        memory = simulate(*model, *step, compute_dtype=dtype, capability=None).report()
    else:
        kind = {"capability": gpu.compute_capability, "multiprocessors": gpu.multiprocessors}
        predictor = Predictor(*model, compute_dtype=dtype, **kind)
        memory = predictor.simulate_all_layers(*step)
    return memory, time.perf_counter() - started


def bench_cuda(arguments: argparse.Namespace) -> None:
    """Compare on the GPU what the table does not have yet, cheapest first, until the time is up.

    While one process measures, this one predicts. It hides the GPU from itself, so that it uses none of its memory.
    """
    deadline = time.perf_counter() + arguments.budget_seconds
    gpu = about_gpu(dry=arguments.dry)
    caps = [gib for gib in arguments.caps if gib * GIB < gpu.total_bytes]
    segments = f"expandable_segments:{not arguments.plain_segments}"
    environment = {**os.environ, **dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), segments)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    done = limits_done(read_rows(arguments.csv), gpu.name, expandable=not arguments.plain_segments)
    waiting = [case for case in chosen(CUDA_GRID, arguments.only) if not done[case.name].issuperset(["", *map(str, caps)])]
    rows: list[Row] = []
    longest = 0.0
    for number, case in enumerate(sorted(waiting, key=work_of)):
        started = time.perf_counter()
        compared = None
        if deadline - started > 1.5 * longest:
            compared = compare_on_gpu(case, gpu, caps, environment, deadline, dry=arguments.dry)
        if compared is None:
            print(f"The time is up: {len(waiting) - number} configurations are left for the next call, first {case.name}.")
            break
        for row in compared:
            print(as_line(row), flush=True)
            if not arguments.dry:
                append_row(arguments.csv, row)
        rows += compared
        longest = max(longest, time.perf_counter() - started)
    print(f"\n{len(rows)} rows\n{summary(rows)}")


def bench_emulated(arguments: argparse.Namespace) -> None:
    """Compare on emulated GPUs what the table does not have yet; each measurement and prediction in a process of its own."""
    import card
    from memory_bench.emulated import CARDS, by_prediction, grid_cases, measure, random_cases

    cases = random_cases(arguments.seed, arguments.random) if arguments.random else grid_cases(arguments.cards or CARDS)
    part, parts = map(int, arguments.part.split("/"))
    expandable = not arguments.plain_segments
    done = {
        (row["machine"], row["configuration"])
        for row in read_rows(arguments.csv)
        if (row["path"], row["versions"], row["expandable_segments"]) == ("emulated", versions(), yes_no(expandable))
    }
    rows: list[Row] = []
    for case, cards in by_prediction(cases)[part - 1 :: parts]:
        truths: dict[str, Mapping[str, Any]] = {}
        for name in cards:
            if (find_gpu(CARDS[name]).name, case.name) in done or not chosen([case], arguments.only):
                continue
            limits = [gib * GIB for gib in arguments.caps if not truths]  # the verdicts are those of all these cards
            truths[name] = card.in_child(partial(measure, name, case, limits, expandable=expandable))
        gpus = {name: find_gpu(CARDS[name]) for name in truths}
        for row in card.in_child(partial(predicted_rows, case, gpus, truths)) if truths else []:
            append_row(arguments.csv, row)
            rows.append(row)
            print(f"{row['machine']:20} {as_line(row)}", flush=True)
    print(f"\n{len(rows)} rows\n{summary(rows)}")


def predicted_rows(case: Case, gpus: Mapping[str, Gpu], truths: Mapping[str, Any]) -> list[Row]:
    """The rows of a configuration that was measured on emulated GPUs for which it is predicted alike."""
    memory, seconds = predict(case, next(iter(gpus.values())))
    compared = (rows_of_gpu(case, gpus[name], memory, truth, seconds, path="emulated") for name, truth in truths.items())
    return [row for rows in compared for row in rows]


def limits_done(rows: Sequence[Row], machine: str, *, expandable: bool) -> dict[str, set[str]]:
    """Configuration -> the limits under which the table has it, on this GPU and with these versions; "" is none."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if (row["machine"], row["versions"], row["expandable_segments"]) == (machine, versions(), yes_no(expandable)):
            found[row["configuration"]].add(row["limit_gib"])
    return found


def about_gpu(*, dry: bool) -> Gpu:
    """The GPU here, or one that a dry run pretends to have.

    Raises:
        SystemExit: there is none.
    """
    if dry:
        return replace(gpu_of_size(80 * GIB), name="dry run")
    try:
        return read_gpu()
    except DeviceError as error:
        raise SystemExit(f"{error} Or see that the script runs: bench_memory.py cuda --dry") from error


def work_of(case: Case) -> float:
    """About how much a configuration computes, to begin with the cheapest: parameters and attention."""
    shape = case.architecture
    attention = 2 * shape.num_hidden_layers * shape.hidden_size
    parameters = shape.num_hidden_layers * shape.hidden_size * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    return sum(length * (parameters + attention * length) for length in case.lengths)


def runnable(case: Case, capability: tuple[int, int], *, dry: bool) -> Case:
    """As this GPU can run it: in float16 where it has no bfloat16; small in a dry run."""
    if capability < (8, 0) and case.compute == "bfloat16":
        case = replace(case, compute="float16")
    return shrink(case) if dry else case


def compare_on_gpu(
    case: Case, gpu: Gpu, caps: Sequence[int], environment: Mapping[str, str], deadline: float, *, dry: bool
) -> list[Row] | None:
    """The rows of one configuration, the one without a limit first; None where the time is up before it is measured."""
    runnable_case = runnable(case, gpu.compute_capability, dry=dry)
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as scratch:
        out = Path(scratch) / "truth.json"
        command = [sys.executable, str(Path(__file__).resolve()), "cuda", "--measure", case.name, "--out", str(out)]
        command += ["--dry"] if dry else []
        with subprocess.Popen([*command, "--caps", *map(str, caps)], env=dict(environment)) as child:
            try:
                memory, seconds = predict(runnable_case, gpu)
                child.wait(min(max(1.0, deadline - time.perf_counter()), 10**6))
            except subprocess.TimeoutExpired:
                return None
            finally:
                child.kill()
        if child.returncode:
            raise SystemExit(f"Measuring {case.name} ended with code {child.returncode}.")
        truth = json.loads(out.read_text(encoding="utf-8"))
    return rows_of_gpu(runnable_case, gpu, memory, truth, seconds)


def measure_in_this_process(name: str, caps: Sequence[int], out: Path, *, dry: bool) -> None:
    """Measure one configuration and write down what was seen."""
    device = about_gpu(dry=dry)  # before anything makes a CUDA context
    from memory_bench.gpu import CudaGpu, DryGpu, measure_on_gpu

    (case,) = [case for case in CUDA_GRID if case.name == name]
    case = runnable(case, device.compute_capability, dry=dry)
    limits = [gib * GIB for gib in caps]
    truth = measure_on_gpu(case, DryGpu() if dry else CudaGpu(), limits, idle_bytes=device.other_processes_bytes)
    out.write_text(json.dumps(asdict(truth)), encoding="utf-8")


def as_line(row: Row) -> str:
    """A row as one line."""
    name = f"{row['configuration']:45}"
    if row.get("limit_gib"):
        verdicts = f"fits: {row['predicted_fits']} predicted, {row['measured_fits']} measured"
        return f"{name} at {row['limit_gib']:2} GiB {verdicts}"
    figures = ", ".join(
        f"{words} {row[f'predicted_{kind}'] / MIB:.0f} predicted, {(row[f'measured_{kind}'] or 0) / MIB:.0f} measured"
        for words, kind in (("allocated", "bytes"), ("reserved", "reserved_bytes"), ("on the GPU", "on_card_bytes"))
    )
    return f"{name} MiB: {figures}"


if __name__ == "__main__":
    main()
