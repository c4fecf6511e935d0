"""`python -m qlora_phi3`, where the command is not on the path."""

from qlora_phi3.cli.main import main

main(prog_name="qlora-phi3")
