"""Makers of hostile files."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.security.watch import PAYLOAD


class Call:
    """Unpickles to the result of a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def touch(folder: Path) -> str:
    """A shell command that leaves a trace."""
    return f"touch {folder / PAYLOAD}"


def calls(folder: Path) -> dict[str, Call]:
    """Objects whose unpickling runs something."""
    code = f"open({str(folder / PAYLOAD)!r}, 'w')"
    return {
        "system": Call(os.system, touch(folder)),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "popen": Call(__import__("subprocess").Popen, ["touch", str(folder / PAYLOAD)]),
        "hub": Call(torch.hub.load, str(folder), PAYLOAD),
        "load": Call(torch.load, str(folder / "inner.pt")),
        "module": Call(__import__("importlib").import_module, PAYLOAD),
    }


def torch_file(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def old_torch_file(path: Path, content: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def raw_pickle(path: Path, content: Any, protocol: int) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def deflated(path: Path) -> Path:
    """A torch archive of zeros whose members are compressed: small on disk, large in memory."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(1 << 22)}}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    return path


def safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, or a false length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def npy(path: Path, header: str, data: bytes = b"") -> Path:
    """A .npy file with any text as header."""
    text = header.encode("latin1").ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return path


def npz(path: Path, members: dict[str, bytes], compressed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for info, content in members:
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def png(width: int, height: int, rows: int | None = None, text: bytes = b"") -> bytes:
    """A PNG that says any size; ``rows`` of it are there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = zlib.compress((b"\0" + bytes(3 * width)) * (height if rows is None else rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def text_chunk(size: int) -> bytes:
    """A compressed comment that stands for ``size`` bytes."""
    content = b"Comment\0\0" + zlib.compress(bytes(size))
    return struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
