"""Fine-tune a real small model on real conversations, on any computer: `python3 scripts/demo.py`.

Makes the virtual environment .venv, installs qlora-phi3 into it, makes the demo's base model and data in the folder demo,
and runs recipes/demo.toml. Done once, the first steps are skipped. Further arguments go to `qlora-phi3 run`.
"""

import argparse

from environment import TORCH_NOTE, make_environment, run, say


def main() -> None:
    """Do all steps in their order; the first that fails ends it with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=TORCH_NOTE)
    _, arguments = parser.parse_known_args()
    programs = make_environment(".venv", "gguf")
    python = str(programs / "python")
    say("Making the base model: SmolLM2-135M-Instruct in the shape of Phi-3")
    run([python, "scripts/make_demo_model.py"])
    say("Making the data: questions and answers from Python's own docstrings")
    run([python, "scripts/make_demo_data.py"])
    say("Training: qlora-phi3 run recipes/demo.toml")
    run([str(programs / "qlora-phi3"), "run", "recipes/demo.toml", *arguments])


if __name__ == "__main__":
    main()
