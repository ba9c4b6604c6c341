"""Ray, and the cluster of it that an index runs on."""

from __future__ import annotations

from typing import Any

from twotower.settings import ConfigError


def import_ray() -> Any:
    """Ray.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "index.engine=ray needs Ray, which is not installed; run: pip install 'twotower[ray]'"
        ) from error
    return ray


def connect(address: str) -> Any:
    """Ray, connected to the cluster that this process uses already, or else to that of an address.

    Raises:
        ConfigError: there is none.
    """
    ray = import_ray()
    if ray.is_initialized():
        return ray
    try:
        # `local` makes a cluster of this machine alone, which ends with the process.
        own = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError: each of them by version
        raise ConfigError(
            f"no Ray cluster answers at index.address={address} "
            f"({str(error).strip().splitlines()[0]}); "
            "start one with `ray start --head`, or use index.address=local"
        ) from error
    return ray
