"""Reads what W&B wrote offline: a log of protobuf records in the format of LevelDB."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER, START = 32768, 7, 7  # bytes of a block, of a chunk's header, of the file's own header
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path):
    """Every record of a .wandb file."""
    data, place, whole = file.read_bytes(), START, b""
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if kind == 0:
            break
        whole = (whole if kind in (MIDDLE, LAST) else b"") + data[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def history(run_dir: Path):
    """What was logged: (key, step, value) of every offline run of a folder, in the order of the runs."""
    found = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") != "history":
                continue
            row: dict = {}
            for item in record.history.item:
                key, *inside = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if inside:  # of a picture or a table
                    row.setdefault(key, {})["/".join(inside)] = value
                else:
                    row[key] = value
            step = row.get("trainer/global_step")
            found += [(key, step, row[key]) for key in sorted(row) if not key.startswith(("_", "trainer/"))]
    return found


def config(run_dir: Path):
    """Run ids, groups and configurations that the offline runs of a folder began with."""
    found = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        run, told = None, {}
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                told |= {i.key: json.loads(i.value_json) for i in record.run.config.update if i.key}
            elif kind == "config":
                told |= {i.key: json.loads(i.value_json) for i in record.config.update if i.key}
        found.append((run.run_id, run.run_group, told))
    return found
