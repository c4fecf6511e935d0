"""Ask the demo's model before and after its training: `.venv/bin/python scripts/ask_demo.py "What does os.walk do?"`.

Run by scripts/demo.py at its end; it takes the adapter of the demo's newest finished run.
"""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
QUESTION = "Explain Python's `locale.currency`."  # one of the held-out ones


def main() -> int:
    """Print both answers; 1 where nothing was trained yet."""
    question = " ".join(sys.argv[1:]) or QUESTION
    adapters = sorted(REPOSITORY.glob("runs/demo/*/adapter"))
    if not adapters:
        print("There is no adapter in runs/demo yet. Train one with: python3 scripts/demo.py", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package that nobody needs
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(adapters[-1])
    base = AutoModelForCausalLM.from_pretrained(REPOSITORY / "demo" / "base", dtype="float32")
    model = PeftModel.from_pretrained(base, adapters[-1])
    with model.disable_adapter():
        print(f"before: {answer(model, tokenizer, question)}", flush=True)
    print(f"after:  {answer(model, tokenizer, question)}")
    return 0


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The likeliest words, up to the end of the turn or 60 tokens, on one line."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**chat, max_new_tokens=60, do_sample=False)[0, chat["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


if __name__ == "__main__":
    sys.exit(main())
