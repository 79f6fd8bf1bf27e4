"""What theory and simple problems say: python scripts/analysis.py NAME [output=FOLDER] [KEY=VALUE ...]

strongly_convex      Theorem 1: measured and predicted rates of EMA-Nesterov, Nesterov, heavy ball, gradient descent
convex               Theorem 2: O(1/T^2) on logistic regression and on the worst-case quadratic
filter               the EMA and the K-step average as low-pass filters, beside the spectrum of a real run's updates
river_valley         Figure 1: trajectories and lookahead directions in a noisy valley
noisy_quadratic      variance and rate of Lookahead, EMA-Nesterov, SNOO and GPA under noise: closed forms, simulation
quadratic_momentum   convergence rates of the same around momentum, on quadratics
advisor              gamma, alpha and window to begin with, for a run of yours

Each writes figures (PNG and SVG) and CSV files into output (default: analysis/NAME) and prints what came out;
NAME --help lists its keys. docs/theory.md explains them.
"""

import sys
from importlib import import_module

from ema_nesterov.cli import arguments, guard
from ema_nesterov.errors import ConfigError

NAMES = ("strongly_convex", "convex", "filter", "river_valley", "noisy_quadratic", "quadratic_momentum", "advisor")


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in NAMES:
        raise ConfigError(f"unknown analysis {name}; type one of {', '.join(NAMES)}")
    module = import_module(f"ema_nesterov.analysis.{name}")  # here, so that each needs only what it uses
    print(module.run(arguments(module.Arguments, module.__doc__)))


if __name__ == "__main__":
    guard(main)
