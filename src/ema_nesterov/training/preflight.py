"""What a run of a config needs, checked in seconds on every rank: one table, printed by the first."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import check
from ..data.loader import TokenDataset
from ..data.manifest import load_manifest
from ..data.preparation.recipes import shards_folder, text_sources
from ..data.shards import find_shards, read_header
from ..errors import ConfigError, UserError, one_line
from .distributed import Ranks, choose_device, world_size
from .folder import BAD_INPUT, FINISHED
from .identity import run_folder
from .memory import Memory, estimate
from .run import open_dataset, split_batch

OK, WARNING, FAIL = "ok", "warning", "FAIL"  # as they get worse
COLOURS = {OK: "green", WARNING: "yellow", FAIL: "bold red"}
PATIENCE = timedelta(seconds=60)  # with a rank that does not answer
BUFFER = 16 * 2**20  # bytes that are summed over the ranks to measure the bandwidth

Finding = tuple[str, str]  # OK, WARNING or FAIL, and the details


def preflight(cfg: DictConfig) -> int:
    """Check all that a run of the composed config needs and print a table; the exit code is 2 where it would fail.

    Raises ConfigError, as a run does, for a config that can be run nowhere.
    """
    check(cfg)
    with joined(cfg) as ranks:
        everyones = ranks.gather(Checks(cfg, ranks).run())
        table = {name: merged([found.get(name) for found in everyones]) for name in everyones[0]}
        if ranks.is_first:
            show(table, f"{cfg.name} on {ranks.size} x {ranks.device.type}")
        ranks.barrier()  # torchrun ends the others as soon as one exits
    return BAD_INPUT if any(result == FAIL for result, _ in table.values()) else FINISHED


@contextmanager
def joined(cfg: DictConfig) -> Iterator[Ranks]:
    """The ranks, which talk through their CPUs: what is said of a GPU must not need it."""
    gpu = cfg.trainer.device == "cuda" or (cfg.trainer.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if world_size() == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), world_size(), device)
    finally:
        dist.destroy_process_group()


class Checks:
    """What one rank finds. A check returns its finding, or None where there is nothing to check, or raises."""

    def __init__(self, cfg: DictConfig, ranks: Ranks):
        self.cfg, self.ranks = cfg, ranks
        self.micro_batch_size = 1  # until the batch is split
        self.needs: Memory | None = None  # until they are estimated
        self.found: dict[str, Finding] = {}

    def run(self) -> dict[str, Finding]:
        for name in ("device", "communication", "batch", "memory", "disk", "data", "wandb"):
            try:
                finding = getattr(self, name)()
            except Exception as e:
                finding = FAIL, one_line(e)
            if finding:
                self.found[name] = finding
        return self.found

    def device(self) -> Finding:
        device = choose_device(self.cfg.trainer.device)
        if device.type == "cpu":
            return OK, "the CPU"
        free, total = torch.cuda.mem_get_info(device)
        return OK, f"{torch.cuda.get_device_name(device)}, {size(free)} of {size(total)} free"

    def communication(self) -> Finding | None:
        """An all-reduce as DDP's, through NCCL where the ranks have GPUs."""
        ranks, group = self.ranks, None
        if ranks.size == 1 or any(result == FAIL for result, _ in ranks.gather(self.found["device"])):
            return None
        if ranks.device.type == "cuda":
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a rank that is silent is an error, not an abort
            torch.cuda.set_device(ranks.device)
            group = dist.new_group(backend="nccl", timeout=PATIENCE)

        def seconds(numbers: int, times: int = 5) -> float:
            buffer = torch.ones(numbers, device=ranks.device)
            dist.all_reduce(buffer, group=group)
            if not (buffer == ranks.size).all():
                raise RuntimeError("the all-reduce sums wrongly; type NCCL_DEBUG=INFO to see more")
            began = time.perf_counter()
            for _ in range(times):
                dist.all_reduce(buffer, group=group)
            buffer[0].item()  # waits for the device
            return (time.perf_counter() - began) / times

        latency, rate = seconds(1) * 1e3, BUFFER / seconds(BUFFER // 4) / 1e9
        details = f"all-reduce over {ranks.size} ranks by {dist.get_backend(group)}: {latency:.2f} ms, {rate:.1f} GB/s"
        return (OK, details) if ranks.is_first else None

    def batch(self) -> Finding:
        self.micro_batch_size = micro = split_batch(self.cfg, self.ranks.size)
        parts = self.cfg.batch_size // self.ranks.size // micro
        return OK, f"{self.cfg.batch_size} sequences a step: {parts} micro-batches of {micro} a rank"

    def memory(self) -> Finding:
        micro, device = self.micro_batch_size, self.ranks.device
        try:
            self.needs = m = estimate(self.cfg, micro, device, self.ranks.group)
        except UserError:
            raise
        except Exception as e:  # a model or an optimizer of the user's
            return WARNING, f"no estimate: {one_line(e)}"
        parts = [part for part in ("weights", "gradients", "optimizer", "wrapper", "activations") if getattr(m, part)]
        details = f"about {size(m.peak)} ({', '.join(f'{part} {size(getattr(m, part))}' for part in parts)})"
        if device.type == "cuda" and not torch.cuda.is_available():
            return OK, f"{details}; there is no GPU to compare with"
        free, lasting = free_memory(device), m.peak - m.activations
        details = f"{details}: {m.peak / free:.0%} of what is free"
        if m.peak <= 0.9 * free:
            return OK, details
        fits = [n for n in range(1, micro) if micro % n == 0 and lasting + m.activations * n / micro <= 0.9 * free]
        advice = f"micro_batch_size={fits[-1]}" if fits else "a smaller seq_len or model"
        return FAIL if m.peak > free else WARNING, f"{details} with micro_batch_size={micro}; type {advice}"

    def disk(self) -> Finding:
        cfg, folder = self.cfg, run_folder(self.cfg)
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        try:
            TemporaryFile(dir=place).close()
        except OSError as e:
            raise ConfigError(f"cannot write run folder {folder}: {e.strerror}; type runs_dir=FOLDER") from None
        free = shutil.disk_usage(place).free
        if self.needs is None:
            return WARNING, f"{size(free)} free in {place}; the size of a checkpoint is not known"
        every, keep_every = cfg.checkpoint_every, cfg.trainer.keep_every
        saved = -(-cfg.steps // every) if every else 1
        for_good = cfg.steps // math.lcm(every, keep_every) if every and keep_every else 0
        count = min(saved, cfg.trainer.keep_checkpoints + 1 + for_good)  # one more while it is written
        held = sum(f.stat().st_size for f in (folder / "checkpoints").rglob("*") if f.is_file())
        needed = max(0, count * self.needs.checkpoint + self.needs.weights - held)
        details = f"{count} checkpoints of {size(self.needs.checkpoint)} and the weights: {size(needed)} to write"
        if needed <= free:
            return OK, f"{details}; {size(free)} free in {place}"
        advice = "trainer.keep_checkpoints=1, a larger checkpoint_every or trainer.keep_every, or runs_dir=FOLDER"
        return FAIL, f"{details}, but only {size(free)} free in {place}; type {advice}"

    def data(self) -> Finding:
        cfg, ranks, micro = self.cfg, self.ranks, self.micro_batch_size
        if "_target_" not in cfg.dataset and (waiting := unprepared(cfg.dataset)):
            return WARNING, waiting
        with closing(open_dataset(cfg, micro, ranks.size)) as dataset:
            if not isinstance(dataset, TokenDataset):
                return OK, f"{cfg.dataset.name} opens"
            dataset.batch(0, cfg.batch_size, ranks.rank, ranks.size, micro)  # compares the checksum of its shard
            val = dataset.val
            needed = val.examples(cfg.dataset.val_tokens) * cfg.seq_len
            for begin in val.tokens.begins[val.tokens.begins < needed]:
                val.tokens.expect(int(begin)).result()
            tokens = cfg.steps * cfg.batch_size * cfg.seq_len
            return OK, f"{dataset.folder}: {sum(dataset.sizes):,} training tokens; the run reads {tokens:,}"

    def wandb(self) -> Finding | None:
        logger = self.cfg.logger
        if not self.ranks.is_first or logger.name != "wandb" or os.environ.get("WANDB_MODE", logger.mode) != "online":
            return None
        from .wandb_run import has_key  # here, so that only runs with W&B need it

        try:
            reason = "" if has_key() else "W&B has no key; type wandb login"
        except Exception as e:
            reason = f"W&B cannot be reached ({one_line(e)})"
        if reason:
            return WARNING, f"{reason}; until then the run logs offline"
        return OK, f"W&B takes the key; project {logger.project}"


def unprepared(d: DictConfig) -> str | None:
    """What the run does first, and takes long, before its dataset can be opened. Raises DataError where it cannot."""
    folder = Path(d.output) if "buffer" in d else shards_folder(d)
    manifest = load_manifest(folder)
    if "buffer" in d and (manifest is None or not manifest.complete):
        texts = sum(len(text_sources(d, files)) for files in (d.files, d.val_files))
        return f"{texts} files of text are there; the run first makes validation shards of them in {folder}"
    if "buffer" in d or manifest is not None or (d.prepare == "sample" and not folder.exists()):
        return None
    paths = find_shards(folder, "train") + find_shards(folder, "val")
    tokens = sum(read_header(path)[0] for path in paths)
    return f"{folder} has no manifest: the run first reads all of its {len(paths)} shards, {tokens:,} tokens"


def merged(findings: list[Finding | None]) -> Finding:
    """One finding from those of all ranks: the worst result, and what the ranks say that have it."""
    held = {rank: finding for rank, finding in enumerate(findings) if finding}
    worst = max((result for result, _ in held.values()), key=list(COLOURS).index)
    said: dict[str, list[int]] = {}
    for rank, (result, details) in held.items():
        if result == worst:
            said.setdefault(details, []).append(rank)
    if list(said.values()) == [list(held)]:
        return worst, next(iter(said))
    return worst, "\n".join(f"rank {', '.join(map(str, ranks))}: {details}" for details, ranks in said.items())


def show(table: dict[str, Finding], title: str) -> None:
    rows = Table("check", "result", "details", title=title, show_lines=True)
    for name, (result, details) in table.items():
        rows.add_row(name, Text(result, COLOURS[result]), Text(details))
    Console(width=None if sys.stdout.isatty() else 120).print(rows)
    sys.stdout.flush()


def free_memory(device: torch.device) -> int:
    """Bytes for this rank: of its GPU, or its part of what the machine has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        free = int(available[1]) * 1024 if available else 0
    except OSError:  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
