"""The command line: ``python -m regularizers list | show | info | bench | demo | new-method``."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from regularizers import catalog


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regularizers", description="Regularization mechanisms for PyTorch."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    listing = commands.add_parser("list", help="list the papers and what stands of each")
    listing.add_argument("--family", choices=catalog.families(), metavar="FAMILY")
    listing.add_argument("--status", choices=catalog.STATUSES)
    listing.set_defaults(run=_list)

    show = commands.add_parser(
        "show", help="show one method: a number, an arXiv id, a name or words"
    )
    show.add_argument("query", nargs="+")
    show.set_defaults(run=_show)

    info = commands.add_parser(
        "info", help="versions, build and backends, as an issue report needs them"
    )
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench", help="measure our kernels, today's alternatives and the hardware's floor"
    )
    bench.add_argument("family", nargs="?", help="one benchmark file; all without")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument("--quick", action="store_true", help="fewer cases, well under a minute")
    bench.add_argument("--seconds", type=float, help="time budget of one case")
    bench.add_argument("--threads", type=int, help="number of CPU threads")
    bench.add_argument(
        "--output", type=Path, default=Path("bench-output"), help="folder for JSON and plots"
    )
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="train a classifier on real images, with and without")
    demo.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for the plots"
    )
    demo.set_defaults(run=_demo)

    new = commands.add_parser(
        "new-method", help="write module, test, catalog entry and docs of a method to begin with"
    )
    new.add_argument("name", help="of the function, in snake case")
    new.add_argument("--family", required=True, metavar="FAMILY")
    new.add_argument("--paper", type=int, required=True, help="its number in the catalog")
    new.set_defaults(run=_new_method)
    return parser


def _list(options: argparse.Namespace) -> int:
    for name, family in catalog.families().items():
        entries = catalog.papers(family=name, status=options.status)
        if options.family not in (None, name) or not entries:
            continue
        print(f"{name}: {family.summary}")
        for paper in entries:
            print(f"  {paper.number:>3}  {paper.status:<11}  {paper.component}")
        print()
    return 0


def _show(options: argparse.Namespace) -> int:
    query = " ".join(options.query)
    found = catalog.find(query)
    if not found:
        print(f"nothing found for {query!r}; try fewer or other words", file=sys.stderr)
        return 1
    first, *others = found
    print(f"[{first.number}] {first.component}\n")
    rows = {
        "paper": f"{first.title}. {first.source}",
        "does": first.summary,
        "status": first.status + (f": {first.missing}" if first.missing else ""),
        "names": "\n".join(f"regularizers.{name}" for name in first.names),
        "formula": f"from {first.formula}" + (f"; {first.verified}" if first.verified else ""),
        "see also": ", ".join((*first.aliases, *first.see_also)),
    }
    for label, text in rows.items():
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 88)]
        for number, line in enumerate(lines):
            print(f"{label if number == 0 else '':<10}{line}")
    if others:
        print("\nAlso: " + ", ".join(f"[{paper.number}] {paper.component}" for paper in others[:8]))
    return 0


def _info(options: argparse.Namespace) -> int:
    from regularizers import info

    for key, value in info().items():
        if not isinstance(value, dict):
            print(f"{key:<14}{value}")
            continue
        print(f"{key}:" if value else f"{key:<14}nothing compiled")
        for name, entry in value.items():
            text = (
                ", ".join(f"{device}: {backend}" for device, backend in entry.items())
                if isinstance(entry, dict)
                else entry
            )
            print(f"  {name:<46}{text}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    import torch

    from regularizers import _bench

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return _bench.run(
        options.family,
        device=options.device,
        quick=options.quick,
        output=options.output,
        seconds=options.seconds,
    )


def _demo(options: argparse.Namespace) -> int:
    from regularizers import _demo

    return _demo.run(options.output)


def _new_method(options: argparse.Namespace) -> int:
    from regularizers import _new_method

    try:
        paths = _new_method.create(options.name, options.family, options.paper)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("Written or changed:", *(f"  {path}" for path in paths), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
