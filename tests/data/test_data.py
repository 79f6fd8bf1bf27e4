from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ema_nesterov.data.loader import MicroBatch, TokenDataset, prefetch
from ema_nesterov.data.manifest import load_manifest
from ema_nesterov.data.preparation.sample import _documents, prepare_sample
from ema_nesterov.data.shards import open_shard, write_shard
from ema_nesterov.data.tokenizers import load_tokenizer
from ema_nesterov.errors import DataError
from tests.conftest import composed


def shards(folder: Path, *lengths: int, split: str = "train") -> list[Path]:
    """Shards that count on from one to the next."""
    paths, start = [], 0
    for i, length in enumerate(lengths):
        paths.append(folder / f"x_{split}_{i:06d}.bin")
        write_shard(paths[-1], np.arange(start, start + length))
        start += length
    return paths


def dataset(folder: Path, *overrides: str, seed: int = 0) -> TokenDataset:
    if not list(folder.glob("*.bin")):
        shards(folder, 330, 170)
        shards(folder, 200, split="val")
    cfg = composed(f"dataset.path={folder}", "dataset.val_tokens=100", *overrides).dataset
    return TokenDataset(cfg, 4096, 10, seed)


def read(data: TokenDataset, step: int, ranks: int, batch: int, micro: int) -> MicroBatch:
    parts = [b for rank in range(ranks) for b in data.batch(step, batch, rank, ranks, micro)]
    return MicroBatch(*(torch.cat(t) for t in zip(*parts, strict=True)))


def global_batch(data: TokenDataset, step: int, ranks: int, micro: int) -> MicroBatch:
    return read(data, step, ranks, 12, micro)


def test_a_shard_has_the_public_format(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, 5)
    assert path.stat().st_size == 1024 + 2 * 5
    assert np.fromfile(path, dtype="<i4", count=4).tolist() == [20240520, 1, 5, 0]
    assert open_shard(path).tolist() == [0, 1, 2, 3, 4]


def test_windows_cover_all_shards_end_to_end_and_targets_are_the_next_tokens(tmp_path: Path) -> None:
    shards(tmp_path, 25, 31, 7)
    shards(tmp_path, 200, split="val")
    data = dataset(tmp_path, "dataset.shuffle=false")
    (batch,) = data.batch(0, 6, 0, 1, 6)
    assert batch.inputs.flatten().tolist() == list(range(60))  # 63 tokens: nothing is dropped at a shard's end
    assert (batch.targets == batch.inputs + 1).all()
    data.require(steps=1, batch_size=6, micro_batch_size=6, ranks=1)


def test_rows_are_whole_documents_and_padding_is_no_target(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / f"c4_{split}_000000.bin", np.array([7, 8, 1, 0, 0, 5, 6, 7, 8, 1]))
    keys = [f"dataset.path={tmp_path}", "dataset.row_len=5", "dataset.val_tokens=6", "dataset.probe_tokens=2"]
    data = TokenDataset(composed("dataset=c4", *keys, "dataset.vocab_size=9").dataset, 100, 5, 0)
    (batch,) = data.batch(0, 2, 0, 1, 2)
    assert batch.inputs.tolist() == [[7, 8, 1, 0, 0], [5, 6, 7, 8, 1]]
    assert batch.targets.tolist() == [[8, 1, -100, -100, -100], [6, 7, 8, 1, -100]]
    assert [len(b.inputs) for b in data.validation(6, 0, 1, 4)] == [2]  # val_tokens counts targets, not padding
    assert [len(b.inputs) for b in data.validation(2, 0, 1, 4)] == [1]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 5), (2, 3), (3, 4), (4, 1)])
def test_the_order_is_the_same_for_every_number_of_ranks(tmp_path: Path, shuffle: bool, ranks: int, micro: int) -> None:
    data = dataset(tmp_path, f"dataset.shuffle={shuffle}")
    for step in (0, 3, 11):
        expected, got = global_batch(data, step, 1, 12), global_batch(data, step, ranks, micro)
        assert torch.equal(expected.inputs, got.inputs)
        assert torch.equal(expected.targets, got.targets)


def test_an_epoch_reads_every_example_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    data = dataset(tmp_path, "dataset.shuffle=true")
    assert data.windows.count == 49  # 7 steps of 7 examples
    epochs = [torch.cat([read(data, 7 * e + s, 1, 7, 7).inputs[:, 0] for s in range(7)]) for e in range(2)]
    assert epochs[0].unique().numel() == 49
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert not torch.equal(epochs[0], epochs[1])
    other_seed = dataset(tmp_path, "dataset.shuffle=true", seed=1)
    assert not torch.equal(global_batch(other_seed, 0, 1, 12).inputs, global_batch(data, 0, 1, 12).inputs)


def test_without_shuffling_the_order_is_the_files(tmp_path: Path) -> None:
    assert global_batch(dataset(tmp_path, "dataset.shuffle=false"), 0, 1, 12).inputs[:, 0].tolist() == list(
        range(0, 120, 10)
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_share_the_validation_set(tmp_path: Path, ranks: int) -> None:
    data = dataset(tmp_path)
    seen = [b.inputs[:, 0] for rank in range(ranks) for b in data.validation(100, rank, ranks, 3)]
    assert torch.cat(seen).sort().values.tolist() == list(range(0, 100, 10))


@pytest.mark.parametrize("threads", [0, 1])
def test_prefetching_changes_nothing(threads: int) -> None:
    def read(step: int) -> list[MicroBatch]:
        return [MicroBatch(torch.tensor([step]), torch.tensor([step]))]

    steps = [b[0].inputs.item() for b in prefetch(read, range(3, 8), torch.device("cpu"), threads)]
    assert steps == [3, 4, 5, 6, 7]
    assert list(prefetch(read, range(3, 3), torch.device("cpu"), threads)) == []


def test_running_out_of_data_is_said_before_training(tmp_path: Path) -> None:
    data = dataset(tmp_path, "dataset.max_epochs=2")
    data.require(8, 12, 12, 1)
    with pytest.raises(DataError, match=r"needs 1080 training tokens.*type steps=8 or dataset.max_epochs=3"):
        data.require(9, 12, 12, 1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def wrong_magic(path: Path) -> None:
    path.write_bytes(b"junk" + path.read_bytes()[4:])


def wrong_version(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4] = 7
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cut short"),
        (wrong_magic, "not a token shard"),
        (wrong_version, "version 7"),
        (lambda path: path.write_bytes(b""), "not a token shard"),
        (lambda path: write_shard(path, np.arange(3)), "fewer than seq_len=10"),
        (lambda path: write_shard(path, np.full(50, 5000)), "token 5000 .* beyond the model's vocabulary of 4096"),
        (lambda path: path.unlink(), "no shards"),
    ],
)
def test_a_damaged_shard_is_named_in_one_line(tmp_path: Path, damage, message: str) -> None:
    (path,) = shards(tmp_path, 300)
    shards(tmp_path, 200, split="val")
    damage(path)
    with pytest.raises(DataError, match=message) as error:
        dataset(tmp_path)
    assert "\n" not in str(error.value)


def test_the_sample_is_split_by_document_and_decodes_to_its_text(sample: Path) -> None:
    from tokenizers import Tokenizer

    texts = _documents()
    assert len(texts) == 249
    assert not set(texts[::20]) & {t for i, t in enumerate(texts) if i % 20}
    val = open_shard(sample / "sample_val_000000.bin")
    starts = np.flatnonzero(val == 0)  # end-of-text leads each document
    assert len(starts) == len(texts[::20])
    decoded = Tokenizer.from_file(str(sample / "tokenizer.json")).decode(val[starts[1] + 1 : starts[2]].tolist())
    assert decoded == texts[20]
    manifest, lengths = load_manifest(sample), np.load(sample / "token_bytes.npy")
    assert manifest is not None
    assert lengths[val].sum() == sum(len(t.encode()) for t in texts[::20])
    assert len(lengths) == manifest.tokenizer["vocab_size"] == 4096


def test_bytes_per_token_count_the_text_of_the_targets_alone(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / f"c4_{split}_000000.bin", np.array([2, 3, 4, 1, 0, 3, 3, 1, 0, 0]))
    np.save(tmp_path / "token_bytes.npy", np.array([0, 0, 1, 2, 6]))
    overrides = ["dataset=c4", f"dataset.path={tmp_path}", "dataset.val_tokens=5", "dataset.row_len=5"]
    overrides += ["dataset.probe_tokens=5", "dataset.vocab_size=9"]
    data = TokenDataset(composed(*overrides).dataset, 100, 5, 0)
    assert data.bytes_per_token() == (2 + 6 + 0 + 2 + 0) / 5  # targets 3 4 1 and 3 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tokenizer", v) for v in (None, "gpt2", {}, {"name": 1, "sha256": None, "vocab_size": 5, "file": None})),
        *(("row_len", "x"), ("complete", "x"), ("format", 2), ("shards", None)),
        *(
            ("shards", [{"file": f, "tokens": n, "largest": m, "sha256": ""}])
            for f, n, m in ((None, 1, 1), ("a", 1, -1))
        ),
    ],
)
def test_a_manifest_that_nobody_wrote_is_one_line(tmp_path: Path, key: str, value: object) -> None:
    dataset(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest.json (cannot be read|has format)"):
        dataset(tmp_path)


def test_a_full_number_of_epochs_holds_every_step(tmp_path: Path) -> None:
    shards(tmp_path, 231)
    shards(tmp_path, 200, split="val")
    data = dataset(tmp_path, "dataset.max_epochs=100")
    data.require(230, 10, 10, 1)  # 23 examples, 2,300 in a hundred epochs
    with pytest.raises(DataError, match=r"type steps=230 or dataset.max_epochs=101$"):
        data.require(231, 10, 10, 1)
    with pytest.raises(DataError, match=r"type dataset.max_epochs=435$"):
        data.require(1, 10_000, 10_000, 1)


def test_preparing_again_leaves_the_folder_alone(sample: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in sample.iterdir()}
    prepare_sample(sample, "sample_bpe4096", 4096)
    assert {p.name: p.stat().st_mtime_ns for p in sample.iterdir()} == before


def test_gpt2_tokens_come_without_a_network(tmp_path: Path) -> None:
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    prepare_sample(tmp_path / "gpt2", "gpt2", 50257)
    val = open_shard(tmp_path / "gpt2" / "sample_val_000000.bin")
    text = "".join(gpt2.decode(part[1:].tolist()) for part in np.split(val, np.flatnonzero(val == 50256)) if len(part))
    assert text == "".join(_documents()[::20])


def test_an_unknown_tokenizer_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="gpt2"):
        load_tokenizer("gpt3")


def test_shards_of_another_tokenizer_are_refused(sample: Path) -> None:
    cfg = composed("dataset=sample_gpt2", "model.vocab_size=50257", f"dataset.path={sample}").dataset
    with pytest.raises(DataError, match="holds tokens of sample_bpe4096, dataset sample_gpt2 is of gpt2"):
        TokenDataset(cfg, 50257, 10, 0)
