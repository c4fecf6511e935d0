"""What `vram-check` shows: the card as a bar, who lives on it at the peak, the plan, the verdict; and tables over many cards."""

import json
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.hardware.gpu_table import CARDS, name_series
from qlora_phi3.memory.report import VramReport, planned_keys
from qlora_phi3.memory.tables import GpuTableRow, MaxLengthRow
from qlora_phi3.units import GIB, format_gib

#: One colour after the other for the tenants, the largest first.
COLOURS = ("cyan", "blue", "magenta", "green", "bright_blue", "bright_magenta", "bright_cyan", "bright_green")


#: Tenants that take less than this share of the peak are told together.
SMALL_SHARE = 0.004


WIDEST_BAR = 100


SHARE_BAR = 24


CONTEXT, SLACK, SMALL = "CUDA context", "allocator's unused parts", "smaller ones"


def show_card(console: Console, device: Gpu) -> None:
    """Who is on a card, and how much is left."""
    for line in _about_card(device):
        _print(console, line)
    if not device.is_local:
        return
    parts = {process.name: process.used_bytes or 0 for process in device.processes}
    known = sum(parts.values())
    unnamed = max(0, device.other_processes_bytes - known)
    _print(console, "")
    console.print(_draw(_width(console), [(known, "█", "yellow"), (unnamed, "▓", "dim yellow")], device.total_bytes))
    table = _plain_table()
    for process in device.processes:
        told = format_gib(process.used_bytes) if process.used_bytes is not None else "not told by the driver"
        table.add_row(escape(process.name), f"[dim]process {process.pid}[/]", told)
    if unnamed:
        table.add_row("others, which the driver does not name", "", format_gib(unnamed))
    table.add_row("free", "", format_gib(device.free_bytes))
    console.print(table)


def _about_card(device: Gpu) -> list[str]:
    major, minor = device.compute_capability
    usable = format_gib(device.total_bytes)
    facts = (
        f"compute capability {major}.{minor}, {device.bandwidth_bytes_per_second / 1e9:,.0f} GB/s, "
        f"{device.tflops_16bit:,.0f} TFLOPS in 16 bit"
    )
    if device.is_local:
        return [f"{device.name}: {format_gib(device.free_bytes)} of {usable} free", facts]
    rough = "about " if device.estimated else ""
    return [f"{device.name}: {rough}{usable} for programs, when nothing else is on the card", facts]


def _stands_for(device: Gpu) -> str:
    """Which cards an answer about a size is about."""
    cards = [card for card in CARDS if card.label in device.represents]
    sizes = sorted({card.nominal_gb for card in cards})
    named = f"{name_series(cards)} with {' and '.join(map(str, sizes))} GB"
    if not device.name.endswith(f" {sizes[0]} GB card"):
        return f"No card of the table has that size: its speed is that of {named}"
    if len(cards) == 1:
        return f"That is the {cards[0].label}"
    older = [
        card for card in CARDS if card.nominal_gb in sizes and card.consumer and card.label not in device.represents
    ]
    or_older = f", or about an older {name_series(older)}" if older else ""
    return f"That is the smallest {named}: they differ a little; --gpu asks about one of them{or_older}"


def show_answer(console: Console, report: VramReport) -> None:
    """All there is to say about one recipe on one card."""
    _print(console, _about_card(report.device)[0])
    if report.device.represents:
        _print(console, _stands_for(report.device))
    if report.device.is_local and report.device.other_processes_bytes:
        _print(console, _taken(report.device))
    if _closed_bytes(report):
        _print(console, f"[memory] budget: a run may take {format_gib(report.budget_bytes)} of it")
    bits = "" if report.compute_dtype == "bfloat16" else f", computing in {report.compute_dtype}"
    _print(console, f"{report.model}{bits}; {report.batch_size} rows an optimizer step")
    _print(console, f"Rows: {report.rows.origin}")
    _print(console, "")
    categories = _categories_on_gpu(report)
    console.print(_bar(report, categories, _width(console)))
    _print(console, _sum_line(report))
    for line in _legend(report):
        _print(console, line)
    _print(console, "")
    console.print(_category_table(categories, report))
    _print(console, "")
    for line in _beside_the_card(report):
        _print(console, line)
    _print(console, "")
    if not report.fits:
        _print(console, "The leanest set-up that the recipe allows:")
    console.print(_plan_table(report))
    _print(console, "")
    _verdict(console, report)


def _taken(device: Gpu) -> str:
    named = [f"{process.name} {format_gib(process.used_bytes)}" for process in device.processes if process.used_bytes]
    named += [process.name for process in device.processes if process.used_bytes is None]
    return f"Taken: {format_gib(device.other_processes_bytes)}" + (f" ({', '.join(named[:6])})" if named else "")


def _closed_bytes(report: VramReport) -> int:
    """What is free on the card and the recipe's budget leaves alone."""
    return report.device.free_bytes - report.budget_bytes


def _categories_on_gpu(report: VramReport) -> list[tuple[str, int]]:
    """The tenants in order of size, the small ones together, then what is not in tensors."""
    small = {name: size for name, size in report.categories.items() if size < SMALL_SHARE * report.peak_allocated_bytes}
    as_list = [(name, size) for name, size in report.categories.items() if name not in small]
    as_list.append((SMALL, sum(small.values())))
    as_list.append((SLACK, report.peak_reserved_bytes - report.peak_allocated_bytes))
    as_list.append((CONTEXT, report.peak_on_card_bytes - report.peak_reserved_bytes))
    return [(name, size) for name, size in as_list if size > 0]


def _colour(number: int, name: str) -> str:
    return "white" if name in (SMALL, SLACK, CONTEXT) else COLOURS[number % len(COLOURS)]


def _bar(report: VramReport, categories: Sequence[tuple[str, int]], width: int) -> Text:
    """Who lives on the card, the margin, and what is left; as wide as what is needed, where that is more than the card."""
    closed = _closed_bytes(report)
    parts = [(report.device.other_processes_bytes, "▓", "yellow"), (closed, "─", "dim")]
    parts += [(size, "█", _colour(number, name)) for number, (name, size) in enumerate(categories)]
    parts.append((report.margin_bytes, "▒", "white"))
    needed, card = sum(size for size, _, _ in parts), report.device.total_bytes
    bar = _draw(width, parts, max(card, needed))
    if needed > card:
        end = width * card // needed
        note = "the budget ends here" if closed else "the card ends here"
        bar.append(f"\n{' ' * end}▲ {note}" if end + len(note) + 2 <= width else f"\n{note:>{max(end - 1, 0)}} ▲")
    return bar


def _legend(report: VramReport) -> Iterator[str]:
    """The parts of the bar that no program of ours takes."""
    if report.device.other_processes_bytes:
        yield f"▓ {format_gib(report.device.other_processes_bytes)} taken by others"
    if closed := _closed_bytes(report):
        yield f"─ {format_gib(closed)} outside of [memory] budget"


def _draw(width: int, parts: Sequence[tuple[int, str, str]], whole_bytes: int) -> Text:
    bar, reached = Text(no_wrap=True), 0
    for size, sign, colour in parts:
        begin, reached = round(width * reached / whole_bytes), reached + size
        bar.append(sign * (round(width * reached / whole_bytes) - begin), style=colour)
    bar.append("░" * (width - len(bar)), style="dim")
    return bar


def _width(console: Console) -> int:
    return min(WIDEST_BAR, console.width)


def _sum_line(report: VramReport) -> str:
    margin = f"a margin of {format_gib(report.margin_bytes)}"
    if report.margin_runs:
        margin += (
            f" ({report.margin_share:.1%} instead of 3%: a run on this card took more than was predicted; "
            f"{report.margin_runs} runs compared)"
        )
    total = format_gib(report.peak_on_card_bytes + report.margin_bytes)
    return (
        f"{format_gib(report.peak_on_card_bytes)} on the card (█) and {margin} (▒) make {total} "
        f"of {format_gib(report.budget_bytes)}" + (" free" if report.device.is_local else "")
    )


def _category_table(categories: Sequence[tuple[str, int]], report: VramReport) -> Table:
    table = _plain_table()
    table.columns[1].justify = "right"
    largest = max(size for _, size in categories)
    for number, (name, size) in enumerate(categories):
        colour = _colour(number, name)
        table.add_row(name, format_gib(size), Text("█" * max(1, round(SHARE_BAR * size / largest)), style=colour))
    table.add_row("[bold]on the card[/]", f"[bold]{format_gib(report.peak_on_card_bytes)}[/]", "")
    return table


def _beside_the_card(report: VramReport) -> Iterator[str]:
    """The figures that are easily confused, and what lies elsewhere."""
    allocated, reserved = format_gib(report.peak_allocated_bytes), format_gib(report.peak_reserved_bytes)
    yield f"Allocated {allocated}, reserved {reserved}; the peak is in the {report.peak_phase} phase."
    if report.host_bytes:
        paged = "all" if report.paged_bytes == report.host_bytes else format_gib(report.paged_bytes)
        state = f", {paged} of it optimizer state that the driver pages" if report.paged_bytes else ""
        yield f"In the computer's memory meanwhile: {format_gib(report.host_bytes)}{state}."


def _plan_table(report: VramReport) -> Table:
    """The plan as a recipe says it."""
    table = _plain_table()
    for planned in planned_keys(report):
        if planned.key != "mlp_tile_tokens" or planned.value:
            pair = f"[{planned.table}] {planned.key} = {json.dumps(planned.value)}"
            table.add_row(escape(pair), f"[dim]{escape(planned.reason)}[/]" if report.fits else "")
    table.columns[1].no_wrap = False
    return table


def _verdict(console: Console, report: VramReport) -> None:
    _print(console, *_verdict_line(report))
    if report.fits:
        for line in _speed_lines(report):
            _print(console, line)
    else:
        _cures(console, report)
    if report.rows.problem:
        _print(console, f"Note: a run would stop at its data. {report.rows.problem}", "yellow")


def _verdict_line(report: VramReport) -> tuple[str, str]:
    """The verdict and its colour."""
    spare = report.budget_bytes - report.peak_on_card_bytes - report.margin_bytes
    budget = " the budget" if _closed_bytes(report) else ""
    if report.fits:
        rows = ", even if every row is that long" if report.rows.assumed else ""
        return f"It fits{budget}, with {format_gib(spare)} to spare{rows}.", "bold green"
    if spare >= 0:
        return f"It does not fit{budget}: the allocator's pieces would not find room.", "bold red"
    rows = ", if rows are that long" if report.rows.assumed else ""
    return f"It does not fit{budget}: {format_gib(-spare)} too much{rows}.", "bold red"


def _speed_lines(report: VramReport) -> Iterator[str]:
    """One speed, or those of the slowest and the fastest of the cards that an answer is about."""
    low, high = report.slowest_tokens_per_second, report.fastest_tokens_per_second
    tokens = report.seconds_per_step * report.tokens_per_second
    step = f"About {_seconds(tokens / low)} an optimizer step, {low:,.0f} tokens a second"
    if round(low) == round(high):
        yield f"{step}: estimated from the card's stated rates, not measured."
        return
    yield f"{step} on the slowest of these cards; {_seconds(tokens / high)}, {high:,.0f} on the fastest:"
    yield "estimated from their stated rates, not measured."


def _cures(console: Console, report: VramReport) -> None:
    if report.suggestions:
        helps = any(hint.fits for hint in report.suggestions)
        heading = "What would help" if helps else "Nothing in the recipe makes it fit; what comes nearest"
        _print(console, f"{heading}, one after the other, the least harm first:")
    for number, hint in enumerate(report.suggestions, 1):
        size = format_gib(hint.saved_bytes)
        does = f"Allows {size} more" if hint.widens else f"Saves up to {size}"
        _print(console, f"  {number}. {hint.text}. {does}{'; then it fits.' if hint.fits else '.'}")
    if report.no_fix_reason:
        _print(console, report.no_fix_reason)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1000:,.0f} ms"


def show_gpu_table(console: Console, rows: Sequence[GpuTableRow]) -> None:
    """One line for each size of card."""
    first = rows[0].report
    _print(console, f"{first.model}; {first.batch_size} rows an optimizer step of at most {first.max_length:,} tokens")
    _print(console, f"Rows: {first.rows.origin}")
    _print(console, "")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("card", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("needed", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("at once", justify="right", no_wrap=True)
    table.add_column("recomputed", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_gpu_table_cells(row))
    console.print(table)
    _print(console, "")
    _print(
        console,
        "GiB: what the smallest of these cards leaves to programs, with nothing else on it. needed: the prediction and a margin. "
        "at once: tokens of one forward pass. recomputed: layers, or of all layers the MLPs alone. "
        "tokens/s: the slowest and the fastest of them by a cost model, not measured.",
        "dim",
    )
    if first.rows.problem:
        _print(console, f"Note: a run would stop at its data. {first.rows.problem}", "yellow")


def _gpu_table_cells(row: GpuTableRow) -> tuple[str, ...]:
    report = row.report
    name = row.series if report.device.is_local else f"{row.nominal_gb:>2} GB  {row.series}"
    usable = f"{report.budget_bytes / GIB:.2f}"
    needed = f"{(report.peak_on_card_bytes + report.margin_bytes) / GIB:.2f}"
    if not report.fits:
        return escape(name), usable, needed, "[red]no[/]", "", "", ""
    kept = {0: "nothing", 1: "all"}.get(report.checkpoint_every_n_layers, f"1 in {report.checkpoint_every_n_layers}")
    if report.mlp_tile_tokens:
        kept = f"{kept}, MLPs" if report.checkpoint_every_n_layers else "MLPs"
    kept += ", offloaded" if report.activation_offloading else ""
    low, high = report.slowest_tokens_per_second, report.fastest_tokens_per_second
    speed = f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f}-{high:,.0f}"
    return escape(name), usable, needed, "[green]fits[/]", f"{report.micro_batch_tokens:,}", kept, speed


def show_max_lengths(console: Console, rows: Sequence[MaxLengthRow]) -> None:
    """The longest row for each card."""
    _print(console, f"{rows[0].model}: the longest row that fits, alone in its forward pass, with the leanest set-up")
    _print(console, "")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("card", no_wrap=True)
    for name in ("usable", "longest row", "on card", "in the computer"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        length = f"{row.max_length:,}{'*' if row.at_the_models_end else ' '}" if row.max_length else "none "
        host = format_gib(row.host_bytes) if row.host_bytes else ""
        table.add_row(escape(row.name), format_gib(row.usable_bytes), length, format_gib(row.peak_on_card_bytes), host)
    console.print(table)
    _print(console, "")
    _print(
        console,
        "on card: the prediction; its margin is within what is usable. in the computer: what is offloaded.",
        "dim",
    )
    if any(row.at_the_models_end for row in rows):
        _print(console, "* all the positions the model has", "dim")


def _plain_table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for number in range(3):
        table.add_column(no_wrap=number < 2)
    return table


def _print(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=not console.is_terminal)
