"""A vocabulary of Phi-3's kind (sentencepiece BPE with bytes to fall back on) as pieces, scores and types.

llama.cpp merges the two neighbours whose joint piece has the highest score. A tokenizer.json merges by a list of pairs
instead. Both give the same ids where every piece has one place in that list, which `_rank_pieces` proves piece by piece.

The vocabulary of a checkpoint as llama.cpp reads it, of both kinds that the Phi-3 family has.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_phi3.errors import ExportError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


#: Score of a piece that no merge ever makes; below all others.
NEVER = -1e9


#: What turns text into pieces in Phi-3's tokenizer.json: a mark in front of every stretch of text, and for each space.
NORMALIZERS = (
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
)


Piece = tuple[str, float, int]


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of Phi-3's kind: BPE over marked pieces, with bytes to fall back on."""
    return tokenizer["model"]["type"] == "BPE" and bool(tokenizer["model"].get("byte_fallback"))


def read_pieces(folder: Path, tokenizer: dict[str, Any]) -> dict[int, Piece]:
    """Text, score and type by id: from tokenizer.model where there is one, else from tokenizer.json.

    Raises:
        ExportError: the two differ, or llama.cpp would not give the same ids.
    """
    _check_normalizers(folder, tokenizer)
    path = folder / "tokenizer.model"
    return _read_model(path, tokenizer) if path.is_file() else _rank_pieces(folder, tokenizer)


def _check_normalizers(folder: Path, tokenizer: dict[str, Any]) -> None:
    normalizer = tokenizer["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if tuple(steps) != NORMALIZERS or tokenizer["pre_tokenizer"] is not None:
        raise ExportError(
            f"The tokenizer of {folder} prepares text in a way that llama.cpp does not: normalizer {normalizer}, "
            f"pre_tokenizer {tokenizer['pre_tokenizer']}.",
            "Put the base's own tokenizer files and config.json into the folder.",
        )


def _read_model(path: Path, tokenizer: dict[str, Any]) -> dict[int, Piece]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ExportError(f"{path} is no sentencepiece model: {error}.", "Copy the base's own file.") from error
    pieces: dict[int, Piece] = {}
    for number in range(model.vocab_size()):
        kind = NORMAL
        for applies, other in (
            (model.is_unknown, UNKNOWN),
            (model.is_control, CONTROL),
            (model.is_unused, UNUSED),
            (model.is_byte, BYTE),
        ):
            kind = other if applies(number) else kind
        pieces[number] = (model.id_to_piece(number), model.get_score(number), kind)
    for text, number in tokenizer["model"]["vocab"].items():
        if pieces.get(number, ("",))[0] != text:
            raise ExportError(
                f"{path} and the tokenizer.json beside it differ: id {number} is {pieces.get(number, (None,))[0]!r} "
                f"in one and {text!r} in the other.",
                "Copy both from the base.",
            )
    return pieces


def _rank_pieces(folder: Path, tokenizer: dict[str, Any]) -> dict[int, Piece]:
    """Scores from the order of the merges.

    What becomes of a stretch of text depends on what lies around it only where a merge crosses its edge. So two neighbours
    whose joint text is a piece are met anywhere only if merging that piece's text alone comes to the same two: either
    they merge there, always at that rank, which is then the piece's score, or they must not, and llama.cpp would.
    """
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(tokenizer["model"]["merges"])}
    added = {token["content"] for token in tokenizer["added_tokens"]}
    pieces = {}
    for text, number in vocabulary.items():
        if is_byte(text):
            pieces[number] = (text, 0.0, BYTE)
            continue
        parts, rank = _merge_alone(text, ranks)
        if len(parts) == 2 and text not in added:
            raise _not_equal(folder, f"llama.cpp would join {parts[0]!r} and {parts[1]!r}, and tokenizer.json does not")
        pieces[number] = (text, -float(rank) if len(parts) == 1 else NEVER, NORMAL)
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise _not_equal(folder, f"there is no piece <0x{missing[0]:02X}> for that byte")
    if any(is_byte(part) for pair in ranks for part in pair):
        raise _not_equal(folder, "it merges bytes")
    return pieces


def is_byte(text: str) -> bool:
    """Whether a piece stands for a byte: `<0x0A>`."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _merge_alone(text: str, ranks: dict[tuple[str, ...], int]) -> tuple[list[str], int]:
    """The parts that a text by itself is merged into, and the rank of the last merge (0: none)."""
    parts, last = list(text), 0
    while True:
        found = [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            return parts, last
        last, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _not_equal(folder: Path, reason: str) -> ExportError:
    return ExportError(
        f"The tokenizer.json of {folder} gives other ids than llama.cpp would: {reason}.",
        "Put the base's own tokenizer.model into the folder.",
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
