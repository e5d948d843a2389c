"""Small tar shards and Parquet files in their true form."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.synthetic import Shapes


def encoded(number: int, size: tuple[int, int] = (40, 32), form: str = "png") -> bytes:
    """A picture of a shape on a white ground, in a file's bytes."""
    pixels = Shapes(24, 32).load([number])[0][0]
    picture = PIL.Image.new("RGB", size, "white")
    picture.paste(PIL.Image.fromarray(pixels.transpose(1, 2, 0)), ((size[0] - 32) // 2, (size[1] - 32) // 2))
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> None:
    """One shard: samples of (key, suffix -> content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, numbers: Sequence[int], *, names: Sequence[str] | None = None, **columns: Any) -> None:
    """One file as the library ``datasets`` writes it: struct {bytes, path}, row groups, class names in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(number), "path": f"{number}.png"} for number in numbers]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array([number % 4 for number in numbers], pa.int64()),
            **columns,
        }
    )
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    if names is not None:
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3)
