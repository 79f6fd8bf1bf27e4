"""Time and memory, beside a floor and a peer measured in the same run.

python scripts/bench.py train           a run as a whole: tokens a second, MFU, where the time goes
python scripts/bench.py compare         two settings, or a peer, taking turns
python scripts/bench.py optimizers      a step of each wrapper and base optimizer
python scripts/bench.py scaling         what ranks send each other, and what it leaves of their speed
python scripts/bench.py data            reading batches: time of a step, waiting, memory
python scripts/bench.py tokenize        preparing text: beside the tokenizer alone on all cores
python scripts/bench.py safety          checking each step, saving checkpoints
python scripts/bench.py NAME --help     its KEY=VALUE arguments
"""

import sys
from importlib import import_module

from ema_nesterov.cli import guard
from ema_nesterov.errors import ConfigError

NAMES = ("train", "compare", "scaling", "optimizers", "data", "tokenize", "safety")


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in NAMES:
        raise ConfigError(f"unknown benchmark {command}; type one of {', '.join(NAMES)}")
    name = "train" if command == "compare" else command
    module = import_module(f"bench_{name}")  # here, so that each needs only what it measures
    if {"-h", "--help"} & set(arguments):
        print(module.__doc__)
    else:
        run = module.run_compare if command == "compare" else module.run
        run(arguments)


if __name__ == "__main__":
    guard(main)
