"""The checks of the table of families, for one family of every kind."""

import os
import time

import pytest
import torch
import transformers
from packaging.version import Version

import tools.families as tool
from tools.families import CI_FAMILIES, REFUSED, check_all, families, family_of
from tools.family_checks import CHECKS, Family, Outcome, Report, check, compare
from tools.family_page import page

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the table is of transformers 5.23 and later: older ones lack families, or keep their "
    "experts in other ways",
)
LLAMA = Family("causal", "llama", "LlamaForCausalLM")


def report(**outcomes: str) -> Report:
    found = {
        name: Outcome(status, why="because" * (status == "failed"))
        for name, status in outcomes.items()
    }
    return Report(LLAMA, "gated", "", "48", found)


@pytest.mark.parametrize("label", CI_FAMILIES)
def test_a_family_of_every_kind_passes_every_check(label: str) -> None:
    found = check(family_of(label))
    assert found.passes, found.failure
    assert list(found.outcomes) == list(CHECKS)


@pytest.mark.parametrize("label", REFUSED)
def test_what_cannot_be_converted_is_refused(label: str) -> None:
    assert check(family_of(label)).failure.startswith(f"{REFUSED[label]}: ")


def test_every_family_of_transformers_is_listed_once() -> None:
    found = families()
    assert len(set(found)) == len(found) > 250
    assert {family_of(label) for label in (*CI_FAMILIES, *REFUSED)} <= set(found)
    assert len(CI_FAMILIES) == 40


def test_a_family_that_crashes_or_hangs_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(family: Family, **_: object) -> Report:
        if family.name == "crash":
            os._exit(3)
        if family.name == "hang":
            time.sleep(60)
        return Report(family)

    monkeypatch.setattr(tool, "check", stand_in)
    monkeypatch.setattr(tool, "SECONDS", 1.0)
    wanted = [Family("causal", name, "") for name in ("crash", "hang", "fine")]
    found = {each.family.name: each.failure for each in check_all(wanted, jobs=2)}
    assert found == {
        "crash": "run: the process died: 3",
        "hang": "run: too slow",
        "fine": "",
    }


def test_logits_are_compared_by_their_largest() -> None:
    expected = torch.tensor([10.0, -20.0])
    assert compare(expected, expected.clone()).status == "exact"
    assert compare(expected + 1e-4, expected).difference == pytest.approx(5e-6, rel=0.05)
    for wrong in (expected + 1, expected * torch.nan):
        with pytest.raises(ValueError, match="logits differ by"):
            compare(wrong, expected)


def test_the_page_has_a_row_a_family_and_says_why_not() -> None:
    good = report(**dict.fromkeys(CHECKS, "exact"))
    bad = report(build="ok", run="ok", find="failed")
    written = page([good, bad]).splitlines()
    assert "| llama | `LlamaForCausalLM` | gated |  | yes | yes | exact | yes |  |" in written
    assert "| llama | `LlamaForCausalLM` | gated |  | no | - | no | - | find: because |" in written
    assert "| causal language models | 2 | 2 | 1 | 1 | 1 | 1 |" in written


def test_a_check_that_a_family_cannot_have_is_no_failure() -> None:
    found = report(**dict.fromkeys(CHECKS, "exact") | {"generate": "skipped"})
    assert found.passes
    assert found.is_exact
