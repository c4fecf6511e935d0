"""Write the pages of docs/ that are made from the program: `python scripts/make_docs.py`.

docs/recipe.md has every key, docs/commands.md the help of every command, and docs/errors.md every message with what to do about
it. A test compares the three with the program.
"""

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click

from qlora_phi3 import errors
from qlora_phi3.cli.main import main
from qlora_phi3.recipe.edit import format_toml
from qlora_phi3.recipe.load import recipe_schema
from qlora_phi3.recipe.messages import DELETED, REPLACED
from qlora_phi3.recipe.schema import TABLES

ROOT = Path(__file__).resolve().parent.parent
RECIPE_HEAD = """# Every key of a recipe

Made from the program by `scripts/make_docs.py`; `qlora-phi3 recipe schema` prints the same for an editor. Names are those
of LoraConfig (`[lora]`), BitsAndBytesConfig (`[quantization]`), TrainingArguments and SFTConfig (`[training]`). `batch_size`, the
rows of an optimizer step, `save_minutes`, `recover_from_divergence`, `report_samples`, and the keys of `[data]` and `[memory]`
are our own.

A relative path in `[model]` or `[data]` is looked for in the folder of the recipe, then in the working directory. `output_dir` is
relative to the working directory.
"""
RECIPE_TAIL = """
## Divergence

A step diverges if its loss or its gradient is not finite; if its gradient norm before clipping is more than 1,000 times the
largest of the run so far, and more than 1,000; or if it is the fifth in a row whose loss is more than 1 nat above the largest
loss of the run's first 20 steps and of all steps more than 20 steps ago. The last two begin after 20 steps. A step whose loss
is high once, as with a hard row in a small batch, is trained as usual.

With `recover_from_divergence`, the adapter and the optimizer go back to a copy of the last good step (at most five steps before
the first suspicious one), and the learning rate is halved from there on. The step counter goes on: the rows of the steps that
diverged are skipped in this epoch, and what the steps between the copy and them had learned is undone. metrics.jsonl and
report.json list the event with the rows. After five recoveries the next divergence ends the run with exit code 2; its last good
state is the newest checkpoint and the adapter. The copy needs computer memory, not GPU memory: trained parameters times 4
bytes, plus the state of the optimizer (8 bytes with `adamw_torch`, 2 with 8-bit AdamW). A checkpoint holds it too, and is about
twice as large.

## Early stopping

With `early_stopping_patience = 3` training ends at the third evaluation in a row whose loss is not lower than the lowest before,
and the adapter of the lowest is saved, also where training goes on to its last step. It lies in the computer's memory (trained
parameters times 4 bytes) and in every checkpoint, so that a resumed run ends in the same adapter; no checkpoint of that step is
needed. The evaluation before the first step does not count. report.json has the reason ("stopped early after step 120; best step
90"), and its `eval_loss_after` is that of the saved adapter. `load_best_model_at_end` saves the same adapter and ends no run.

## Starts that change the base

PiSSA, OLoRA and CorDA move a part of each weight into the adapter and keep the rest, which is quantized anew in 4 bit. PEFT 0.21
refuses PiSSA on 4-bit weights, and OLoRA quantizes what is left again. The adapter then fits neither the base's own files nor the
4-bit base that others load, so that no export could be compared with what was trained: `init_lora_weights` refuses these names.
`"loftq"` has the same aim, a smaller error of quantization at the start, and leaves the base as it is: an ordinary LoRA, to be
merged onto the 4-bit weights (`--onto nf4`; `auto` measures it). On the unquantized base it would correct what is not wrong.

## Trackers

`report_to = "tensorboard"`, `"wandb"`, `"mlflow"`, `"trackio"` or a list: `pip install 'qlora-phi3[wandb]'` and so on. They get
loss, learning rate, gradient norm, tokens a second and the held-out loss, with the step, from before the first step to after the
last. A resumed run goes on under its name, `<recipe>-<time>`. TensorBoard writes to `tensorboard/` in the run; the others go
to the project `qlora-phi3` unless the environment names another (`WANDB_PROJECT`, `MLFLOW_EXPERIMENT_NAME`). A tracker that is
not installed, or cannot start, is an error before the first step; one that fails later is left out with a note. The settings that
transformers sends go along, the paths of the base and of the run among them, and no token. What the run prints is not sent.
"""


def render_recipe() -> str:
    """The page as Markdown: a table of key, default and meaning for each table of the recipe."""
    parts = [RECIPE_HEAD]
    definitions = recipe_schema()["$defs"]
    for table, model in TABLES.items():
        described = definitions[model.__name__]
        parts.append(f"\n## [{table}]\n\n{described['description']}\n\n| key | default | meaning |\n|---|---|---|\n")
        for key, field in model.model_fields.items():
            if field.is_required():
                default = "must be given"
            elif field.default_factory is not None or field.default is None:
                default = ""
            else:
                default = f"`{format_toml(model.model_construct().model_dump()[key])}`"
            meaning = described["properties"][key].get("description", "").replace("|", "\\|")
            parts.append(f"| `{key}` | {default} | {meaning} |\n")
    return "".join([*parts, RECIPE_TAIL])


COMMANDS_HEAD = """# Every command

Made from the program by `scripts/make_docs.py`: what `--help` prints. `RUN` is the directory of a run, `runs/NAME/latest`, or the
name of a recipe that has runs: its newest one. Completion in a shell: add one of these lines to its start-up file.

```
eval "$(_QLORA_PHI3_COMPLETE=bash_source qlora-phi3)"    # ~/.bashrc
eval "$(_QLORA_PHI3_COMPLETE=zsh_source qlora-phi3)"     # ~/.zshrc
_QLORA_PHI3_COMPLETE=fish_source qlora-phi3 | source     # ~/.config/fish/completions/qlora-phi3.fish
```
"""


def render_commands() -> str:
    """The page as Markdown: the help of every command and of every command in a group."""
    parts = [COMMANDS_HEAD]

    def add(command: click.Command, context: click.Context) -> None:
        command._help_option = None  # click keeps the one of an earlier context, which may have lacked -h
        parts.append(f"\n## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n")
        for name in command.list_commands(context) if isinstance(command, click.Group) else ():
            child = command.get_command(context, name)
            add(child, click.Context(child, parent=context, info_name=name, terminal_width=100, max_content_width=100))

    add(main, click.Context(main, info_name="qlora-phi3", terminal_width=100, max_content_width=100, **main.context_settings))
    return "".join(parts)


ERRORS_HEAD = """# Every error, and what to do about it

Made from the source by `scripts/make_docs.py`. Search this page for a part of the message that you see. `{...}` stands for what
differs: a path, a number, a name. Exit codes: 2 bad input, 3 does not fit, 4 cannot tell, 5 an export differs from what was
trained, 130 stopped by Ctrl-C. `--debug` shows the traceback. `qlora-phi3 recipe check` lists all problems of a recipe at once.
"""
#: Sections of the page: the first part of a module's path below the package, and its heading.
SECTIONS = {
    "recipe": "Recipe", "data": "Data", "family": "Model", "model": "Model", "hardware": "GPU and memory",
    "memory": "GPU and memory", "training": "Training", "runfolder": "Training", "inference": "Using a model",
    "evaluation": "Using a model", "adapters": "Adapters", "export": "Export", "cli": "Command line",
}  # fmt: skip
ERROR_CLASSES = {
    name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.UserError)
}


COMPUTED = re.compile("{.*?}")
Texts = dict[str, list[ast.expr]]


def render_errors() -> str:
    """The page as Markdown: for each part of the program a table of message and hint."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "qlora_phi3").rglob("*.py"))}
    shared: Texts = defaultdict(list)  # constants of modules, and what functions return or yield
    for tree in trees.values():
        for name, value in [*find_assignments([node for node in tree.body if isinstance(node, ast.Assign)]), *find_results(tree)]:
            shared[name].append(value)
    rows: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for path, tree in trees.items():
        section = SECTIONS.get(path.relative_to(ROOT / "qlora_phi3").parts[0].removesuffix(".py"), "General")
        for message, hints in find_errors(tree, shared, path):
            rows[section][as_cell(message)].update(dict.fromkeys(hints))
    parts = [ERRORS_HEAD]
    for section in [*dict.fromkeys(SECTIONS.values()), "General"]:
        parts.append(f"\n## {section}\n\n| message | what to do |\n|---|---|\n")
        for message, hints in sorted(rows[section].items(), key=lambda row: row[0].lower()):
            parts.append(f"| {message} | {as_cell(' / '.join(hints))} |\n")
    parts.append("\n## Keys of other tools and of older versions\n\n| key in a recipe | message |\n|---|---|\n")
    deleted = {key for keys in DELETED.values() for key in keys.split()}
    parts += [f"| `{key}` | {as_cell(text)} |\n" for key, text in sorted(REPLACED.items()) if key not in deleted]
    parts += [f"| {', '.join(f'`{key}`' for key in sorted(keys.split()))} | {reason} |\n" for reason, keys in DELETED.items()]
    return "".join(parts)


def find_assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Every name that is assigned in these statements, or in the blocks inside them, with its value."""
    for node in (found for statement in body for found in ast.walk(statement)):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.NamedExpr | ast.For):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value = node.iter if isinstance(node, ast.For) else node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple):
                values = (
                    value.elts
                    if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
                    else [value] * len(target.elts)
                )
                pairs = list(zip(target.elts, values, strict=True))
            yield from ((name.id, text) for name, text in pairs if isinstance(name, ast.Name))


def find_results(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every function's name with each value that it returns or yields."""
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Return | ast.Yield) and node.value is not None:
                yield function.name, node.value


def find_errors(tree: ast.Module, shared: Texts, path: Path) -> Iterator[tuple[str, list[str]]]:
    """The message of every error that a module can raise, with the hints that it can have.

    A call of an error's class has both as its first two arguments, and one of `memory_errors` as its second and third. What
    `contradictions` yields are messages about a recipe.

    Raises:
        SystemExit: a message is not a text of the source that can be found; people could not look it up.
    """
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        local: Texts = defaultdict(list)
        for name, value in find_assignments(function.body):
            local[name].append(value)
        if function.name == "contradictions":
            yield from ((text, []) for _, value in find_results(function) for text in read_texts(value, local, shared))
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            called = call.func.id if isinstance(call.func, ast.Name) else ""
            arguments = call.args[1:] if called == "memory_errors" else call.args if called in ERROR_CLASSES else []
            messages = [text for argument in arguments[:1] for text in read_texts(argument, local, shared)]
            hints = [text for argument in arguments[1:2] for text in read_texts(argument, local, shared)]
            for message in messages:
                if not re.search("[a-z]{3}", COMPUTED.sub("", message)) and not hints:
                    if called == "RecipeError":
                        continue  # the list of a recipe's problems, each with a row of its own
                    raise SystemExit(f"{path}:{call.lineno}: the message is no text that can be found: {message}")
                yield message, hints


def read_texts(node: ast.expr, local: Texts, shared: Texts, depth: int = 0) -> list[str]:
    """The texts that an expression can have; what is computed stands in braces."""

    def read(part: ast.expr) -> list[str]:
        return read_texts(part, local, shared, depth + 1)

    match node:
        case ast.Constant(value=value):
            return [str(value)]
        case ast.JoinedStr(values=values):
            return ["".join(str(part.value) if isinstance(part, ast.Constant) else name_value(part.value) for part in values)]
        case ast.BinOp(left=left, right=right):
            return [first + second for first in read(left) for second in read(right)]
        case ast.IfExp(body=body, orelse=other):
            return read(body) + read(other)
        case ast.Name(id=name) if depth < 6 and (local.get(name) or shared.get(name)):
            return [text for value in local.get(name) or shared[name] for text in read(value)]
        case ast.Call(func=ast.Attribute(value=ast.Constant() | ast.JoinedStr() | ast.Name() as text)):
            return read(text)
        case ast.Call(func=ast.Name(id=name)) if depth < 6 and shared.get(name):
            return [text for value in shared[name] for text in read_texts(value, {}, shared, depth + 1)]
    return [name_value(node)]


def name_value(node: ast.expr) -> str:
    """What stands for a computed part of a message: the last name of its expression, in braces."""
    names = [
        part.attr if isinstance(part, ast.Attribute) else part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute | ast.Name)
    ]
    return f"{{{names[0] if names else '...'}}}"


def as_cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    for old, new in (("|", "\\|"), ("<", "&lt;"), ("\n", " ")):
        text = text.replace(old, new)
    return text.strip()


PAGES = {"recipe.md": render_recipe, "commands.md": render_commands, "errors.md": render_errors}

if __name__ == "__main__":
    for name, render in PAGES.items():
        (ROOT / "docs" / name).write_text(render(), encoding="utf-8", newline="\n")
