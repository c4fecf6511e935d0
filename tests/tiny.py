"""A small tokenizer of Phi-3's kind, built in memory: its special tokens, its marked pieces, bytes for the rest."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|tool|>", "<|/tool|>")
SPECIAL_PHI4 = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
TEMPLATE_FOLDER = Path(__file__).parent / "data" / "hub_templates"


def hub_template(name: str) -> str:
    """A model's own chat template, as its tokenizer_config.json on the hub has it."""
    return (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def build_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of about 700 tokens with the chat template given (jinja; None for none).

    As in Phi-3-mini's own files, every special token but `<|endoftext|>` has rstrip, each piece of text between special
    tokens gets a leading mark, and a character without a token of its own falls back to its bytes.
    """
    characters = [chr(code) for code in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for pair in [("▁", letter) for letter in characters] + [
        ("t", "h"),
        ("i", "n"),
        ("e", "r"),
        ("▁t", "h"),
        ("▁", "▁"),
    ]:
        merges.append(pair)
        vocabulary.setdefault("".join(pair), len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = SPECIAL_PHI4 if template and "<|im_sep|>" in template else SPECIAL
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True, rstrip=token != "<|endoftext|>") for token in special]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>" if special is SPECIAL_PHI4 else "<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=4096,
    )
    tokenizer.chat_template = template
    return tokenizer


def build_byte_tokenizer(template: str, *, strip: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of Phi-4's kind (bytes, here without merges); `strip`: special tokens take white space around."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(sorted(alphabet))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = SPECIAL_PHI4 if "<|im_sep|>" in template else SPECIAL
    backend.add_special_tokens([AddedToken(token, normalized=False, lstrip=strip, rstrip=strip) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer
