"""What a host does around its layers: the same numbers, whoever does it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from moe_tools.inference.optimized import optimize
from tests.families import build

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ROWS, LENGTH = 2, 5
NEAR = {"atol": 1e-4, "rtol": 1e-4}


def ids(length: int, rows: int = ROWS) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(length))


def pair(**config: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = build("llama", **SIZES | config)
    return optimize(copy.deepcopy(model)), model


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for every mask that the host itself makes: it does so where its own code runs."""
    seen: list[str] = []
    made = modeling_llama.create_causal_mask

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append("host")
        return made(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", counting)
    return seen


def both(hosts: tuple[Any, Any], **given: Any) -> list[Any]:
    """What the optimised model and the other one make of a token behind a prompt."""
    made = []
    for host in hosts:
        cache = DynamicCache()
        given |= {"past_key_values": cache}
        with torch.no_grad():
            host(ids(LENGTH), past_key_values=cache)
            made.append(host(**{"input_ids": ids(1)} | given))
    return made


def padded(left: int) -> Tensor:
    mask = torch.ones(ROWS, LENGTH + 1, dtype=torch.long)
    mask[0, :left] = 0
    return mask


SHORT: dict[str, dict[str, Any]] = {
    "alone": {},
    "a mask of ones": {"attention_mask": padded(0)},
    "a padded mask": {"attention_mask": padded(2)},
    "a mask of bools": {"attention_mask": padded(2).bool()},
    "a position": {"position_ids": torch.tensor([[9]])},
    "positions": {"position_ids": torch.tensor([[9], [4]])},
    "the cache asked for": {"use_cache": True},
    "logits of the last": {"logits_to_keep": 1},
    "a tuple, which the head makes": {"return_dict": False},
}
HOSTS: dict[str, dict[str, Any]] = {
    "h instead of ids": {"input_ids": None, "inputs_embeds": torch.randn(ROWS, 1, 64)},
    "no cache to be returned": {"use_cache": False},
    "every h": {"output_hidden_states": True},
    "a mask in four dimensions": {
        "attention_mask": torch.zeros(ROWS, 1, 1, LENGTH + 1),
    },
    "a mask that hides the token itself": {
        "attention_mask": torch.cat([padded(0)[:, :-1], torch.tensor([[1], [0]])], dim=1)
    },
    "two tokens": {"input_ids": ids(2)},
}


@pytest.mark.parametrize("name", [*SHORT, *HOSTS])
def test_any_call_gives_what_the_host_gives(name: str, loops: list[str]) -> None:
    hosts = pair()
    loops.clear()
    ours, theirs = both(hosts, **(SHORT | HOSTS)[name])
    one, other = (made[0] if isinstance(made, tuple) else made.logits for made in (ours, theirs))
    torch.testing.assert_close(one, other, **NEAR)
    # two prompts, the token of the host, and ours where that is left to it
    assert len(loops) == 3 + (name in HOSTS)


@pytest.mark.parametrize("path", ["embed_tokens", "rotary_emb", "norm"])
@pytest.mark.parametrize("how", ["hooked", "replaced"])
def test_modules_around_the_layers_stay_the_users(path: str, how: str) -> None:
    hosts = pair()
    before, _ = both(hosts)
    for host in hosts:
        if how == "hooked":
            host.model.get_submodule(path).register_forward_hook(doubled)
        else:
            setattr(host.model, path, Doubled(host.model.get_submodule(path)))
    ours, theirs = both(hosts)
    torch.testing.assert_close(ours.logits, theirs.logits, **NEAR)
    assert (ours.logits - before.logits).abs().max() > 1e-3


def doubled(_: nn.Module, __: Any, y: Any) -> Any:
    return tuple(2 * part for part in y) if isinstance(y, tuple) else 2 * y


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return doubled(self, args, self.inner(*args, **kwargs))


def changed_in_place(host: Any) -> None:
    with torch.no_grad():
        host.model.norm.weight.mul_(2)


def changed_by_another(host: Any) -> None:
    host.model.norm.weight = nn.Parameter(2 * host.model.norm.weight.detach())


@pytest.mark.parametrize("change", [changed_in_place, changed_by_another])
def test_the_last_norm_is_followed(change: Callable[[Any], None]) -> None:
    hosts = pair()
    before, _ = both(hosts)
    for host in hosts:
        change(host)
    ours, theirs = both(hosts)
    torch.testing.assert_close(ours.logits, theirs.logits, **NEAR)
    assert (ours.logits - before.logits).abs().max() > 1e-3


def test_a_config_that_asks_for_more_is_heard() -> None:
    fast, _ = hosts = pair()
    for host in hosts:
        host.config.output_hidden_states = True
    ours, theirs = both(hosts)
    assert len(ours.hidden_states) == SIZES["num_hidden_layers"] + 1
    for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(one, other, **NEAR)
    assert cast("Any", fast).config.output_hidden_states


def test_text_is_that_of_the_host(loops: list[str]) -> None:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, :2] = 0
    hosts, made = pair(), []
    for host in hosts:
        loops.clear()
        made.append(
            host.generate(
                input_ids=ids(LENGTH), attention_mask=mask, max_new_tokens=9, do_sample=False
            )
        )
        assert len(loops) == (1 if host is hosts[0] else 9)  # of ours the prompt alone
    assert torch.equal(*made)
