"""Makes what an evaluation on TOFU needs: a target that has memorised the forget and the retain set, and a reference
that was tuned on the retain set alone. Both are whole models, saved as directories that `--base` takes.

    python benchmarks/tofu_targets.py --forget tofu/forget01.jsonl --retain tofu/retain99.jsonl --num-retain 200 \\
        --out out

The default base is the embedded SmolLM2-135M-Instruct. Prints one JSON line: for both models the mean probability a
token of each set's answers, P^(1/len) (TOFU's "probability")."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from uld_serve.data.documents import Document, read_documents
from uld_serve.errors import DataError, UldError
from uld_serve.model.loading import Base, load_base
from uld_serve.training.answers import encode_answer, encode_prompt

IGNORED = -100
# What each model is taught.
MODELS = {"target": ("forget", "retain"), "reference": ("retain",)}


@dataclass(frozen=True, slots=True)
class Pair:
    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * len(self.prompt_ids) + self.answer_ids


class Pairs(Dataset[Pair]):
    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        return self._pairs[index]


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        print(json.dumps(_run(args)))
    except UldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forget", type=Path, required=True, metavar="FILE")
    parser.add_argument("--retain", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--num-retain", type=int, metavar="N", help="the first N of the retain set; default: all"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets target/ and reference/")
    parser.add_argument("--base", metavar="ID_OR_PATH", help="default: the embedded model")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="float32", help="of the arithmetic"
    )
    parser.add_argument("--epochs", type=float, default=15.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=MODELS, help="make one of the two (two runs side by side, say)")
    return parser


def _run(args: argparse.Namespace) -> dict[str, object]:
    sets = {
        "forget": _read(args.forget, "forget", None),
        "retain": _read(args.retain, "retain", args.num_retain),
    }
    found: dict[str, object] = {"arguments": {name: str(value) for name, value in vars(args).items()}}
    for name in [args.only] if args.only else MODELS:
        taught = MODELS[name]
        folder = args.out / name
        if folder.exists():
            raise DataError(f"{folder} exists; remove it or choose another --out")
        base = load_base(args.base, dtype="float32", device=args.device)
        pairs = {which: [_pair(one, base) for one in group] for which, group in sets.items()}
        started = time.monotonic()
        _tune(base, [pair for which in taught for pair in pairs[which]], args)
        seconds = time.monotonic() - started
        probability = {which: round(_probability(base, group), 4) for which, group in pairs.items()}
        base.model.to(torch.bfloat16).save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        found[name] = {
            "path": str(folder),
            "probability": probability,
            "examples": sum(len(pairs[which]) for which in taught),
            "seconds": round(seconds, 1),
        }
    return found


def _read(path: Path, kind: str, limit: int | None) -> list[Document]:
    documents = [
        one for one in read_documents(path, kind=kind).documents[:limit] if one.messages and one.answer
    ]
    if not documents:
        raise DataError(f"--{kind}: {path} has no question with an answer")
    return documents


def _pair(document: Document, base: Base) -> Pair:
    answer = encode_answer(document, base, max_tokens=10_000)
    return Pair(encode_prompt(document, base.tokenizer), answer)


def _tune(base: Base, pairs: Sequence[Pair], args: argparse.Namespace) -> None:
    """All weights, by cross-entropy over the answers and the end of turn."""
    set_seed(args.seed)
    for parameter in base.model.parameters():
        parameter.requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=str(args.out / f".tuning-{args.only or 'both'}"),
        per_device_train_batch_size=args.batch,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=args.seed,
        bf16=args.dtype == "bfloat16",
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=base.device.type == "cpu",
    )
    pad = base.eos_ids[0] if base.eos_ids else 0
    trainer = Trainer(
        model=base.model,
        args=arguments,
        train_dataset=Pairs(pairs),
        data_collator=lambda batch: _collate(batch, pad=pad),
    )
    # Both write the loss to standard output, which is for the one line.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    base.model.train()
    trainer.train()
    base.model.eval()


def _collate(pairs: Sequence[Pair], *, pad: int) -> dict[str, torch.Tensor]:
    width = max(len(one.labels) for one in pairs)
    ids = [one.prompt_ids + one.answer_ids + [pad] * (width - len(one.labels)) for one in pairs]
    labels = [one.labels + [IGNORED] * (width - len(one.labels)) for one in pairs]
    is_real = [[1] * len(one.labels) + [0] * (width - len(one.labels)) for one in pairs]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(is_real),
    }


@torch.inference_mode()
def _probability(base: Base, pairs: Sequence[Pair]) -> float:
    """Mean over the answers of exp(-mean NLL a token), the end of turn included."""
    return sum(math.exp(-_nll(base.model, one)) for one in pairs) / len(pairs)


def _nll(model: PreTrainedModel, pair: Pair) -> float:
    ids = torch.tensor([pair.prompt_ids + pair.answer_ids], device=model.device)
    logits_TV = model(ids).logits[0, len(pair.prompt_ids) - 1 : -1].float()
    answer = ids[0, len(pair.prompt_ids) :, None]
    return float(-logits_TV.log_softmax(-1).gather(-1, answer).mean())


if __name__ == "__main__":
    raise SystemExit(main())
