"""Write a run's weights for transformers: python scripts/export_hf.py run=RUN_FOLDER [output=FOLDER] [step=N] [at=x]

    output    the folder (default: RUN_FOLDER/hf); one that an export wrote before is replaced
    step      of a checkpoint (default: the newest)
    at        x, the iterate; y, the lookahead point at the run's full alpha; or e, the weight EMA
    path      a folder of shards with the tokenizer (default: that of the run's data)

The folder holds config.json, model.safetensors in float32, generation_config.json, the tokenizer and a README.md:
`AutoModelForCausalLM.from_pretrained(FOLDER)` and `AutoTokenizer.from_pretrained(FOLDER)` read it without this package.
Llama is transformers' own; NanoGPT's code stands in the folder, and loads with trust_remote_code=True. Prints the
folder, and how far the logits of the model loaded from it are from the run's.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_nesterov.cli import arguments, guard
from ema_nesterov.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ema_nesterov.data.tokenizers import Tokenizer
    from ema_nesterov.training.trained import Trained

POINTS = {"x": "the iterate", "y": "the lookahead point at full alpha", "e": "the weight EMA"}
LOSSES = {"x": "val/loss", "y": "val/lookahead_loss", "e": "val/ema_loss"}
TOLERANCE = 1e-4  # on logits in float32, summed in another order
ROW = 512  # tokens that the two models are compared on, at most
# what tokenizers differ in: spaces, line ends, digits, apostrophes, accents, ligatures, other scripts
TEXT = " It's 1,234.5 km  from here;\n\n\tdef f(x):\r\n    return 'x'  # na\u00efve \ufb01ne \u65e5\u672c \U0001f642 "

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A language model of {parameters:,} parameters ({model}), pre-trained with the framework ema-nesterov
([arXiv:2605.25395](https://arxiv.org/abs/2605.25395)).

| | |
|---|---|
| run | {run} |
| step | {step:,} of {steps:,}, batches of {batch} rows of {seq_len} tokens |
| weights | at {at}, {point} |
| validation loss there | {loss} |
| dataset | {dataset} |
| optimizer | {optimizer} |
| lookahead | {lookahead} |

With transformers 5 or newer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
batch = tokenizer(["One text", "and another one"], padding=True, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=20), skip_special_tokens=True))
```

{tokens}

The licence is for whoever publishes this to choose; that of the dataset may matter.
"""


@dataclass
class Arguments:
    run: str | None = None
    output: str | None = None
    step: int | None = None
    at: str = "x"
    path: str | None = None


def main() -> None:
    args = arguments(Arguments, __doc__)
    if args.run is None:
        raise ConfigError("run= is missing; type run=RUN_FOLDER, as scripts/where.py prints it")
    if args.step is not None and args.step < 0:
        raise ConfigError(f"step={args.step} must be at least 0")
    if args.at not in POINTS:
        raise ConfigError(f"at={args.at} is no point; type at=x, at=y or at=e")
    output = Path(args.output) if args.output else Path(args.run) / "hf"
    if output.exists() and not is_export(output):
        raise ConfigError(f"{output} exists and is no export; type output=FOLDER, one that does not exist")

    import torch  # here, so that a typo is answered before it is loaded
    from transformers.utils import logging

    from ema_nesterov.training.checkpoint import in_utf8
    from ema_nesterov.training.trained import open_trained

    logging.disable_progress_bar()
    run = open_trained(Path(args.run), args.step, torch.device("cpu"))
    tokenizer = find_tokenizer(run, args.path)
    aside = output.with_name(f".{output.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        with torch.no_grad(), point(run, args.at), in_utf8(aside) as folder:
            model = exported(run, args.at)
            if tokenizer is not None:
                for part in (model.config, model.generation_config):
                    part.bos_token_id, part.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
                model.generation_config.pad_token_id = tokenizer.pad_token_id
                tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
            (aside / "README.md").write_text(card(run, args.at, model, tokenizer), encoding="utf-8")
            difference = compare(run, model, folder)
        replace(aside, output)
    except OSError as e:
        raise ConfigError(f"cannot write {output}: {e.strerror or e}; make room, or type output=FOLDER") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{output}: step {run.step} at {args.at}; the logits differ from the run's by at most {difference:.1e}")


def is_export(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and '"ema_nesterov_run"' in config.read_text(errors="replace", encoding="utf-8")


def replace(aside: Path, output: Path) -> None:
    """A folder cannot be renamed onto one that is not empty."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    aside.rename(output)
    shutil.rmtree(old, ignore_errors=True)


# --- the model ------------------------------------------------------------------------------------


def point(run: Trained, at: str) -> AbstractContextManager:
    """Hold x, y or e, as `validate` does. Raises ConfigError where the run has none."""
    from ema_nesterov.derived import lookahead_position
    from ema_nesterov.lookahead import Wrapper
    from ema_nesterov.training.evaluate import at_iterate, holding, parameters, weight_ema

    if at == "x":
        return at_iterate(run.optimizer)
    if at == "y" and isinstance(run.optimizer, Wrapper) and run.cfg.lookahead.name != "none":
        return run.optimizer.at_position(lookahead_position(run.cfg))
    if at == "e" and (tracker := weight_ema(run.optimizer)) is not None:
        return holding(parameters(run.optimizer), tracker.average())
    raise ConfigError(f"{run.folder} has no {POINTS[at].removeprefix('the ')} at step {run.step}; type at=x")


def exported(run: Trained, at: str) -> PreTrainedModel:
    """transformers' model of the weights that the run's model holds; it shares their memory."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from ema_nesterov.models import Llama, NanoGPT124M, NanoGPT162M
    from ema_nesterov.models.common import own
    from ema_nesterov.models.modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM

    if not isinstance(run.model, (Llama, NanoGPT124M, NanoGPT162M)):
        raise ConfigError(f"{run.folder} has a model of your own, which transformers does not know; export it yourself")
    cfg = run.cfg.model
    about: dict[str, Any] = {
        "ema_nesterov_run": {"run": name_of(run), "step": run.step, "at": at},
        # Llama's rotary positions know no end either: what was trained is what a reader should be told
        **{"vocab_size": cfg.vocab_size, "max_position_embeddings": run.cfg.seq_len},
    }
    weights = {name: own(p).detach() for name, p in run.model.named_parameters()}
    model: PreTrainedModel
    if isinstance(run.model, Llama):
        known = run.model.llama.config
        kept = (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
            *("initializer_range", "tie_word_embeddings", "pad_token_id"),
        )
        options = {key: getattr(known, key) for key in kept}
        model = LlamaForCausalLM(LlamaConfig(**options, **about, bos_token_id=None, eos_token_id=None))
        weights = {name.removeprefix("llama."): weight for name, weight in weights.items()}
    else:
        heads = cfg.heads if isinstance(run.model, NanoGPT124M) else cfg.width // cfg.head_dim
        shape = {"architecture": cfg.architecture, "layers": cfg.layers, "heads": heads, "width": cfg.width}
        # the library then copies the code, and what it imports, beside the weights
        NanoGPTConfig.register_for_auto_class()
        NanoGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        model = NanoGPTForCausalLM(NanoGPTConfig(**shape, **about, float32_gains=cfg.get("float32_gains", False)))
        weights = {f"model.{name}": weight for name, weight in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig()
    return model


def compare(run: Trained, model: PreTrainedModel, folder: Path) -> float:
    """The largest difference between the logits of the run's model and of the one loaded from the folder.

    Raises RuntimeError where it is no rounding.
    """
    import torch

    vocab_size, time = run.cfg.model.vocab_size, min(run.cfg.seq_len, ROW)
    row = torch.randint(vocab_size, (1, time), generator=torch.Generator().manual_seed(0))
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)
    ours: Tensor = run.model(row)
    difference = float((loaded(input_ids=row).logits - ours).abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the exported logits differ by {difference:.1e}: a defect; nothing was exported")
    return difference


# --- the tokenizer --------------------------------------------------------------------------------


def find_tokenizer(run: Trained, path: str | None) -> PreTrainedTokenizerFast | None:
    """None, and a line that says why, where the run's own data are gone or their tokenizer cannot be converted."""
    from generate import tokenizer_of

    from ema_nesterov.data.manifest import load_manifest
    from ema_nesterov.data.preparation.recipes import shards_folder

    try:
        if path is None and "_target_" in run.cfg.dataset:
            raise DataError("the dataset is of your own")
        folder = Path(path) if path else shards_folder(run.cfg.dataset)
        ours = tokenizer_of(folder)
        manifest = load_manifest(folder)
        return converted(ours, manifest.pad_id if manifest else None, run.cfg.seq_len)
    except DataError as e:
        if path:
            raise
        print(f"without a tokenizer: {str(e).partition(';')[0]}; type path=SHARDS to have one", flush=True)
        return None


def converted(ours: Tokenizer, pad_id: int | None, seq_len: int) -> PreTrainedTokenizerFast:
    """The same ids from transformers. Raises DataError where its library makes others of a text.

    No mark is added to a text, T5's </s> neither: a prompt that ends in one would be over.
    """
    from transformers import PreTrainedTokenizerFast

    advice = "type path=SHARDS with a tokenizer.json of it"
    try:
        rust = rust_tokenizer(ours)
    except Exception as e:  # the converters raise many kinds
        raise DataError(f"{ours.name} cannot be converted for transformers ({e}); {advice}") from None
    eos, bos = (ours.after or ours.before)[-1], ours.before[0] if ours.before else None
    tokens = {"eos_token": eos, "bos_token": bos, "pad_token": eos if pad_id is None else pad_id}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust,
        model_max_length=seq_len,
        padding_side="left",  # a batch of prompts can be generated from
        model_input_names=["input_ids", "attention_mask"],  # no token_type_ids, which generate() refuses
        clean_up_tokenization_spaces=False,
        **{key: rust.id_to_token(i) for key, i in tokens.items() if i is not None},
    )
    if rust.encode(TEXT, add_special_tokens=False).ids != ours.encode([TEXT])[0].tolist():
        raise DataError(f"transformers' conversion of {ours.name} gives other ids; {advice}")
    return tokenizer


def rust_tokenizer(ours: Tokenizer) -> Any:
    import json
    from types import SimpleNamespace

    from tokenizers import Tokenizer as Rust
    from transformers.convert_slow_tokenizer import SpmConverter, TikTokenConverter

    from ema_nesterov.data.tokenizers import load_tokenizer, without_sentinels

    if ours.file is None:
        encoding = load_tokenizer(ours.name)
        special = encoding._special_tokens  # among the ranks, since they need not be the last ids
        converter: Any = TikTokenConverter(pattern=encoding._pat_str, extra_special_tokens=special)
        ranks = encoding._mergeable_ranks | {token.encode(): i for token, i in special.items()}
        converter.load_tiktoken_bpe = lambda _: ranks  # it would read a file, which takes another package to write
        return converter.converted()
    if ours.file.suffix == ".json":
        plain = without_sentinels(json.loads(ours.file.read_text(encoding="utf-8")))
        return Rust.from_str(json.dumps({**plain, "post_processor": None}))
    return SpmConverter(SimpleNamespace(vocab_file=str(ours.file))).converted()


# --- the card -------------------------------------------------------------------------------------


def name_of(run: Trained) -> str:
    """The folder below runs_dir: .../name-<hash>/seed<k>."""
    return "/".join(run.folder.resolve().parts[-2 - run.cfg.name.count("/") :])


def card(run: Trained, at: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None) -> str:
    from ema_nesterov.models import Llama
    from ema_nesterov.models.common import count_parameters
    from ema_nesterov.training.logs import read_metrics

    cfg, lines = run.cfg, read_metrics(run.folder / "metrics.jsonl")
    losses = [line[LOSSES[at]] for line in lines if line["step"] == run.step and LOSSES[at] in line]
    look = [f"{key} {value}" for key, value in cfg.lookahead.items() if key != "name"]
    tokens = "The tokenizer was not at hand when this was written."
    if tokenizer is not None:
        tokens = f"Documents are divided by `{tokenizer.eos_token}`; the tokenizer adds nothing to a text."
    optimizer = cfg.optimizer.get("name") or cfg.optimizer.get("_target_")
    return CARD.format(
        name=cfg.name,
        parameters=count_parameters(run.model),
        model=cfg.model.name,
        run=name_of(run),
        step=run.step,
        steps=cfg.steps,
        batch=cfg.batch_size,
        seq_len=cfg.seq_len,
        at=at,
        point=POINTS[at],
        loss=f"{losses[-1]:.4f} nats" if losses else "not measured at this step",
        dataset=cfg.dataset.get("name") or cfg.dataset.get("_target_"),
        optimizer=f"{optimizer}, learning rate {cfg.optimizer.lr}" if "lr" in cfg.optimizer else optimizer,
        lookahead=", ".join([cfg.lookahead.name, *look]),
        trust="" if isinstance(run.model, Llama) else ", trust_remote_code=True",
        tokens=tokens,
    )


if __name__ == "__main__":
    guard(main)
