"""`qlora-phi3 init`: from a file of chats to a commented recipe that fits this computer's GPU."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_phi3.cli.options import check_new_file, create_file, debug_option, named_gpu, watching
from qlora_phi3.cli.output import ask, ask_number, echo, print_rich
from qlora_phi3.errors import UserError, printable, quoted, wrap_words
from qlora_phi3.units import describe_duration, describe_epochs, format_count

if TYPE_CHECKING:
    from qlora_phi3.hardware.gpu import Gpu
    from qlora_phi3.memory.proposal import DataSummary, ModelOption, TrainingChoice
    from qlora_phi3.ui.console import Watcher

EXAMPLE = "example-chats.jsonl"
DOES_NOT_FIT = 3
LARGEST_EPOCHS = 100


@click.command()
@click.argument("names", metavar="[DATA]", nargs=-1)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="The recipe to write. [default: DATA.toml, beside it]"
)
@click.option("--model", metavar="NAME", help="Take this model, a hub id or a folder, instead of comparing several.")
@click.option("--gpu", metavar="NAME", help="Plan for a GPU that is not here: --gpu 'RTX 4070 Laptop'.")
@click.option("--vram", metavar="SIZE", help="Plan for any GPU of a size: --vram 12GB.")
@click.option("--question", metavar="COLUMN", help="Column of the questions, where it has a name of its own.")
@click.option("--answer", metavar="COLUMN", help="Column of the answers.")
@click.option("--yes", is_flag=True, help="Ask nothing, and take what is proposed.")
@debug_option
@click.pass_context
def init(ctx: click.Context, /, names: tuple[str, ...], out: Path | None, yes: bool, **named: str | None) -> None:
    """Write a recipe for DATA: which model fits, how long its rows are, how often to go over them, each with its reason.

    \b
    Examples:
      qlora-phi3 init
      qlora-phi3 init my-chats.jsonl
      qlora-phi3 init my-chats.jsonl --vram 8GB --yes
      qlora-phi3 init support.csv --question customer_text --answer our_reply

    DATA is a .jsonl, .json, .csv or .parquet file of chats or questions and answers (qlora-phi3 docs data). Without it a file of
    eight chats is written to look at. Nothing is downloaded, and no file is overwritten. Exit code 3: no model fits the GPU.
    """
    if not names:
        _write_example(out, named)
        return
    from dataclasses import replace

    from qlora_phi3.hardware.gpu import choose_gpu

    data, target = _check_data(names), _name_recipe(names[0], out)
    asks = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    columns = _choose_columns(data, named["question"], named["answer"], asks)
    device = named_gpu(named["gpu"], named["vram"]) or choose_gpu("auto")
    with watching() as watcher:
        watcher.info(f"Reading {data}")
        from qlora_phi3.memory.proposal import EPOCHS_RULE, choose_training, propose, read_data

        summary = read_data(data, columns, Path(), watcher.progress)
        choice = choose_training(len(summary.lengths))
        options = _compare(named["model"], summary, choice, device, watcher)
        option = _shorten(propose(options, has_tools=summary.has_tools), summary, choice, device, watcher)
    options = [option if each.name == option.name else each for each in options]
    _show(summary, options, option, device)
    if asks and len(options) > 1:
        option = _ask_model(options, option, partial(_shorten, summary=summary, choice=choice, device=device))
    if option.report is not None and not option.report.fits:
        echo(f"No recipe is written: {option.name} does not fit. Try another model or GPU.", err=True)
        ctx.exit(DOES_NOT_FIT)
    if asks:
        echo(f"Epochs by the rows, of which there are {len(summary.lengths):,}: {EPOCHS_RULE}.")
        choice = replace(choice, epochs=ask_number("Epochs, passes over the rows", choice.epochs, LARGEST_EPOCHS))
        target = out or ask("Write the recipe to", str(target), value_proc=_read_target)
    _write(target, summary, option, choice, device)


def _check_data(names: Sequence[str]) -> str:
    """The name of the data, unless it is no data, which is refused before anything else is looked at: UserError."""
    data, path = names[0], Path(names[0])
    if len(names) > 1:
        pattern = path.parent / f"*{path.suffix}"
        raise UserError("DATA is one name.", f"For several files put a pattern in quotes: qlora-phi3 init '{pattern}'")
    if path.suffix.lower() == ".toml":
        raise UserError(f"{data} is a recipe, not data.", f"Train with it: qlora-phi3 run {quoted(data)}")
    if not path.resolve().name:
        raise UserError(f"{data} is the whole file system, not a folder of data.", "Name a file, or a folder of files.")
    from qlora_phi3.data.sources import open_local
    from qlora_phi3.recipe.load import find_path

    if find_path(data, Path()) is None:
        open_local(data, Path())  # it says what is missing; a pattern may find files
    return data


def _name_recipe(data: str, out: Path | None) -> Path:
    """The recipe's file, which is not there yet, and can be written."""
    path = Path(data)
    if path.name in ("", ".."):
        path = Path(os.path.relpath(path.resolve().parent), path.resolve().name)
    target = out or path.with_name(f"{path.name.partition('.')[0].replace('*', '') or 'recipe'}.toml")
    check_new_file(target, "--out" if out else "")
    return target


def _read_target(text: str) -> Path:
    """The file that a person types; asked again where a recipe cannot be written there."""
    try:
        check_new_file(Path(text), "")
    except UserError as error:
        message = wrap_words(f"Error: {error}", shutil.get_terminal_size().columns)  # click prints it as it is
        raise click.BadParameter(message.removeprefix("Error: ")) from error
    return Path(text)


def _write_example(out: Path | None, named: Mapping[str, str | None]) -> None:
    """Write the eight chats that ship; UserError where the file exists, or `out` names a recipe."""
    from importlib.resources import files

    if out is not None:
        raise UserError(f"--out {out} is for a recipe, and no DATA is named.", "Leave --out out for a file of example chats.")
    target = Path(EXAMPLE)
    words = " ".join([EXAMPLE, *(f"--{name} {quoted(named[name])}" for name in ("model", "gpu", "vram") if named[name])])
    if target.exists():
        raise UserError(f"{target} exists already.", f"Go on with it: qlora-phi3 init {words}")
    create_file(target, (files("qlora_phi3") / EXAMPLE).read_text(encoding="utf-8"))
    echo(f"Written: {target}, eight chats, one a line. Your own file can look like this; other formats: qlora-phi3 docs data")
    click.echo(f"Next: qlora-phi3 init {words}")


def _choose_columns(data: str, question: str | None, answer: str | None, asks: bool) -> dict[str, str]:
    """[data] fields for a file of questions and answers whose columns have names of their own; empty for any other file.
    DataError where it is missing or unreadable.
    """
    from qlora_phi3.memory.proposal import unknown_columns

    if bool(question) != bool(answer):
        raise UserError("--question and --answer belong together.", "Name both columns.")
    if question is not None and question == answer:
        raise UserError(f"--question and --answer are both {question!r}.", "Name two columns.")
    columns = unknown_columns(data, Path())
    if question is not None and answer is not None:
        for name in (question, answer):
            if columns and name not in columns:
                raise UserError(f"{data} has no column {name!r}.", f"Its columns are {', '.join(columns)}.")
        return {"instruction": question, "output": answer}
    if len(columns) < 2 or not asks:
        return {}
    click.echo(f"The columns of {data}: {', '.join(columns)}")
    asked = ask("Which one is the question", type=click.Choice(columns), show_choices=False)
    others = click.Choice([column for column in columns if column != asked])
    return {"instruction": asked, "output": ask("Which one is the answer", type=others, show_choices=False)}


def _compare(
    model: str | None, summary: "DataSummary", choice: "TrainingChoice", device: "Gpu | None", watcher: "Watcher"
) -> "list[ModelOption]":
    """The models for the rows, each simulated on the GPU; without a GPU the smallest one."""
    from qlora_phi3.memory.proposal import MODELS, SMALLEST_MODEL, model_option, simulate_option

    names = [model] if model else list(MODELS) if device else [SMALLEST_MODEL]
    watcher.info("Starting torch, transformers and peft")
    options = [model_option(name, summary, Path(), watcher.progress) for name in names]
    if device is not None:
        for number, option in enumerate(options):
            watcher.progress("Simulating the training of each model", number, len(options))
            options[number] = simulate_option(option, summary, choice, device, watcher.info)
    return options


def _shorten(
    option: "ModelOption", summary: "DataSummary", choice: "TrainingChoice", device: "Gpu | None", watcher: "Watcher"
) -> "ModelOption":
    """The option; one that does not fit gets the longest `max_length` that does."""
    from qlora_phi3.memory.proposal import shorten_option

    if device is None or option.report is None or option.report.fits:
        return option
    watcher.info(f"{option.name}: searching the longest row that fits")
    return shorten_option(option, summary, choice, device, watcher.info)


def _ask_model(options: "Sequence[ModelOption]", proposed: "ModelOption", shorten: "Callable[..., ModelOption]") -> "ModelOption":
    """Let a person choose a model by its number, until it fits."""
    while True:
        number = ask_number("Model", options.index(proposed) + 1, len(options))
        with watching() as watcher:
            option = shorten(options[number - 1], watcher=watcher)
        if option.report is None or option.report.fits:
            return option
        click.echo(f"{option.name} does not fit. Choose another one; Ctrl-C ends.")


def _show(summary: "DataSummary", options: "Sequence[ModelOption]", chosen: "ModelOption", device: "Gpu | None") -> None:
    """The rows, and the table of models."""
    from qlora_phi3.data.formats import TITLES
    from qlora_phi3.data.report import describe_unread
    from qlora_phi3.memory.proposal import BYTES_PER_TOKEN, describe_gpu
    from qlora_phi3.ui.vram import show_models

    lengths, counted = chosen.lengths, "" if chosen.is_exact else f", estimated at {BYTES_PER_TOKEN} bytes a token"
    echo(f"{format_count(len(lengths), 'usable row')} read as {TITLES.get(summary.format, summary.format)}")
    if summary.format == "text":
        echo("That is plain text: the model learns to continue it, not to answer. Chats have questions and answers.")
    echo(f"Tokens: half have at most {lengths[(len(lengths) - 1) // 2]:,}, the longest {lengths[0]:,}{counted}")
    if summary.data.fields:
        echo("Columns: " + ", ".join(f"{theirs!r} is the {ours}" for ours, theirs in summary.data.fields.items()))
    if summary.unread:
        echo(printable(describe_unread(summary.unread)))
    if summary.duplicates:
        echo(f"  {format_count(summary.duplicates, 'row')} with the words of an earlier row")
    for count in summary.skipped[:3]:
        echo(printable(f"  {format_count(count.rows, 'row')} cannot be used: {count.reason} (first: {count.where[0]})"))
    echo(f"Planned for {describe_gpu(device)}")
    if device is None:
        echo("A run on the CPU is for trying things out: it is far slower. --vram 12GB plans for a GPU of that size.")
        echo(f"The model: {chosen.name} (--model names another one)")
        return
    echo("")
    print_rich(lambda console: show_models(console, options))
    echo("\nMemory is simulated; speed and time are estimated. The time is of the training alone.\n")


def _write(target: Path, summary: "DataSummary", option: "ModelOption", choice: "TrainingChoice", device: "Gpu | None") -> None:
    """Write the recipe, and name the next commands."""
    from qlora_phi3.family import is_hub_id
    from qlora_phi3.memory.cost import count_weights
    from qlora_phi3.memory.proposal import choose_training, describe_gpu, recipe_text

    check_new_file(target, "")
    create_file(target, recipe_text(summary, option, choice, target, describe_gpu(device)))
    time = ""
    if option.report is not None and option.report.run_seconds is not None:
        share = choice.epochs / choose_training(len(option.lengths)).epochs  # of the epochs that were simulated
        time = f" in about {describe_duration(share * option.report.run_seconds)}"
    echo(f"Written: {target}")
    echo(f"{option.name}, rows of at most {option.max_length:,} tokens, {describe_epochs(choice.epochs)}{time}")
    if is_hub_id(option.name) and not Path(option.name).is_dir():
        model = option.architecture
        size = count_weights(model) + (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
        echo(f"The first run downloads the model, about {2 * size / 1e9:.0f} GB, unless it is here already.")
    echo(f"Look at the rows as the model sees them: qlora-phi3 inspect {quoted(target)}")
    echo(f"Then train:                              qlora-phi3 run {quoted(target)}")
