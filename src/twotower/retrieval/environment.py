"""The machine, the threads and the libraries that figures depend on."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import torch

from twotower.machine import processor
from twotower.retrieval.faiss_index import import_faiss
from twotower.retrieval.scan import tiers
from twotower.settings import ConfigError


def environment() -> dict[str, Any]:
    """What to print above the figures.

    FAISS gets as many threads as torch: comparing different numbers would say nothing.
    """
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    torch_blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    about = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "exact": tiers.describe(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_blas": torch_blas[1] if torch_blas else "unknown",
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "numpy": np.__version__,
        "numpy_blas": f"{blas.get('name')} {blas.get('version')}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
    }
    try:
        faiss = import_faiss()
    except ConfigError:
        return {**about, "faiss": "not installed"}
    faiss.omp_set_num_threads(torch.get_num_threads())
    return {
        **about,
        "faiss": faiss.__version__,
        "faiss_threads": faiss.omp_get_max_threads(),
        "faiss_compile_options": faiss.get_compile_options().strip(),
        "faiss_blas_threshold": faiss.cvar.distance_compute_blas_threshold,
    }
