"""transformers.Trainer with any base optimizer inside any lookahead wrapper, on a small Llama from scratch.

    python examples/hf_trainer.py                                          # half a minute on two CPU cores
    python examples/hf_trainer.py --base soap --lookahead snoo
    python examples/hf_trainer.py --resume                                 # from the last checkpoint in --out

Trainer needs no subclass: it calls the optimizer's eval() before an evaluation, which puts the iterate x into
the model, and train() before the next step. A checkpoint of either mode resumes, to the same weights bit for bit.
The text is the language reference that comes with Python, byte by byte. Trainer wants `pip install accelerate`.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.optim import SGD, AdamW, Optimizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from ema_nesterov.lookahead import GPA, NALA, SNOO, EMANesterov, Lookahead, Nesterov
from ema_nesterov.optim import SOAP, Aurora, Chain, Muon, NorMuon

LENGTH = 64
MATRIX_OPTIMIZERS = {
    "muon": lambda matrices: Muon(matrices, lr=0.02),
    "normuon": lambda matrices: NorMuon(matrices, lr=0.02),
    "aurora": lambda matrices: Aurora(matrices, lr=0.02),
    "soap": lambda matrices: SOAP(matrices, lr=3e-3),
}
WRAPPERS = {
    "none": lambda base: base,
    "ema_nesterov": lambda base: EMANesterov(base, alpha=0.5, ema_decay=0.99),
    "nesterov": lambda base: Nesterov(base, alpha=0.5),
    "nala": lambda base: NALA(base, alpha=0.5, k=5),
    "lookahead": lambda base: Lookahead(base, alpha=0.5, k=5),
    "snoo": lambda base: SNOO(base, lr=0.8, momentum=0.5, k=5),
    "gpa": lambda base: GPA(base, mu_x=0.9, mu_y=0.7),
}


def build_optimizer(name: str, lookahead: str, model: LlamaForCausalLM, matrices_only: bool) -> Optimizer:
    wrap = WRAPPERS[lookahead]
    if name == "adamw":
        return wrap(AdamW(model.parameters(), lr=3e-3))
    if name == "sgd":
        return wrap(SGD(model.parameters(), lr=0.3, momentum=0.9))
    # Muon and its kin are for the hidden layers' matrices; embeddings, head and norms belong to AdamW
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p not in set(matrices)]
    adamw, matrix = AdamW(others, lr=3e-3), MATRIX_OPTIMIZERS[name](matrices)
    return Chain([adamw, wrap(matrix)]) if matrices_only else wrap(Chain([adamw, matrix]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=["adamw", "sgd", *MATRIX_OPTIMIZERS], default="muon")
    parser.add_argument("--lookahead", choices=WRAPPERS, default="ema_nesterov")
    parser.add_argument("--matrices-only", action="store_true", help="look ahead in the matrices alone")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/hf_trainer"))
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(arguments)

    text = torch.frombuffer(bytearray("\n".join(topics.values()), "utf-8"), dtype=torch.uint8).long()
    windows = [{"input_ids": window, "labels": window} for window in text.split(LENGTH)[:-1]]
    train, validation = windows[:-128], windows[-128:]

    set_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = build_optimizer(args.base, args.lookahead, model, args.matrices_only)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)

    options = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_steps=args.save_every,
        logging_steps=args.eval_every,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(model, options, train_dataset=train, eval_dataset=validation, optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=args.resume)

    # Training ends at the lookahead point y; what is exported is the iterate x. (With load_best_model_at_end leave
    # this out: a checkpoint that was saved after its evaluation holds x already.)
    if hasattr(optimizer, "eval"):  # a wrapper, or a chain that may hold one; torch's own optimizers have none
        optimizer.eval()
    trainer.save_model(str(args.out / "final"))


if __name__ == "__main__":
    main()
