"""Builds the C++ extension; everything else is in pyproject.toml.

The extension is optional: where it does not compile, the package installs without it and runs on its PyTorch reference
ops. No -march here: the kernels choose their instruction set at run time (csrc/dispatch.cpp).
"""

from pathlib import Path
from runpy import run_path
from sysconfig import get_config_var

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile().install()

files = run_path("ragged_exit/ops/sources.py")  # not imported: the package needs torch
digest = files["digest"]("csrc")
# setuptools goes by the files' times, which a copy may keep; what was built in place holds its sources' digest
built = Path("ragged_exit", "_native" + get_config_var("EXT_SUFFIX"))
stale = built.exists() and digest.encode() not in built.read_bytes()

setup(
    ext_modules=[
        Pybind11Extension(
            "ragged_exit._native",
            files["sources"]("csrc"),
            depends=files["headers"]("csrc"),
            define_macros=[("RAGGED_EXIT_SOURCES", f'"{digest}"')],
            cxx_std=17,
            extra_compile_args=["-O3", "-fopenmp", "-Wall", "-Wextra"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
    options={"build_ext": {"force": True}} if stale else {},
)
