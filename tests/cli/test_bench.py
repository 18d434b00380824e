import json

from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from tests.families import build, routed
from tests.tiny import build_tokenizer


def test_bench_times_dense_and_routed(capsys):
    assert main(["bench", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [(row["operation"], row["tokens"]) for row in figures["ffn"]] == [
        ("forward", 1),
        ("forward", 512),
        ("forward + backward", 512),
    ]
    assert all(row["dense_ms"] > 0 and row["routed_ms"] > 0 for row in figures["ffn"])


def test_bench_clusters_beside_min_cost_flow(capsys):
    assert main(["bench", "clustering", "--json", "-"]) == 0
    ours, exact = json.loads(capsys.readouterr().out)["clustering"]
    assert (ours["by"], exact["by"]) == ("ours", "min-cost flow")
    assert ours["smallest"] == ours["largest"] == exact["smallest"] == exact["largest"] == 32
    assert ours["objective"] < 1.01 * exact["objective"]


def test_an_unknown_shape_is_one_line(capsys):
    assert main(["bench", "--shape", "llama9"]) == 2
    assert "known: smollm2-135m, llama2-7b, mixtral-8x7b, d2048" in capsys.readouterr().err


KERNELS = ["bench", "kernels", "--shape", "24x64", "--dtype", "bf16", "--expert-size", "8"]
FEW = ["--repeats", "2", "--rotate", "0.0001"]


def test_bench_times_the_kernels_beside_the_dense_ways(capsys):
    assert main([*KERNELS, *FEW, "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)["kernels"]
    ways = ["torch gather", "experts of 8", "neurons given", "exact gate", "screened gate"]
    assert [(row["operation"], row["sparsity"]) for row in figures] == [
        ("F.linear", 0.0),
        ("torch.mv", 0.0),
        *((way, sparsity) for sparsity in (0.5, 0.75, 0.9, 0.97) for way in ways),
    ]
    assert all(row["ms"] > 0 and row["share_of_bandwidth"] > 0 for row in figures)
    assert all((row["dtype"], row["tokens"]) == ("bfloat16", 1) for row in figures)
    assert figures[0]["speedup"] == 1.0


def test_bench_times_batches_and_dtypes_of_packed_weights_and_draws_them(tmp_path, capsys):
    picture = tmp_path / "kernels.svg"
    more = ["--batch", "1", "4", "--packed-dtype", "fp16", "int4", "--plot", str(picture)]
    assert main([*KERNELS, *FEW, *more, "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)["kernels"]
    experts = [row for row in figures if row["operation"] == "experts of 8"]
    assert [(row["dtype"], row["tokens"]) for row in experts[::4]] == [
        ("float16", 1),
        ("float16", 4),
        ("int4", 1),
        ("int4", 4),
    ]
    dense = {(row["dtype"], row["tokens"]) for row in figures if row["sparsity"] == 0}
    assert dense == {("bfloat16", 1), ("bfloat16", 4)}
    # Nothing is screened where the gate is small already, and a batch has no matrix times vector.
    assert not [r for r in figures if r["operation"] == "screened gate" and r["dtype"] == "int4"]
    assert not [r for r in figures if r["operation"] == "torch.mv" and r["tokens"] == 4]
    assert "4 tokens" in picture.read_text()


def test_only_kernels_are_drawn(tmp_path, capsys):
    assert main(["bench", "ffn", "--plot", str(tmp_path / "x.svg")]) == 2
    assert "bench ffn has no picture: leave --plot out" in capsys.readouterr().err


def test_a_shape_may_be_given_in_numbers(capsys):
    assert main(["bench", "--shape", "0x5"]) == 2
    assert "known: smollm2-135m, llama2-7b, mixtral-8x7b, d2048, or DxF" in capsys.readouterr().err


def test_bench_times_whole_models(tmp_path, capsys):
    model, _ = routed(build("llama"))
    save(model, tmp_path / "out")
    few = ["--prompt-tokens", "4", "--tokens", "2", "--repeats", "1", "--threads", "1"]
    assert main(["bench", "generate", str(tmp_path / "out"), *few, "--json", "-"]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)["generate"]
    assert [row["model"] for row in figures] == [
        "dense",
        "dense, optimised",
        "routed",
        "optimised",
    ]
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in figures)
    assert f"{tmp_path / 'out'}, fp32, 1 threads" in printed.err


def test_bench_times_a_random_model_of_a_shape(capsys):
    few = ["--prompt-tokens", "4", "--tokens", "2", "--repeats", "1"]
    assert main(["bench", "generate", "--shape", "64x128", *few]) == 0
    out = capsys.readouterr().out
    assert "optimised                 88% off" in out and "of the read rate" in out
    assert "\nbar: dense" in out and "the fastest dense model at decoding" in out


def test_bench_times_a_model_in_few_bits_beside_the_others(capsys):
    few = ["--prompt-tokens", "4", "--tokens", "2", "--repeats", "1", "--expert-size", "16"]
    options = ["--packed-dtype", "int4", "--linears", "int8"]
    assert main(["bench", "generate", "--shape", "64x128", *few, *options, "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)["generate"]
    assert [row["model"] for row in figures][3:] == [
        "optimised",
        "dense, linears int8",
        "int4, linears int8",
    ]
    assert main(["bench", "generate", *few, "--packed-dtype", "int8", "int4"]) == 2
    assert "times one --packed-dtype, not int8, int4" in capsys.readouterr().err


def test_only_generate_takes_a_folder(capsys):
    assert main(["bench", "ffn", "out"]) == 2
    assert "bench ffn times a shape, not out: use --shape" in capsys.readouterr().err


def test_bench_times_a_training_step(tmp_path, capsys):
    save(build("llama"), tmp_path / "donor")
    few = ["--repeats", "2", "--block-length", "16", "--json", "-"]
    assert main(["bench", "train", str(tmp_path / "donor"), *few]) == 0
    dense, soft = json.loads(capsys.readouterr().out)["train"]
    assert (dense["step"], soft["step"]) == ("dense", "soft")
    assert dense["tokens"] == soft["tokens"] == 2 * 16  # blocks of `lte_paper`
    assert dense["ratio"] == 1.0 and soft["ratio"] > 0 and soft["milliseconds"] > 0


def test_only_a_routed_train_step_is_timed(tmp_path, capsys):
    save(build("llama"), tmp_path / "donor")
    assert main(["bench", "train", str(tmp_path / "donor"), "--recipe", "relu"]) == 2
    assert (
        "recipe relu has no soft, straight or weighted train step to time"
        in capsys.readouterr().err
    )


def test_generate_takes_prompts_of_held_out_text(tmp_path, capsys):
    save(build("llama"), tmp_path / "out")
    build_tokenizer().save_pretrained(tmp_path / "out")
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"A line of text, number {i}." for i in range(900))
    )
    few = ["bench", "generate", str(tmp_path / "out"), "--dtype", "fp32", "--tokens", "2"]
    few += ["--repeats", "1", "--prompt-tokens", "8", "--data", str(tmp_path / "text.txt")]
    assert main([*few, "--sequences", "3"]) == 0
    assert "3 sequences" in capsys.readouterr().out
    assert main([*few, "--sequences", "900000"]) == 2
    assert "held-out tokens" in capsys.readouterr().err
    shape = ["bench", "generate", "--shape", "64x128", "--data", "docs"]
    assert main(shape) == 2
    assert "--data needs a model with a tokenizer" in capsys.readouterr().err
    assert main(["bench", "kernels", "--sequences", "2"]) == 2
    assert "bench kernels writes no text" in capsys.readouterr().err
    assert main([*shape[:4], "--sequences", "2", "--against", "llama.cpp"]) == 2
    assert "leave --sequences out" in capsys.readouterr().err
