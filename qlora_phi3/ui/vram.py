"""What `vram-check` prints: the GPU's memory as a bar, the categories at the peak, the plan, the verdict; and its tables."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.hardware.gpu_table import GPU_TABLE, name_series
from qlora_phi3.memory.report import VramReport, planned_keys
from qlora_phi3.memory.tables import MaxLengthRow
from qlora_phi3.ui.console import print_line
from qlora_phi3.units import GIB, describe_duration, describe_epochs, format_count, format_gib, format_percent, round_to_100

if TYPE_CHECKING:
    from qlora_phi3.memory.proposal import ModelOption

#: Colours of the categories, the largest first.
COLOURS = ("cyan", "blue", "magenta", "green", "bright_blue", "bright_magenta", "bright_cyan", "bright_green")
#: Categories of less than this share of the peak are shown as one.
SMALL_SHARE = 0.004
#: Columns of the bar, at most, and of the largest bar in the table of categories.
WIDEST_BAR, CATEGORY_BAR = 100, 24
#: Names of the kinds of kernels.
KINDS_OF_TIME = {
    "matmul": "matrix products",
    "attention": "attention",
    "dequantize": "dequantization",
    "elementwise": "element-wise kernels",
    "offload": "offloading",
    "launch": "kernel launches",
}
#: Columns that the notes on the models need beside their figures.
WIDE = 110


def show_gpu(console: Console, device: Gpu) -> None:
    """The processes on a GPU, and how much memory is free."""
    major, minor = device.compute_capability
    gb_per_second, tflops = device.bandwidth_bytes_per_second / 1e9, device.tflops_16bit
    print_line(console, _describe_memory(device))
    print_line(console, f"compute capability {major}.{minor}, {gb_per_second:,.0f} GB/s, {tflops:,.0f} TFLOPS in 16 bit")
    if not device.is_local:
        return
    known = sum(process.used_bytes or 0 for process in device.processes)
    unnamed = max(0, device.other_processes_bytes - known)
    print_line(console, "")
    parts = [(known, "█", "yellow"), (unnamed, "▓", "dim yellow")]
    console.print(draw_bar(min(WIDEST_BAR, console.width), parts, device.total_bytes))
    table = build_table("", "", "")
    for process in device.processes:
        used = format_gib(process.used_bytes) if process.used_bytes is not None else "not known to the driver"
        table.add_row(escape(process.name), f"[dim]process {process.pid}[/]", used)
    if unnamed:
        table.add_row("other processes, which the driver does not name", "", format_gib(unnamed))
    table.add_row("free", "", format_gib(device.free_bytes))
    console.print(table)


def _describe_memory(device: Gpu) -> str:
    usable = format_gib(device.total_bytes)
    if device.is_local:
        return f"{device.name}: {format_gib(device.free_bytes)} of {usable} free"
    about = "about " if device.estimated else ""
    return f"{device.name}: {about}{usable} for programs, when nothing else is on the GPU"


def show_report(console: Console, report: VramReport) -> None:
    """The report for one recipe on one GPU."""
    print_line(console, "\n".join(_heading(report)))
    line, style = next(_verdict(report))
    print_line(console, f"{line}\n", style)
    memory, least = report.memory, SMALL_SHARE * report.memory.allocated_bytes
    large = [(name, size) for name, size in memory.by_category.items() if size >= least]
    categories = [(name, size, COLOURS[number % len(COLOURS)]) for number, (name, size) in enumerate(large)]
    rest = {
        "smaller ones": sum(size for size in memory.by_category.values() if size < least),
        "unused by the allocator": memory.reserved_bytes - memory.allocated_bytes,
        "CUDA context": memory.on_gpu_bytes - memory.reserved_bytes,
    }
    categories += [(name, size, "white") for name, size in rest.items() if size > 0]
    _show_bar(console, report, categories)
    print_line(console, "")
    table = build_table("", ">", "")
    largest = max(size for _, size, _ in categories)
    for name, size, colour in categories:
        table.add_row(name, format_gib(size), Text("█" * max(1, round(CATEGORY_BAR * size / largest)), style=colour))
    table.add_row(f"[bold]{report.device.where}[/]", f"[bold]{format_gib(memory.on_gpu_bytes)}[/]", "")
    console.print(table)
    allocated, reserved = format_gib(memory.allocated_bytes), format_gib(memory.reserved_bytes)
    of_process = "the process takes Python, its libraries and their buffers too, about 1 GiB"
    kinds = f"Tensors: {of_process}" if report.device.is_cpu else f"Allocated {allocated}, reserved {reserved}"
    print_line(console, f"\n{kinds}; the peak is in the {memory.peak_phase} phase.")
    if memory.host_bytes:
        paged = "all" if memory.paged_bytes == memory.host_bytes else format_gib(memory.paged_bytes)
        state = f", {paged} of it paged optimizer state" if memory.paged_bytes else ""
        print_line(console, f"In host memory at the same time: {format_gib(memory.host_bytes)}{state}.")
    print_line(console, "" if report.fits else "\nThe plan that needs least memory:")
    plan = build_table("", "")
    for table_name, key, value, reason in planned_keys(report):
        if key != "mlp_tile_tokens" or value:
            pair = escape(f"[{table_name}] {key} = {json.dumps(value)}")
            plan.add_row(pair, f"[dim]{escape(reason)}[/]" if report.fits else "")
    plan.columns[1].no_wrap = False
    console.print(plan)
    print_line(console, "")
    for line, style in _verdict(report):
        print_line(console, line, style)


def _heading(report: VramReport) -> Iterator[str]:
    """The GPU, what it represents, what is used on it, the model, and the rows."""
    device = report.device
    if device.is_cpu:
        yield "No NVIDIA GPU here: this is a run on the processor. --gpu 'RTX 4070', --vram 12GB or --all check GPUs."
    yield _describe_memory(device)
    if device.represents:
        gpus = [gpu for gpu in GPU_TABLE if gpu.label in device.represents]
        sizes = sorted({gpu.nominal_gb for gpu in gpus})
        series = f"{name_series(gpus)} with {' and '.join(map(str, sizes))} GB"
        same_size = [gpu for gpu in GPU_TABLE if gpu.nominal_gb in sizes and gpu.consumer]
        others = [gpu for gpu in same_size if gpu.label not in device.represents]
        if device.total_bytes != min(gpu.usable_bytes for gpu in gpus):
            yield f"No GPU of the table has that size: its speed is that of {series}"
        elif len(gpus) == 1:
            yield f"That is the {gpus[0].label}"
        else:
            older = f", or an older {name_series(others)}" if others else ""
            yield f"The smallest {series}: they differ a little. --gpu checks one of them{older}"
    if device.is_local and device.other_processes_bytes:
        named = [f"{process.name} {format_gib(process.used_bytes)}" for process in device.processes if process.used_bytes]
        named += [process.name for process in device.processes if process.used_bytes is None]
        names = f" ({', '.join(named[:6])})" if named else ""
        yield f"Used by other processes: {format_gib(device.other_processes_bytes)}{names}"
    if device.is_cpu:
        each = "" if report.rows_per_gpu == report.batch_size else " in each of its processes"
        yield f"A run may use half of it: {format_gib(report.budget_bytes)}{each}"
    elif device.free_bytes > report.budget_bytes:
        yield f"[memory] budget: a run may use {format_gib(report.budget_bytes)} of it"
    stored = f", stored in {report.stored}" if report.stored else ""
    dtype = "" if report.compute_dtype == "bfloat16" else f", computing in {report.compute_dtype}"
    yield f"{report.model}{stored}{dtype}; {report.step_rows}"
    yield f"Rows: {report.rows.origin}"


def _show_bar(console: Console, report: VramReport, categories: Sequence[tuple[str, int, str]]) -> None:
    """What is on the GPU, the margin, and what is left, with a legend; as wide as what is needed, where that is more."""
    width, device = min(WIDEST_BAR, console.width), report.device
    outside, available = device.free_bytes - report.budget_bytes, device.total_bytes
    parts = [(device.other_processes_bytes, "▓", "yellow"), (outside, "─", "dim")]
    parts += [*((size, "█", colour) for _, size, colour in categories), (report.margin_bytes, "▒", "white")]
    needed = sum(size for size, _, _ in parts)
    bar = draw_bar(width, parts, max(available, needed))
    if needed > available:
        end = width * available // needed
        note = "the budget ends here" if outside else "the GPU ends here"
        bar.append(f"\n{' ' * end}▲ {note}" if end + len(note) + 2 <= width else f"\n{note:>{max(end - 1, 0)}} ▲")
    console.print(bar)
    on_gpu, margin = format_gib(report.memory.on_gpu_bytes), format_gib(report.margin_bytes)
    total = format_gib(report.memory.on_gpu_bytes + report.margin_bytes)
    free = " free" if device.is_local and not device.is_cpu else ""
    print_line(console, f"█ {on_gpu} and a margin of ▒ {margin} make {total} of {format_gib(report.budget_bytes)}{free}")
    if report.margin_runs:
        instead = f"The margin is {format_percent(report.margin_share, 1)} instead of 3 %"
        print_line(console, f"{instead}: runs on this GPU took more than predicted ({report.margin_runs} compared)")
    if device.other_processes_bytes:
        print_line(console, f"▓ {format_gib(device.other_processes_bytes)} used by other processes")
    if outside:
        kind = "left to other programs and processes" if device.is_cpu else "outside of [memory] budget"
        print_line(console, f"─ {format_gib(outside)} {kind}")


def draw_bar(width: int, parts: Sequence[tuple[int, str, str]], total_bytes: int) -> Text:
    """A bar of `width` columns for the total: parts of a size in bytes, each with its sign and colour, then what is left."""
    bar, reached = Text(no_wrap=True), 0
    for size, sign, colour in parts:
        begin, reached = round(width * reached / total_bytes), reached + size
        bar.append(sign * (round(width * reached / total_bytes) - begin), style=colour)
    bar.append("░" * (width - len(bar)), style="dim")
    return bar


def _verdict(report: VramReport) -> Iterator[tuple[str, str | None]]:
    """Lines and their style: the verdict; the speed where it fits, else what to change."""
    spare = report.budget_bytes - report.memory.on_gpu_bytes - report.margin_bytes
    budget = " the budget" if report.device.free_bytes > report.budget_bytes else ""
    if report.fits:
        rows = ", even if every row is that long" if report.rows.assumed else ""
        yield f"It fits{budget}, with {format_gib(spare)} to spare{rows}.", "bold green"
        yield from ((line, None) for line in _speed_lines(report))
    else:
        rows = ", if every row is that long" if report.rows.assumed else ""
        too_much = f"It does not fit{budget}: {format_gib(-spare)} too much{rows}."
        fragmented = f"It does not fit{budget}: the allocator's segments leave gaps that no request fits."
        yield fragmented if spare >= 0 else too_much, "bold red"
        if any(suggestion.fits for suggestion in report.suggestions):
            yield "What would help, each on top of those before it, the least harmful first:", None
        elif report.suggestions:
            yield "Nothing in the recipe makes it fit. What comes nearest, each on top of those before it:", None
        for number, suggestion in enumerate(report.suggestions, 1):
            size = format_gib(suggestion.saved_bytes)
            effect = f"Allows {size} more" if suggestion.widens else f"Saves up to {size}"
            yield f"  {number}. {suggestion.text}. {effect}{'; then it fits.' if suggestion.fits else '.'}", None
        if report.no_fix_reason:
            yield report.no_fix_reason, None
    if report.rows.problem:
        yield f"Note: a run would stop at its data. {report.rows.problem}", "yellow"


def _speed_lines(report: VramReport) -> Iterator[str]:
    """The speed, or those of the slowest and the fastest of these GPUs; and the time of the run, or of 1,000 rows."""
    low, high = report.slowest_tokens_per_second, report.fastest_tokens_per_second
    times = [report.seconds_per_step * report.tokens_per_second / each for each in (low, high)]
    slow, fast = (f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:,.0f} ms" for seconds in times)
    if round(low) == round(high):
        yield f"About {slow} an optimizer step, {low:,.0f} tokens a second:"
        rates = (
            "processor's speed now, which other programs change" if report.device.is_cpu else "GPU's stated rates, not measured"
        )
        yield f"estimated from the {rates}."
    else:
        yield f"About {slow} an optimizer step, {low:,.0f} tokens a second, on the slowest of these GPUs;"
        yield f"{fast}, {high:,.0f} on the fastest: estimated from their stated rates, not measured."
    run_seconds = report.seconds_per_1000_rows if report.run_seconds is None else report.run_seconds
    about = " to ".join(dict.fromkeys(describe_duration(run_seconds * report.tokens_per_second / each) for each in (high, low)))
    if report.total_steps is None or report.epochs is None:
        yield f"1,000 rows of {report.max_length:,} tokens take about {about}."
    else:
        epochs, rows, steps = describe_epochs(report.epochs), report.rows.count, format_count(report.total_steps, "step")
        yield f"{epochs} of {format_count(rows, 'row')} ({steps}) in about {about}, evaluations included."
    seconds = report.step["seconds"]
    shares = sorted(zip(round_to_100(list(seconds.values())), seconds, strict=True), reverse=True)
    named = [f"{share} % {KINDS_OF_TIME[kind]}" for share, kind in shares if share]
    yield f"That is {', '.join(named)}."


def show_gpu_table(console: Console, reports: Sequence[VramReport]) -> None:
    """One line for each size of GPU."""
    first = reports[0]
    print_line(console, f"{first.model}; {first.step_rows} of at most {first.max_length:,} tokens")
    print_line(console, f"Rows: {first.rows.origin}\n")
    table = build_table("GPU", "usable>", "needed>", "fits", "tokens at once>", "recomputed", "tokens/s>")
    for report in reports:
        size, _, series = report.device.name.partition(", ")
        name = report.device.name if report.device.is_local else f"{size:>5}  {series}"
        usable = f"{report.budget_bytes / GIB:.2f}"
        needed = f"{(report.memory.on_gpu_bytes + report.margin_bytes) / GIB:.2f}"
        if not report.fits:
            table.add_row(escape(name), usable, needed, "[red]no[/]", "", "", "")
            continue
        every = report.checkpoint_every_n_layers
        layers = {0: "nothing", 1: "all"}.get(every, f"1 in {every}")
        if report.mlp_tile_tokens:
            layers = f"{layers}, MLPs" if every else "MLPs"
        layers += " but attention" if report.keep_attention else ""
        layers += ", offloaded" if report.activation_offloading else ""
        low, high = report.slowest_tokens_per_second, report.fastest_tokens_per_second
        speed = f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f}-{high:,.0f}"
        tokens = f"{report.micro_batch_tokens:,}"
        table.add_row(escape(name), usable, needed, "[green]yes[/]", tokens, layers, speed)
    console.print(table)
    print_line(
        console,
        "\nusable: GiB that the smallest of these GPUs leaves to programs, with nothing else on it. needed: GiB of the "
        "prediction and its margin. tokens at once: of one forward pass. recomputed: layers, or the MLPs alone of all layers. "
        "tokens/s: on the slowest and the fastest of them by a cost model, not measured.",
        "dim",
    )
    if first.rows.problem:
        print_line(console, f"Note: a run would stop at its data. {first.rows.problem}", "yellow")


def show_models(console: Console, options: "Sequence[ModelOption]") -> None:
    """Each model of the family on one GPU, with what it is chosen for: on the same line where there is room, else below it."""
    wide = console.width >= WIDE
    table = build_table("", "model", "fits", "GiB>", "max_length>", "tokens/s>", "time>", *([""] if wide else ()))
    for number, option in enumerate(options, 1):
        report = option.report
        cells = [f"{report.memory.on_gpu_bytes / GIB:.1f}", f"{option.max_length:,}", "", ""] if report else [""] * 4
        if report is not None and report.fits:
            cells[2:] = [f"{report.tokens_per_second:,.0f}", describe_duration(report.run_seconds or 0)]
        note, name = f"[dim]{escape(option.note)}[/]", escape(option.name.removeprefix("microsoft/"))
        fits = "[green]yes[/]" if report is not None and report.fits else "[red]no[/]"
        table.add_row(
            f"{number}", name if wide or not option.note else f"{name}\n{note}", fits, *cells, *([note] if wide else [])
        )
    console.print(table)
    if len(options) > 1:
        print_line(console, "The models with the most parameters (14.7B: 14.7 billion) come first.", "dim")


def show_max_lengths(console: Console, rows: Sequence[MaxLengthRow]) -> None:
    """The longest row for each GPU."""
    heading = f"{rows[0].model}: the longest row that fits, alone in its step, with the plan that needs least memory"
    print_line(console, f"{heading}\n")
    table = build_table("GPU", "usable>", "longest row>", "on the GPU>", "in host memory>")
    for row in rows:
        length = f"{row.max_length:,}{'*' if row.is_model_limit else ' '}" if row.max_length else "none "
        host = format_gib(row.host_bytes) if row.host_bytes else ""
        table.add_row(escape(row.name), format_gib(row.usable_bytes), length, format_gib(row.on_gpu_bytes), host)
    console.print(table)
    legend = "on the GPU: the prediction; its margin is within what is usable. in host memory: what is offloaded."
    limit = "\n* all the positions the model has" if any(row.is_model_limit for row in rows) else ""
    print_line(console, f"\n{legend}{limit}", "dim")


def build_table(*headings: str) -> Table:
    """A table without borders; a heading that ends in `>` is of a column of numbers. Without any heading none is shown."""
    has_headings = any(heading.rstrip(">") for heading in headings)
    table = Table(box=None, show_header=has_headings, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading.endswith(">") else "left"
        table.add_column(name := heading.rstrip(">"), justify=justify, no_wrap=True, min_width=len(name))
    return table
