"""The order of the data: one for all ranks and restarts, or exactly the authors'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ema_nesterov.data.loader import TokenDataset
from ema_nesterov.data.order import Windows
from ema_nesterov.data.shards import write_shard
from ema_nesterov.errors import DataError
from tests.conftest import composed

SIZES = [331, 257, 290]  # tokens of the shards


def dataset(folder: Path, *overrides: str) -> TokenDataset:
    if not list(folder.glob("*.bin")):
        for split, sizes in (("train", SIZES), ("val", [100])):
            for i, size in enumerate(sizes):
                write_shard(folder / f"x_{split}_{i:06d}.bin", sum(sizes[:i]) + np.arange(size))
    cfg = composed(f"dataset.path={folder}", "dataset.val_tokens=64", *overrides).dataset
    return TokenDataset(cfg, 4096, 8, 3)


def inputs(data: TokenDataset, step: int, batch: int, ranks: int, micro: int) -> list[list[int]]:
    """The global batch, rank after rank."""
    return torch.cat([b.inputs for r in range(ranks) for b in data.batch(step, batch, r, ranks, micro)]).tolist()


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 1),
    st.none() | st.integers(0, 9),
)
def test_every_epoch_holds_every_window_once(sizes: list[int], length: int, spare: int, seed: int | None) -> None:
    windows = Windows(sizes, length, spare, seed)
    assert windows.count == max(0, sum(sizes) - spare) // length
    if windows.count:
        epochs = windows.starts(np.arange(3 * windows.count)).reshape(3, -1)
        assert (np.sort(epochs) == np.arange(windows.count) * length).all()
        at_once = windows.starts(np.arange(windows.count, 2 * windows.count)[::-1])
        assert (at_once[::-1] == epochs[1]).all()  # a position's window depends on nothing else


def test_shuffling_reads_one_shard_after_the_other_in_an_order_of_its_own() -> None:
    windows = Windows([1000] * 8, 10, 0, 5)
    shards = windows.starts(np.arange(2 * windows.count)).reshape(2, 8, 100) // 1000
    assert (shards == shards[:, :, :1]).all()  # so that few shards are open at a time
    assert shards[0, :, 0].tolist() != shards[1, :, 0].tolist() != sorted(shards[1, :, 0].tolist())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_run_of_any_ranks_that_restarts_reads_what_one_rank_reads_without(tmp_path: Path, ranks: int) -> None:
    whole = dataset(tmp_path, "dataset.shuffle=true")
    expected = [inputs(whole, step, 8, 1, 8) for step in range(30)]  # over three epochs
    for first in (0, 11):
        restarted = dataset(tmp_path, "dataset.shuffle=true")
        for step in range(first, 30):
            assert inputs(restarted, step, 8, ranks, 1) == expected[step]


def authors_124m(shards: list[np.ndarray], micro: int, length: int, rank: int, ranks: int) -> Iterator[np.ndarray]:
    """The walk of their loader, one variable after the other (FACTS: modded-nanogpt's first track)."""
    shard, position = 0, rank * micro * length

    def fetch() -> np.ndarray:
        nonlocal shard, position
        batch = shards[shard][position : position + micro * length + 1]
        position += micro * length * ranks
        if position + micro * length * ranks + 1 > len(shards[shard]):
            shard, position = (shard + 1) % len(shards), rank * micro * length
        return batch

    yield fetch()  # fetched before the loop,
    shard, position = 0, rank * micro * length  # then the loader is reset
    while True:
        yield fetch()


@pytest.mark.parametrize(("batch", "ranks", "micro"), [(8, 1, 4), (8, 2, 4), (12, 3, 2), (8, 4, 2)])
def test_order_nanogpt_124m_is_the_walk_of_the_authors_loader(
    tmp_path: Path, batch: int, ranks: int, micro: int
) -> None:
    data = dataset(tmp_path, "dataset.order=nanogpt_124m", "dataset.max_epochs=3")
    tokens, ends = np.arange(sum(SIZES)), np.cumsum(SIZES)
    shards = np.split(tokens, ends[:-1])
    data.require(20, batch, micro, ranks)
    for rank in range(ranks):
        walk = authors_124m(shards, micro, 8, rank, ranks)
        for step in range(20):
            for got in data.batch(step, batch, rank, ranks, micro):
                expected = next(walk)
                assert got.inputs.flatten().tolist() == expected[:-1].tolist()
                assert got.targets.flatten().tolist() == expected[1:].tolist()


def test_at_the_papers_size_ranks_6_and_7_leave_a_shard_a_batch_earlier() -> None:
    from ema_nesterov.data.order import nanogpt_124m_counts, nanogpt_162m_counts

    counts = [nanogpt_124m_counts([10**8], 1024, 64, rank, 8)[0] for rank in range(8)]
    assert counts == [190] * 6 + [189] * 2
    assert nanogpt_162m_counts([10**8], 1024, 512).tolist() == [190]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_order_nanogpt_162m_drops_the_rest_of_each_shard(tmp_path: Path, ranks: int) -> None:
    data = dataset(tmp_path, "dataset.order=nanogpt_162m", "dataset.max_epochs=1")
    expected, start = [], 0
    for size in SIZES:
        position = 0
        while position + 64 + 1 < size:
            expected.append(np.arange(start + position, start + position + 64).reshape(8, 8).tolist())
            position += 64
        start += size
    data.require(len(expected), 8, 8 // ranks, ranks)
    with pytest.raises(DataError, match=rf"type steps={len(expected)} "):
        data.require(len(expected) + 1, 8, 8 // ranks, ranks)
    for step, batch in enumerate(expected):
        assert inputs(data, step, 8, ranks, 8 // ranks) == batch


def test_a_shard_too_short_for_the_authors_loader_is_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path, "dataset.order=nanogpt_124m")
    with pytest.raises(DataError, match=r"reads 320 tokens of a shard at a time.*type dataset.order=windows"):
        data.require(1, 40, 40, 1)


def test_a_run_in_the_authors_order_resumes_only_as_it_began(tmp_path: Path) -> None:
    began, other = (dataset(tmp_path, "dataset.order=nanogpt_124m") for _ in range(2))
    began.require(2, 8, 4, 2)
    other.require(2, 8, 8, 1)
    with pytest.raises(DataError, match="the 2 ranks and micro_batch_size=4"):
        other.resume(began.state())


def test_a_run_resumes_only_on_the_data_that_it_began_with(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    began = dataset(tmp_path / "a").state()
    dataset(tmp_path / "a").resume(began)
    for split, size in (("train", 400), ("val", 100)):
        write_shard(tmp_path / "b" / f"x_{split}_000000.bin", np.arange(size) + 1)
    with pytest.raises(DataError, match="does not hold the data that this run began with"):
        dataset(tmp_path / "b").resume(began)


def test_an_altered_shard_is_found_when_it_is_first_opened_and_not_before(tmp_path: Path) -> None:
    dataset(tmp_path)
    path = tmp_path / "x_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[1024 + 2 * 100] ^= 1
    path.write_bytes(content)
    data = dataset(tmp_path, "dataset.shuffle=false")
    data.batch(0, 40, 0, 1, 40)  # within the first shard
    with pytest.raises(DataError, match=r"000001.bin is not what was written"):
        data.batch(1, 40, 0, 1, 40)


def test_swapped_short_and_unlisted_shards_are_found(tmp_path: Path) -> None:
    dataset(tmp_path)
    one, two = tmp_path / "x_train_000001.bin", tmp_path / "x_train_000002.bin"
    keep = two.read_bytes()
    two.write_bytes(one.read_bytes())
    with pytest.raises(DataError, match=r"000002.bin holds 257 tokens, its manifest says 290"):
        dataset(tmp_path)
    two.unlink()
    with pytest.raises(DataError, match="cannot read shard"):
        dataset(tmp_path)
    two.write_bytes(keep)
    (tmp_path / "x_train_000003.bin").write_bytes(keep)
    with pytest.raises(DataError, match=r"000003.bin, which its manifest does not list"):
        dataset(tmp_path)
