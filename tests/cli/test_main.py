"""Finding a verb, and what becomes of errors. No model is loaded here."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from safetensors import SafetensorError

from moe_tools.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a verb `probe` that does what it is given."""

    def install(action: Callable[[], int], name: str = "probe") -> None:
        module = types.ModuleType(f"moe_tools.cli.{name}")
        module.SUMMARY = "probe"  # type: ignore[attr-defined]
        module.add_arguments = lambda parser: None  # type: ignore[attr-defined]
        module.run = lambda args: action()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        names.append(name)
        monkeypatch.setattr("moe_tools.cli.main.VERBS", tuple(names))

    names = list(VERBS)
    return install


def fail(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on standard error; nothing on standard output."""
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert line.startswith("moe-tools: ")
    return line.removeprefix("moe-tools: ")


def test_help_lists_every_verb_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert not err
    for name in VERBS:
        (line,) = (line for line in out.splitlines() if line.startswith(f"  {name} "))
        assert len(line.split()) > 3


def test_no_verb_is_help_and_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert not out and "usage: moe-tools VERB" in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moe-tools 0.")


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: moe-tools {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_needs_no_torch(name: str) -> None:
    code = (
        "import sys\nfrom moe_tools.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, name, "--help"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evalute"], "unknown verb 'evalute'; did you mean 'evaluate'? (known: "),
        (["--hlep"], "unknown verb '--hlep'"),
        (["evaluate"], "the following arguments are required: folder"),
        (["evaluate", "x", "--tokens", "0"], "--tokens: '0' is no whole number of at least 1"),
        (["evaluate", "x", "--tokens", "many"], "--tokens: 'many' is no whole number"),
        (["evaluate", "x", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["evaluate", "x", "--json", "no/such/x.json"], "--json: 'no/such/x.json' is no file in a"),
        (["generate", "x"], "the following arguments are required: --prompt"),
        (["generate", "x", "--prompt", " "], "--prompt is empty: give some text to continue"),
        (["generate", "x", "--prompt", "a", "--temperature", "-1"], "'-1' is no number of at"),
        (["generate", "x", "--prompt", "a", "--temperature", "nan"], "'nan' is no number of at"),
        (["doctor", "x", "y"], "unrecognized arguments: y (see `moe-tools doctor --help`)"),
        (["recipes", "no-such-recipe"], "unknown recipe 'no-such-recipe'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), 2, "two lines"),
        (FloatingPointError("the loss is nan"), 2, "the loss is nan"),
        (PermissionError(13, "Permission denied", "x"), 1, "[Errno 13] Permission denied: 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line(
    verb: Callable[..., None],
    error: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb(fail(error))
    assert main(["probe"]) == code
    assert one_line(capsys) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "?", "/x/y"), "/x/y cannot be written: No space left on device ("),
        (SafetensorError("? (os error 30)"), "a file cannot be written: Read-only file system: c"),
        (RuntimeError("?/inline_container.cc:1"), "a file cannot be written: PyTorch could not"),
    ],
)
def test_a_disk_that_refuses_is_one_line_whatever_library_says_so(
    verb: Callable[..., None], error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(fail(error))
    assert main(["probe"]) == 2
    assert one_line(capsys).startswith(line)


def test_an_interrupted_conversion_says_that_it_resumes(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(fail(KeyboardInterrupt()), name="convert")
    assert main(["convert"]) == 130
    assert one_line(capsys) == "interrupted; the same command resumes"


def test_debugging_shows_the_traceback(
    verb: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    verb(fail(ValueError("mistake")))
    monkeypatch.setenv("MOE_TOOLS_DEBUG", "1")
    with pytest.raises(ValueError, match="mistake"):
        main(["probe"])


def test_a_bug_keeps_its_traceback(verb: Callable[..., None]) -> None:
    verb(fail(KeyError("ours")))
    with pytest.raises(KeyError):
        main(["probe"])


def test_our_log_is_shown_once_and_put_back(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("moe_tools")
    before = (logger.level, list(logger.handlers), logger.propagate)

    def action() -> int:
        logging.getLogger("moe_tools.some.module").info("step 1")
        return 0

    verb(action, name="inner")
    verb(lambda: action() or main(["inner"]))
    assert main(["probe"]) == 0
    assert capsys.readouterr().err == 2 * "moe-tools: step 1\n"
    assert (logger.level, list(logger.handlers), logger.propagate) == before


def test_a_warning_of_another_package_is_not_shown(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def action() -> int:
        warnings.warn_explicit("noise", UserWarning, "x.py", 1, module="transformers.x")
        return 0

    verb(action)
    assert main(["probe"]) == 0
    assert capsys.readouterr().err == ""


def test_a_warning_of_ours_is_not_hidden(verb: Callable[..., None]) -> None:
    def action() -> int:
        warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="moe_tools.x")
        return 0

    verb(action)
    with pytest.raises(UserWarning, match="ours"):  # an error in every test
        main(["probe"])


@pytest.mark.parametrize("name", VERBS)
def test_no_verb_calls_another_through_the_command_line(name: str) -> None:
    text = (ROOT / "cli" / f"{name}.py").read_text(encoding="utf-8")
    assert "cli.main" not in text and "argv" not in text


def test_convert_and_train_share_their_options() -> None:
    """They differ in how the recipe is named, and by the table after `convert`."""
    options: dict[str, dict[str, tuple[object, ...]]] = {}
    for name in ("convert", "train"):
        parser = argparse.ArgumentParser()
        import_module(f"moe_tools.cli.{name}").add_arguments(parser)
        options[name] = {
            action.dest: (action.option_strings, action.nargs, action.default, action.help)
            for action in parser._actions
        }
    convert, train = options["convert"], options["train"]
    assert convert.keys() - train.keys() == {"method", "eval_tokens"}
    assert train.keys() <= convert.keys()
    assert {name for name in train if train[name] != convert[name]} == {"recipe"}
    for name in ("convert", "train"):
        assert len((ROOT / "cli" / f"{name}.py").read_text().splitlines()) < 50


def test_the_program_exits_with_the_code() -> None:
    command = [sys.executable, "-m", "moe_tools.cli.main", "evalute"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_the_parser_of_a_verb_is_built_from_its_file(verb: Callable[..., None]) -> None:
    seen: list[argparse.Namespace] = []
    verb(lambda: 3)
    module = sys.modules["moe_tools.cli.probe"]
    module.add_arguments = lambda parser: parser.add_argument("--x")  # type: ignore[attr-defined]
    module.run = lambda args: seen.append(args) or 3  # type: ignore[attr-defined]
    assert main(["probe", "--x", "y"]) == 3
    assert seen[0].x == "y"
