"""`tools/train`: trains the shipped model from nothing and writes it only if it passes its own check."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import PreTrainedTokenizerFast

from training.corpus import SourceFile, Split, split_by_file, stdlib_files
from training.evaluate import recall
from training.judge import CHECK_FACTS, CHECK_LENGTH, Figures, check, measure
from training.loop import Plan, Trainer
from training.model import MAX_POSITIONS, build_model, build_optimizers
from training.publish import choose_prompt, environment, publish
from training.stream import Stream
from training.tasks import FactFormat
from training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 2_048  # tokens, the longest sequences trained on
_CHECKPOINT_EVERY = 500  # steps
_QUICK_PROMPTS = 32

_EXAMPLES = """examples:
  tools/train                       train with the shipped recipe and write the shipped model
  tools/train --resume              go on from the last checkpoint of an interrupted run
  tools/train --seed 1 --output build/seed1
  tools/train --steps 100           a smoke run: trains, evaluates, fails its check and writes nothing

The model is written only if its bits per byte are below the trigram's and its recall at 1,024 tokens is 0.95 or more.
"""


@dataclass(frozen=True)
class Material:
    """Everything training reads, made from the seed alone."""

    split: Split
    tokenizer: PreTrainedTokenizerFast
    form: FactFormat
    train: Stream
    held_out: Stream


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tools/train", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "zsmerge_compile" / "assets" / "llama-stdlib"
    parser.add_argument("--seed", type=int, default=0, help="of the file split, the weights and the batches (0)")
    parser.add_argument("--steps", type=int, default=7_000, help="optimizer steps (7000)")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate (0.004)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--output", type=Path, default=default, help="where the model goes (the package's assets)")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "build/train/state.pt", help="(build/train/state.pt)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    return parser.parse_args(arguments)


def prepare(seed: int) -> Material:
    split = split_by_file(stdlib_files(), seed)
    tokenizer = train_tokenizer((file.text for file in split.train), MAX_POSITIONS)
    streams = (Stream(files, tokenizer) for files in split)
    return Material(split, tokenizer, FactFormat(tokenizer), *streams)


def resume(trainer: Trainer, checkpoint: Path) -> None:
    try:
        trainer.load(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"Cannot resume: {error}") from error


def train(trainer: Trainer, material: Material, checkpoint: Path, console: Console) -> None:
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = trainer.progress
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("steps", total=trainer.plan.steps, completed=progress.step)
        while progress.step < trainer.plan.steps:
            trainer.step(material.form, material.train, console)
            bar.advance(task)
            if progress.step % _CHECKPOINT_EVERY == 0 or progress.step == trainer.plan.steps:
                trainer.save(checkpoint)
                report(trainer, material, console)


def report(trainer: Trainer, material: Material, console: Console) -> None:
    """One line on where training stands, with recall over a few prompts."""
    progress, model = trainer.progress, trainer.model
    quick = recall(model, material.form, material.held_out, CHECK_LENGTH, CHECK_FACTS, _QUICK_PROMPTS)
    losses = {name: progress.curve[-1].get(name, math.nan) for name in ("code_loss", "answer_loss")}
    console.print(
        f"step {progress.step}, {progress.seconds:.0f} s, {progress.tokens / 1e6:.1f} M tokens: "
        f"code {losses['code_loss']:.2f}, answers {losses['answer_loss']:.2f} nats, "
        f"recall at {CHECK_LENGTH} tokens {quick.share:.2f}"
    )


def make_record(trainer: Trainer, material: Material, figures: Figures, prompt: SourceFile) -> dict[str, Any]:
    """What training.json says."""
    plan = trainer.plan
    return {
        "command": f"tools/train --seed {plan.seed} --steps {plan.steps} --lr {plan.lr}",
        "seed": plan.seed,
        "steps": plan.steps,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "tokens_seen": trainer.progress.tokens,
        "seconds": round(trainer.progress.seconds, 1),
        **environment(),
        "trained_context": CONTEXT,
        "model": figures.model._asdict(),
        "trigram": figures.trigram._asdict(),
        "recall": [row._asdict() for row in figures.recall],
        "train_files": len(material.split.train),
        "held_out_files": [file.name for file in material.split.held_out],
        "held_out_text": prompt.name,
        "loss_curve": trainer.progress.curve,
    }


def main(arguments: list[str] | None = None) -> None:
    options, console = parse_arguments(arguments), Console(highlight=False)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    material = prepare(options.seed)
    prompt = choose_prompt(material.split.held_out, material.tokenizer)
    model = build_model(material.tokenizer)
    trainer = Trainer(model, build_optimizers(model, options.lr), Plan(options.seed, options.steps, options.lr))
    if options.resume:
        resume(trainer, options.checkpoint)
    train(trainer, material, options.checkpoint, console)
    figures = measure(model, material.form, material.train, material.held_out, CONTEXT, console)
    check(figures)
    publish(options.output, model, material.tokenizer, prompt, make_record(trainer, material, figures, prompt))
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
