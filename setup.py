"""The loops in C, which are left out where there is no compiler. All else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "bert_fast.compression.native._kernels",
            ["bert_fast/compression/native/kernels.c"],
            extra_compile_args=["-O3"],
            optional=True,
        )
    ]
)
