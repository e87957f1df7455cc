"""Command line of `tools/kernels`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from kernels_tool.shapes import KERNELS, SHAPES

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "aot":
        _choose_folder(parser, options)
    if importlib.util.find_spec("triton") is None:
        print("triton must be installed, got none; pip install triton", file=sys.stderr)
        return 1
    if options.command == "aot":
        from kernels_tool.aot import run
    else:
        from kernels_tool.tune import run
    return run(options)


def _choose_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """The committed table holds every variant: a part of them goes elsewhere."""
    part = any((options.model, options.dtype, options.arch, options.kernel))
    if part and (options.out is None or options.out.resolve() == RESULTS):
        parser.error(f"--out must be a folder other than {RESULTS} for a part of the variants, got {options.out}")
    options.out = options.out or RESULTS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/kernels",
        description=__doc__,
        epilog="examples:\n  tools/kernels aot\n"
        "  tools/kernels aot --model LLaMA-3-8B --dtype bf16 --arch 90 --out /tmp\n"
        "  tools/kernels tune --model LLaMA-3-8B\n"
        "  PYTHON=python3 tools/kernels tune    # this python3, which has torch and triton\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "compile every variant for sm_80 and sm_90 and table what it needs; no GPU"
    aot = commands.add_parser("aot", help=text)
    text = (
        "time the decode kernels' block sizes on this GPU and write the table that they read (prompts keep their rule)"
    )
    tune = commands.add_parser("tune", help=text)
    for command in (aot, tune):
        command.add_argument("--model", action="append", choices=SHAPES, help="only these shapes (default: all)")
        command.add_argument("--dtype", action="append", choices=("bf16", "fp16", "fp32"), help="default: all")
    aot.add_argument("--arch", action="append", type=int, choices=(80, 90), help="default: both")
    aot.add_argument("--kernel", action="append", choices=KERNELS, help="only these (default: all)")
    text = f"folder of triton_aot.json and triton_aot.txt ({RESULTS}; a part of the variants must go elsewhere)"
    aot.add_argument("--out", type=Path, help=text)
    tune.add_argument("--slots", type=int, nargs="+", default=[1024, 4096, 16384])
    tune.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    tune.add_argument("--out", type=Path, help="default: the table inside the package")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
