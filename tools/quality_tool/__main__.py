"""`tools/quality`: what compression costs on the shipped models, for every method at every budget.

Writes JSON, tables and plots; models left out keep what an earlier run wrote, and a run that names methods or policies
adds their cells to those of its models. Peers are kvpress's presses, run in a virtual environment of their own (made at
first use) on the same weights and token ids.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from quality_tool import plots, policy_table, tables
from quality_tool.material import FULL, QUICK
from quality_tool.methods import ABLATED_SHARES, ABLATIONS, BASE, DEFAULT, METHODS, SHARES, default_policies, methods_of
from quality_tool.records import Records
from quality_tool.session import Session, conditions
from training.model import FAMILIES
from training.train import ROOT
from zsmerge_compile.cli.policy import ROOMY, Choice, policy
from zsmerge_compile.errors import ConfigError

RESULTS = ROOT / "tools" / "results"
_EXAMPLES = """examples:
  tools/quality                             everything: our methods and kvpress's, all models
  tools/quality --no-peers --models llama   without the second environment
  tools/quality --policies h2o snapkv:window=16,pooling=max       these beside what the file has
  tools/quality --policy-table tools/results/bench_policies.json  policies: quality, bytes and step times in one table
  tools/quality --ablations                 one change to the paper's values at a time
  tools/quality --quick --out /tmp/q.json   a look: four texts and recall prompts
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tools/quality", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"ours, of: {', '.join(METHODS)} (all)")
    parser.add_argument(
        "--policies", nargs="+", type=policy, metavar="POLICY", help="NAME or NAME:key=value,...: these, without peers"
    )
    parser.add_argument("--shares", nargs="+", type=share, metavar="X", help="budgets as shares of the prompt")
    parser.add_argument("--ablations", action="store_true", help="single changes to the paper's values instead")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out kvpress")
    parser.add_argument(
        "--policy-table", nargs="*", type=Path, metavar="BENCH", help="print that table from --out and results of bench"
    )
    parser.add_argument("--quick", action="store_true", help="four texts and four recall prompts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--out", type=Path, help="(tools/results/quality.json or ablations.json)")
    options = parser.parse_args(arguments)
    options.out = options.out or RESULTS / ("ablations.json" if options.ablations else "quality.json")
    if options.out.suffix != ".json" or not options.out.parent.is_dir():
        parser.error(f"--out must be a .json file in an existing folder, got {options.out}")
    known = ABLATIONS if options.ablations else METHODS
    unknown = sorted(set(options.methods or ()) - set(known))
    if unknown:
        parser.error(f"--methods must be of {', '.join(known)}, got {', '.join(unknown)}")
    options.adds = bool(options.methods or options.policies)
    options.peers = options.peers and not (options.policies and not options.methods)
    policies = _policies(parser, options)
    chosen = options.methods or ([] if options.policies else known)
    options.methods = {name: method for name, method in known.items() if name in chosen} | methods_of(policies)
    options.shares = options.shares or list(ABLATED_SHARES if options.ablations else SHARES)
    return options


def _policies(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[Choice, ...]:
    """The policies to measure, once each; a run that names methods or tries ablations measures those named only."""
    if options.ablations and options.policies:
        parser.error("--policies must be given without --ablations, got both")
    try:
        for choice in options.policies or ():
            choice.with_weights({}).make(ROOMY)
    except ConfigError as error:
        parser.error(str(error))
    if options.policies is None and not options.ablations and not options.methods:
        return default_policies()
    return tuple(options.policies or ())


def share(text: str) -> float:
    value = float(text)
    if not 0.002 <= value <= 1:  # three slots of the prompt are the smallest budget
        raise argparse.ArgumentTypeError(f"must be a share in [0.002, 1], got {text}")
    return value


def main(arguments: list[str] | None = None) -> None:
    options, console = parse_arguments(arguments), Console(highlight=False)
    if options.policy_table is not None:
        print(policy_table.markdown(Records.read(options.out), options.policy_table))
        return
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    given = sys.argv[1:] if arguments is None else arguments
    records = Records.read(options.out) if options.out.exists() else Records(options.out)
    for family in options.models:
        base = BASE if options.ablations else DEFAULT
        session = Session(family, base, size, records, conditions(size, family, given), console, options.adds)
        session.ours(options.methods, options.shares)
        if options.ablations:
            continue
        if options.peers:
            from quality_tool import peers

            peers.judge(session, options.shares)
        if not options.adds:
            session.survivors()
    tables.write(records, options.out.with_suffix(".txt"))
    tables.show(records, console)
    for path in [options.out, options.out.with_suffix(".txt"), *plots.draw(records, options.out)]:
        console.print(f"written to {path}")


if __name__ == "__main__":
    main()
