from __future__ import annotations

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from ema_nesterov.config import check
from ema_nesterov.derived import alpha_schedule, lr_schedule, momentum_schedule, steps_of, validation_steps
from ema_nesterov.errors import ConfigError
from ema_nesterov.lookahead import Wrapper
from ema_nesterov.models import build_model
from ema_nesterov.optim.build import build_optimizer
from ema_nesterov.training.identity import run_hash
from tests.conftest import ROOT, composed

EXPERIMENTS = sorted(
    str(p.relative_to(ROOT / "configs" / "experiment").with_suffix(""))
    for p in (ROOT / "configs" / "experiment").rglob("*.yaml")
)


@pytest.mark.parametrize("group", ["model", "dataset", "optimizer", "lookahead", "schedule", "trainer", "logger"])
def test_every_option_composes(group: str) -> None:
    for path in (ROOT / "configs" / group).glob("*.yaml"):
        alone = ["lookahead=none"] if path.stem == "lr_matched" else []  # the control of a lookahead
        cfg = composed(f"{group}={path.stem}", *alone)
        assert OmegaConf.missing_keys(cfg) == ({"dataset.path"} if path.stem == "text" else set())
        if group not in ("dataset",):  # a dataset may not fit the default model's vocabulary
            check(composed(f"{group}={path.stem}", "dataset.vocab_size=100", *alone))


def test_every_wrapper_composes_with_every_base() -> None:
    names = {group: [p.stem for p in (ROOT / "configs" / group).glob("*.yaml")] for group in ("optimizer", "lookahead")}
    with torch.device("meta"):
        model = build_model(composed().model)
    lookaheads = {name: composed(f"lookahead={name}").lookahead for name in names["lookahead"]}
    for optimizer in names["optimizer"]:
        cfg = composed(f"optimizer={optimizer}")
        for lookahead in names["lookahead"]:
            cfg.lookahead = lookaheads[lookahead]
            check(cfg)
            if optimizer == "muon" or lookahead in ("none", "ema_nesterov"):
                assert isinstance(build_optimizer(model, cfg), Wrapper) == (lookahead != "none")


def test_the_papers_numbers_stand_in_the_experiments() -> None:
    cfg = composed("experiment=nanogpt_124m/muon_ema_nesterov")
    assert (cfg.steps, cfg.batch_size * cfg.seq_len) == (6200, 524_288)
    assert (cfg.optimizer.lr, cfg.optimizer.adam.embedding_lr) == (3.6e-4, 3.6e-3)
    alpha, lr = alpha_schedule(cfg), lr_schedule(cfg)
    assert [alpha(t) for t in (1799, 1800, 4400, 5600)] == [0.0, 0.5, 0.5, 0.0]
    assert alpha(5599) == pytest.approx(0.167, abs=1e-3)
    assert (lr(4399), lr(5300)) == (1.0, 0.5)
    track3 = alpha_schedule(composed("experiment=nanogpt_162m/muon_ema_nesterov"))
    assert [track3(t) > 0 for t in (499, 500, 2399, 2400)] == [False, True, True, False]
    llama = alpha_schedule(composed("experiment=llama_60m/muon_ema_nesterov"))
    assert [llama(t) for t in (749, 750, 1999, 2000)] == [0.0, 0.7, 0.7, 0.0]


def test_the_162m_records_differ_where_they_say() -> None:
    base, wrapped = (composed(f"experiment=nanogpt_162m/{name}") for name in ("record30", "record30_ema_nesterov"))
    rates = [
        [round(lr_schedule(cfg, matrix)(t), 6) for t in (600, 1700, 2899)]
        for cfg in (base, wrapped)
        for matrix in (0, 1)
    ]
    constants = [(1.6589351369335795e-4, 3050), (8.845209253220434e-5, 3050)]
    constants += [(c, 2980) for c, _ in constants]
    expected = [[round(min(1.0, c * (end - t) ** 1.2), 6) for t in (600, 1700, 2899)] for c, end in constants]
    assert rates == expected
    momentum = momentum_schedule(base)
    assert momentum is not None
    assert [round(momentum(t), 4) for t in (0, 150, 300, 2920, 2970, 3019)] == [0.85, 0.9, 0.95, 0.95, 0.9, 0.851]
    alpha = alpha_schedule(wrapped)
    assert [alpha(t) > 0 for t in (299, 300, 1949, 1950)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (("steps=400",), [0, 100, 200, 300, 400]),
        (("steps=350", "eval_every=100"), [0, 100, 200, 300, 350]),
        (("steps=400", "eval_every=0"), [400]),
        (("steps=400", "eval_every=0", "eval_at=[0,7,0.5]"), [0, 7, 200, 400]),
        (("steps=400", "eval_at=[0.88/25,500/3]"), [0, 100, 200, 300, 375, 400]),  # 352 is no multiple of 25
    ],
)
def test_the_steps_that_are_validated(overrides: tuple[str, ...], steps: list[int]) -> None:
    assert sorted(validation_steps(composed(*overrides))) == steps


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("muon", [3000, *range(3025, 3351, 25)]),  # results 12, 39 and 40
        ("muon_ema_nesterov", [2750, *range(2850, 3151, 25)]),
        (
            "record30_ema_nesterov",
            [2750, 2850, 2860, 2870, 2875, 2880, 2890, 2900],
        ),  # of 30 and 40, but for single steps
    ],
)
def test_the_162m_runs_are_validated_where_the_public_logs_are(name: str, last: list[int]) -> None:
    steps = sorted(validation_steps(composed(f"experiment=nanogpt_162m/{name}")))
    assert steps[-len(last) :] == last


BASES = sorted({e.removesuffix("_ema_nesterov").removesuffix("_lr_matched") for e in EXPERIMENTS})


@pytest.mark.parametrize("base", BASES)
def test_every_experiment_is_valid_and_differs_from_its_base_where_it_says(base: str) -> None:
    names = {base, f"{base}_ema_nesterov", f"{base}_lr_matched"}
    held = {name: composed(f"experiment={name}") for name in EXPERIMENTS if name in names}
    for name, cfg in held.items():
        check(cfg)
        assert cfg.name == name
    if len(held) == 1:  # another lookahead
        return
    wrapped, control = held[f"{base}_ema_nesterov"], held[f"{base}_lr_matched"]
    if not base.startswith("nanogpt_162m"):  # there the lookahead's runs are shorter
        a, b = (OmegaConf.to_container(cfg, resolve=True) for cfg in (held[base], wrapped))
        assert {key for key in a if a[key] != b[key]} == {"name", "lookahead"}
    # the control moves as far as the lookahead
    assert control.lookahead.name == "none"
    assert control.steps == wrapped.steps
    alpha, lr, matched = alpha_schedule(wrapped), lr_schedule(wrapped), lr_schedule(control)
    assert any(alpha(t) > 0 for t in range(control.steps))
    assert all(matched(t) == lr(t) / (1 - alpha(t)) for t in range(control.steps))


@pytest.mark.parametrize(
    "same",
    [
        ("seed=3",),
        ("runs_dir=elsewhere", "micro_batch_size=1", "log_every=7", "eval_every=3", "eval_at=[0.5]"),
        ("logger=wandb", "trainer.device=cpu", "trainer.workers=0"),
        ("optimizer.momentum=0.95",),  # the default
    ],
)
def test_the_hash_ignores_what_does_not_change_the_result(same: tuple[str, ...]) -> None:
    assert run_hash(composed(*same)) == run_hash(composed())


@pytest.mark.parametrize(
    "other",
    ["steps=401", "lookahead.alpha=0.4", "optimizer.adam.eps=1e-9", "lookahead=none", "model.layers=3", "seq_len=128"],
)
def test_the_hash_tells_runs_with_other_results_apart(other: str) -> None:
    assert run_hash(composed(other)) != run_hash(composed())


def test_a_new_key_with_a_default_renames_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed()
    before = run_hash(cfg)
    from dataclasses import field, make_dataclass

    from ema_nesterov import schemas

    wider = make_dataclass("MuonConfig", [("new_key", int, field(default=7))], bases=(schemas.MuonConfig,))
    cfg.optimizer = OmegaConf.merge(OmegaConf.structured(wider), dict(cfg.optimizer))
    assert run_hash(cfg) == before
    cfg.optimizer.new_key = 8
    assert run_hash(cfg) != before


@pytest.mark.parametrize(("length", "steps"), [(0, 0), (0.29, 116), (1, 1), (250, 250)])
def test_lengths_below_one_are_fractions_of_the_run(length: float, steps: int) -> None:
    assert steps_of(length, 400) == steps


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=fineweb"], r"dataset fineweb has 50257 tokens, model tiny only 4096; type model.vocab_size=50257"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["model.heads=3"], "model.width=128 must be a multiple of"),
        (["+lookahead.alfa=1"], "unknown key lookahead.alfa; did you mean lookahead.alpha"),
        (["+colour=1"], "unknown key colour"),
        (["optimizer.scale=spektral"], "did you mean spectral"),
        (["lookahead.warmup_steps=300", "lookahead.rest_steps=300"], "do not fit into 400 steps"),
        (["schedule.decay_steps=2.5"], "schedule.decay_steps must be a fraction below 1 or a whole number"),
        (["lookahead.ema_decay=1.0"], r"lookahead.ema_decay=1.0 must be in \[0, 1\)"),
        (["lookahead.alpha=-99"], "lookahead.alpha=-99.0 must be a number above -99"),
        (["lookahead.alpha=nan"], "lookahead.alpha=nan must be a finite number"),
        (["lookahead=nesterov", "lookahead.alpha=-1"], "lookahead.alpha=-1.0 must be a number above -1"),
        (["lookahead=lookahead", "lookahead.alpha=-0.1"], "lookahead.alpha=-0.1 must be at least 0"),
        (["lookahead=snoo", "lookahead.k=0"], "lookahead.k=0 must be at least 1"),
        (["lookahead=gpa", "lookahead.mu_y=0"], "lookahead.mu_y=0.0 must be above 0"),
        (["lookahead=lookahead", "lookahead.adaptive=true"], "type optimizer=adamw"),
        (["name=../elsewhere"], "name="),
        (["optimizer.adam.betas=[0.9]"], "two numbers"),
        (["dataset=c4", "model=llama_60m", "seq_len=128"], "seq_len=128 must be the length of a row of c4, 256"),
        (["model=llama_60m", "seq_len=4096"], "model.max_seq_len=2048"),
        (["dataset.val_tokens=5"], "dataset.val_tokens=5 must be at least seq_len"),
        (["trainer.device=gpu"], "trainer.device=gpu must be one of auto, cpu, cuda"),
        (["trainer.grad_clip=-1"], "trainer.grad_clip"),
        (["micro_batch_size=0"], "micro_batch_size=0"),
        (["schedule=lr_matched"], "type lookahead=none"),
        (
            ["schedule=lr_matched", "lookahead=none", "schedule.matched_alpha=1"],
            "matched_alpha=1.0 must be a number below 1",
        ),
        (["schedule.matrix_decay_steps=5"], "left out unless schedule.decay=power"),
        (["schedule=power", "schedule.min_ratio=0.1"], "left out when schedule.decay=power"),
        (["schedule=power", "optimizer=adamw"], "adamw has none"),
        (["schedule=power", "schedule.extra_steps=-1"], "schedule.extra_steps=-1.0 must be at least 0"),
        (["schedule=power", "schedule.matrix_decay_steps=0"], "schedule.matrix_decay_steps=0.0 must be above 0"),
        (["schedule=power", "schedule.exponent=nan"], "schedule.exponent=nan must be a finite number"),
        (["optimizer.lr=inf"], "optimizer.lr=inf must be a finite number"),
        (["optimizer=soap", "lookahead=lookahead", "lookahead.inner_state=interpolate"], "moments turn"),
        (["model=nanogpt_162m", "model.init=record31", "dataset.vocab_size=9"], "did you mean record30"),
    ],
)
def test_an_impossible_combination_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check(composed(*overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("typo", ["lookahead.alhpa=0.5", "optimizer.lr=fast", "stpes=3", "model.layers=two"])
def test_a_typo_or_a_wrong_type_fails_at_composition(typo: str) -> None:
    with pytest.raises(ConfigCompositionException):
        composed(typo)
