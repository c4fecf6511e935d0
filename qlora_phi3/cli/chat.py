"""`qlora-phi3 chat`: talk to a trained model, alone or beside its base."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_phi3.cli.options import base_option, check_sampling, complete_run, debug_option, sampling_options, silence_libraries
from qlora_phi3.cli.output import ask_number, echo
from qlora_phi3.errors import RunError, Terminated, UserError, printable, quoted
from qlora_phi3.units import format_count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qlora_phi3.inference import InferenceModel

HELP = """/system TEXT  set the system turn, and begin anew; without TEXT remove it
/reset        begin anew
/save FILE    write the conversation, but for empty, stopped and cut answers, as a row to train on (JSONL, messages)
/quit         end; so does Ctrl-D, and Ctrl-C twice
Alt-Enter begins a new line; Ctrl-C stops an answer."""
#: Columns that two answers beside each other need; runs that are offered where none is named.
MIN_WIDTH_COMPARE, OFFERED_RUNS = 100, 20
#: What ended an answer: Ctrl-C, or the model; and what stands for an answer without text.
STOPPED, ENDED, EMPTY = "stopped", "ended by itself", "(empty)"
#: Columns of a part of a word that is held back until the word ends and is known to fit in the line.
HELD_COLUMNS = 40
#: What is no answer is on stderr.
print_dim = partial(echo, dim=True, err=True)


@click.command()
@click.argument("run", metavar="[RUN]", required=False, shell_complete=complete_run)
@click.option("--system", metavar="TEXT", help="System turn: how the model is to answer. [default: that of all training rows]")
@click.option("--compare", is_flag=True, help="Show the answer of the untuned base beside that of the tuned model.")
@click.option("--prompt", metavar="TEXT", help="Print one answer and exit; with - the prompt is read from stdin.")
@base_option
@sampling_options(512)
@click.option("--seed", type=click.IntRange(0), help="Of drawn tokens. [default: another one each time]")
@debug_option
def chat(run: str | None, prompt: str | None, compare: bool, base: Path | None, **options: Any) -> None:
    """Talk to the model of RUN.

    \b
    Examples:
      qlora-phi3 chat runs/my-chats/latest
      qlora-phi3 chat my-chats --compare
      qlora-phi3 chat my-chats --prompt "What is a mutex?"
      qlora-phi3 chat microsoft/Phi-3-mini-4k-instruct

    RUN is a run, the name of a recipe (its newest run), a PEFT adapter, an export, or a base; without it the runs are listed.
    """
    from qlora_phi3.runfolder import RunFolder, find_model

    wanted = check_sampling(options)
    path = find_model(run if run is not None else _choose_run())
    if compare and not RunFolder(path).adapter.is_dir() and not (path / "adapter_config.json").is_file():
        raise UserError(f"{path} has no adapter: there is nothing to compare.", "Leave --compare out, or give a run.")
    if prompt is not None and not (prompt := _as_unicode(sys.stdin.read() if prompt == "-" else prompt).strip()):
        raise UserError("The prompt is empty.", "Write the question after --prompt.")

    from qlora_phi3.ui.console import Watcher

    with closing(Watcher()) as watcher:
        watcher.info("Starting torch, transformers and peft")
        silence_libraries()
        import torch

        from qlora_phi3.inference import load_for_inference, sampling

        watcher.info(f"Loading {path}")
        inference = load_for_inference(path, base=base, progress=watcher.progress)
    seed = torch.seed() % 2**62 if options["seed"] is None else options["seed"]
    system = _trained_system(path) if options["system"] is None else _as_unicode(options["system"])
    talk = Conversation(inference, sampling(**wanted), options["max_new_tokens"], seed, compare, system)
    if prompt is None:
        _converse(talk, str(path))
    elif talk.ask(prompt) == STOPPED:
        raise KeyboardInterrupt


def _trained_system(path: Path) -> str:
    """The system turn that every training row of a run had, which is printed; empty where there is none."""
    from qlora_phi3.runfolder import RunFolder

    with suppress(RunError):
        if system := str(RunFolder(path).read_report().get("data", {}).get("system", "")):
            shown = printable(" ".join(system.split()), longest_line=200)
            print_dim(f"System turn, as in all training rows (none: --system ''): {shown}")
        return system
    return ""


def _choose_run() -> str:
    """Let the user choose one of the newest runs by its number; RunError, which lists them, where there is no terminal."""
    from qlora_phi3.runfolder import NO_RUNS, RunFolder
    from qlora_phi3.ui.runs import list_summaries

    runs = [run for run in list_summaries(Path("runs")) if RunFolder(Path(run.path)).adapter.is_dir()][:OFFERED_RUNS]
    if not runs:
        raise RunError("No model is named, and there is no trained run under runs.", NO_RUNS)
    lines = []
    for number, run in enumerate(runs, start=1):
        before, after = run.eval_loss_before, run.eval_loss_after
        loss = "" if before is None or after is None else f"   held-out loss {before:.4f} -> {after:.4f}"
        lines.append(printable(f"{number:>3}  {run.path}   {run.status}{loss}"))
    shown = "\n".join(lines)
    if not _is_terminal():
        raise RunError(f"No run is named. The newest are:\n{shown}\n", f"Name one: qlora-phi3 chat {quoted(runs[0].path)}")
    click.echo(shown)
    return runs[ask_number("Number (Ctrl-C ends)", 1, len(lines)) - 1].path


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _as_unicode(text: str) -> str:
    """Text that a tokenizer takes: bytes that the terminal's encoding did not have are read as UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class WordWriter:
    """Writes an answer as it comes; on a terminal in lines that end between words, and without white space at its ends."""

    def __init__(self, console: "Console") -> None:
        self.columns = console.width if console.is_terminal else 0
        self.column, self.space, self.word, self.is_empty = 0, "", "", True

    def write(self, pieces: list[str], *, is_last: bool = False) -> None:
        """Write the last of the pieces; on a terminal the words that are known to be complete."""
        from rich.cells import cell_len

        *parts, self.word = re.findall(r"\s+|\S+", self.word + printable(pieces[-1])) or [""]
        if is_last or not self.columns or cell_len(self.word) > HELD_COLUMNS:
            parts, self.word = [*parts, self.word], ""
        if not self.columns:
            click.echo("".join(parts), nl=False)
            return
        for part in parts:
            if not part.strip():
                self.space += "" if self.is_empty else part
                continue
            if "\n" in self.space:
                self.column = 0
            elif self.space and self.column + cell_len(self.space + part) > self.columns:
                self.space, self.column = "\n", 0
            click.echo(self.space + part, nl=False)
            self.column += cell_len(self.space.rpartition("\n")[2] + part)
            self.space, self.is_empty = "", False


class Conversation:
    """The turns until now of "tuned" and, to `compare`, of "base", with the adapter disabled, which gets the same questions."""

    def __init__(
        self, inference: "InferenceModel", sampling: dict[str, Any], limit: int, seed: int, compare: bool, system: str
    ) -> None:
        self.inference, self.sampling, self.max_new_tokens = inference, sampling, limit
        self.seed, self.compare, self.system = seed, compare, system
        self.turns: dict[str, list[dict[str, str]]] = {}
        self.incomplete: set[int] = set()  #: Places in the turns of "tuned" of answers that Ctrl-C or a limit ended.

    def messages(self, side: str) -> list[dict[str, str]]:
        """The conversation of one side, with its system turn."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns.get(side, [])]

    def ask(self, question: str) -> str:
        """Print the answers to a question, each with a line of figures; returns the last of these lines."""
        from rich.console import Console
        from rich.live import Live

        console, answers = Console(highlight=False), list[tuple[str, str]]()
        beside = self.compare and console.is_terminal and console.width >= MIN_WIDTH_COMPARE
        # Below each other, the base's long answer comes last.
        sides = ("base", "tuned") if beside else ("tuned", "base") if self.compare else ("tuned",)
        width = console.width // 2 - 2
        for side in sides:
            if answers and answers[-1][1] == STOPPED:
                break
            messages = [*self.messages(side), {"role": "user", "content": question}]
            if beside:
                with Live(console=console, transient=True, auto_refresh=False) as live:

                    def show(pieces: list[str], live: Live = live) -> None:
                        live.update(_columns([*answers, ("".join(pieces), "")], width, console.height - 3), refresh=True)

                    answers.append(self._answer(side, messages, show))
                continue
            if self.compare:
                click.secho(f"{side}:", bold=True)
            writer = WordWriter(console)
            answers.append(self._answer(side, messages, writer.write))
            writer.write([""], is_last=True)
            click.echo("" if answers[-1][0].strip() or not (writer.columns or self.compare) else EMPTY)
            print_dim(answers[-1][1])
        if beside:
            console.print(_columns(answers, width))
        for side, (text, figures) in zip(sides, answers if len(answers) == len(sides) else (), strict=False):
            turns = self.turns.setdefault(side, [])
            if text.strip():
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
                self.incomplete |= {len(turns) - 1} if side == "tuned" and not figures.endswith(ENDED) else set()
        return answers[-1][1]

    def _answer(self, side: str, messages: list[dict[str, str]], show: Callable[[list[str]], None]) -> tuple[str, str]:
        """Generate the answer of one side; `show` is called with its pieces. Returns it with a line of figures.

        Ctrl-C stops the answer, which stays as far as it came.
        """
        import torch

        from qlora_phi3.inference import fit_messages, generate

        pieces, limit, started = list[str](), self.max_new_tokens, time.perf_counter()
        fitted = fit_messages(self.inference, messages, limit)
        if dropped := (len(messages) - len(fitted)) // 2:
            print_dim(f"The conversation is too long for the model: its first {dropped} questions are left out.")
        torch.manual_seed(self.seed + len(messages))

        def show_more(piece: str) -> None:
            pieces.append(piece)
            show(pieces)

        with self.inference.model.disable_adapter() if side == "base" else nullcontext():
            try:
                answer = generate(self.inference, fitted, max_new_tokens=limit, sampling=self.sampling, show=show_more)
            except Terminated:
                raise
            except KeyboardInterrupt:
                return "".join(pieces), STOPPED
        tokens, is_full = answer.num_tokens, answer.num_tokens < limit
        cut = "cut: the model has no more positions" if is_full else "cut at --max-new-tokens"
        speed = f"{tokens / (time.perf_counter() - started):.1f} tokens/s"
        ended = ENDED if answer.text.strip() else "an empty answer: it ended its turn at once"
        return answer.text, f"{format_count(tokens, 'token')}, {speed}, {ended if answer.ended_by_itself else cut}"


def _columns(answers: list[tuple[str, str]], width: int, most_lines: int = 0) -> "Table":
    """The answers of base and tuned beside each other, with their figures; with `most_lines` only the last lines of each."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table, cells = Table("base", "tuned", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold"), []
    for column in table.columns:
        column.width = width
    for text, figures in answers:  # which an answer in progress has not
        shown = printable(text.strip(), longest_line=sys.maxsize) or (EMPTY if figures else "")
        cells.append(Text("\n").join(Text(shown).wrap(Console(), width)[-most_lines:]))
    table.add_row(*cells)
    table.add_row(*(Text(figures, style="dim") for _, figures in answers))
    return table


def _converse(talk: Conversation, name: str) -> None:
    """Answer what the user types until they quit; the commands are in `HELP`."""
    read_input = _open_input()
    print_dim(f"{printable(name)}. /help lists the commands, Ctrl-D ends.")
    is_second = False  # of two Ctrl-C at the prompt: the first may have come too late for an answer
    while True:
        at_prompt = True
        try:
            text = _as_unicode(read_input()).strip()
            at_prompt = is_second = False
            command, _, rest = text.partition(" ")
            if command == "/quit":
                return
            if re.fullmatch(r"/\w+", command):
                print_dim(printable(_obey(talk, command, rest.strip())))
            elif text.lower() in ("quit", "exit"):
                print_dim("To end, type /quit or press Ctrl-D.")
            elif text:
                talk.ask(text)
        except (EOFError, Terminated):
            return
        except KeyboardInterrupt:  # while an answer is generated, `talk` stops it
            if is_second:
                return
            is_second = at_prompt
            print_dim("\nCtrl-D or /quit ends the chat; so does Ctrl-C now." if at_prompt else STOPPED)
        except UserError as error:
            echo(f"Error: {error}", err=True)


def _obey(talk: Conversation, command: str, rest: str) -> str:
    """Carry out a command; returns a line about it. RunError where /save cannot write; it never replaces a file."""
    import json

    from qlora_phi3.files import atomic_write

    if command == "/save" and talk.turns.get("tuned") and rest:
        path = Path(rest).expanduser()
        if path.exists():
            raise RunError(f"{path} exists.", "Give another name.")
        turns = talk.turns["tuned"]
        kept = [turn for place, turn in enumerate(turns) if place | 1 not in talk.incomplete]
        left_out = f"{format_count((len(turns) - len(kept)) // 2, 'question')} left out, whose answer was stopped or cut"
        if not kept:
            return f"Nothing is written: {left_out}."
        row = {"messages": [*talk.messages("tuned")[: -len(turns)], *kept]}
        atomic_write(path, json.dumps(row, ensure_ascii=False) + "\n", hint="{cause}, or give another name.")
        return f"Written: {path}{f' ({left_out})' if len(kept) < len(turns) else ''}"
    if command == "/save":
        return "There is nothing to save yet." if rest else "Write: /save FILE"
    if command not in ("/system", "/reset"):
        return HELP if command == "/help" else f"There is no command {command}; /help lists them."
    talk.turns.clear()
    talk.incomplete.clear()
    talk.system = rest if command == "/system" else talk.system
    return f"A new conversation, {'with' if talk.system else 'without'} a system turn."


def _open_input() -> Callable[[], str]:
    """A function that reads what the user types: by prompt_toolkit on a terminal, else line by line."""
    if not _is_terminal():
        return input
    from qlora_phi3.files import user_state_dir

    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    except ModuleNotFoundError:
        print_dim("For a history, and messages of several lines: pip install 'qlora-phi3[chat]'")
        return partial(input, "> ")
    keys, path = KeyBindings(), user_state_dir() / "chat-history"
    history: History = InMemoryHistory()
    with suppress(OSError):  # a home that cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(path)

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if not event.current_buffer.text:
            event.app.exit(exception=KeyboardInterrupt)
        event.current_buffer.reset()

    session: PromptSession[str] = PromptSession("> ", history=history, key_bindings=keys)
    return session.prompt
