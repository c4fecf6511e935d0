"""The vocabulary of a checkpoint as llama.cpp reads it: tokens, types and scores, for both tokenizers of the Phi-3 family.

Of a sentencepiece vocabulary llama.cpp merges the two neighbours whose joint piece has the highest score; a tokenizer.json merges
by a list of pairs. Both give the same ids where every piece has one rank in that list, which `_rank_pieces` verifies.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_phi3.errors import ExportError

#: Score of a piece that no merge makes; below all others.
NEVER = -1e9
#: Scores of added tokens and of embedding rows without a token; they are never merged. As in llama.cpp's own files.
ADDED, FILLER = -1000.0, -10000.0
#: What turns text into pieces in Phi-3's tokenizer.json: a mark before every stretch of text, and for each space.
NORMALIZERS = ({"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How a tokenizer.json splits text before it merges, and llama.cpp's name for it: Phi-4, Phi-4-mini, and two more.
PRE_TOKENIZERS = {
    (CL100K, "bytes"): "dbrx",
    (O200K, "bytes"): "gpt-4o",
    ("digits", "words and bytes"): "smollm",
    ("words and bytes",): "gpt-2",
}
#: Where llama.cpp still splits text differently from a tokenizer.json; measured, see docs/gguf.md.
LIMITS = {"gpt-4o": ("llama.cpp splits words with combining marks, as in Hindi, differently from this tokenizer.",)}
#: Text, score, and gguf.TokenType.
Piece = tuple[str, float, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by id, as many as the embedding has rows."""

    #: llama.cpp's names: `llama` (sentencepiece) or `gpt2` (bytes, with merges), and how text is split before the merges.
    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]  #: gguf.TokenType of each token.
    scores: tuple[float, ...] | None  #: For `llama` only.
    special: tuple[str, ...]  #: Of bos, eos, unk and pad, those that the tokenizer has.


def read_vocabulary(folder: Path, tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer that was loaded from `folder`; `rows` are the embedding's. ExportError where llama.cpp
    cannot do what this tokenizer does, or it has more tokens than the model.
    """
    from gguf import TokenType

    source = json.loads(tokenizer.backend_tokenizer.to_str())
    is_sentencepiece = source["model"]["type"] == "BPE" and bool(source["model"].get("byte_fallback"))
    if is_sentencepiece:
        pre, pieces = "default", read_pieces(folder, source)
    else:
        pre = _check_byte_tokenizer(folder, source)
        pieces = {number: (text, 0.0, TokenType.NORMAL) for text, number in source["model"]["vocab"].items()}
    # gguf.SentencePieceVocab and BpeVocab take added tokens from added_tokens.json only and call them all user-defined. Phi-3's
    # are control tokens, some of them in place of a piece.
    for token in source["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        pieces[token["id"]] = (token["content"], ADDED, kind)
    if (number := max(pieces)) >= rows:
        message = f"The tokenizer of {folder} has a token {pieces[number][0]!r} of id {number}, and the model has {rows} rows."
        raise ExportError(message, "Use the tokenizer files of the model's own base.")
    all_rows = [pieces.get(number, (f"[PAD{number}]", FILLER, TokenType.UNUSED)) for number in range(rows)]
    tokens, scores, types = zip(*all_rows, strict=True)
    special = (name for name in ("bos", "eos", "unk", "pad") if getattr(tokenizer, f"{name}_token_id") is not None)
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores if is_sentencepiece else None,
        special=tuple(special),
    )


def read_pieces(folder: Path, source: dict[str, Any]) -> dict[int, Piece]:
    """The pieces of a sentencepiece vocabulary by id: from tokenizer.model where there is one, else from tokenizer.json.
    ExportError where the two differ, or llama.cpp would not give the same ids.
    """
    import gguf

    normalizer = source["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if tuple(steps) != NORMALIZERS or source["pre_tokenizer"] is not None:
        raise ExportError(
            f"The tokenizer of {folder} prepares text in a way that llama.cpp does not: normalizer {normalizer}, "
            f"pre_tokenizer {source['pre_tokenizer']}.",
            "Put the base's own tokenizer files and config.json into the directory.",
        )
    path = folder / "tokenizer.model"
    if not path.is_file():
        return _rank_pieces(folder, source)
    try:
        model = gguf.SentencePieceVocab(folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}.", "Copy the base's own tokenizer files.") from error
    tokens = enumerate(model.sentencepiece_tokens())
    pieces = {number: (text.decode(), score, kind) for number, (text, score, kind) in tokens}
    for text, number in source["model"]["vocab"].items():
        found = pieces[number][0] if number in pieces else None
        if found != text:
            message = f"{path} and tokenizer.json differ: id {number} is {found!r} in the first and {text!r} in the second."
            raise ExportError(message, "Copy both from the base.")
    return pieces


def _rank_pieces(folder: Path, source: dict[str, Any]) -> dict[int, Piece]:
    """Scores from the order of the merges, for which gguf has no class.

    What surrounds a text matters only where a merge crosses its edge. So if two neighbours whose joint text is a piece can occur,
    merging that piece's text alone ends with the same two: either they merge, always at that rank, which is then the piece's
    score, or they must not merge, and llama.cpp would merge them.
    """
    from gguf import TokenType

    vocabulary: dict[str, int] = source["model"]["vocab"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(source["model"]["merges"])}
    added = {token["content"] for token in source["added_tokens"]}
    byte_texts = {f"<0x{byte:02X}>" for byte in range(256)}
    pieces, problems = {}, []
    for text, number in vocabulary.items():
        if text in byte_texts:
            pieces[number] = (text, 0.0, TokenType.BYTE)
            continue
        parts, rank = _merge_alone(text, ranks)
        if len(parts) == 2 and text not in added:
            problems.append(f"llama.cpp would join {parts[0]!r} and {parts[1]!r}")
        pieces[number] = (text, -float(rank) if len(parts) == 1 else NEVER, TokenType.NORMAL)
    problems += [f"there is no piece {text}" for text in sorted(byte_texts - vocabulary.keys())]
    problems += [f"it merges the byte {part}" for pair in ranks for part in pair if part in byte_texts]
    if problems:
        hint = "Put the base's own tokenizer.model into the directory."
        raise ExportError(f"The tokenizer.json of {folder} gives other ids than llama.cpp would: {problems[0]}.", hint)
    return pieces


def _merge_alone(text: str, ranks: dict[tuple[str, ...], int]) -> tuple[list[str], int]:
    """The parts that a text by itself is merged into, and the rank of the last merge (0: none)."""
    parts, last = list(text), 0
    while True:
        found = [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            return parts, last
        last, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _check_byte_tokenizer(folder: Path, source: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a BPE over bytes; ExportError where llama.cpp cannot do what it does."""
    model, pre = source["model"], source["pre_tokenizer"] or {"type": "none"}
    steps = tuple(_describe(step) for step in pre.get("pretokenizers", [pre]))
    unmerged = None
    if model.get("ignore_merges"):
        # Without a piece that the merges do not make, ignore_merges changes nothing.
        from tokenizers import Tokenizer

        merging = Tokenizer.from_str(json.dumps({**source, "model": {**model, "ignore_merges": False}})).model
        texts = model["vocab"].keys() - {token["content"] for token in source["added_tokens"]}
        unmerged = next((text for text in sorted(texts) if len(merging.tokenize(text)) > 1), None)
    for key, value, is_supported in (
        ("model type", model["type"], model["type"] == "BPE"),
        ("merges", model.get("merges"), bool(model.get("merges"))),
        ("normalizer", source["normalizer"], source["normalizer"] is None),
        ("ignore_merges, and merges do not make the piece", unmerged, unmerged is None),
        ("pre_tokenizer", pre, steps in PRE_TOKENIZERS),
    ):
        if not is_supported:
            hint = "Use the tokenizer files of the model's own base."
            raise ExportError(f"The tokenizer of {folder} does not fit llama.cpp's phi3 models: {key} {value!r}.", hint)
    return PRE_TOKENIZERS[steps]


def _describe(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "words and bytes" if use_regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": behavior, "invert": invert}:
            if (behavior, invert) in (("Removed", True), ("Isolated", False)):
                return regex
    return str(step)
