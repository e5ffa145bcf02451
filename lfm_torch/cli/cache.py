"""``lfm-torch cache``: what a store of finished pieces holds, whether it is sound, and how to make it smaller."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from lfm_torch._files import STORE_INDEX
from lfm_torch.comparison.jobs.index import DAY
from lfm_torch.comparison.jobs.sizes import parse_size, shown_size
from lfm_torch.comparison.jobs.store import Store


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add ``ls``, ``verify`` and ``prune`` to the parser of ``lfm-torch cache``."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="action")
    ls = commands.add_parser("ls", help="list the stored representations and count the stored pairs")
    verify = commands.add_parser("verify", help="read everything and compare checksums (exit status 1: damage)")
    verify.add_argument("--remove", action="store_true", help="delete what is damaged, to be computed again")
    prune = commands.add_parser("prune", help="delete what has not been used, and leftovers of killed processes")
    prune.add_argument("--unused-for", type=float, metavar="DAYS", help="pieces and pairs not used for so many days")
    prune.add_argument("--max-size", metavar="SIZE", help="least recently used pieces, until the rest takes this much")
    for command in (ls, verify, prune):
        command.add_argument("store", type=Path, metavar="STORE", help="the directory (OUT/store of a comparison)")
        command.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
        command.add_argument("--quiet", action="store_true", help="print errors only")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says and return its exit status."""
    directory: Path = arguments.store
    if not (directory / STORE_INDEX).exists():
        raise ValueError(f"STORE must be a directory that a comparison has filled, got {str(directory)!r}")
    store = Store(directory)
    try:
        return {"ls": _ls, "verify": _verify, "prune": _prune}[arguments.action](store, arguments)
    finally:
        store.close()


def _ls(store: Store, arguments: argparse.Namespace) -> int:
    pieces, n_values = store.ls(), store.n_values()
    if arguments.json:
        print(json.dumps({"pieces": [dataclasses.asdict(piece) for piece in pieces], "values": n_values}, indent=2))
    elif not arguments.quiet:
        for piece in pieces:
            used = time.strftime("%Y-%m-%d", time.gmtime(piece.used * DAY))
            print(f"{shown_size(piece.bytes):>10}  {used}  {piece.kind:<7} {piece.title}")
        print(f"{len(pieces)} pieces, {n_values} values of pairs, {shown_size(store.size())} in all")
    return 0


def _verify(store: Store, arguments: argparse.Namespace) -> int:
    problems = store.verify(remove=arguments.remove)
    if arguments.json:
        print(json.dumps({"damaged": problems}, indent=2))
    elif not arguments.quiet:
        print("\n".join(problems) if problems else f"{len(store.ls())} pieces and {store.n_values()} values are sound")
    return 1 if problems and not arguments.remove else 0


def _prune(store: Store, arguments: argparse.Namespace) -> int:
    limit = None if arguments.max_size is None else parse_size(arguments.max_size)
    freed = store.prune(unused_days=arguments.unused_for, max_bytes=limit)
    if arguments.json:
        print(json.dumps({"freed_bytes": freed, "bytes": store.size()}, indent=2))
    elif not arguments.quiet:
        print(f"freed {shown_size(freed)}; {shown_size(store.size())} are left")
    return 0
