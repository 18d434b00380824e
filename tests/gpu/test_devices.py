"""Where tensors are: all on one card, which need not be the current one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.inference.optimized import optimize
from tests.families import logits
from tests.gpu.test_models import every_kind, model_of, packed_of
from tests.gpu.ways import error, every_dtype, every_way, make, tolerance

pytest.importorskip("triton")

ELSEWHERE = {"cpu": "meta", "cuda": "cpu"}
"""Where the kernels run -> another device."""


@pytest.fixture
def second() -> str:
    """A card that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one card")
    assert torch.cuda.current_device() == 0
    return "cuda:1"


@pytest.mark.gpu
@every_way
@every_dtype
def test_another_card_than_the_current_one_computes(
    name: str, dtype: torch.dtype, second: str
) -> None:
    way = make(name, dtype, second)
    inputs = way.draw()
    with torch.no_grad():
        y_TD = way.run(*inputs)
    assert str(y_TD.device) == second and torch.cuda.current_device() == 0
    assert error(y_TD, way.exact(*inputs)) <= tolerance(name, dtype)


@pytest.mark.gpu
def test_a_model_on_another_card_than_the_current_one_is_optimised(
    second: str, tmp_path: Path
) -> None:
    save(model_of("routed"), tmp_path)
    plain, fast = (load(tmp_path, device=second, optimize=fast) for fast in (False, True))
    assert {str(packed.device) for packed in packed_of(fast)} == {second}
    torch.testing.assert_close(logits(fast), logits(plain), rtol=1e-5, atol=2e-5)


@every_way
@pytest.mark.parametrize("operand", [0, -1], ids=["x", "choice"])
def test_an_operand_that_is_elsewhere_is_refused(name: str, operand: int, place: str) -> None:
    way = make(name, torch.float32, place)
    inputs = [*way.draw()]
    inputs[operand] = inputs[operand].to(ELSEWHERE[place])
    with pytest.raises(ValueError, match=f"is on .*{ELSEWHERE[place]}"), torch.no_grad():
        way.run(*inputs)


@every_kind
def test_an_optimised_model_cannot_go_elsewhere(kind: str, place: str) -> None:
    fast = optimize(model_of(kind).to(place), backend="triton")
    here = {"cpu": "cpu", "cuda": "cuda:0"}[place]
    message = f"is packed for {here} and cannot go to {ELSEWHERE[place]}: load the model again"
    with pytest.raises(ValueError, match=message):
        fast.to(ELSEWHERE[place])
