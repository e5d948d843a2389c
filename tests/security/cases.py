"""Hostile files and who reads them. Every case makes its files in a folder, and returns the call that reads them.

A case that ends in a ``UserError`` is refused; one whose name begins with ``HARMLESS`` is read as data, and its code is
not run.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.security import forged
from tests.security.forged import calls, entry, member, npy_bytes, safetensors, torch_file
from tests.security.watch import PAYLOAD

Read = Callable[[], Any]
Case = tuple[str, Read]


def checkpoints(folder: Path) -> Iterator[Case]:
    """Pickles in checkpoints of every reader."""
    from callbacks.checkpoint import AtomicCheckpointIO
    from datamodules.layouts.ddt import DDTLatents
    from repalign.autoencoders.latent_norm import statistics_from_file
    from repalign.autoencoders.weights import read_weights
    from repalign.encoders.cards import read_card
    from repalign.encoders.weights import find_weights
    from repalign.metrics.lpips import _read as read_lpips
    from tasks.build import read_checkpoint
    from tasks.convert import read_official
    from tasks.train import _step_of

    evil = calls(folder)
    torch_file(folder / "inner.pt", {"x": evil["system"]})
    for name, call in evil.items():
        yield f"official .pt, {name}", partial(read_official, torch_file(folder / f"{name}.pt", {"ema": {"x": call}}))
    for protocol in (0, 2, 4):
        file = forged.raw_pickle(folder / f"raw{protocol}.bin", {"model": evil["system"]}, protocol)
        yield f"official .bin, bare pickle {protocol}", partial(read_official, file)
    old = forged.old_torch_file(folder / "old.pth", {"model": evil["eval"]})
    yield "official .pth, old format", partial(read_official, old)
    yield "encoder .pth", partial(find_weights, read_card("dinov2_b"), old)
    yield "resume .ckpt", partial(_step_of, torch_file(folder / "step_1.ckpt", {"progress": evil["system"]}))
    run = torch_file(folder / "run.ckpt", {"state_dict": {"x": torch.ones(1)}, "callbacks": evil["exec"]})
    yield "task.checkpoint .ckpt", partial(read_checkpoint, run)
    yield "trainer's reader .ckpt", partial(_as_user, AtomicCheckpointIO().load_checkpoint, run)
    yield "autoencoder .ckpt", partial(read_weights, run)
    yield "autoencoder .bin", partial(read_weights, folder / "raw2.bin")
    yield "statistics .pt", partial(statistics_from_file, folder / "eval.pt")
    yield "LPIPS .pth", partial(read_lpips, old, "paths.vgg16", "X", "weights")
    (folder / "latents" / "n01").mkdir(parents=True)
    torch_file(folder / "latents" / "n01" / "a.pt", {"mean": evil["system"]})
    yield "DDT latents .pt", partial(DDTLatents, folder / "latents")
    script = folder / "script.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(script))
    yield "TorchScript program", partial(read_official, script)
    yield "compressed archive", partial(read_checkpoint, forged.deflated(folder / "bomb.ckpt"))
    whole = (torch_file(folder / "whole.pt", {"model": {"x": torch.ones(99)}})).read_bytes()
    (folder / "torn.pt").write_bytes(whole[: len(whole) // 2])
    yield "torn archive", partial(read_official, folder / "torn.pt")
    yield "state dict that is a tensor", partial(read_weights, torch_file(folder / "bare.pt", torch.ones(3)))
    yield "state dict of texts", partial(read_official, torch_file(folder / "texts.pt", {"model": {"a": "os.system"}}))
    file = folder / "deep.pt"
    file.write_bytes(b"\x80\x02" + b"(" * 100_000 + b"l" * 99_999 + b".")
    yield "pickle nested without end", partial(read_official, file)
    lightning = {"state_dict": {"x": torch.ones(1)}, "hyper_parameters": {"_instantiator": "os.system", "command": "x"}}
    yield "HARMLESS hyper-parameters that call", partial(read_checkpoint, torch_file(folder / "hyper.ckpt", lightning))
    target = {"state_dict": {"x": torch.ones(1)}, "config": {"_target_": "os.system", "_args_": [forged.touch(folder)]}}
    yield "HARMLESS _target_ in a checkpoint", partial(read_checkpoint, torch_file(folder / "target.ckpt", target))

    sharded = folder / "step_00000002.ckpt"
    sharded.mkdir()
    torch_file(sharded / "rest.pt", {"progress": {"step": evil["system"]}, "optimizer_groups": []})
    forged.raw_pickle(sharded / ".metadata", evil["exec"], 4)  # where the default planner keeps a pickle
    yield "resume, shards with a pickle", partial(_step_of, sharded)
    yield "task.checkpoint, shards with a pickle", partial(read_checkpoint, sharded)
    false = folder / "step_00000004.ckpt"
    false.mkdir()
    torch_file(false / "rest.pt", {"progress": {"step": 4}, "optimizer_groups": []})
    forged.raw_pickle(false / ".metadata", evil["exec"], 4)
    safetensors(false / "model-00001-of-00001.safetensors", {"model.x": entry()}, bytes(8), length=1 << 62)
    yield "task.checkpoint, shards with a header of 4 EiB", partial(read_checkpoint, false)


def tensors(folder: Path) -> Iterator[Case]:
    """Headers of safetensors."""
    from repalign.autoencoders.latent_norm import statistics_from_file
    from repalign.autoencoders.weights import read_weights
    from repalign.backbones.tuning import _fill
    from repalign.encoders.cards import read_card
    from repalign.encoders.pca import read_pca
    from repalign.encoders.weights import find_weights
    from repalign.metrics.reference import Reference
    from repalign.samplers.similarity import read_similarity
    from tasks.convert import read_official, read_parts

    def make(name: str, *arguments: Any, **options: Any) -> Path:
        return safetensors(folder / f"{name}.safetensors", *arguments, **options)

    huge = make("huge", {"a": entry()}, bytes(8), length=1 << 62)
    yield "header of 4 EiB", partial(read_parts, huge)
    yield "header of 4 EiB, PCA", partial(read_pca, huge)
    yield "header longer than the file", partial(read_official, make("long", {"a": entry()}, bytes(8), length=5000))
    overlap = make("overlap", {"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12))
    yield "overlapping tensors", partial(read_weights, overlap)
    yield "overlapping tensors, reference", partial(Reference.load, overlap)
    yield (
        "offsets beyond the file",
        partial(read_official, make("beyond", {"a": entry(offsets=(0, 1 << 50))}, bytes(8))),
    )
    yield "offsets backwards", partial(find_weights, read_card("dinov2_b"), make("back", {"a": entry(offsets=(8, 0))}))
    yield "type that lies", partial(read_similarity, make("lies", {"similarity": entry("F64")}, bytes(8)))
    yield "unknown type", partial(read_parts, make("unknown", {"a": entry("OBJ")}, bytes(8)))
    yield "shape that overflows", partial(read_parts, make("wide", {"a": entry(shape=(1 << 40, 1 << 40))}, bytes(8)))
    yield "negative shape", partial(_fill, torch.nn.Linear(1, 1), make("minus", {"a": entry(shape=(-2,))}, bytes(8)))
    yield "header that is code", partial(read_official, make("code", b"__import__('os').system('touch x')"))
    yield "header nested without end", partial(read_parts, make("deep", b'{"a":' * 50_000))
    note = {"__metadata__": {"provenance": "[" * 100_000}, "a": entry()}
    yield "provenance nested without end", partial(read_weights, make("note", note, bytes(8)))
    target = {"__metadata__": {"provenance": '{"_target_": "os.system"}'}, "mean": entry()}
    yield "_target_ in provenance", partial(statistics_from_file, make("target", target, bytes(8)))
    paths = {"__metadata__": {"format": "repalign"}, "../../../etc/x/a": entry()}
    yield "HARMLESS names that are paths", partial(read_parts, make("paths", paths, bytes(8)))


def arrays(folder: Path) -> Iterator[Case]:
    """.npy, .npz, HDF5 and the manifests of stores."""
    from datamodules.layouts.repa import REPALatents
    from datamodules.store import ArrayStore
    from repalign.metrics.reference import Reference
    from tasks.pictures_in import _from_npz

    evil = np.array([calls(folder)["system"]], dtype=object)
    objects = forged.npz(folder / "objects.npz", {"mu.npy": npy_bytes(evil), "sigma.npy": npy_bytes(evil)})
    yield "moments of objects", partial(Reference.load, objects)
    pictures = forged.npz(folder / "pictures.npz", {"arr_0.npy": npy_bytes(evil)})
    yield "pictures of objects", partial(_drain, _from_npz, pictures)
    code = "{'descr': __import__('os').system('touch x'), 'fortran_order': False, 'shape': (1,)}"
    held = forged.npy(folder / "code.npy", code).read_bytes()
    yield "header that is code", partial(Reference.load, forged.npz(folder / "code.npz", {"mu.npy": held}))
    yield "header that is code, pictures", partial(_drain, _from_npz, forged.npz(folder / "c.npz", {"arr_0.npy": held}))
    lie = forged.npy(folder / "lie.npy", "{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}")
    lies = forged.npz(folder / "lies.npz", {"mu.npy": lie.read_bytes(), "sigma.npy": b""})
    yield "shape of 8 TiB", partial(Reference.load, lies)
    wide = forged.npy(folder / "w.npy", "{'descr': '|u1', 'fortran_order': False, 'shape': (9, 99999, 99999, 3)}")
    bomb = forged.npz(folder / "bomb.npz", {"arr_0.npy": wide.read_bytes() + bytes(1 << 22)}, compressed=True)
    yield "pictures of 30 GB each, compressed", partial(_drain, _from_npz, bomb)
    outside = forged.npz(folder / "outside.npz", {"../../mu.npy": npy_bytes(np.ones(2)), "/etc/sigma.npy": b""})
    yield "members outside", partial(Reference.load, outside)
    (folder / "torn.npz").write_bytes(pictures.read_bytes()[:60])
    yield "torn archive", partial(Reference.load, folder / "torn.npz")
    yield "torn archive, pictures", partial(_drain, _from_npz, folder / "torn.npz")
    (folder / "repa").mkdir()
    np.save(folder / "repa" / "a.npy", evil, allow_pickle=True)
    (folder / "repa" / "dataset.json").write_text('{"labels": [["a.npy", 0]]}')
    yield "REPA latents of objects", partial(REPALatents, folder / "repa")
    for name, arrays_, what in (
        ("names", {"../../etc/x": {"dtype": "float32", "shape": [1]}}, "store outside its folder"),
        ("kinds", {"a": {"dtype": "O", "shape": [1]}}, "store of objects"),
        ("sizes", {"a": {"dtype": "float32", "shape": [-1]}}, "store of negative rows"),
        ("texts", {"a": {"dtype": "__import__('os')", "shape": [1]}}, "store whose type is code"),
    ):
        yield what, partial(ArrayStore, _store(folder / name, arrays_))


def configurations(folder: Path) -> Iterator[Case]:
    """Targets, resolvers, tags and Hydra's own part."""
    from omegaconf import OmegaConf

    from tasks import jobs
    from tasks.instantiate import build
    from tasks.launch import compose
    from tasks.report import write_report
    from tasks.roll_back import roll_backs

    command = forged.touch(folder)
    nodes = {
        "os.system": {"_target_": "os.system", "command": command},
        "eval": {"_target_": "builtins.eval", "_args_": [f"open('{folder / PAYLOAD}', 'w')"]},
        "subprocess, partial": {"_target_": "subprocess.run", "_partial_": True, "args": command},
        "through a module of ours": {"_target_": "callbacks.checkpoint.os.system", "command": command},
        "an importer of ours": {"_target_": "repalign.encoders.text_folder.package", "name": PAYLOAD, "extra": "x"},
        "a writer that we import": {"_target_": "repalign.backbones.tuning.save_file", "tensors": {}, "filename": "x"},
        "in a list in a list": {"x": [[{"_target_": "os.system", "command": command}]]},
        "made by a resolver": {"x": "${oc.create:{_target_: os.system, command: x}}"},
        "made by two resolutions": {"x": "\\${oc.create:{_target_: os.system, command: x}}"},
        "decoded from a text": {"x": "${oc.decode:'{_target_: os.system, command: x}'}"},
        "a secret of the environment": {"_target_": "torch.optim.AdamW", "lr": "${oc.env:PATH}"},
        "hydra's own helper": {"_target_": "hydra.utils.get_method", "path": "os.system"},
        "functools": {"_target_": "functools.partial", "_args_": [{"_target_": "os.system"}]},
    }
    for name, node in nodes.items():
        yield f"_target_: {name}", partial(build, OmegaConf.create(node), "optimizer")
    recipes = {
        "!!python/object/apply": "seed: !!python/object/apply:os.system ['" + command + "']",
        "!!python/name": "seed: !!python/name:os.system",
        "hydra.callbacks": f"hydra: {{callbacks: {{a: {{_target_: os.system, command: '{command}'}}}}}}",
        "hydra.job.env_set": "hydra: {job: {env_set: {LD_PRELOAD: /tmp/x.so}}}",
        "hydra.job_logging": "hydra: {job_logging: {handlers: {a: {(): os.system}}}}",
        "hydra.launcher.setup": "defaults: [override /hydra/launcher: submitit_slurm]\nhydra: {launcher: {setup: [x]}}",
        "hydra.sweeper": "hydra: {sweeper: {_target_: os.system}}",
        "hydra.searchpath": "hydra: {searchpath: ['pkg://" + PAYLOAD + "']}",
        "hydra.output_subdir": "hydra: {output_subdir: ../../../etc}",
    }
    for name, text in recipes.items():
        place = folder / name.replace("/", "_") / "experiment"
        place.mkdir(parents=True)
        (place / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
        yield f"recipe: {name}", partial(compose, ["experiment=evil"], place.parent)
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    from tasks.hydra_part import config_dir

    (folder / "bomb").mkdir()
    (folder / "bomb" / "x.yaml").write_text(bomb)
    yield "recipe: aliases without end", partial(config_dir, ["--config-dir", str(folder / "bomb")])
    for name, text in (
        ("tag", recipes["!!python/object/apply"]),
        ("bomb", f"{bomb}reference: *i\n"),
        ("deep", "[" * 20_000),
    ):
        run = folder / f"run_{name}"
        run.mkdir()
        (run / "config.yaml").write_text(text)
        (run / "overrides.yaml").write_text(text)
        yield f"HARMLESS stored configuration: {name}", partial(write_report, run)
    job = folder / "job"
    job.mkdir()
    (job / jobs.RECORD).write_text(json.dumps({"finished": True, "composition": {"_target_": "os.system"}}))
    cfg = compose(["experiment=demo", f"run_dir={job}"])
    yield "_target_ in job.json", partial(jobs.begin, cfg)
    (folder / "roll_backs.json").write_text('{"_target_": "os.system"}')
    yield "_target_ in roll_backs.json", partial(roll_backs, folder)


def shards(folder: Path) -> Iterator[Case]:
    """Tar shards, Parquet files, lists of pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from datamodules.captioned import CaptionedFolder
    from datamodules.coco import CocoPictures
    from datamodules.image_folder import ImageFolder
    from datamodules.parquet import ParquetPictures
    from datamodules.webdataset import TarPictures

    good = forged.png(8, 8)

    def tar_of(name: str, *members: tuple[tarfile.TarInfo, bytes]) -> Read:
        forged.tar(folder / name / "a.tar", list(members))
        return lambda: _pictures(TarPictures(folder / name, 8, cache_root=folder / f"{name}_cache", upscale=True))

    yield "HARMLESS tar with ..", tar_of("up", (member("../../../out/a.png"), good))
    yield "HARMLESS tar with absolute names", tar_of("absolute", (member("/etc/cron.d/a.png"), good))
    link = (member("a.png", tarfile.SYMTYPE, "/etc/passwd"), b"")
    yield "tar of links", tar_of("links", link, (member("b.png", tarfile.LNKTYPE, "../../x"), b""))
    yield (
        "tar of devices",
        tar_of("devices", (member("a.png", tarfile.CHRTYPE), b""), (member("b.png", tarfile.FIFOTYPE), b"")),
    )
    yield "tar: JSON nested without end", tar_of("deep", (member("a.png"), good), (member("a.json"), b"[" * 99_999))
    yield "tar: label that is code", tar_of("label", (member("a.png"), good), (member("a.cls"), b"__import__('os')"))
    torn = folder / "lying"
    forged.tar(torn / "a.tar", [(member("a.png"), good)])
    held = bytearray((torn / "a.tar").read_bytes())
    held[124:136] = b"77777777777\0"
    held[148:156] = b"%06o\0 " % (sum(held[:148]) + 8 * 32 + sum(held[156:512]))
    (torn / "a.tar").write_bytes(held)
    yield "tar: member of 8 GiB in 10 kB", lambda: _pictures(TarPictures(torn, 8, cache_root=folder / "lc"))
    (folder / "gz").mkdir()
    with tarfile.open(folder / "gz" / "a.tar", "w:gz") as archive:
        archive.add(torn / "a.tar", "a.png")
    yield "tar: compressed", lambda: _pictures(TarPictures(folder / "gz", 8, cache_root=folder / "gc"))

    for name, row in (
        ("path alone", {"bytes": None, "path": "/etc/passwd"}),
        ("torn picture", {"bytes": b"x", "path": None}),
    ):
        place = folder / f"parquet_{name}"
        place.mkdir()
        pq.write_table(pa.table({"image": [row, row], "label": [0, 1]}), place / "a.parquet")
        yield f"Parquet: {name}", partial(_made, ParquetPictures, place, 8)
    place = folder / "extension"
    place.mkdir()
    import pickle

    field = pa.field("image", pa.binary(), metadata={
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(calls(folder)["system"]),
    })  # fmt: skip
    columns = [pa.array([good], pa.binary()), pa.array([0])]
    pq.write_table(pa.table(columns, schema=pa.schema([field, pa.field("label", pa.int64())])), place / "a.parquet")
    yield "HARMLESS Parquet: extension type that is a pickle", partial(_made, ParquetPictures, place, 8, upscale=True)
    (folder / "torn").mkdir()
    (folder / "torn" / "a.parquet").write_bytes(b"PAR1" + bytes(50) + b"\xff\xff\xff\x7fPAR1")
    yield "Parquet: footer of 2 GiB", partial(_made, ParquetPictures, folder / "torn", 8)

    for name, line in (
        ("..", '{"file_name": "../secret.png", "text": "x"}'),
        ("absolute", '{"file_name": "/etc/passwd", "text": "x"}'),
        ("nested without end", '{"file_name":' * 50_000),
        ("of 8 MB", '{"file_name": "' + "a" * (1 << 23) + '", "text": "x"}'),
    ):
        place = folder / f"list_{name}"
        place.mkdir()
        (place / "metadata.jsonl").write_text(line + "\n")
        yield f"list of captions: {name}", partial(_made, CaptionedFolder, place, 8)
    (folder / "coco").mkdir()
    image = {"id": 1, "file_name": "../../etc/passwd", "width": 8, "height": 8}
    listed = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    (folder / "coco.json").write_text(json.dumps(listed))
    yield "COCO: file outside", partial(CocoPictures, folder / "coco", folder / "coco.json", 8)
    (folder / "deep.json").write_text("[" * 100_000)
    yield "COCO: nested without end", partial(CocoPictures, folder / "coco", folder / "deep.json", 8)
    (folder / "labels").mkdir()
    (folder / "labels" / "dataset.json").write_text('{"labels": [["../../../etc/passwd", 0]]}')
    yield "list of labels: file outside", partial(_made, ImageFolder, folder / "labels", 8)


def pictures(folder: Path) -> Iterator[Case]:
    """Encoded pictures that are bombs, programs or other formats."""
    from datamodules.image_folder import ImageFolder
    from datamodules.openmoji import render
    from tasks.pictures_in import _from_folder

    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(" + PAYLOAD.encode() + b") (w) file\nshowpage\n%%EOF\n"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><script>{PAYLOAD}</script></svg>'.encode()
    held = {
        "of 3.6 gigapixels": forged.png(60_000, 60_000, rows=1),
        "comment of 100 MB": forged.png(8, 8, text=forged.text_chunk(100 << 20)),
        "EPS called PNG": eps,
        "SVG called PNG": svg,
        "PSD called PNG": b"8BPS\x00\x01" + bytes(40),
        "HTML called PNG": b"<html><script>1</script>",
        "torn": forged.png(64, 64)[:70],
        "no rows": forged.png(64, 64, rows=0),
    }
    for name, content in held.items():
        place = folder / name / "n01"
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(content)
        yield f"picture: {name}", partial(_made, ImageFolder, place.parent, 8, upscale=True)
        yield f"picture in task.reference: {name}", lambda f=place.parent: list(_from_folder(f, 4, "task.reference"))
    (folder / "secret.txt").write_text("secret")
    entity = f'<!DOCTYPE svg [<!ENTITY x SYSTEM "file://{folder}/secret.txt">]>'
    lol = (
        '<!DOCTYPE svg [<!ENTITY a "lol">'
        + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True))
        + "]>"
    )
    body = '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><text>&{};</text>{}</svg>'
    link = f'<image href="file://{folder}/secret.png" width="8" height="8"/><image href="http://127.0.0.1:9/x.png"/>'
    for name, text in (
        ("external entity", entity + body.format("x", "")),
        ("entities without end", lol + body.format("j", "")),
    ):
        (folder / f"{name}.svg").write_text(text)
        yield f"SVG: {name}", partial(_as_user, render, folder / f"{name}.svg", 8)
    (folder / "link.svg").write_text(body.replace("&{};", "").format(link))
    yield "HARMLESS SVG: links", partial(render, folder / "link.svg", 8)


def networks(folder: Path) -> Iterator[Case]:
    """Folders in the layout of transformers and diffusers."""
    from repalign.autoencoders.diffusers_folder import check_config
    from repalign.autoencoders.weights import read_weights
    from repalign.encoders.features import ClipFeatures
    from repalign.encoders.text_folder import load_text_network
    from tasks.convert import read_official

    code = f"open({str(folder / PAYLOAD)!r}, 'w')\n"

    def place(name: str, config: dict[str, Any], **files: Any) -> Path:
        made = folder / name
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config))
        (made / f"{PAYLOAD}.py").write_text(code)
        for file, content in files.items():
            (made / f"{file}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return made

    own = {
        "AutoModelForTextEncoding": f"{PAYLOAD}.Model",
        "AutoConfig": f"{PAYLOAD}.Config",
        "AutoModel": f"{PAYLOAD}.Model",
    }
    remote = {name: f"someone/evil--{value}" for name, value in own.items()}
    tokenizer = {"auto_map": {"AutoTokenizer": [f"{PAYLOAD}.Tokenizer", None]}, "tokenizer_class": "Evil"}
    for name, config, files in (
        ("auto_map of an unknown type", {"model_type": "evil", "auto_map": own}, {}),
        ("auto_map of a known type", {"model_type": "t5", "auto_map": own}, {}),
        ("auto_map of a hub", {"model_type": "evil", "auto_map": remote}, {}),
        ("trust_remote_code in the file", {"model_type": "t5", "trust_remote_code": True, "auto_map": own}, {}),
        ("attention from a hub", {"model_type": "t5", "_attn_implementation": "someone/evil-kernel"}, {}),
        ("tokenizer with auto_map", {"model_type": "t5"}, {"tokenizer_config": tokenizer}),
        (
            "adapter of another base",
            {"model_type": "t5"},
            {"adapter_config": {"base_model_name_or_path": "someone/evil"}},
        ),
        ("nested without end", {"model_type": "t5"}, {"generation_config": "[" * 100_000}),
        ("unknown type", {"model_type": "evil"}, {}),
        ("no type", {"architectures": ["os.system"]}, {}),
    ):
        yield f"text encoder: {name}", partial(load_text_network, place(name, config, **files))
    pickled = place("pickled", {"model_type": "t5", "d_model": 8, "num_layers": 1, "vocab_size": 9})
    torch_file(pickled / "pytorch_model.bin", {"shared.weight": calls(folder)["system"]})
    yield "text encoder: pickle alone", partial(load_text_network, pickled)
    yield "text encoder: class of another kind", partial(load_text_network, pickled, kind="os")
    yield "CLIP: auto_map", partial(ClipFeatures, str(place("clip", {"model_type": "clip", "auto_map": own})))
    vae = place("vae", {"_class_name": [PAYLOAD, "Model"], "auto_map": own})
    (vae / "model_index.json").write_text(json.dumps({"_class_name": PAYLOAD, "vae": [PAYLOAD, "Model"]}))
    torch_file(vae / "diffusion_pytorch_model.bin", {"x": calls(folder)["system"]})
    yield "diffusers: own code and a pickle", partial(read_weights, vae)
    yield "diffusers: transformer with a pickle", partial(read_official, vae)
    (vae / "config.json").write_text("[" * 100_000)
    yield "diffusers: config nested without end", partial(check_config, vae, {})


def run_folders(folder: Path) -> Iterator[Case]:
    """What a report reads of a run folder."""
    from tasks.report import write_report

    def run(name: str, **files: str) -> Path:
        made = folder / name
        (made / "samples").mkdir(parents=True)
        (made / "config.yaml").write_text("name: x\nsteps: 3\n")
        for file, content in files.items():
            (made / file.replace("__", ".")).write_text(content)
        return made

    rows = "step,name,value\n"
    yield (
        "HARMLESS report: field of 1 MB",
        partial(write_report, run("field", metrics__csv=rows + "1," + "a" * (1 << 20) + ",1\n")),
    )
    yield (
        "HARMLESS report: step of 400 digits",
        partial(write_report, run("step", metrics__csv=f"{rows}{'9' * 400},a,1\n")),
    )
    yield (
        "HARMLESS report: formula in a name",
        partial(write_report, run("math", metrics__csv=rows + "".join(f"{n},metric/$\\frac{{$,1\n" for n in (1, 2)))),
    )
    yield (
        "report: record of other types",
        partial(write_report, run("types", run__json='{"step": "many", "seconds": []}')),
    )
    yield "HARMLESS report: record nested without end", partial(write_report, run("deep", run__json="[" * 100_000))
    yield "report: parts of other types", partial(write_report, run("parts", config__yaml="method: x\ndata: 3\n"))
    linked = run("linked")
    (folder / "secret.txt").write_text("a secret")
    (linked / "samples" / "step_000001_raw.png").symlink_to(folder / "secret.txt")
    yield "HARMLESS report: a link called picture", partial(write_report, linked)
    copied = run("copied")
    (copied / "samples" / "step_000001_raw.png").write_text("a secret")
    yield "report: a text called picture", partial(write_report, copied)


FAMILIES = (checkpoints, tensors, arrays, configurations, shards, pictures, networks, run_folders)


def _as_user(read: Callable[..., Any], *arguments: Any) -> Any:
    """Readers below the line of messages: their one kind of error stands for a refusal."""
    from repalign.errors import UserError
    from repalign.reading import Unreadable

    try:
        return read(*arguments)
    except (Unreadable, ValueError) as error:
        raise UserError(str(error)) from error


def _drain(read: Callable[..., Any], path: Path) -> None:
    for _ in read(path, 2, "task.reference"):
        pass


def _made(kind: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return _pictures(kind(*arguments, **options))


def _pictures(source: Any) -> Any:
    return source.load([0])


def _store(folder: Path, described: dict[str, Any]) -> Path:
    """A store whose checksums are right and whose description is not."""
    from datamodules.files import digest_of

    folder.mkdir()
    content: dict[str, Any] = {
        "format": 2, "rows": 1, "shard_rows": 1, "arrays": described, "info": {},
        "files": {f"{name}.00000.npy": {"bytes": 1, "sha256": ""} for name in described}, "sums": {},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digest_of(content)}))
    return folder
