"""DeepSpeed's checkpoints for another number of processes, by its universal format.

Its checkpoints are shards, one a process. The first process joins them, parameter by parameter, in
a folder beside (`deepspeed.checkpoint.ds_to_universal`), which any number of processes can read
under the same stage of ZeRO.
"""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

from moe_tools import processes
from moe_tools.atomic import new_folder
from moe_tools.steps.launch import Launch

LATEST = "latest_universal"
"""The file that names the folder of the shards."""
KEPT = ("trainer_state.json", "scheduler.pt")
"""Files of a checkpoint that are the same for any number of processes."""


def reshaped(checkpoint: str, launch: Launch) -> tuple[str, Launch]:
    """Makes of a checkpoint one that these processes can read.

    Args:
        checkpoint: folder that as many passes an optimizer step wrote, in other processes.
        launch: of this run; the same stage of ZeRO.

    Returns:
        The folder, in `reshaped/` beside, and the launch under which it is read.

    Raises:
        ValueError: the disk refuses.
    """
    assert launch.deepspeed is not None
    old = Path(checkpoint)
    new = old.parent / "reshaped" / old.name
    processes.on_first(lambda: _join(old, new))
    given = {**launch.deepspeed.get("checkpoint", {}), "load_universal": True}
    return str(new), replace(launch, deepspeed={**launch.deepspeed, "checkpoint": given})


def _join(old: Path, new: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    if new.is_dir():  # by a run that was killed again since
        return
    tag = (old / "latest").read_text().strip()
    with new_folder(new) as partial:
        options = Namespace(
            input_folder=str(old / tag),
            output_folder=str(partial / tag),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            main(options)
        (partial / LATEST).write_text(tag)
        for name in KEPT:
            shutil.copy(old / name, partial / name)
