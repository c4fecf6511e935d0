"""`qlora-phi3 chat`: talk to a trained model, alone or beside its base."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_phi3.cli.options import check_sampling, debug_option, sampling_options, silence_libraries
from qlora_phi3.errors import RunError, UserError, printable
from qlora_phi3.files import user_state_dir
from qlora_phi3.runfolder import find_model, list_runs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qlora_phi3.inference import Answer, InferenceModel, Sampling

HELP = """/system TEXT  set the system turn, and begin anew; without TEXT remove it
/reset        begin anew
/save FILE    write the conversation as a row to train on (JSONL, messages)
/quit         end; so does Ctrl-D
Alt-Enter, or \\ at the end of a line, begins a new line. Ctrl-C stops an answer."""
#: Columns that two answers beside each other need.
MIN_WIDTH_COMPARE = 100
#: Runs that are offered where none is named.
OFFERED_RUNS = 20


@click.command()
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--system", metavar="TEXT", default="", help="System turn: how the model is to answer.")
@click.option("--compare", is_flag=True, help="Show the answer of the untuned base beside that of the tuned model.")
@click.option("--prompt", metavar="TEXT", help="Print one answer and exit; with - the prompt is read from stdin.")
@sampling_options(512)
@click.option("--seed", type=click.IntRange(0), help="Of drawn tokens. [default: another one each time]")
@click.option("--4bit", "load_in_4bit", is_flag=True, help="Quantize a base or an export; a run is as it was trained.")
@debug_option
@click.pass_context
def chat(ctx: click.Context, /, run: str | None, prompt: str | None, compare: bool, **options: Any) -> None:
    """Talk to the model of RUN.

    \b
    Examples:
      qlora-phi3 chat runs/chat/latest
      qlora-phi3 chat chat --compare
      qlora-phi3 chat chat --prompt "What is a mutex?"
      qlora-phi3 chat microsoft/Phi-3-mini-4k-instruct --4bit

    RUN is a run, the name of a recipe (its newest run), a PEFT adapter, an export, or a base; without it the runs are listed.
    /help in the conversation lists its commands.
    """
    sampling = check_sampling(*(options.pop(name) for name in ("temperature", "top_p", "top_k")))
    path = find_model(run if run is not None else _choose_run())
    if prompt is not None:
        prompt = sys.stdin.read() if prompt == "-" else prompt
        if not (prompt := _as_unicode(prompt).strip()):
            raise UserError("The prompt is empty.", "Write the question after --prompt.")

    from qlora_phi3.ui.console import Watcher

    watcher = Watcher()
    try:
        watcher.info("Starting torch, transformers and peft")
        if not ctx.meta.get("debug"):
            silence_libraries()
        import torch

        from qlora_phi3.inference import Sampling, load_for_inference

        watcher.info(f"Loading {path}")
        inference = load_for_inference(path, load_in_4bit=options["load_in_4bit"])
    finally:
        watcher.close()
    sides = ("base", "tuned") if compare else ("tuned",)
    if compare and not hasattr(inference.model, "disable_adapter"):
        raise UserError(
            f"{path} has no adapter: there is nothing to compare.", "Give a run or an adapter, or leave --compare out."
        )
    seed = torch.seed() if options["seed"] is None else options["seed"]
    system = _as_unicode(options["system"])
    talk = Conversation(inference, Sampling(**sampling), options["max_new_tokens"], seed % 2**62, sides, system)
    if prompt is None:
        _converse(talk, str(path))
    else:
        talk.ask(prompt, stops=False)


def _choose_run() -> str:
    """Let the user choose one of the newest runs by its number; RunError, which lists them, where there is no terminal."""
    runs = list_runs(Path("runs"))[::-1]
    if not runs:
        raise RunError("No model is named, and there is no run under runs.", "Train one: qlora-phi3 run RECIPE.toml")
    lines = []
    for number, run in enumerate(runs[:OFFERED_RUNS], start=1):
        report: dict[str, Any] = {}
        with suppress(RunError):
            report = run.read_report()
        before, after = report.get("eval_loss_before"), report.get("eval_loss_after")
        loss = "" if before is None or after is None else f"   held-out loss {before:.4f} -> {after:.4f}"
        lines.append(printable(f"{number:>3}  {run.path}   {report.get('status', 'no report')}{loss}"))
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        shown = "\n".join(lines)
        raise RunError(f"No run is named. The newest are:\n{shown}\n", f"Name one: qlora-phi3 chat {runs[0].path}")
    click.echo("\n".join(lines))
    try:
        number = click.prompt("Number of the run", type=click.IntRange(1, len(lines)), default=1)
    except click.Abort:
        raise KeyboardInterrupt from None
    return str(runs[number - 1].path)


def _as_unicode(text: str) -> str:
    """Text that a tokenizer takes: bytes that the terminal's encoding did not have are read as UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclass(slots=True)
class Conversation:
    """The turns so far, for each of `sides`, which answer the same questions: "base", with the adapter disabled, and "tuned"."""

    inference: "InferenceModel"
    sampling: "Sampling"
    max_new_tokens: int
    seed: int
    sides: tuple[str, ...]
    system: str
    turns: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def messages(self, side: str) -> list[dict[str, str]]:
        """The conversation of one side, with its system turn."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns.get(side, [])]

    def ask(self, question: str, *, stops: bool = True) -> None:
        """Print the answers to a question, and what is to be known of each.

        Args:
            stops: Ctrl-C stops an answer, which stays as far as it came; else it ends the program.
        """
        from rich.console import Console

        console, answers = Console(highlight=False), list[tuple[str, str]]()
        beside = len(self.sides) > 1 and console.is_terminal and console.width >= MIN_WIDTH_COMPARE
        for side in self.sides:
            messages = [*self.messages(side), {"role": "user", "content": question}]
            if beside:
                answers.append(self._answer_beside(side, messages, answers, console, stops))
            else:
                if len(self.sides) > 1:
                    click.secho(f"{side}:", bold=True)
                text, figures = self._answer(side, messages, lambda piece: click.echo(piece, nl=False), stops)
                click.echo()
                _print_dim(figures)
                answers.append((text, figures))
        if beside:
            console.print(_columns(console, self.sides, answers))
        for side, (text, _) in zip(self.sides, answers, strict=True):
            new = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            self.turns.setdefault(side, []).extend(new if text else [])

    def _answer_beside(
        self, side: str, messages: list[dict[str, str]], before: list[tuple[str, str]], console: "Console", stops: bool
    ) -> tuple[str, str]:
        """Answer in a column of its own that is drawn anew with each piece, next to the answers `before`."""
        from rich.live import Live

        pieces: list[str] = []
        with Live(console=console, transient=True, auto_refresh=False) as live:

            def show(piece: str) -> None:
                pieces.append(piece)
                live.update(_columns(console, self.sides, [*before, ("".join(pieces), "")], console.height - 3), refresh=True)

            return self._answer(side, messages, show, stops)

    def _answer(self, side: str, messages: list[dict[str, str]], show: Callable[[str], None], stops: bool) -> tuple[str, str]:
        """Generate the answer of one side; returns it with a line of figures."""
        import torch

        from qlora_phi3.inference import fit_messages, generate

        pieces, started = list[str](), time.perf_counter()
        fitted = fit_messages(self.inference, messages, self.max_new_tokens)
        if dropped := (len(messages) - len(fitted)) // 2:
            _print_dim(
                f"The conversation is longer than the model's positions: the oldest turns are left out ({dropped} of them)."
            )
        torch.manual_seed(self.seed + len(messages))
        with self.inference.model.disable_adapter() if side == "base" else nullcontext():
            stream = generate(self.inference, fitted, max_new_tokens=self.max_new_tokens, sampling=self.sampling)
            try:
                with closing(stream):
                    answer = _read(stream, pieces, show)
            except KeyboardInterrupt:
                if not stops:
                    raise
                return "".join(pieces), "stopped"
        seconds = time.perf_counter() - started
        end = "ended by itself" if answer.ended_by_itself else "cut at --max-new-tokens"
        if not answer.ended_by_itself and answer.num_tokens < self.max_new_tokens:
            end = "cut: the model has no more positions"
        return answer.text, f"{answer.num_tokens} tokens, {answer.num_tokens / seconds:.1f} tokens/s, {end}"


def _read(stream: "Generator[str, None, Answer]", pieces: list[str], show: Callable[[str], None]) -> "Answer":
    """Show each piece of a generated text, and keep it in `pieces`; returns what the generator returns."""
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        pieces.append(piece)
        show(printable(piece))


def _columns(console: "Console", sides: tuple[str, ...], answers: list[tuple[str, str]], most_lines: int = 0) -> "Table":
    """Answers beside each other, each with its line of figures; with `most_lines` only their last lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, expand=True, padding=(0, 2, 0, 0), header_style="bold")
    cells = []
    for side in sides:
        table.add_column(side, ratio=1)
    for text, _ in answers:
        parts = (printable(text[start : start + 1000]) for start in range(0, len(text), 1000))  # which cuts no short line
        lines = Text("".join(parts)).wrap(console, console.width // len(sides) - 2)
        cells.append(Text("\n").join(lines[-most_lines:]))
    table.add_row(*cells)
    table.add_row(*(Text(figures, style="dim") for _, figures in answers))
    return table


def _print_dim(line: str) -> None:
    """Print a line about the conversation, on stderr: stdout has the answers alone."""
    sys.stdout.flush()
    click.secho(printable(line), dim="NO_COLOR" not in os.environ, err=True)


def _converse(talk: Conversation, name: str) -> None:
    """Answer what the user types until they quit; the commands are in `HELP`."""
    read_input = _open_input()
    _print_dim(f"{name}. /help lists the commands, Ctrl-D ends.")
    while True:
        try:
            text = _as_unicode(read_input()).strip()
        except (EOFError, KeyboardInterrupt):
            return
        word, _, rest = text.partition(" ")
        if word == "/quit":
            return
        try:
            if re.fullmatch(r"/\w+", word):
                _print_dim(_obey(talk, word, rest.strip()))
            elif text:
                talk.ask(text)
        except UserError as error:
            click.echo(f"Error: {error}", err=True)


def _obey(talk: Conversation, command: str, rest: str) -> str:
    """Carry out a command other than /quit; returns a line about it."""
    if command == "/help":
        return HELP
    if command == "/save":
        return _save(talk, rest)
    if command not in ("/reset", "/system"):
        return f"There is no command {command}; /help lists them."
    talk.turns.clear()
    if command == "/system":
        talk.system = rest
        return "The system turn is set; a new conversation begins." if rest else "No system turn; a new conversation begins."
    return "A new conversation begins."


def _save(talk: Conversation, name: str) -> str:
    """Write the tuned side's conversation as a row of the format `messages`; never over a file."""
    if not name or not talk.turns.get("tuned"):
        return "Write /save FILE." if not name else "There is nothing to save yet."
    path = Path(name).expanduser()
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"messages": talk.messages("tuned")}, ensure_ascii=False) + "\n")
    except FileExistsError:
        return f"{path} exists; give another name."
    except (OSError, ValueError, RuntimeError) as error:
        return f"{path} cannot be written: {getattr(error, 'strerror', None) or error}."
    return f"Written: {path}"


def _open_input() -> Callable[[], str]:
    """A function that reads what the user types: by prompt_toolkit on a terminal, else line by line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    except ModuleNotFoundError:
        _print_dim("With a history and several lines: pip install 'qlora-phi3[chat]'")
        return _read_lines
    keys = KeyBindings()
    history: History = InMemoryHistory()
    with suppress(OSError):  # a home that cannot be written
        path = user_state_dir() / "chat-history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(path)

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    session: PromptSession[str] = PromptSession("> ", history=history, key_bindings=keys, multiline=True)
    return session.prompt


def _read_lines() -> str:
    """One message from the terminal; a line that ends with a backslash goes on in the next one."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  "))
    return "\n".join(lines)
