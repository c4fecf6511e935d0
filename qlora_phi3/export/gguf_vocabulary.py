"""The vocabulary of a checkpoint as llama.cpp reads it, of both kinds that the Phi-3 family has."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_phi3.errors import ExportError
from qlora_phi3.export.gguf_sentencepiece import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    is_sentencepiece,
    read_pieces,
)

#: Scores of added tokens and of rows of the embedding without a token; they are never merged. As in llama.cpp's own files.
ADDED, FILLER = -1000.0, -10000.0
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How a tokenizer.json cuts text before it merges, and llama.cpp's name for that way: Phi-4, Phi-4-mini, and two more.
PRE_TOKENIZERS = {
    (CL100K, "bytes"): "dbrx",
    (O200K, "bytes"): "gpt-4o",
    ("digits", "words and bytes"): "smollm",
    ("words and bytes",): "gpt-2",
}
#: Where llama.cpp cuts otherwise than a tokenizer.json all the same; measured, see docs/gguf.md.
LIMITS = {
    "gpt-4o": ("llama.cpp cuts words with combining marks, as Hindi has them, otherwise than this tokenizer does.",)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by id, as many as the embedding has rows.

    Args:
        model: llama.cpp's name for the kind: `llama` (sentencepiece) or `gpt2` (bytes).
        pre: llama.cpp's name for the way that text is cut before the merges.
        types: llama.cpp's token types.
        scores: of `llama` only.
        merges: of `gpt2` only, as `left right`, the first first.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None


def read_vocabulary(folder: Path, tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a loaded tokenizer and its folder.

    Args:
        folder: with the tokenizer's files; tokenizer.model is used where there is one.
        tokenizer: the fast tokenizer loaded from it.
        rows: of the embedding.

    Raises:
        ExportError: llama.cpp cannot do what this tokenizer does, or it has more tokens than the model.
    """
    source = json.loads(tokenizer.backend_tokenizer.to_str())
    sentencepiece = is_sentencepiece(source)
    pieces = read_pieces(folder, source) if sentencepiece else _read_byte_pieces(folder, source)
    for token in source["added_tokens"]:
        pieces[token["id"]] = (token["content"], ADDED, CONTROL if token["special"] else USER_DEFINED)
    if max(pieces) >= rows:
        number = max(pieces)
        raise ExportError(
            f"The tokenizer of {folder} has a token {pieces[number][0]!r} of id {number}, and the model has {rows} rows.",
            "Use the tokenizer files of the model's own base.",
        )
    all_rows = [pieces.get(number, (f"[PAD{number}]", FILLER, UNUSED)) for number in range(rows)]
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else _name_pre_tokenizer(folder, source),
        tokens=tuple(text for text, _, _ in all_rows),
        types=tuple(kind for _, _, kind in all_rows),
        scores=tuple(score for _, score, _ in all_rows) if sentencepiece else None,
        merges=None if sentencepiece else tuple(" ".join(pair) for pair in source["model"]["merges"]),
    )


def _read_byte_pieces(folder: Path, source: dict[str, Any]) -> dict[int, tuple[str, float, int]]:
    model = source["model"]
    if model["type"] != "BPE":
        raise _unknown(folder, f"a vocabulary of the kind {model['type']}")
    if not model["merges"]:
        raise _unknown(folder, "no merges")
    if source["normalizer"] is not None:
        raise _unknown(folder, f"the normalizer {source['normalizer']['type']}")
    if model.get("ignore_merges") and (piece := _find_unmerged(source)):
        raise _unknown(folder, f"words that no merges make ({piece!r}; ignore_merges)")
    return {number: (text, 0.0, NORMAL) for text, number in model["vocab"].items()}


def _find_unmerged(source: dict[str, Any]) -> str | None:
    """A piece that the merges alone do not make; where there is none, `ignore_merges` changes nothing."""
    from tokenizers import Tokenizer

    merging = {**source, "model": {**source["model"], "ignore_merges": False}}
    model = Tokenizer.from_str(json.dumps(merging)).model
    added = {token["content"] for token in source["added_tokens"]}
    return next(
        (text for text in source["model"]["vocab"] if text not in added and len(model.tokenize(text)) > 1), None
    )


def _name_pre_tokenizer(folder: Path, source: dict[str, Any]) -> str:
    pre = source["pre_tokenizer"] or {"type": "none"}
    steps = tuple(_describe(step) for step in pre.get("pretokenizers", [pre]))
    if steps not in PRE_TOKENIZERS:
        raise _unknown(folder, f"the pre-tokenizer {pre}")
    return PRE_TOKENIZERS[steps]


def _describe(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "words and bytes" if use_regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
            return regex
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return regex
    return str(step)


def _unknown(folder: Path, what: str) -> ExportError:
    return ExportError(
        f"The tokenizer of {folder} has {what}, which llama.cpp's phi3 models do not have.",
        "Use the tokenizer files of the model's own base.",
    )
