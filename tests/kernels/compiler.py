"""The compiler and the flags that setup.py builds the native kernels with."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

from setuptools import Extension
from setuptools._distutils.ccompiler import CCompiler, new_compiler
from setuptools._distutils.sysconfig import customize_compiler

ROOT = Path(__file__).parents[2]


def extension() -> Extension:
    """The extension as setup.py declares it."""
    with chdir(ROOT), patch("setuptools.setup") as setup:
        runpy.run_path("setup.py")
    (found,) = setup.call_args.kwargs["ext_modules"]
    return found


def compile_objects(sources: Sequence[Path], folder: Path, flags: Sequence[str]) -> list[Path]:
    """Object files of C++ sources in `folder`; `flags` come behind those of setup.py."""
    arguments = [*extension().extra_compile_args, *flags]
    made = compiler().compile(
        [str(source) for source in sources], output_dir=str(folder), extra_postargs=arguments
    )
    return [Path(name) for name in made]


def compiler() -> CCompiler:
    """The compiler that build_ext would take."""
    made = new_compiler()
    customize_compiler(made)
    return made


def compile_library(source: Path, folder: Path) -> Path:
    """A shared library of one C++ source."""
    made = compiler()
    objects = made.compile(
        [str(source)], output_dir=str(folder), extra_postargs=["-std=c++17", "-O1"]
    )
    library = folder / f"{source.stem}.so"
    made.link_shared_object(objects, str(library), target_lang="c++")
    return library
