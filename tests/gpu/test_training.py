"""Training on a card: ZeRO with one process, and a run that is taken up again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_tools.recipe import Train
from moe_tools.steps.launch import Launch
from moe_tools.training.train import train
from tests.gpu.one_process import DTYPES, STAGES, two_steps
from tests.killed import Killed, kill_at
from tests.training.test_distributed import ROOT, figures, weights
from tests.training.test_train import HARD, SOFT, converted, equal, text

SCRIPT = Path(__file__).with_name("one_process.py")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.slow
@every_dtype
def test_zero_with_one_process_ends_where_pytorch_alone_does(
    place: str, dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    two_steps(tmp_path / "alone", dtype, Launch(place))
    words = [sys.executable, str(SCRIPT), str(tmp_path), place, dtype]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, theirs = figures(tmp_path / "alone"), weights(tmp_path / "alone")
    for stage in STAGES:
        assert figures(tmp_path / stage)["lm"] == pytest.approx(expected["lm"], rel=2e-3)
        mine = weights(tmp_path / stage)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype, name
            if dtype == "fp32":
                assert (value - theirs[name]).abs().max() < 2e-6, name


@every_dtype
@pytest.mark.parametrize("step", [SOFT, HARD], ids=lambda step: step.mode)
def test_a_resumed_run_ends_where_an_undisturbed_one_does(
    place: str, dtype: str, step: Train, tmp_path: Path
) -> None:
    step, launch = replace(step, checkpoint_every=2), Launch(place)
    through, killed, resumed = (  # in eager attention no sum's order is left to the card
        converted(DTYPES[dtype], attn_implementation="eager") for _ in range(3)
    )
    train(through, step, text(32), tmp_path / "through", launch=launch)
    kill_at(killed, 5)
    with pytest.raises(Killed):
        train(killed, step, text(32), tmp_path / "killed", launch=launch)
    train(resumed, step, text(32), tmp_path / "killed", launch=launch)
    assert resumed.device.type == place
    assert equal(resumed, through) and not equal(resumed.cpu(), converted(DTYPES[dtype]))
