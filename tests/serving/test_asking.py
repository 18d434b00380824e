"""What `-m vllm` runs, with vLLM and without it: pytest in a process of its own."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.gpu.test_asking import asked

IN_VLLM = "tests/vllm/test_served.py"
LIGHT = "tests/serving/test_vllm_options.py"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_is_refused_in_one_line() -> None:
    done = asked("-m", "vllm", IN_VLLM)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    wanted = "ERROR: -m vllm asks for vLLM, which is not installed: make test-vllm"
    assert done.stderr.strip() == wanted


def test_who_does_not_ask_has_the_others() -> None:
    done = asked("--collect-only", "-q", IN_VLLM, LIGHT)
    assert done.returncode == 0, done.stdout
    found = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {LIGHT}
    assert "deselected" in done.stdout and "skipped" not in done.stdout
