"""The user's table of cards: written by `make gpu`, read where a model is optimised."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from moe_tools.inference import card_limits
from moe_tools.inference.card_limits import FILE, keep, use_known_cards
from moe_tools.inference.measured_limits import VARIABLE
from moe_tools.inference.optimized import optimize
from moe_tools.kernels.triton import limits
from moe_tools.kernels.triton.limits import UNTUNED, Entry, Kind, of
from tests.inference.test_optimized import make

TILES = (128, 16, 8, 512, 64, 128, 8, 4)


def entry(
    device: str = "A", kind: Kind = "given", tokens: int = 1, share: float = 0.7, width: int = 64
) -> Entry:
    return Entry(
        device=device,
        dtype="bf16",
        kind=kind,
        width=width,
        neurons=4 * width,
        tokens=tokens,
        share=share,
        tiles=TILES,
    )


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(limits, "in_force", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE)
    return tmp_path / "moe_tools" / FILE


def test_what_was_kept_is_in_force_where_a_model_is_optimised() -> None:
    keep([entry(), entry(tokens=4, share=0.5)])
    optimize(make("llama"))
    known = of("A", "bf16", "given", 64, 256)
    assert [known.share(tokens) for tokens in (1, 2, 4, 5, 600)] == [0.7, 0.5, 0.5, 0.5, 0.5]
    config = known.config(1)
    assert config is not None and tuple(config.numbers) == TILES


def test_a_card_is_measured_anew_and_another_one_stays() -> None:
    keep([entry("A"), entry("A", "gate first"), entry("B")])
    keep([entry("A", share=0.2)])
    use_known_cards()
    shares = [of(*card, 64, 256).share(1) for card in (("A", "bf16", "given"),)]
    assert shares == [0.2]
    assert of("A", "bf16", "gate first", 64, 256).share(1) == 0.7
    assert of("B", "bf16", "given", 64, 256).share(1) == 0.7


def test_a_card_that_nobody_measured_errs_towards_products() -> None:
    unknown = of("C", "bf16", "given", 64, 256)
    assert [unknown.share(tokens) for tokens in (1, 2, 16, 64, 5000)] == [0.6, 0.4, 0.25, 0.1, 0.1]
    assert unknown.config(1) is None
    assert unknown.pays(1, 0.5) and not unknown.pays(2, 0.5)
    assert unknown.pays(4, 0.1) and not unknown.pays(64, 0.01)
    assert list(UNTUNED.values()) == sorted(UNTUNED.values(), reverse=True)


def test_the_nearest_shape_speaks() -> None:
    limits.put_in_force([entry(width=64, share=0.1), entry(width=4096, share=0.9)])
    assert of("A", "bf16", "given", 2048, 8192).share(1) == 0.9
    assert of("A", "bf16", "given", 100, 400).share(1) == 0.1


@pytest.mark.parametrize("text", ["[{}]", "{}", "null", "["])
def test_a_file_that_cannot_be_read_is_named_and_left(
    text: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.parent.mkdir(parents=True)
    home.write_text(text)
    with caplog.at_level(logging.WARNING, "moe_tools"):
        use_known_cards()
    assert f"{home} is no table of limits" in caplog.text and "run `make gpu` again" in caplog.text
    assert home.read_text() == text and limits.in_force == []


def test_built_in_leaves_it_unread(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep([entry()])
    monkeypatch.setenv(VARIABLE, "built-in")
    use_known_cards()
    assert home.exists() and limits.in_force == []


def test_where_nothing_can_be_written_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(card_limits, "write_cache", full)
    keep([entry()])


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_that_cannot_be_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"^share is .*, but must be in \(0, 1\]"):
        optimize(make("llama"), share=share)
