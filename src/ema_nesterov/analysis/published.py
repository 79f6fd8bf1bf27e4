"""The published runs of EMA-Nesterov around Muon, and where the advisor goes from one to the next."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple


class Published(NamedTuple):
    """A published run of EMA-Nesterov around Muon, and its base -> itself."""

    name: str
    parameters: float
    steps: int
    batch_tokens: float
    gamma: float
    alpha: float
    gain: str
    source: str


PUBLISHED = (
    Published("Llama 60M", 58e6, 2500, 0.52e6, 0.99, 0.7, "28.11 -> 27.62 ppl", "Table 2"),
    Published("Llama 60M", 58e6, 2500, 4.2e6, 0.99, 0.7, "24.09 -> 23.67 ppl", "Table 2"),
    Published("Llama 60M", 58e6, 5000, 0.26e6, 0.995, 0.7, "28.21 -> 27.27 ppl", "Table 2"),
    Published("Llama 130M", 134e6, 2500, 1.05e6, 0.99, 0.7, "21.59 -> 21.26 ppl", "Table 2"),
    Published("Llama 130M", 134e6, 2500, 8.4e6, 0.99, 0.7, "18.39 -> 18.11 ppl", "Table 2"),
    Published("Llama 130M", 134e6, 5000, 0.52e6, 0.995, 0.5, "21.15 -> 20.85 ppl", "Table 2"),
    Published("Llama 130M", 134e6, 5000, 4.2e6, 0.995, 0.5, "17.78 -> 17.59 ppl", "Table 2"),
    Published("Llama 350M", 368e6, 2500, 3.1e6, 0.99, 0.5, "16.12 -> 15.86 ppl", "Table 2"),
    Published("Llama 350M", 368e6, 2500, 25.2e6, 0.99, 0.5, "14.01 -> 13.82 ppl", "Table 2"),
    Published("Llama 1B", 1339e6, 5000, 4.2e6, 0.999, 0.5, "12.22 -> 12.12 ppl", "Table 2"),
    Published("NanoGPT 124M", 124e6, 6200, 0.52e6, 0.995, 0.5, "base - 0.208 ppl", "section 4, released scripts"),
    Published("NanoGPT 162M", 162e6, 3150, 0.52e6, 0.99, 0.6, "3.2881 -> 3.2780 nats", "result 39"),
)
# Where a rule changes its value: half-way, in ratio, between the published runs on either side
LONG = round(sqrt(3150 * 5000), -2)  # 4,000 steps
LARGE = round(sqrt(368e6 * 1339e6), -7)  # 700M parameters
MIDDLE = round(sqrt(134e6 * 162e6), -7)  # 150M
SMALL = round(sqrt(58e6 * 134e6), -7)  # 90M
BATCH = min(p.batch_tokens for p in PUBLISHED)  # the smallest


class Window(NamedTuple):
    """A published window; decay: the share of the run over which the learning rate falls."""

    decay: float
    warmup: float  # share of the run
    rest: float  # share of the run, or of the decay
    of_decay: bool
    source: str


WINDOWS = (
    Window(0.1, 0.3, 0.2, False, "30% and 20% of the run, C.4's window for a decay of 10% (Llama)"),
    Window(
        *(1800 / 6200, 1800 / 6200, 600 / 1800, True),
        "29% of the run, and a third of the decay: NanoGPT 124M's 1,800 and 600 of 6,200 steps (C.4, released scripts)",
    ),
    Window(
        *(0.7, 500 / 3150, 750 / 2205, True),
        "16% of the run, and a third of the decay: NanoGPT 162M's 500 and 750 of 3,150 steps (C.4, result 39)",
    ),
)
