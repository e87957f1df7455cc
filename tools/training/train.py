"""`tools/train FAMILY`: trains a shipped model from nothing and writes it only if it passes its own check."""

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
from training.curriculum import CONTEXT, Forms
from training.evaluate import FACT_COUNTS, recall
from training.heads import whole_heads
from training.judge import CHECK_LENGTH, CHECK_RECALL, Figures, check, measure
from training.loop import Plan, Trainer
from training.model import FAMILIES, MAX_POSITIONS, build_model, build_optimizers
from training.publish import choose_prompt, environment, publish
from training.stream import Stream
from training.tasks import FactFormat
from training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SPLIT_SEED = 0  # one split of the files, and so one tokenizer, for all models
_HELD_OUT_WINDOW = 2_048  # tokens, for bits per byte
_CHECKPOINT_EVERY = 500  # steps
_QUICK_PROMPTS = 32

_EXAMPLES = f"""examples:
  tools/train llama                 train with the shipped recipe and write the shipped model
  tools/train falcon --resume       go on from the last checkpoint of an interrupted run
  tools/train falcon --resume --steps 8000      or of one that ended, with more steps and the rate up again
  tools/train mistral --seed 1 --output build/mistral-1
  tools/train llama --steps 100     a smoke run: trains, evaluates, fails its check and writes nothing

The model is written only if its bits per byte are below the trigram's and its recall of every number of facts at
{CHECK_LENGTH:,} tokens is {CHECK_RECALL} or more.
"""


@dataclass(frozen=True)
class Material:
    """Everything training reads, made from the seed alone."""

    split: Split
    tokenizer: PreTrainedTokenizerFast
    forms: Forms
    train: Stream
    held_out: Stream


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tools/train", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (0)")
    parser.add_argument("--steps", type=int, default=5_000, help="optimizer steps (5000)")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate (0.004)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--output", type=Path, help="where the model goes (the package's assets)")
    parser.add_argument("--checkpoint", type=Path, help="(build/train/FAMILY-SEED.pt)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    options = parser.parse_args(arguments)
    options.output = options.output or ROOT / "zsmerge_compile" / "assets" / f"{options.family}-stdlib"
    options.checkpoint = options.checkpoint or ROOT / f"build/train/{options.family}-{options.seed}.pt"
    return options


def prepare() -> Material:
    split = split_by_file(stdlib_files(), SPLIT_SEED)
    tokenizer = train_tokenizer((file.text for file in split.train), MAX_POSITIONS)
    streams = (Stream(files, tokenizer) for files in split)
    return Material(split, tokenizer, Forms(FactFormat(tokenizer, 1), FactFormat(tokenizer, 2)), *streams)


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
            trainer.step(material.forms, material.train, console)
            bar.advance(task)
            if progress.step % _CHECKPOINT_EVERY == 0 or progress.step == trainer.plan.steps:
                trainer.save(checkpoint)
                report(trainer, material, console)


def report(trainer: Trainer, material: Material, console: Console) -> None:
    """One line on where training stands, with recall over a few prompts."""
    progress, model = trainer.progress, trainer.model
    shares = [
        recall(model, form, material.held_out, CHECK_LENGTH, FACT_COUNTS[-1], _QUICK_PROMPTS).share
        for form in material.forms
    ]
    losses = {name: progress.curve[-1].get(name, math.nan) for name in ("code_loss", "answer_loss", "copy_loss")}
    console.print(
        f"step {progress.step}, {progress.seconds:.0f} s, {progress.tokens / 1e6:.1f} M tokens: "
        f"code {losses['code_loss']:.2f}, answers {losses['answer_loss']:.2f}, copies {losses['copy_loss']:.2f} nats, "
        f"recall of {FACT_COUNTS[-1]} facts at {CHECK_LENGTH} tokens {shares[0]:.2f}, of long keys {shares[1]:.2f}"
    )


def make_record(trainer: Trainer, material: Material, figures: Figures, prompt: SourceFile) -> dict[str, Any]:
    """What training.json says."""
    plan = trainer.plan
    return {
        "command": commands(plan, trainer.progress.extended),
        "family": plan.family,
        "shape": shape(trainer.model.config),
        "seed": plan.seed,
        "steps": plan.steps,
        "extended": trainer.progress.extended,
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


def commands(plan: Plan, extended: list[list[int]]) -> str:
    """What was run, a call for each length of the plan: a longer plan raises the rate again, so they are not one."""
    fixed = f"tools/train {plan.family} --seed {plan.seed} --lr {plan.lr}"
    planned = [steps for _, steps in extended] + [plan.steps]
    return "; ".join(f"{fixed} --steps {steps}{' --resume' * (turn > 0)}" for turn, steps in enumerate(planned))


def shape(config: Any) -> str:
    """In words, as the model's README has it."""
    held = getattr(config, "num_key_value_heads", 1)  # Falcon's config has no such field: multi-query
    window = getattr(config, "sliding_window", None)
    words = f"{config.num_hidden_layers} layers, {config.num_attention_heads} query and {held} key/value heads"
    return words if window is None else f"{words}, a sliding window of {window:,} tokens"


def main(arguments: list[str] | None = None) -> None:
    options, console = parse_arguments(arguments), Console(highlight=False)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    material = prepare()
    prompt = choose_prompt(material.split.held_out, material.tokenizer)
    model = build_model(options.family, material.tokenizer)
    plan = Plan(options.family, options.seed, options.steps, options.lr)
    trainer = Trainer(model, build_optimizers(model, options.lr), plan)
    if options.resume:
        resume(trainer, options.checkpoint)
    with whole_heads():
        train(trainer, material, options.checkpoint, console)
        figures = measure(model, material.forms, material.train, material.held_out, _HELD_OUT_WINDOW, console)
    check(figures)
    publish(options.output, model, material.tokenizer, prompt, make_record(trainer, material, figures, prompt))
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
