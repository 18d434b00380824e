from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from moe_tools.report.plot import TICKS, plot
from moe_tools.report.report import Row, print_cells, print_table, read_json, to_json

ROW = Row(
    model="out/lte",
    role="model",
    perplexity=21.5,
    nats_per_token=math.log(21.5),
    ratio_to_control=1.0524,
    ratio_to_donor=None,
    ffn_sparsity=0.5,
    ffn_dense_flops=160e6,
    ffn_flops=80e6,
    router_flops=4e6,
    total_flops=190e6,
    total_dense_flops=266e6,
    train_tokens=500_000,
    tokens=1022,
    seconds=3.0,
    data="docs",
    block_length=512,
    dtype="bfloat16",
    device="cpu",
    layer_sparsity={"model.layers.0.mlp": 0.25, "model.layers.1.mlp": 0.75},
    ffn_dense_bytes=160e6,
    ffn_bytes=80e6,
    scoring_bytes=4e6,
    total_bytes=190e6,
    total_dense_bytes=266e6,
    together={
        "4": {"ffn_dense": 160e6, "ffn": 128e6, "scoring": 4e6, "total": 238e6},
        "16": {"ffn_dense": 160e6, "ffn": 156e6, "scoring": 4e6, "total": 266e6},
    },
)
DENSE = replace(
    ROW,
    model="donor",
    role="donor",
    ratio_to_control=None,
    ffn_sparsity=0.0,
    ffn_flops=160e6,
    router_flops=0.0,
    total_flops=266e6,
    train_tokens=None,
    layer_sparsity={},
    ffn_bytes=160e6,
    scoring_bytes=0.0,
    total_bytes=266e6,
    together={},
)


def shown(*rows: Row, width: int = 120) -> list[list[str]]:
    """The words of every line of the table; what few models have may make it wider."""
    file = io.StringIO()
    print_table(rows, file)
    lines = file.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    return [line.replace("│", " ").split() for line in lines]


def test_a_line_has_every_figure() -> None:
    expected = "out/lte 21.50 1.052 - 50.0% 84 (0.53x) 190 (0.71x) 0.82, 1.00 0.53, 0.71 500,000"
    assert expected.split() in shown(DENSE, ROW)


def test_a_dense_line_says_so() -> None:
    expected = "donor (donor) 21.50 - - dense 160 (1.00x) 266 (1.00x) - 1.00, 1.00 -"
    assert expected.split() in shown(DENSE, ROW)


@pytest.mark.parametrize("name", ["out[a]", "out[/b]"])
def test_a_name_in_brackets_is_no_markup(name: str) -> None:
    assert any(name in words for words in shown(replace(ROW, model=name)))


def test_a_sparsity_of_zero_is_not_dense() -> None:
    line = shown(replace(ROW, ffn_sparsity=0.0, layer_sparsity={"a": 0.0}))
    assert any("0.0%" in words for words in line)


def test_zeros_have_a_column_where_some_model_has_any() -> None:
    relu = replace(DENSE, model="relu", role="model", zeros=0.6125)
    words = "relu 21.50 - - dense 61.3% 160 (1.00x) 266 (1.00x) - 1.00, 1.00 -"
    assert words.split() in shown(DENSE, relu, ROW)
    expected = "donor (donor) 21.50 - dense - 160 (1.00x) 266 (1.00x) 1.00, 1.00"
    assert expected.split() in shown(DENSE, relu)
    assert not any("zeros" in line for line in shown(DENSE, ROW))
    assert json.loads(to_json([relu, ROW]))[0]["zeros"] == 0.6125


def test_tiny_models_keep_their_digits() -> None:
    tiny = replace(ROW, ffn_bytes=5000.0, scoring_bytes=376.0, ffn_dense_bytes=9216.0)
    assert any("0.00538" in words for words in shown(tiny))


def test_predictors_have_two_columns_of_their_own() -> None:
    predicted = replace(ROW, recall=0.9, precision=0.755)
    assert not {"recall", "precision"} & {word for line in shown(ROW) for word in line}
    lines = shown(DENSE, predicted, width=140)
    assert {"recall", "precision"} <= {word for line in lines for word in line}
    figures = "84 (0.53x) 190 (0.71x) 0.82, 1.00 0.53, 0.71 500,000"
    model = f"out/lte 21.50 1.052 - 50.0% 90.0% 75.5% {figures}"
    donor = "donor (donor) 21.50 - - dense - - 160 (1.00x) 266 (1.00x) - 1.00, 1.00 -"
    assert model.split() in lines and donor.split() in lines


def test_the_caption_names_text_and_machine() -> None:
    words = [word for line in shown(ROW) for word in line]
    for word in ("1022", "docs,", "512,", "bfloat16", "cpu;"):
        assert word in words


def test_the_caption_names_the_texts_by_their_fingerprints() -> None:
    trained = replace(ROW, text="aa11", run_text="bb22")
    words = [word for line in shown(replace(DENSE, text="aa11"), trained) for word in line]
    assert "aa11)," in words and "bb22" in words
    assert not {"text", "(text"} & {word for line in shown(DENSE, ROW) for word in line}


def test_the_caption_says_which_protocol_it_was() -> None:
    row = replace(ROW, protocol="wikitext2", data="hub:x", text="aa11", stride=256, after=8)
    said = " ".join(word for line in shown(row) for word in line)
    assert "1022 tokens of wikitext2 from hub:x (text aa11), windows of 512 at a stride" in said
    assert "at a stride of 256, after the first 8 of each, bfloat16" in said
    assert "held-out" not in said


def test_rows_of_two_protocols_do_not_mix() -> None:
    rows = replace(DENSE, protocol="wikitext2"), replace(ROW, protocol="wikitext2", stride=256)
    with pytest.raises(ValueError) as error:
        to_json(rows)
    assert str(error.value) == (
        "donor was measured by wikitext2, out/lte by wikitext2 at a stride of 256: they do not "
        "compare, measure both in one call"
    )


def test_rows_of_two_texts_do_not_mix(tmp_path: Path) -> None:
    rows = [replace(DENSE, text="aa11"), replace(ROW, text="bb22")]
    (tmp_path / "rows.json").write_text(f"{to_json(rows[:1])[:-1]},{to_json(rows[1:])[1:]}")
    for use in (
        shown,
        lambda *rows: to_json(rows),
        lambda *rows: plot(rows, tmp_path / "plot.svg"),
        lambda *rows: read_json(tmp_path / "rows.json"),
    ):
        with pytest.raises(ValueError) as error:
            use(*rows)
        assert str(error.value) == (
            "donor was measured on the text aa11, out/lte on bb22: they do not compare, "
            "measure both in one call"
        )


def test_a_text_that_is_not_known_is_another_one() -> None:
    with pytest.raises(ValueError, match=r"on the text \(unknown\), out/lte on bb22: they do not"):
        shown(DENSE, replace(ROW, text="bb22"))


def test_a_grid_names_its_texts() -> None:
    cell = {"split": "random", "router": "mlp", "target": 0.5, "sparsity": 0.5, "perplexity": 9.0}
    cell |= {
        "ffn_share": 0.5,
        "ffn_bytes_share": None,
        "recall": None,
        "captured": None,
        "text": "aa11",
        "run_text": "bb22",
    }
    file = io.StringIO()
    print_cells([cell], file)
    assert "held-out text aa11; fitted to text bb22" in file.getvalue()


def test_json_holds_every_field_of_every_row() -> None:
    first, second = json.loads(to_json([DENSE, ROW]))
    assert first["model"] == "donor" and first["layer_sparsity"] == {}
    assert second["layer_sparsity"] == ROW.layer_sparsity
    assert second["ffn_share"] == 84 / 160
    assert second["ffn_bytes_share"] == 84 / 160
    derived = ("ffn_share", "ffn_bytes_share")
    assert Row(**{key: value for key, value in second.items() if key not in derived}) == ROW


def test_json_never_holds_what_json_does_not_have() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json([replace(ROW, perplexity=math.inf)])


def test_an_moe_host_shows_both_levels() -> None:
    levels = {"experts": 0.75, "neurons": 0.85, "both": 0.9625}
    lines = shown(replace(ROW, two_levels=levels), DENSE, width=140)
    assert any({"MoE", "layers"} <= set(line) for line in lines)
    assert any(line[4:7] == ["50.0%", "85.0%", "96.2%"] for line in lines)
    assert any("dense - -" in " ".join(line) for line in lines)
    assert not any("MoE" in line for line in shown(ROW))


def test_a_name_in_a_plot_is_no_formula(tmp_path: Path) -> None:
    rows = [replace(ROW, model=r"a$\oops$<b>", series="")]
    plot(rows, tmp_path / "plot.svg")
    assert "<b>" not in (tmp_path / "plot.svg").read_text()


BYTES = ("ffn_dense_bytes", "ffn_bytes", "scoring_bytes", "total_bytes", "total_dense_bytes")


def before(row: Row) -> dict[str, object]:
    """A row as a version that counted no bytes wrote it."""
    new = (*BYTES, "ffn_bytes_share", "together", "few_bit_ops")
    return {key: value for key, value in row.to_dict().items() if key not in new}


def test_rows_of_a_version_without_bytes_are_still_read(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([before(DENSE), before(ROW)]))
    donor, model = read_json(tmp_path / "rows.json")
    assert (model.ffn_bytes_share, model.total_bytes, model.together) == (None, None, {})
    lines = shown(donor, model)
    assert not any("MB/token" in line for line in lines)
    assert ["out/lte", "21.50", "1.052", "-", "50.0%", "0.53,", "0.71", "500,000"] in lines
    plot([donor, model], tmp_path / "plot.svg")
    assert "bytes" not in (tmp_path / "plot.svg").read_text()


def test_bytes_are_told_from_flops() -> None:
    int4 = replace(DENSE, model="int4", role="model", ffn_bytes=45e6, total_bytes=151e6)
    expected = "int4 21.50 - dense 45 (0.28x) 151 (0.57x) 1.00, 1.00"
    assert expected.split() in shown(DENSE, int4)


def test_operations_in_few_bits_have_a_column_of_their_own() -> None:
    assert not any("few-bit" in line for line in shown(DENSE, ROW))
    lines = shown(DENSE, replace(ROW, few_bit_ops=53.1e6), width=140)
    assert any("few-bit" in line for line in lines)
    assert any(line[-2:] == ["53.1", "500,000"] for line in lines)


def test_together_reads_what_one_of_them_needs() -> None:
    assert ROW.together_share(4) == 132 / 160
    assert ROW.together_share(16) == 1
    assert ROW.together_share(3) is None
    few = replace(ROW, together={"4": ROW.together["4"]})  # eight sequences are no sixteen
    assert any("0.82, - 0.53, 0.71" in " ".join(line) for line in shown(DENSE, few))


def test_a_plot_has_both_prices(tmp_path: Path) -> None:
    rows = [replace(DENSE), replace(ROW, ratio_to_donor=1.2, series="lte")]
    plot(rows, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "FFN bytes a token reads" in drawn and "FFN FLOPs" in drawn
    assert "perplexity / dense" in drawn


@pytest.mark.parametrize(("worst", "highest"), [(2.5, 2), (60.0, 3)])
def test_what_is_of_no_use_leaves_a_plot_at_its_top(
    worst: float, highest: int, tmp_path: Path
) -> None:
    rows = [replace(DENSE), *(replace(ROW, ratio_to_donor=r, series="lte") for r in (1.2, worst))]
    plot(rows, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    marked = [ratio for ratio in TICKS if f"<!-- {ratio:g}x -->" in drawn]
    assert marked[0] == 1 and marked[-1] == highest


def test_a_plot_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no converted model to draw"):
        plot([DENSE], tmp_path / "plot.svg")
