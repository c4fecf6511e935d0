"""Make the demo's data: questions and answers about the Python standard library, from its own docstrings.

The modules are parsed with `ast` and never imported. One object (module, class, function, method) becomes one
conversation. Complete modules are held out, so that no docstring of a held-out module is trained on. The same Python gives
the same files. Standard library only.
"""

import argparse
import ast
import hashlib
import inspect
import json
import platform
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_OUT = REPOSITORY / "demo"

ANSWER_LENGTHS = range(15, 401)  # characters of a docstring's first paragraph
SIGNATURE_LENGTH = 120  # characters; a longer signature is not used as an answer
SEED = 20240423
#: One module in this many is held out.
HELD_OUT_SHARE = 10
#: Programs, tests and tables of Python's distribution, which are not modules to program with.
SKIPPED_MODULES = {"antigravity", "encodings", "idlelib", "lib2to3", "test", "this", "turtledemo"}
SKIPPED_PARTS = {"test", "tests", "__main__", "idle_test"}

README = """# Questions and answers about the Python standard library

Made by `scripts/make_demo_data.py` for the demo of qlora-phi3 from Python {version}.

- Text: the first paragraphs of the docstrings in Python's standard library, (c) Python Software Foundation and the
  authors of the modules, under the PSF licence agreement (https://docs.python.org/3/license.html). The questions are
  this script's.
- `chats.jsonl`: {num_training} conversations to train on, in `messages` format, shuffled.
- `chats-heldout.jsonl`: {num_held_out} conversations about other modules.
"""

Message = dict[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Documented:
    """One public object of the standard library with the first paragraph of its docstring."""

    name: str  # dotted, starting with the module
    kind: str  # module, class, function, method or property
    text: str
    signature: str  # `name(arguments)`, empty for other objects and long signatures

    @property
    def module(self) -> str:
        """The top-level module, `email` for `email.message.Message`."""
        return self.name.partition(".")[0]


# --- reading ----------------------------------------------------------------------------------------------------------


def find_sources(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the source of every public module in a standard library's folder, in order."""
    for top in sorted(sys.stdlib_module_names - SKIPPED_MODULES):
        for path in [folder / f"{top}.py", *sorted((folder / top).rglob("*.py"))]:
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            private = any(part.startswith("_") or part in SKIPPED_PARTS for part in parts)
            if path.is_file() and not private:
                yield ".".join(parts), path


def clean_paragraph(docstring: str) -> str:
    """Return a docstring's first paragraph as one line, or "" if it cannot be an answer.

    Not an answer: a paragraph that is too short or too long, a signature, an interactive session, the title of a list.
    """
    paragraph = " ".join(re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0].split())
    is_sentence = len(paragraph) in ANSWER_LENGTHS and " " in paragraph and not paragraph.endswith(":")
    is_prose = not re.search(r">>>|->|^[\w.]+\(|^[-=*$#]|XXX|\x00", paragraph)
    return paragraph if is_sentence and is_prose else ""


def read_signature(node: Function, name: str, *, is_method: bool) -> str:
    """Return a function's signature without annotations and a method's `self`; "" if it is too long."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(node.args)
    if is_method:
        text = re.sub(r"^(self|cls)(, /)?(, )?", "", text)
    signature = f"{name}({text})"
    return signature if len(signature) <= SIGNATURE_LENGTH else ""


def is_property(node: ast.AST) -> bool:
    """Whether a method is a property."""
    decorators = node.decorator_list if isinstance(node, Function) else []
    return any(ast.unparse(decorator).endswith("property") for decorator in decorators)


def read_objects(source: str, module: str) -> Iterator[Documented]:
    """Yield a module's documented public objects: the module, its functions and classes, and their methods."""
    tree = ast.parse(source)
    yield from describe(tree, module, "module")
    for node in select_public(tree.body):
        name = f"{module}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from describe(node, name, "class")
            for member in select_public(node.body):
                if isinstance(member, Function):
                    kind = "property" if is_property(member) else "method"
                    yield from describe(member, f"{name}.{member.name}", kind)
        else:
            yield from describe(node, name, "function")


def select_public(body: list[ast.stmt]) -> Iterator[ast.ClassDef | Function]:
    """Yield the classes and functions whose names do not begin with an underscore."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node


def describe(node: ast.Module | ast.ClassDef | Function, name: str, kind: str) -> Iterator[Documented]:
    """Yield the object if its docstring gives an answer."""
    text = clean_paragraph(ast.get_docstring(node, clean=False) or "")
    if text:
        signature = ""
        if isinstance(node, Function) and kind != "property":
            signature = read_signature(node, name, is_method=kind == "method")
        yield Documented(name=name, kind=kind, text=text, signature=signature)


def read_standard_library(folder: Path) -> list[Documented]:
    """Read all documented public objects in a fixed order; of objects with equal texts only the first."""
    found: dict[str, Documented] = {}
    for module, path in find_sources(folder):
        for item in read_objects(path.read_text(encoding="utf-8"), module):
            found.setdefault(item.text.casefold(), item)
    return list(found.values())


# --- writing ----------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "module": ("What is the Python module `{}` for?", "What does Python's `{}` module offer?"),
    "class": ("What is `{}` in Python?", "What is the class `{}` for?"),
    "function": ("What does `{}` do in Python?", "What is `{}` for?", "Explain Python's `{}`."),
    "method": ("What does the method `{}` do?", "What does `{}` do in Python?", "Explain the method `{}`."),
    "property": ("What is `{}` in Python?", "What does the property `{}` hold?"),
}
CALL_QUESTIONS = ("How is `{}` called?", "Which arguments does `{}` take?", "How do I call `{}` in Python?")
FOLLOW_UPS = ("How is it called?", "Which arguments does it take?", "And how do I call it?")


def build_chat(item: Documented, draw: random.Random) -> list[Message]:
    """Build one conversation about an object; if its signature is known, one in three asks for it, in one turn or two."""
    form = draw.choice(("what", "what", "what", "what", "call", "both")) if item.signature else "what"
    call = f"Call it as `{item.signature}`."
    if form == "call":
        return build_turn(draw.choice(CALL_QUESTIONS).format(item.name), f"{call} {item.text}")
    turns = build_turn(draw.choice(QUESTIONS[item.kind]).format(item.name), item.text)
    return turns + build_turn(draw.choice(FOLLOW_UPS), call) if form == "both" else turns


def build_turn(question: str, answer: str) -> list[Message]:
    """Build a user's message and the assistant's."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def is_held_out(module: str) -> bool:
    """Whether a top-level module is held out. Only its name decides, so that it is the same for every Python version."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def build_chats(items: list[Documented]) -> tuple[list[list[Message]], list[list[Message]]]:
    """Build the conversations to train on and those held out, each shuffled with a fixed seed."""
    draw = random.Random(SEED)
    training: list[list[Message]] = []
    held_out: list[list[Message]] = []
    for item in items:
        (held_out if is_held_out(item.module) else training).append(build_chat(item, draw))
    draw.shuffle(training)
    draw.shuffle(held_out)
    return training, held_out


def write_chats(path: Path, chats: list[list[Message]]) -> None:
    """Write conversations, one a line, under a temporary name that is renamed at the end."""
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    partial.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and make the data."""
    parser = argparse.ArgumentParser(description="Make the demo's conversations from Python's own docstrings.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the directory (default: %(default)s)")
    out: Path = parser.parse_args(arguments).out
    folder = Path(sysconfig.get_paths()["stdlib"])
    print(f"Reading the docstrings of Python {platform.python_version()} in {folder}", flush=True)
    items = read_standard_library(folder)
    if not items:
        raise SystemExit(f"{folder} has no sources with docstrings. Use a Python that is installed with its .py files.")
    training, held_out = build_chats(items)
    out.mkdir(parents=True, exist_ok=True)
    write_chats(out / "chats.jsonl", training)
    write_chats(out / "chats-heldout.jsonl", held_out)
    text = README.format(version=platform.python_version(), num_training=len(training), num_held_out=len(held_out))
    (out / "chats-README.md").write_text(text, encoding="utf-8")
    print(f"{len(training)} conversations to train on and {len(held_out)} held out are in {out}")


if __name__ == "__main__":
    main()
