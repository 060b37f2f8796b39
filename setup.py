"""Builds the C++ extension; everything else is in pyproject.toml.

The extension is optional: where it does not compile, the package installs without it and runs on its PyTorch reference
ops. No -march here: the kernels choose their instruction set at run time (csrc/dispatch.cpp).
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile().install()

setup(
    ext_modules=[
        Pybind11Extension(
            "ragged_exit._native",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fopenmp", "-Wall", "-Wextra"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
