"""From the facts of a training to what is wrong with it.

Every rule is a function of the facts (:class:`callbacks.training_facts.TrainingFacts`), and of those of the recipe's
fingerprint where there is one; without it the law that holds for any recipe is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from tasks.findings import FINE, LOOK, WRONG, Finding

Facts = Mapping[str, float]
Curves = Mapping[str, list[float]]

SAME = 0.02  # relative: a fact against the fingerprint's
LATENT_STD = (0.5, 2.0)  # of normalised latents, where no fingerprint says better
ALIVE = 1e-3  # spread of features as a part of their size
STILL = 1e-5  # of the way of the weights: an average that goes no further in tens of steps does not follow


def latent_scale(facts: Facts, expected: Facts | None) -> Iterator[Finding]:
    """Normalised latents have about zero mean and unit deviation."""
    if "latent/std" not in facts:
        return
    std, mean = facts["latent/std"], facts["latent/mean"]
    wanted, low, high = 1.0, *LATENT_STD
    if expected is not None and "latent/std" in expected:
        wanted = expected["latent/std"]
        low, high = wanted * (1 - SAME), wanted * (1 + SAME)
    found = f"normalised latents have a deviation of {std:.3g} (mean {mean:.2g}), expected {wanted:.3g}"
    if low <= std <= high:
        yield Finding("latent scale", FINE, found)
        return
    yield Finding(
        "latent scale", WRONG, f"{found}: wrong by a factor of {std / wanted:.3g}" if wanted else found,
        "the latent norm was left out, applied twice, or is of another autoencoder: see autoencoder.norm, and "
        "task=precompute, which measures mean and deviation",
    )  # fmt: skip


def encoders(facts: Facts, expected: Facts | None) -> Iterator[Finding]:
    """Features differ between pictures and places."""
    for name in sorted(key.split("/")[1] for key in facts if key.startswith("features/") and key.endswith("/spread")):
        spread, size = facts[f"features/{name}/spread"], facts[f"features/{name}/size"]
        check, found = f"encoder {name}", f"features of size {size:.3g} that vary by {spread:.3g}"
        if not spread > ALIVE * size:
            yield Finding(
                check, WRONG, f"{found}: the encoder is dead, the same for every picture and place",
                f"see encoders.{name}.weights (not loaded?) and its preprocessing; make its store again",
            )  # fmt: skip
            continue
        other = [
            key for key in (f"features/{name}/spread", f"features/{name}/size")
            if expected is not None and key in expected and not _close(facts[key], expected[key])
        ]  # fmt: skip
        if other:
            assert expected is not None
            yield Finding(
                check, WRONG, f"{found}, expected {expected[f'features/{name}/size']:.3g} and "
                f"{expected[f'features/{name}/spread']:.3g}: another encoder or other preprocessing",
                f"see encoders.{name} and data.image_size",
            )  # fmt: skip
        else:
            yield Finding(check, FINE, found)


def time_direction(facts: Facts, expected: Facts | None) -> Iterator[Finding]:
    """At t = 0 is the data: what the network is told to be near the data is more like them."""
    if "near_data" not in facts or "near_noise" not in facts:
        return
    near, far = facts["near_data"], facts["near_noise"]
    found = f"x_t is like x_0 by {near:.2f} where the network is told t < 1/3, by {far:.2f} where t > 2/3"
    if near > far:
        yield Finding("time", FINE, found)
    else:
        yield Finding(
            "time", WRONG, f"{found}: time is swapped", "here t=0 is data and t=1 noise; a network that counts the "
            "other way stands behind a clock: see clock and path",
        )  # fmt: skip


def average(facts: Facts, expected: Facts | None) -> Iterator[Finding]:
    """The average follows the weights, and lags behind them."""
    if "ema/moved" not in facts:
        return
    moved, weights = facts["ema/moved"], facts["weights/moved"]
    found = f"the average went {moved:.2g} of the way of the weights"
    if weights == 0:
        yield Finding(
            "weights", WRONG, "no weight moved", "see optimizer.lr, and whether the backbone is frozen (tuning)"
        )
    elif moved < STILL:
        yield Finding("average", WRONG, f"{found}: it is frozen", "see ema.decay (1 minus a rounding error?)")
    elif expected is not None and not 0.8 < moved / max(expected.get("ema/moved", moved), 1e-30) < 1.25:
        yield Finding(
            "average", WRONG, f"{found}, expected {expected['ema/moved']:.2g}", "see ema.decay and ema.warmup"
        )
    elif moved > 0.999:
        yield Finding("average", LOOK, f"{found}: it averages nothing", "see ema.decay")
    else:
        yield Finding("average", FINE, found)


def conditions(facts: Facts, expected: Facts | None) -> Iterator[Finding]:
    """A share of the conditions is dropped for guidance, not all and not another share than the recipe's."""
    if "dropped" not in facts:
        return
    dropped, found = facts["dropped"], f"{100 * facts['dropped']:.0f} % of the conditions are dropped"
    if dropped > 0.99:
        yield Finding("conditions", WRONG, found, "the network sees none: see conditioner.drop")
    elif expected is not None and abs(dropped - expected.get("dropped", dropped)) > 0.005:
        yield Finding(
            "conditions", WRONG, f"{found}, expected {100 * expected['dropped']:.0f} %", "see conditioner.drop"
        )
    else:
        yield Finding("conditions", FINE, found)


RULES = (latent_scale, encoders, time_direction, average, conditions)


def numbers(curves: Curves) -> Iterator[Finding]:
    """Losses are finite and gradients are there."""
    losses, norms = curves.get("train/loss", []), curves.get("train/grad_norm", [])
    broken = [step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    if broken:
        yield Finding(
            "loss",
            WRONG,
            f"not finite from step {broken[0]} on",
            "see precision, optimizer.lr and the data of that step",
        )
    elif norms and not any(norms):
        yield Finding(
            "gradients", WRONG, "exactly 0 in every step", "the loss does not reach what is trained: see tuning"
        )
    elif losses:
        yield Finding("loss", FINE, f"finite in {len(losses)} steps, {losses[0]:.4g} -> {losses[-1]:.4g}")


def against(own: Curves, stored: Curves, tolerance: float) -> Iterator[Finding]:
    """The curves of a recipe are those of its fingerprint, within ``tolerance`` (relative)."""
    missing = sorted(stored.keys() - own.keys())
    if missing:
        yield Finding(
            "fingerprint",
            WRONG,
            f"this training has no {', '.join(missing)}",
            "the recipe was changed: see what is typed",
        )
    worst, first = 0.0, ("", 0, 0.0)
    for name in sorted(stored.keys() & own.keys()):
        for step, (a, b) in enumerate(zip(own[name], stored[name], strict=False), 1):
            far = abs(a - b) / max(abs(b), 1e-3)
            worst = max(worst, far) if math.isfinite(far) else math.inf
            if not far <= tolerance and (not first[0] or step < first[1]):
                first = (name, step, far)
    if not first[0]:
        yield Finding("fingerprint", FINE, f"all numbers within {worst:.1e} of the recipe's")
        return
    name, step, far = first
    same = f"equal for {step - 1} steps, then " if step > 1 else ""
    yield Finding(
        "fingerprint", WRONG, f"{same}{name} is off by {100 * far:.2g} % at step {step}",
        "from step 1: other data, weights or options; later: other arithmetic, or a learning rate, an average or an "
        "optimizer that is not the recipe's",
    )  # fmt: skip


def diagnose(facts: Facts, curves: Curves, stored: Mapping[str, object] | None, tolerance: float) -> list[Finding]:
    """Everything that the facts say, the named causes first."""
    # Facts of another number of steps are others: the average lags less, other samples are dropped.
    expected = stored["facts"] if stored is not None and len(curves.get("train/loss", [])) == stored["steps"] else None
    found = [*numbers(curves)]
    for rule in RULES:
        found += rule(facts, expected)  # type: ignore[arg-type]
    if stored is not None:
        found += rates(curves, stored["curves"])  # type: ignore[arg-type]
        found += against(curves, stored["curves"], tolerance)  # type: ignore[arg-type]
    return found


def rates(own: Curves, stored: Curves) -> Iterator[Finding]:
    """The learning rate is the recipe's."""
    pairs = list(zip(own.get("train/lr", []), stored.get("train/lr", []), strict=False))
    other = [(step, a, b) for step, (a, b) in enumerate(pairs, 1) if not _close(a, b)]
    if other:
        step, a, b = other[0]
        yield Finding(
            "learning rate", WRONG, f"{a:.3g} at step {step}, expected {b:.3g}", "see optimizer.lr and its warm-up"
        )
    elif pairs:
        yield Finding("learning rate", FINE, f"{pairs[0][0]:.3g} -> {pairs[-1][0]:.3g}")


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= SAME * abs(b) + 1e-12
