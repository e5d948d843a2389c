"""task=plan: memory, time and cost of a recipe on many GPUs, on paper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repalign.errors import UserError, unknown_choice
from repalign.performance.peaks import GPUS
from repalign.performance.plan import Footprint, predict
from repalign.performance.trace import Allocations, pretended, recompute_blocks, weightless
from repalign.random import SampleRandom
from repalign.training.phase import only
from tasks.build import assemble
from tasks.instantiate import build
from tasks.plan_pages import write

LIVE = ("encoder", "autoencoder")
MANY = (512, 1024)  # images of a traced step: nothing is computed, so they cost as much as one
# Width, tokens and pooled width of text encoders whose folders need not be here, by what their nodes read.
TEXT = {
    ("REPALIGN_SD3_TEXT", "text_encoder"): (768, 77, 768),
    ("REPALIGN_SD3_TEXT", "text_encoder_2"): (1280, 77, 1280),
    ("REPALIGN_SD3_TEXT", "text_encoder_3"): (4096, 77, None),
    ("REPALIGN_T5", "text_encoder"): (4096, 120, None),
    ("REPALIGN_CLIP_L_TEXT", None): (768, 77, None),
}


class Serials(list[int]):
    """Serial numbers that lie on the host, as a batch holds them."""

    def tolist(self) -> list[int]:
        """Themselves."""
        return list(self)


def run(cfg: DictConfig) -> None:
    """Trace a step of the composition, predict it on ``task.gpus``, write plan.json and plan.md.

    Raises:
        UserError: one line for an unknown GPU, a share out of range, or a network that no recipe has.
    """
    task = cfg.task
    if task.gpu not in GPUS:
        raise unknown_choice("task.gpu", str(task.gpu), GPUS, "GPU")
    if not 0 < task.mfu <= 1:
        raise UserError(f"task.mfu: expected a share in (0, 1], found {task.mfu}")
    for name in task.live:
        if name not in LIVE:
            raise unknown_choice("task.live", str(name), LIVE, "network")
    print_, stores = footprint(cfg, str(task.precision), list(task.live))
    arithmetic = "bfloat16" if str(task.precision)[:2] in ("bf", "16") else "tf32"
    rows = []
    for gpus in task.gpus:
        if cfg.data.batch_size < gpus:
            print(f"{gpus} GPUs: data.batch_size={cfg.data.batch_size} leaves some without a picture", flush=True)
            continue
        for sharded, recompute in ((False, False), (False, True), (True, False)):
            if recompute and print_.recomputed is None or sharded and gpus == 1:
                continue
            row = predict(
                print_, GPUS[task.gpu], gpus, cfg.data.batch_size, mfu=task.mfu, arithmetic=arithmetic,
                network=task.network, sharded=sharded, recompute=recompute, accumulate=cfg.data.accumulate,
            )  # fmt: skip
            rows.append(("FSDP" if sharded else "DDP", "recomputed" if recompute else "kept", row))
    write(cfg, print_, stores, rows)


def footprint(cfg: DictConfig, precision: str, live: list[str]) -> tuple[Footprint, dict[str, int]]:
    """What a step is, and bytes that a picture takes in the stores by their name.

    The step runs on the meta device, in seconds for any size: with one image, and with so many that activations are
    most of what it allocates; from there on that grows with the batch along a line.
    """
    module = on_meta(cfg)
    few, many = MANY
    least, one, two = (allocated(module, precision, live, batch) for batch in (1, few, many))
    per_image = (two - one) / (many - few)
    flops = {name: count / few for name, count in operations(module, precision, live, few).items()}
    trained = sum(p.numel() for p in _trained(module))
    frozen = {id(p): p.numel() * p.element_size() for p in module.frozen.parameters()}
    averaged = sum(p.numel() for p in module.ema.module.parameters())
    kept: float | None = None
    blocks = getattr(module.trained["backbone"], "units", ())
    if blocks:
        recompute_blocks(blocks)
        less = [allocated(module, precision, live, batch) for batch in MANY]
        kept = (less[1] - less[0]) / (many - few)
    measured = Footprint(
        parameters=trained,
        averaged=averaged,
        frozen=sum(frozen.values()) if live else 0,
        trained_flops=flops["all"] - flops["frozen"],
        frozen_flops=flops["frozen"],
        per_image=per_image,
        fixed=one - few * per_image,
        least=least,
        recomputed=kept,
        forward_share=flops["forward"] / max(flops["all"] - flops["frozen"], 1),
    )
    return measured, stores_of(cfg, module)


def on_meta(cfg: DictConfig) -> Any:
    """The module of a composition, with shapes and without weights, pictures or text networks."""
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    with open_dict(cfg):
        for node in (cfg.autoencoder, *cfg.encoders.values()):
            if "weights" in node:
                node.weights = "random"
        for name in ("attention", "activations", "compile"):  # all kinds cost what is traced here
            cfg[name] = {"_target_": "repalign.training.policies.as_it_is", "_partial_": True}
        for name in ("base", "vgg16", "lpips"):
            cfg.paths[name] = "random"
        if cfg.streams:
            cfg.pca = {"_target_": "repalign.encoders.pca.random_pca", "_partial_": True}
        for name, node in cfg.text_encoders.items():
            cfg.text_encoders[name] = stand_in(node)
    data = SimpleNamespace(
        image_size=cfg.data.image_size,
        num_classes=classes_of(cfg),
        cache_latents=False,
        keep_images=True,
        captions=None,
    )
    with weightless():
        module = assemble(cfg, data).module
    module.planned_size = cfg.data.image_size
    return module.to("meta")


def classes_of(cfg: DictConfig) -> int:
    """As configured; of pictures that come with the project, as they are; of a folder that nobody opens, ImageNet's."""
    if cfg.data.get("num_classes"):
        return cfg.data.num_classes
    return 1000 if "root" in cfg.data else build(cfg.data, "data").num_classes


def stand_in(node: DictConfig) -> DictConfig:
    """A text encoder of the same widths, for one whose folder need not be here."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    for (variable, network), (width, length, pooled) in TEXT.items():
        if variable in str(raw.get("folder")) and (network is None or raw.get("network") == network):
            target = "repalign.encoders.text_sd3.RandomTextEncoder"
            length = raw.get("length") or length
            return OmegaConf.create({"_target_": target, "width": width, "length": length, "pooled": pooled})
    return node


def allocated(module: Any, precision: str, live: list[str], batch: int) -> int:
    """Peak of the bytes that a step allocates on top of the weights."""
    given = made_up(module, live, batch)
    with pretended(precision), Allocations() as allocations:
        take_step(module, given)
    return allocations.peak


def operations(module: Any, precision: str, live: list[str], batch: int) -> dict[str, float]:
    """Operations of a step: all, those of frozen networks, those before the first backward pass.

    Apart from :func:`allocated`: the counter holds what the modules give.
    """
    given = made_up(module, live, batch)
    counter = FlopCounterMode(display=False)
    frozen, forward = [0.0], [0.0]
    with ExitStack() as stack:
        stack.enter_context(pretended(precision))
        stack.enter_context(counter)
        _count_frozen(module, counter, frozen, stack)
        take_step(module, given, lambda: forward.append(counter.get_total_flops() - frozen[0]))
    return {"all": counter.get_total_flops(), "frozen": frozen[0], "forward": forward[1]}


def take_step(module: Any, given: dict[str, Any], before_backward: Callable[[], None] = lambda: None) -> None:
    """Forward and backward of the module's own step; gradients are let go afterwards."""
    if module.automatic_optimization:
        module.note = lambda *_: None
        loss = module.training_step(given, 0)
        before_backward()
        loss.backward()
    else:
        shared = module.begin(given, SampleRandom(0, given["serial"], given["label"].device))
        before_backward()
        for name, phase in module.phases.items():
            with only(phase, module.parts):
                module.losses(name, shared).total.backward()
    for parameter in module.parameters():
        parameter.grad = None


def _count_frozen(module: Any, counter: FlopCounterMode, total: list[float], stack: ExitStack) -> None:
    """Add the operations of encoders, and of an autoencoder that is not trained, as they are called."""

    def around(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = counter.get_total_flops()
            result = whole(*args, **kwargs)
            total[0] += counter.get_total_flops() - before
            return result

        object.__setattr__(owner, name, call)
        stack.callback(object.__delattr__, owner, name)

    for encoder in module.encoders.values():
        if isinstance(encoder, nn.Module):
            around(encoder, "forward")
    if not module.trains_autoencoder:
        around(module.autoencoder, "encode")


def made_up(module: Any, live: list[str], batch: int) -> dict[str, Any]:
    """A batch on the meta device: stored latents and features, or pictures where their networks run in the step."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device="meta")

    side = module.planned_size
    given: dict[str, Any] = {"serial": Serials(range(batch)), "label": empty(dtype=torch.int64)}
    pictures = module.trains_autoencoder or bool(live) or "image" in module.conditioner.reads
    if pictures:
        given["image"] = empty(3, side, side, dtype=torch.uint8)
    if "autoencoder" not in live and not module.trains_autoencoder:
        shape = module.latent_shape
        latent = shape if isinstance(shape, tuple) else shape["latent"]
        given |= {"moments_mean": empty(*latent), "moments_std": empty(*latent)}
    if "encoder" not in live:
        for name, encoder in module.encoders.items():
            spec = encoder.spec
            tokens = spec.prefix + (spec.grid[0] * spec.grid[1] if spec.grid else 1)
            given[f"features/{name}"] = empty(tokens, spec.dim, dtype=torch.float16)
    for name, encoder in module.conditioner.text_encoders.items():
        given[f"text/{name}"] = empty(encoder.length, encoder.spec.dim, dtype=torch.float16)
        given[f"text_mask/{name}"] = empty(encoder.length, dtype=torch.bool)
        if encoder.pooled_dim:
            given[f"text_pooled/{name}"] = empty(encoder.pooled_dim, dtype=torch.float16)
    return given


def stores_of(cfg: DictConfig, module: Any) -> dict[str, int]:
    """Bytes of a picture in each store: mean and deviation of latents, features and text states."""
    size = {"float16": 2, "float32": 4}
    given = made_up(module, [], 1)
    bytes_of: dict[str, int] = {}
    for name, value in given.items():
        kind, _, which = name.partition("/")
        if kind in ("moments_mean", "moments_std"):
            bytes_of["latents"] = bytes_of.get("latents", 0) + value.numel() * size[cfg.data.latent_dtype]
        elif kind in ("features", "text", "text_mask", "text_pooled"):
            store = f"{'text' if kind.startswith('text') else kind}_{which}"
            each = 1 if kind == "text_mask" else size[cfg.data.feature_dtype]
            bytes_of[store] = bytes_of.get(store, 0) + value.numel() * each
    return bytes_of


def _trained(module: Any) -> list[nn.Parameter]:
    if module.automatic_optimization:
        return [p for p in module.learned() if p.requires_grad]
    named = {name for phase in module.phases.values() for name in phase.trains}
    return [p for name in named for p in module.parts[name].parameters() if p.requires_grad]
