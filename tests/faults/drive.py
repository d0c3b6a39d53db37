"""Injects faults into tiny runs on one or two ranks, resumes them, and compares with undisturbed runs, bit for bit.

    python tests/faults/drive.py --tries 1000 --results faults.jsonl       # goes on where it was interrupted
    python tests/faults/drive.py --table --results faults.jsonl
    python tests/faults/drive.py --kind "kill in a save" --try 17          # one again, with what it wrote

The exit status is 1 where a try diverged silently, hung, ended in a traceback, or lost a step that was committed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "launch")]

from attempt import SILENT, TAIL_CHARACTERS, Attempt, Verdict  # noqa: E402
from forked_ranks import import_all  # noqa: E402
from kinds import KINDS, PROOF, SELECTED  # noqa: E402
from table import read_results, table  # noqa: E402
from tiny_run import Laboratory  # noqa: E402


def main() -> int:
    arguments = parse_arguments()
    if arguments.table:
        print(table(read_results(arguments.results)))
        return 0
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import_all()
    # So that no rank outlives the driver.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = {(result["kind"], result["try"], result["seed"]) for result in read_results(arguments.results)}
    results, until = [], time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="faults-", dir=arguments.folder) as name:
        laboratory = Laboratory(Path(name))
        for kind, number in wanted(arguments):
            if arguments.number is None and (kind, number, arguments.seed) in done:
                continue
            if time.monotonic() > until:
                break
            results.append(attempt(laboratory, kind, number, arguments))
        finds = not arguments.selection or finds_divergence(laboratory)
    print(table(results))
    return int(not finds or any(result["bad"] for result in results))


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Kinds and numbers of tries, kinds in turn."""
    if arguments.selection:
        yield from SELECTED
        return
    kinds = arguments.kind or list(KINDS)
    if arguments.number is not None:
        yield from ((kind, arguments.number) for kind in kinds)
        return
    part, parts = arguments.part
    every = [(kind, number) for number in range(-(-arguments.tries // len(kinds))) for kind in kinds]
    yield from every[part::parts]


def attempt(laboratory: Laboratory, kind: str, number: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Make a try, and note and tell what came of it."""
    began, one = time.monotonic(), Attempt(laboratory, kind, number, arguments.seed)
    KINDS[kind](one)
    verdict = one.verdict()
    result = {"kind": kind, "try": number, "seed": arguments.seed, "outcome": verdict.outcome, "bad": verdict.is_bad}
    result |= {"layout": one.layout.name, "fault": verdict.fault, "reasons": verdict.reasons}
    result["seconds"] = round(time.monotonic() - began, 1)
    if verdict.is_bad or arguments.number is not None:
        print(report(one, verdict), flush=True)
    print(f"{kind} {number}: {verdict.outcome} ({verdict.fault})", flush=True)
    with arguments.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    one.remove()
    return result


def finds_divergence(laboratory: Laboratory) -> bool:
    """Whether a run that compares no checksums, and so trains on wrong weights, is found to have diverged."""
    one = Attempt(laboratory, PROOF[0], PROOF[1], without_checksums=True)
    KINDS[one.kind](one)
    outcome = one.verdict().outcome
    print(f"{one.kind} {one.number} without checksums: {outcome} ({one.fault}); must be {SILENT}", flush=True)
    return outcome == SILENT


def report(one: Attempt, verdict: Verdict) -> str:
    """Of a try: how to repeat it, what was found, and the end of what it wrote."""
    texts = "\n".join(f"--- start {number + 1} ---\n{text[-TAIL_CHARACTERS:]}" for number, text in enumerate(one.texts))
    again = f'python tests/faults/drive.py --kind "{one.kind}" --try {one.number} --seed {one.seed}'
    return (
        f"=== {verdict.outcome}: {again}\n"
        f"{one.layout.name}: {verdict.fault}\n" + "\n".join(verdict.reasons) + f"\n{texts}\n==="
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=1000, help="in total, over all kinds (default 1000)")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this one; may be repeated")
    parser.add_argument("--try", type=int, dest="number", metavar="N", help="only the try of this number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--results", type=Path, default=Path(os.devnull), metavar="FILE", help="lines are appended")
    parser.add_argument("--table", action="store_true", help="print the table of the results and exit")
    parser.add_argument("--selection", action="store_true", help="the tries of `make test`")
    parser.add_argument("--folder", type=Path, help="where working folders are made (default: that of temporary files)")
    parser.add_argument(
        "--part", type=_part, default=(0, 1), metavar="K/N", help="every N-th try, beginning with the K-th, from 0"
    )
    return parser.parse_args()


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    return int(part), int(parts)


if __name__ == "__main__":
    sys.exit(main())
