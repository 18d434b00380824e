"""The one thing that pyproject.toml cannot say: how the native kernels are compiled."""

import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(
    str(source) for source in Path("kernels/csrc").glob("*.cpp") if source.name != "check.cpp"
)
# Apple's compiler has no OpenMP; the kernels then make their own threads.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

setup(
    ext_modules=[
        Extension(
            "moe_tools.kernels.cpu._sparse_ffn",
            sources=SOURCES,
            depends=[str(header) for header in sorted(Path("kernels/csrc").glob("*.h"))],
            # No -march: what needs a newer CPU says so itself and is chosen at run time.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                # GCC's own AVX-512 headers (bug 105593).
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
                *OPENMP,
            ],
            extra_link_args=OPENMP,
            language="c++",
            # Without a compiler the install goes on: `moe-tools doctor` and the tests then say so.
            optional=True,
        )
    ]
)
