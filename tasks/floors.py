"""Security floors: versions below which a file of someone else can run code here, or which are malware themselves.

Read from the metadata of what is installed; nothing is imported, because importing may already be the attack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from repalign.errors import UserError


@dataclass(frozen=True)
class Floor:
    """The lowest version of a package that is started, and why."""

    package: str
    lowest: str
    why: str
    forbidden: tuple[str, ...] = ()


_LIGHTNING = "CVE-2026-58659: hyper-parameters of a checkpoint call any function; 2.6.2 and 2.6.3 steal credentials"
FLOORS = (
    Floor("torch", "2.10", "CVE-2026-24747: its weights_only reader corrupts memory (below 2.6 CVE-2025-32434: code)"),
    Floor("lightning", "2.6.6", _LIGHTNING, ("2.6.2", "2.6.3")),
    Floor("pytorch-lightning", "2.6.6", _LIGHTNING, ("2.6.2", "2.6.3")),
    Floor("transformers", "5.3", "CVE-2026-4372, CVE-2026-5241: a model's config.json turns remote code on"),
    Floor("hydra-core", "1.3.4", "its instantiate had no block list: a configuration called any function"),
    Floor("pillow", "12.1.1", "CVE-2026-25990: a picture writes out of bounds"),
    Floor("pyarrow", "14.0.1", "CVE-2023-47248: a Parquet file runs code"),
    Floor("pyyaml", "5.4", "CVE-2020-14343: a YAML file runs code"),
    Floor("numpy", "1.16.3", "CVE-2019-6446: a .npy file runs code"),
    Floor("jinja2", "3.1.6", "CVE-2025-27516: a template leaves its sandbox"),
)


def check_floors(installed: Callable[[str], str] = version) -> None:
    """Refuse to start with a package that is known to be unsafe. What is not installed is not asked for.

    Args:
        installed: version of a package; raises PackageNotFoundError.

    Raises:
        UserError: naming package, version, floor, why, and how to mend it.
    """
    for floor in FLOORS:
        try:
            found = installed(floor.package)
        except PackageNotFoundError:
            continue
        try:
            safe = Version(found) >= Version(floor.lowest) and found not in floor.forbidden
        except InvalidVersion:
            safe = False
        if not safe:
            raise UserError(
                f"{floor.package} {found} is not safe ({floor.why}); expected {floor.lowest} or later: "
                f"make setup, or pip install '{floor.package}>={floor.lowest}'"
            )
