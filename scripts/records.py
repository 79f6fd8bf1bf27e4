"""Figures of benchmarks, kept as data and shown in docs/benchmarks.md; used by bench.py."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from floors import Machine

from ema_nesterov.training.distributed import Ranks
from ema_nesterov.training.folder import provenance

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- figures: written by scripts/bench.py -->", "<!-- end of figures -->"


@dataclass
class Record:
    benchmark: str
    about: dict[str, str]  # command, commit, device, ...
    figures: dict[str, float | None]  # None: not to be had here

    def heading(self) -> str:
        return "\n".join(f"{key}: {value}" for key, value in self.about.items())


def about(arguments: list[str], ranks: Ranks, machine: Machine) -> dict[str, str]:
    device = ranks.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rates = ", ".join(f"{rate / 1e9:.2f} TFLOP/s {str(dtype)[6:]}" for dtype, rate in machine.matmul.items())
    ranked = f"torchrun --standalone --nproc-per-node={ranks.size}" if ranks.size > 1 else "python"
    kept = [a for a in arguments if not a.startswith("record=")]
    return {
        "command": f"{ranked} scripts/bench.py {sys.argv[1]} {shlex.join(kept)}".strip(),
        "device": f"{ranks.size} x {kind}: copies {machine.copy / 1e6:.0f} GB/s, products {rates}",
        "software": f"torch {torch.__version__}, commit {provenance()['git']}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write(record: Record) -> None:
    """Keep the record in place of an earlier one of the same command and kind of device, and show all of them."""
    path, page = DOCS / "benchmarks.json", DOCS / "benchmarks.md"
    held = [Record(**r) for r in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    held = [r for r in held if same(r) != same(record)] + [record]
    path.write_text(json.dumps([asdict(r) for r in held], indent=1) + "\n", encoding="utf-8")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{''.join(section(r) for r in held)}{END}{after}", encoding="utf-8")


def same(record: Record) -> tuple[str, str]:
    return record.about["command"], record.about["device"].partition(":")[0]


def section(record: Record) -> str:
    lines = [f"- {key}: `{value}`" if key == "command" else f"- {key}: {value}" for key, value in record.about.items()]
    rows = [f"| {key} | {number(value)} |" for key, value in record.figures.items() if value is not None]
    return "\n".join([f"### {record.benchmark}", "", *lines, "", "| | |", "|---|---:|", *rows, "", ""])


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
