"""The package's one compiled part; all else about it stands in setup.cfg."""

from setuptools import Extension, setup

FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-pthread"]

setup(
    ext_modules=[
        # Loaded by ctypes, so it needs no Python headers and serves every version of Python.
        # Optional: without a compiler the search does with torch, and `twotower info` says so.
        Extension(
            "twotower.retrieval.scan._scan",
            ["src/twotower/retrieval/scan/scan.c"],
            depends=[
                f"src/twotower/retrieval/scan/scan_{part}.h" for part in ("amx", "heaps", "kernels")
            ],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
            py_limited_api=True,
        )
    ]
)
