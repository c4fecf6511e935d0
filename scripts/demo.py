"""Fine-tune a real small model on real conversations, on any computer: `python3 scripts/demo.py`.

Makes the virtual environment .venv, installs qlora-phi3, makes the demo's base model and data in the directory demo,
runs recipes/demo.toml, and asks the model before and after training a question. Steps that are done already are skipped.
More arguments are passed to `qlora-phi3 run`.
"""

import argparse
import json
import shlex
import sys
import time
from typing import List  # noqa: UP035 - this file must parse on older Pythons

from environment import REPOSITORY, TORCH_NOTE, make_environment, print_step, run


def main() -> None:
    """Run all steps; the first that fails ends the demo with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=TORCH_NOTE)
    _, arguments = parser.parse_known_args()
    programs = make_environment(".venv", "gguf")
    python = str(programs / "python")
    print_step("Making the base model: SmolLM2-135M-Instruct in Phi-3's layout")
    run([python, "scripts/make_demo_model.py"])
    print_step("Making the data: questions and answers from Python's own docstrings")
    run([python, "scripts/make_demo_data.py"])
    print_step("Training: qlora-phi3 run recipes/demo.toml")
    began = time.time()
    try:
        run([str(programs / "qlora-phi3"), "run", "recipes/demo.toml", *arguments])
    except SystemExit:
        print_resume_command(arguments, began)
        raise
    if any(path.stat().st_mtime > began - 2 for path in REPOSITORY.glob("runs/demo/*/adapter")):
        print_step("Asking the model before and after training a held-out question: scripts/ask_demo.py")
        run([python, "scripts/ask_demo.py"])


def print_resume_command(arguments: List[str], began: float) -> None:  # noqa: UP006
    """Print the command that resumes the newest run, if that run was written since `began` and is not done."""
    reports = sorted(REPOSITORY.glob("runs/demo/*/report.json"))
    if not reports or reports[-1].stat().st_mtime < began - 2:  # some file systems store full seconds only
        return
    if json.loads(reports[-1].read_text(encoding="utf-8"))["status"] != "done":
        again = arguments if "--resume" in arguments else ["--resume", *arguments]
        print("Resume with: python3 scripts/demo.py " + " ".join(map(shlex.quote, again)), file=sys.stderr)


if __name__ == "__main__":
    main()
