"""The table benchmarks/memory.csv, its rows, and what docs/memory.md shows of them; no torch.

The columns have the names of the published file: `on_card` is what the process takes on the GPU.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from memory_bench.cases import Case, count_parameters

from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.memory.allocator import replay
from qlora_phi3.memory.report import MemoryReport

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "memory.csv"
PAGE = ROOT / "docs" / "memory.md"
MIB, GIB = 2**20, 2**30
BEGIN, END = "<!-- {}: made by scripts/bench_memory.py table -->", "<!-- end of {} -->"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "qlora-phi3")
CONFIGURATION = (
    "configuration", "model", "weights", "compute", "rank", "lora", "rows", "evaluation", "accumulates", "checkpoint_every",
    "offloading", "optim", "tile_mib", "mlp_tile_tokens", "attention",
)  # fmt: skip
COLUMNS = (
    "date", "path", "machine", "versions", "seen", *CONFIGURATION, "parameters", "limit_gib",
    "predicted_bytes", "measured_bytes", "error_percent", "predicted_phase", "measured_phase", "phases",
    "process_bytes", "process_error_percent",
    "predicted_reserved_bytes", "measured_reserved_bytes", "reserved_error_percent",
    "predicted_on_card_bytes", "measured_on_card_bytes", "on_card_error_percent", "paged_bytes", "context_bytes",
    "expandable_segments", "predicted_fits", "measured_fits", "forward_backward_seconds", "simulation_seconds",
    "predicted_pinned_bytes", "measured_pinned_bytes",
)  # fmt: skip
FURTHER_ERRORS = {
    "Against the process": "process_error_percent",
    "Reserved": "reserved_error_percent",
    "On the GPU": "on_card_error_percent",
}
Row = dict[str, Any]


def versions() -> str:
    """The libraries that decide memory, and this package."""
    return " ".join(f"{name}={_version(name)}" for name in LIBRARIES)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from the source tree
        return "source"


def start_row(case: Case, path: str, machine: str) -> Row:
    """The columns of a row that are known before anything is measured."""
    return {
        "date": date.today().isoformat(),
        "path": path,
        "machine": machine,
        "versions": versions(),
        "seen": "tuned" if case.tuned else "unseen",
        **case.describe(),
    }


def error_percent(predicted: int, measured: int | None) -> float | None:
    """How much is predicted too much; None where nothing was measured."""
    return round(100 * (predicted / measured - 1), 3) + 0.0 if measured else None


def side_by_side(predicted: Mapping[str, int], measured: Mapping[str, int]) -> str:
    """Phase=predicted/measured, in bytes."""
    return " ".join(f"{name}={size}/{measured[name]}" for name, size in predicted.items() if name in measured)


def rows_of_gpu(
    case: Case, gpu: Gpu, memory: MemoryReport, truth: Mapping[str, Any], seconds: float, *, path: str = "cuda"
) -> list[Row]:
    """Prediction and measurement of one configuration: the run without a limit, and the verdict under each limit."""
    from qlora_phi3.memory.cuda_path import context_bytes  # imports torch and bitsandbytes, which must follow tests' card.py

    expandable = truth["expandable"] or not truth["phases"]
    served = replay(memory.trace, expandable_segments=expandable)
    context = context_bytes(truth["multiprocessors"] or gpu.multiprocessors)
    on_gpu = served.peak_reserved_bytes + context
    start = {**start_row(case, path, gpu.name), "parameters": count_parameters(case)}
    allocated = max(truth["phases"].values(), default=None)
    rest = None if truth["on_gpu_bytes"] is None else truth["on_gpu_bytes"] - truth["reserved_then_bytes"]
    free = start | {
        "predicted_bytes": memory.allocated_bytes,
        "measured_bytes": allocated,
        "error_percent": error_percent(memory.allocated_bytes, allocated),
        "predicted_phase": memory.peak_phase,
        "measured_phase": max(truth["phases"], key=truth["phases"].get, default=None),
        "phases": side_by_side(memory.by_phase, truth["phases"]),
        "predicted_reserved_bytes": served.peak_reserved_bytes,
        "measured_reserved_bytes": truth["reserved_bytes"],
        "reserved_error_percent": error_percent(served.peak_reserved_bytes, truth["reserved_bytes"]),
        "predicted_on_card_bytes": on_gpu,
        "measured_on_card_bytes": truth["on_gpu_bytes"],
        "on_card_error_percent": error_percent(on_gpu, truth["on_gpu_bytes"]),
        "paged_bytes": memory.paged_bytes,
        "predicted_pinned_bytes": memory.host_bytes - memory.paged_bytes,
        "measured_pinned_bytes": truth.get("pinned"),
        "context_bytes": rest,
        "expandable_segments": "yes" if expandable else "no",
        "forward_backward_seconds": truth["forward_backward_seconds"],
        "simulation_seconds": round(seconds, 2),
    }
    limited = [
        start
        | {
            "limit_gib": int(limit) // GIB,
            "expandable_segments": free["expandable_segments"],
            "predicted_fits": yes_no(replay(memory.trace, expandable_segments=expandable, allowed_bytes=int(limit)).fits),
            "measured_fits": yes_no(fits),
        }
        for limit, fits in truth["fits"].items()
    ]
    return [free, *limited]


def yes_no(answer: bool) -> str:
    """As the table writes it."""
    return "yes" if answer else "no"


def append_row(path: Path, row: Row) -> None:
    """Add one row to a table, and its head to a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path) -> list[Row]:
    """All rows of a table, as text; none where there is no table."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def newest(rows: Iterable[Row], path: str) -> list[Row]:
    """The last row of each configuration and limit on this path."""
    keys = ("machine", "configuration", "expandable_segments", "limit_gib")
    found = {tuple(row[key] for key in keys): row for row in rows if row["path"] == path}
    return list(found.values())


def summary(rows: Sequence[Row]) -> str:
    """Number and errors of the measured rows, the tuned apart from the others, and the verdicts."""
    lines = []
    for name in ("tuned", "unseen"):
        of_kind = [row for row in rows if row["seen"] == name]
        if allocated := _errors(of_kind, "error_percent"):
            lines.append(f"{name.capitalize()}: {len(allocated)} configurations, error {_spread(allocated)}.")
    for words, column in FURTHER_ERRORS.items():
        if errors := _errors(rows, column):
            lines.append(f"{words}: error {_spread(errors)}.")
    verdicts = [row["predicted_fits"] == row["measured_fits"] for row in rows if row.get("measured_fits")]
    if verdicts:
        lines.append(f"Verdicts under a limit: {sum(verdicts)} of {len(verdicts)} right.")
    return "  \n".join(lines)


def _errors(rows: Sequence[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row.get(column) not in ("", None)]


def _spread(errors: Sequence[float]) -> str:
    mean = sum(map(abs, errors)) / len(errors)
    return f"{min(errors):+.2f} % to {max(errors):+.2f} %, mean of the absolute errors {mean:.2f} %"


def cpu_table(rows: Sequence[Row]) -> str:
    """The CPU's rows as Markdown, with their summary."""
    lines = [
        "| | configuration | model | what differs | predicted | measured | error | by the process |",
        "|---|---|---|---|--:|--:|--:|--:|",
    ]
    for number, row in enumerate(rows, start=1):
        process = f"{float(row['process_error_percent']):+.2f} %" if row["process_error_percent"] else ""
        lines.append(
            f"| {number} | {row['configuration']}{' *' if row['seen'] == 'tuned' else ''} | {_millions(row)}, {row['model']} "
            f"| {_differences(row)} | {_mib(row['predicted_bytes'])} | {_mib(row['measured_bytes'])} "
            f"| {float(row['error_percent']):+.2f} % | {process} |"
        )
    about = "  \n".join(dict.fromkeys(f"{row['date']}, {row['machine']}, {row['versions']}." for row in reversed(rows)))
    return f"{summary(rows)}\n\n" + "\n".join(lines) + f"\n\n{about}" if rows else "No CPU row has been measured yet."


def cuda_table(rows: Sequence[Row]) -> str:
    """The GPUs' rows as Markdown, those without a limit in full, with the verdicts of the others."""
    free = [row for row in rows if not row["limit_gib"]]
    if not free:
        return "**No row has been measured on a GPU yet.** Every figure of this project for a GPU is a prediction."
    lines = [
        "| GPU | configuration | rows | what differs | allocated | error | reserved | error | on the GPU | error | limits |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in free:
        limited = [
            other
            for other in rows
            if other["limit_gib"] and (other["machine"], other["configuration"]) == (row["machine"], row["configuration"])
        ]
        figures = " | ".join(
            f"{_mib(row[f'measured_{kind}'])} | {_signed(row[f'{error}_percent'])}"
            for kind, error in (
                ("bytes", "error"),
                ("reserved_bytes", "reserved_error"),
                ("on_card_bytes", "on_card_error"),
            )
        )
        lines.append(
            f"| {row['machine']} | {row['configuration']} | {row['rows']} | {_differences(row)} | {figures} "
            f"| {', '.join(map(_verdict, limited))} |"
        )
    return f"{summary(rows)}\n\n" + "\n".join(lines) + f"\n\n{free[-1]['date']}, {free[-1]['versions']}."


def emulated_table(rows: Sequence[Row]) -> str:
    """The emulated GPUs' rows as Markdown: summaries, and of the grid each row that was also tried under limits."""
    drawn = [row for row in rows if row["configuration"].startswith("random ")]
    grid = [row for row in rows if row not in drawn]
    lines = [
        "| GPU | configuration | rows | what differs | allocated | error | reserved | error | pinned (predicted) | limits |",
        "|---|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in grid:
        limited = [
            other
            for other in grid
            if other["limit_gib"] and (other["machine"], other["configuration"]) == (row["machine"], row["configuration"])
        ]
        if row["limit_gib"] or not limited:
            continue
        pinned = f"{_mib(row['measured_pinned_bytes'])} ({_mib(row['predicted_pinned_bytes'])})"
        lines.append(
            f"| {row['machine']} | {row['configuration']} | {row['rows']} | {_differences(row)} "
            f"| {_mib(row['measured_bytes'])} | {_signed(row['error_percent'])} "
            f"| {_mib(row['measured_reserved_bytes'])} | {_signed(row['reserved_error_percent'])} "
            f"| {pinned if int(row['predicted_pinned_bytes']) else ''} "
            f"| {', '.join(map(_verdict, limited))} |"
        )
    about = f"{rows[-1]['date']}, {rows[-1]['versions']}." if rows else "No row yet."
    grids = {
        machine: [row for row in grid if row["machine"] == machine] for machine in dict.fromkeys(row["machine"] for row in grid)
    }
    summaries = [f"The grid on an emulated {machine}:\n{summary(its)}" for machine, its in grids.items()]
    return "\n\n".join([f"Drawn at random:\n{summary(drawn)}", *summaries, "\n".join(lines), about])


def _verdict(row: Row) -> str:
    right = row["predicted_fits"] == row["measured_fits"]
    return f"{row['limit_gib']} GiB {'fits' if row['measured_fits'] == 'yes' else 'does not'}{'' if right else ' (wrong)'}"


def _signed(text: str) -> str:
    return f"{float(text):+.2f} %" if text else ""


def _mib(text: str) -> str:
    return f"{int(text) / MIB:,.1f} MiB" if text else ""


def _millions(row: Row) -> str:
    return f"{int(row['parameters']) / 1e6:.0f} M"


def _differences(row: Row) -> str:
    """The settings that are not the usual ones, in a few words."""
    usual = {
        "weights": "nf4", "compute": "bfloat16", "rank": "16", "evaluation": "same", "accumulates": "yes",
        "checkpoint_every": "1", "offloading": "no", "optim": "adamw_torch", "tile_mib": "32", "mlp_tile_tokens": "0",
        "attention": "sdpa",
    }  # fmt: skip
    words = [row["rows"], row["lora"]]
    words += [f"{key} {row[key]}" for key, value in usual.items() if row[key] != value]
    return ", ".join(word for word in words if word).replace("_", " ")


def render_page(text: str, rows: Sequence[Row]) -> str:
    """A page with its generated parts made again."""
    tables = {"cpu": cpu_table, "cuda": cuda_table, "emulated": emulated_table}
    for name, table in tables.items():
        content = table(newest(rows, name))
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    return text


def refresh_page() -> None:
    """Write the tables of docs/memory.md again."""
    PAGE.write_text(render_page(PAGE.read_text(encoding="utf-8"), read_rows(TABLE)), encoding="utf-8", newline="\n")
