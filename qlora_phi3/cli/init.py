"""`qlora-phi3 init`: from a file of chats to a commented recipe that fits this computer's GPU."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_phi3.cli.options import check_new_file, create_file, debug_option, named_gpu, watching
from qlora_phi3.cli.output import PIPED_WIDTH, print_rich

if TYPE_CHECKING:
    from qlora_phi3.hardware.gpu import Gpu
    from qlora_phi3.memory.proposal import DataSummary, ModelOption, TrainingChoice
    from qlora_phi3.ui.console import Watcher

EXAMPLE = "example-chats.jsonl"
DOES_NOT_FIT = 3
LARGEST_EPOCHS = 100
#: Columns that the notes on the models need beside the figures.
WIDE = 110


@click.command()
@click.argument("data", required=False)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="The recipe to write. [default: DATA.toml, beside it]"
)
@click.option("--model", metavar="NAME", help="Take this model, a hub id or a folder, instead of comparing several.")
@click.option("--gpu", metavar="NAME", help="Plan for a GPU that is not here: --gpu 'RTX 4070 Laptop'.")
@click.option("--vram", metavar="SIZE", help="Plan for any GPU of a size: --vram 12GB.")
@click.option("--yes", is_flag=True, help="Ask nothing, and take what is proposed.")
@debug_option
@click.pass_context
def init(
    ctx: click.Context, /, data: str | None, out: Path | None, model: str | None, gpu: str | None, vram: str | None, yes: bool
) -> None:
    """Write a recipe for DATA: which model fits, how long its rows are, how often to go over them, each with its reason.

    \b
    Examples:
      qlora-phi3 init
      qlora-phi3 init my-chats.jsonl
      qlora-phi3 init my-chats.jsonl --vram 8GB --yes

    DATA is a .jsonl, .json, .csv or .parquet file of chats or of questions and answers (docs/data.md). Without DATA a file of
    eight chats is written to look at. Nothing is downloaded, and no file is overwritten. Exit code 3: no model fits the GPU.
    """
    if data is None:
        _write_example(out)
        return
    target = out or Path(data).with_name(f"{Path(data).name.partition('.')[0].replace('*', '') or 'recipe'}.toml")
    check_new_file(target)
    from qlora_phi3.hardware.gpu import choose_gpu

    device = named_gpu(gpu, vram)
    if device is None and (chosen := choose_gpu("auto")):
        device = chosen.gpu
    with watching() as watcher:
        watcher.info(f"Reading {data}")
        from qlora_phi3.memory.proposal import choose_training, read_data

        summary = read_data(data, Path(), watcher.progress)
        choice = choose_training(len(summary.lengths))
        summary, options = _compare(model, summary, choice, device, watcher)
    asks = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    _show(summary, options, device)
    option = next((each for each in options if each.fits is not False and (each.is_simulated or device is None)), None)
    if asks and option is not None and len(options) > 1:
        number = click.prompt("Model", default=options.index(option) + 1, type=click.IntRange(1, len(options)))
        with watching() as watcher:
            option = _verify(options[number - 1], summary, choice, device, watcher)
    if option is None or option.fits is False:
        click.echo(
            f"No recipe is written: {option.name if option else 'none of them'} does not fit. Try another model or GPU.", err=True
        )
        ctx.exit(DOES_NOT_FIT)
    if asks:
        epochs = click.prompt("Epochs, passes over the rows", default=choice.epochs, type=click.IntRange(1, LARGEST_EPOCHS))
        choice = replace(choice, epochs=epochs)
        target = out or Path(click.prompt("Write the recipe to", default=str(target)))
    _write(target, summary, option, choice, device)


def _write_example(out: Path | None) -> None:
    """Write the eight chats that ship; UserError where the file exists."""
    target = out or Path(EXAMPLE)
    create_file(target, (files("qlora_phi3") / EXAMPLE).read_text(encoding="utf-8"))
    click.echo(f"Written: {target}, eight chats, one a line. Your own file can look like this; docs/data.md has other formats.")
    click.echo(f"Next: qlora-phi3 init {target}")


def _compare(
    model: str | None, summary: "DataSummary", choice: "TrainingChoice", device: "Gpu | None", watcher: "Watcher"
) -> "tuple[DataSummary, list[ModelOption]]":
    """The models for the rows; on a GPU each with memory and time, the one that is proposed by the simulation.

    The rows are counted by the tokenizer of the first model that may be proposed, where it is on this computer.
    """
    from qlora_phi3.memory.proposal import MODELS, SMALLEST_MODEL, count_tokens, estimate_option, model_option, propose

    names = [model] if model else list(MODELS) if device else [SMALLEST_MODEL]
    options = [model_option(name, summary) for name in names]
    if device is not None:
        options = [estimate_option(option, summary, choice, device) for option in options]
    order = propose(options, summary)
    watcher.info("Starting torch, transformers and peft")
    summary = count_tokens(summary, order[0], Path(), watcher.progress)
    if summary.is_exact:
        options = [model_option(name, summary) for name in names]
        options = [estimate_option(option, summary, choice, device) for option in options] if device else options
        order = propose(options, summary)
    for option in order if device else ():
        tried = _verify(option, summary, choice, device, watcher, shorten=option is order[-1])
        options[options.index(option)] = tried
        if tried.fits:
            break
    return summary, options


def _verify(
    option: "ModelOption",
    summary: "DataSummary",
    choice: "TrainingChoice",
    device: "Gpu | None",
    watcher: "Watcher",
    shorten: bool = True,
) -> "ModelOption":
    """A model as `vram-check` finds it; with `shorten`, one that does not fit gets the longest `max_length` that does."""
    from qlora_phi3.memory.proposal import longest_that_fits, simulate_option

    if option.is_simulated or device is None:
        return option
    tried, checker = simulate_option(option, summary, choice, device, watcher.info)
    if tried.fits or not shorten:
        return tried
    watcher.info(f"{option.name}: searching the longest row that fits")
    if length := longest_that_fits(option, checker, device):
        return simulate_option(replace(option, max_length=length), summary, choice, device, watcher.info)[0]
    return tried


def _show(summary: "DataSummary", options: "Sequence[ModelOption]", device: "Gpu | None") -> None:
    """The rows, and the table of models."""
    from rich.markup import escape

    from qlora_phi3.errors import printable
    from qlora_phi3.memory.proposal import BYTES_PER_TOKEN, describe_gpu
    from qlora_phi3.ui.vram import build_table
    from qlora_phi3.units import GIB, describe_duration, format_count

    lengths, counted = summary.lengths, "" if summary.is_exact else f", estimated at {BYTES_PER_TOKEN} bytes a token"
    click.echo(f"{format_count(len(lengths), 'usable row')} of format {summary.format}")
    click.echo(f"Tokens: half have at most {lengths[len(lengths) // 2]:,}, the longest {lengths[0]:,}{counted}")
    for count in summary.skipped[:3]:
        click.echo(printable(f"  {format_count(count.rows, 'row')} cannot be used: {count.reason} (first: {count.where[0]})"))
    click.echo(f"Planned for {describe_gpu(device)}")
    if device is None:
        click.echo("A run on the CPU is for trying things out: it is far slower. --vram 12GB plans for a GPU of that size.")
        return
    wide = shutil.get_terminal_size((PIPED_WIDTH, 0)).columns >= WIDE
    table = build_table("", "model", "fits", "least GiB>", "max_length>", "tokens/s>", "time>", *([""] if wide else ()))
    for number, option in enumerate(options, 1):
        about = "" if option.is_simulated else "~"
        speed = [f"{about}{option.tokens_per_second:,.0f}", f"{about}{describe_duration(option.seconds)}"]
        cells = [f"~{option.needed_bytes / GIB:.1f}", f"{option.max_length:,}", *(speed if option.fits else ("", ""))]
        fits = f"[green]{about}yes[/]" if option.fits else f"[red]{about}no[/]"
        name = escape(option.name.removeprefix("microsoft/"))
        notes = [f"[dim]{escape(option.note)}[/]"] if wide else []
        table.add_row(f"{number}", name, fits, *cells, *notes)
    click.echo("")
    print_rich(lambda console: console.print(table))
    click.echo("\n~: estimated; the rest is simulated, as by vram-check. tokens/s and time are by a")
    click.echo("cost model, not measured.\n")


def _write(target: Path, summary: "DataSummary", option: "ModelOption", choice: "TrainingChoice", device: "Gpu | None") -> None:
    """Write the recipe, and name the next commands."""
    from qlora_phi3.memory.proposal import describe_gpu, recipe_text, training_seconds
    from qlora_phi3.units import describe_duration, describe_epochs

    check_new_file(target)
    create_file(target, recipe_text(summary, option, choice, target, describe_gpu(device)))
    time = f" in about {describe_duration(training_seconds(option, summary, choice))}" if device else ""
    click.echo(f"Written: {target}")
    click.echo(f"{option.name}, rows of at most {option.max_length:,} tokens, {describe_epochs(choice.epochs)}{time}")
    click.echo(f"Look at the rows as the model sees them: qlora-phi3 inspect {target}")
    click.echo(f"Then train:                              qlora-phi3 run {target}")
