"""Ask the demo's model before and after its training: `.venv/bin/python scripts/ask_demo.py "What does os.walk do?"`.

scripts/demo.py runs it at its end. It loads the newest run of the demo that has an adapter.
"""

import logging
import sys
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
QUESTION = "Explain Python's `locale.currency`."  # a held-out one


def main() -> int:
    """Print both answers; the exit code is 1 if there is no trained adapter yet."""
    question = " ".join(sys.argv[1:]) or QUESTION
    adapters = sorted(REPOSITORY.glob("runs/demo/*/adapter"))
    if not adapters:
        print("There is no adapter in runs/demo yet. Train one with: python3 scripts/demo.py", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about a package that is not needed
    from qlora_phi3.inference import generate, load_for_inference

    inference = load_for_inference(adapters[-1].parent)
    messages = [{"role": "user", "content": question}]
    with inference.model.disable_adapter():
        print("before:", " ".join(generate(inference, messages, max_new_tokens=60).text.split()), flush=True)
    print("after: ", " ".join(generate(inference, messages, max_new_tokens=60).text.split()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
