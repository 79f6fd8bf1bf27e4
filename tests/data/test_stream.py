"""C4 without preparation: one shuffled stream, the same for every number of ranks, resumed at the exact document."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ema_nesterov.data.preparation.recipes import prepare_dataset
from ema_nesterov.data.shuffle import ShuffledStream
from ema_nesterov.data.stream import StreamDataset
from ema_nesterov.errors import DataError
from ema_nesterov.training.folder import FINISHED
from ema_nesterov.training.run import run
from tests.conftest import ROOT, TINY, composed, read_metrics, run_folder, train_process
from tests.data.texts import documents, tokens, write_c4


def stream(
    sizes: list[int], buffer: int, counts: dict[int, int] | None = None, read: list | None = None
) -> ShuffledStream:
    def documents(source: int, skip: int):
        if read is not None:
            read.append((source, skip))
        texts = [f"{source}:{i}" for i in range(sizes[source])][skip:]
        return (texts[i : i + 7] for i in range(0, len(texts), 7))

    return ShuffledStream(len(sizes), documents, buffer, 42, {} if counts is None else counts)


def test_the_order_is_that_of_datasets_in_one_process() -> None:
    """The file holds what datasets 4.0.0 reads of four files with shuffle(seed=42, buffer_size=50)."""
    recorded = json.loads((ROOT / "tests" / "reference" / "datasets_4.0.0_shuffle.json").read_text(encoding="utf-8"))
    names, sizes = [0, 2, 3, 4], [37, 120, 55, 203]
    ours = [text.split(":") for _, text in islice(stream(sizes, 50).documents(0), sum(sizes))]
    assert [f"{names[int(source)]}:{i}" for source, i in ours] == recorded


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 300), st.data())
def test_a_stream_that_is_sought_goes_on_as_if_it_had_been_read(sizes, buffer: int, position: int, data) -> None:
    """Over ends of epochs, with all, some or none of the sources' sizes known."""
    total = sum(sizes)
    if total == 0:
        assert list(stream(sizes, buffer).documents(position)) == []
        return
    whole = list(islice(stream(sizes, buffer).documents(0), position + 20))
    assert (
        sorted(text for _, text in whole[:total]) == sorted(text for _, text in whole)[:0]
        or len(whole) <= total
        or (
            sorted(text for _, text in whole[:total])
            == sorted(f"{s}:{i}" for s, n in enumerate(sizes) for i in range(n))
        )
    )
    known = {s: n for s, n in enumerate(sizes) if data.draw(st.booleans())}
    assert list(islice(stream(sizes, buffer, known).documents(position), 20)) == whole[position:]


def test_seeking_reads_only_the_last_sources_before_a_position() -> None:
    sizes, read = [100] * 40, []
    next(stream(sizes, 10, dict(enumerate(sizes)), read).documents(3000))
    assert len(read) <= 3


# --- the dataset ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    base = tmp_path_factory.mktemp("stream")
    train = [documents(110, i) for i in range(3)]
    return write_c4(base / "en", train, [documents(60, 9)]), [text for texts in train for text in texts]


def overrides(raw: Path, out: Path, tokenizer: Path) -> list[str]:
    return ["dataset=c4_stream", f"dataset.path={raw}", f"dataset.output={out}", f"dataset.tokenizer={tokenizer}",
            "dataset.row_len=32", "dataset.buffer=40", "dataset.processes=1", "dataset.val_tokens=500",
            "dataset.probe_tokens=100", "dataset.max_epochs=3"]  # fmt: skip


def rows(data: StreamDataset, step: int, ranks: int = 1) -> torch.Tensor:
    return torch.cat([b.inputs for rank in range(ranks) for b in data.batch(step, 12, rank, ranks, 3)])


@pytest.mark.usefixtures("inline_stream")
def test_every_row_is_a_row_of_the_prepared_set_once_an_epoch_for_any_ranks_and_restarts(
    raw, t5: Path, tmp_path: Path
) -> None:
    folder, texts = raw
    keys = overrides(folder, tmp_path / "val", t5)
    prepared = [f"dataset.path={folder}", f"dataset.output={tmp_path / 'prepared'}", f"dataset.tokenizer={t5}"]
    prepare_dataset(composed("dataset=c4", *prepared, "dataset.row_len=32", "dataset.processes=1").dataset)
    expected = tokens(tmp_path / "prepared", "train").reshape(-1, 32)
    one = StreamDataset(composed(*keys).dataset, 32000, 0)
    got = torch.cat([rows(one, step) for step in range(30)])
    assert len(expected) == len(texts) == 330
    assert sorted(map(tuple, got[:330].tolist())) == sorted(map(tuple, expected.tolist()))
    state = one.state()
    one.close()
    resumed = StreamDataset(composed(*keys).dataset, 32000, 0)
    resumed.resume(state)
    assert torch.equal(rows(resumed, 25), got[25 * 12 : 26 * 12])
    resumed.close()
    two = StreamDataset(composed(*keys).dataset, 32000, 0)  # without what was learned of the files, as a second rank
    mine = torch.cat([b.inputs for step in (9, 10) for b in two.batch(step, 12, 1, 2, 2)])
    assert torch.equal(mine, got[9 * 12 : 11 * 12].reshape(2, 2, 6, 32)[:, 1].reshape(-1, 32))
    two.close()


@pytest.mark.usefixtures("inline_stream")
def test_the_end_of_the_stream_is_an_error_that_says_what_was_needed(raw, t5: Path, tmp_path: Path) -> None:
    data = StreamDataset(composed(*overrides(raw[0], tmp_path, t5), "dataset.max_epochs=1").dataset, 32000, 0)
    data.require(40, 12, 3, 1)
    rows(data, 26)
    with pytest.raises(DataError, match=r"needs 480 documents, .* holds 330 x .*type steps=27 or dataset.max_epochs=2"):
        rows(data, 27)
    data.close()


@pytest.mark.usefixtures("inline_stream")
def test_what_the_reading_process_cannot_do_is_said_in_one_line(raw, t5: Path, tmp_path: Path) -> None:
    folder = write_c4(tmp_path / "en", [["fine"], ["x"]], [documents(60)])
    data = StreamDataset(composed(*overrides(folder, tmp_path / "val", t5)).dataset, 32000, 0)
    next(iter(folder.glob("c4-train.00001*"))).write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"c4-train.00001-of-01024.json.gz cannot be read"):
        rows(data, 0)
    data.close()


@pytest.mark.usefixtures("inline_stream")
def test_a_run_that_streams_goes_on_from_a_checkpoint_on_more_ranks(raw, t5: Path, tmp_path: Path) -> None:
    keys = [*TINY, "model.vocab_size=32000", "steps=6", "checkpoint_every=3", "eval_every=3", "probe_every=0"]
    keys += ["noise_every=0", *overrides(raw[0], tmp_path / "val", t5), f"runs_dir={tmp_path / 'runs'}"]
    assert run(composed(*keys)) == FINISHED
    folder = run_folder(tmp_path / "runs")
    expected = read_metrics(folder)
    (folder / "status.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    again = train_process(*keys, ranks=2)
    assert again.returncode == 0, again.stderr
    assert "leaked" not in again.stderr
    assert "resuming at step 3" in again.stdout
    for before, after in zip(expected, read_metrics(folder), strict=True):
        assert before == pytest.approx(after, rel=1e-4)
