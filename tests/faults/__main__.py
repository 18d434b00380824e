"""`python -m tests.faults`: what becomes of runs that are killed, full disks and hostile files.

A fixed seed draws the same faults at every call; a kill then still falls where the clock has it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# Before torch is imported: a child that is forked has no use for the threads of its parent.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

PARTS = ("kills", "disk", "files")


def main() -> int:
    """Prints what was found; 1: there are faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; default: all")
    parser.add_argument("--kills", type=int, default=100, help="default: 100")
    parser.add_argument("--disks", type=int, default=30, help="full disks; default: 30")
    parser.add_argument("--files", type=int, default=1000, help="hostile files; default: 1000")
    parser.add_argument("--few", action="store_true", help="of the files made by hand, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", help="folder for what is made; kept, and a fault in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as made:
        work = Path(args.work or made).resolve()
        os.environ["HF_HOME"] = str(work / "home")  # code of a model would be copied to there
        return max(_part(name, work / name, args) for name in args.only or PARTS)


def _part(name: str, work: Path, args: argparse.Namespace) -> int:
    from tests.faults import disk, files, kills
    from tests.faults.runs import prepare

    began = time.monotonic()
    prepare(work)
    chosen = (args.seed, args.workers)
    if name == "kills":
        killed = list(kills.kills(work, args.kills, *chosen))
        lines, bad = kills.report(killed), any(each.faults for each in killed)
    elif name == "disk":
        if not disk.can_mount():
            print("disk: left out, for only root may mount a small one")
            return 0
        full = list(disk.full_disks(work, args.disks, *chosen))
        lines, bad = disk.report(full), any(each.faults for each in full)
    else:
        read = list(files.hostile_files(work, args.files, *chosen, few=args.few))
        lines, bad = files.report(read), any(each.faults for each in read)
    print(f"{name}, {time.monotonic() - began:.0f} s", *lines, sep="\n", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
