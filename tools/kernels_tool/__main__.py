"""Command line of `tools/kernels`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/kernels",
        description=__doc__,
        epilog="examples:\n  tools/kernels aot\n"
        "  tools/kernels aot --model LLaMA-3-8B --dtype bf16 --arch 90 --out /tmp\n"
        "  tools/kernels tune --model LLaMA-3-8B\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    aot = commands.add_parser("aot", help="compile every variant for sm_80 and sm_90 and table what it needs; no GPU")
    tune = commands.add_parser("tune", help="time block sizes on this GPU and write the table that the kernels read")
    for command in (aot, tune):
        command.add_argument("--model", action="append", help="only these shapes (default: all)")
        command.add_argument("--dtype", action="append", choices=("bf16", "fp16", "fp32"), help="default: all")
    aot.add_argument("--arch", action="append", type=int, choices=(80, 90), help="default: both")
    aot.add_argument("--kernel", action="append", help="only these: split, finish, rows, columns, ... (default: all)")
    aot.add_argument("--out", type=Path, default=RESULTS, help="folder of triton_aot.json and triton_aot.txt")
    tune.add_argument("--slots", type=int, nargs="+", default=[1024, 4096, 16384])
    tune.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    tune.add_argument("--out", type=Path, help="default: the table inside the package")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("triton must be installed, got none; pip install triton", file=sys.stderr)
        return 1
    if options.command == "aot":
        from kernels_tool.aot import run
    else:
        from kernels_tool.tune import run
    return run(options)


if __name__ == "__main__":
    raise SystemExit(main())
