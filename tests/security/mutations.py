"""Seeded mistakes in configurations. Each is wrong by construction: nothing here asks the checks whether it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tasks.instantiate import objects
from tasks.signatures import arguments_of

CONF = Path(__file__).parents[2] / "conf"
RECIPES = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
GROUPS = (
    "backbone",
    "encoder",
    "data",
    "optimizer",
    "path",
    "objective",
    "sampler",
    "guidance",
    "trainer",
    "callbacks",
)
EVIL = (
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "pickle.loads",
    "torch.load",
    "shutil.rmtree",
)


@dataclass(frozen=True)
class Mutant:
    """A command line that must be refused.

    Attributes:
        kind: of the mistake.
        words: the command line.
        parts: what the line must name.
        recipe: text of a recipe that the command line reads from a folder of its own.
    """

    kind: str
    words: tuple[str, ...]
    parts: tuple[str, ...]
    recipe: str = ""


@dataclass
class Base:
    """A recipe that is right, and chance."""

    name: str
    cfg: DictConfig
    chance: random.Random

    def __post_init__(self) -> None:
        self.plain: Any = OmegaConf.to_container(self.cfg, resolve=False)
        self.objects = [(key, node) for key, node in objects(self.plain) if arguments_of(node["_target_"], key)]

    def literal(self, *types: type) -> tuple[str, Any]:
        """A key of an object whose written value has one of the types."""
        found = [
            (f"{key}.{name}", value)
            for key, node in self.objects
            for name, value in node.items()
            if type(value) in types and not str(name).startswith("_") and "[" not in key and "${" not in str(value)
        ]
        return self.chance.choice(found)

    def text(self) -> str:
        return (CONF / "experiment" / f"{self.name}.yaml").read_text(encoding="utf-8")

    def typo(self, word: str, taken: Any) -> str:
        """The word with one letter doubled, dropped or swapped, which is none of the taken ones."""
        while True:
            at = self.chance.randrange(1, len(word))
            new = self.chance.choice(
                [word[:at] + word[at - 1] + word[at:], word[: at - 1] + word[at:], word[:at] + "q" + word[at:]]
            )
            if new and new not in taken and new[0].isalpha() and new != word:
                return new

    def command(self, *words: str) -> tuple[str, ...]:
        return (f"experiment={self.name}", *words)


def typo_in_key(base: Base) -> Mutant:
    key, value = base.literal(int, float, bool)
    owner, _, name = key.rpartition(".")
    wrong = f"{owner}.{base.typo(name, OmegaConf.select(base.cfg, owner))}"
    return Mutant("typo in a key", base.command(f"{wrong}={str(value).lower()}"), (f"'{wrong}'", "Did you mean"))


def typo_at_the_top(base: Base) -> Mutant:
    key = base.chance.choice(["steps", "seed", "compile", "resume", "run_name", "init_from"])
    wrong = base.typo(key, base.plain)
    return Mutant("typo at the top", base.command(f"{wrong}=1"), (f"'{wrong}'", "Did you mean"))


def unknown_option(base: Base) -> Mutant:
    key, node = base.chance.choice([(k, n) for k, n in base.objects if "[" not in k])
    names = arguments_of(node["_target_"], key) or []
    wrong = base.typo(base.chance.choice([n for n in names if len(n) > 3] or ["option"]), [*names, *node])
    return Mutant("unknown option", base.command(f"+{key}.{wrong}=1"), (f"{key}.{wrong}", "no such option"))


def number_as_text(base: Base) -> Mutant:
    key, _ = base.literal(int, float)
    return Mutant("wrong type", base.command(f"{key}=many"), (key, "expected", "'many'"))


def switch_as_number(base: Base) -> Mutant:
    key, _ = base.literal(bool)
    return Mutant("wrong type", base.command(f"{key}=3"), (key, "true or false", "3"))


def object_as_text(base: Base) -> Mutant:
    key = base.chance.choice(["optimizer", "backbone", "sampler", "path", "method", "trainer", "clock", "objective"])
    value = base.chance.choice(["[1,2]", "{depth:3}"])
    if value == "{depth:3}":  # merges: an option that a path of this house never has
        key = base.chance.choice(["path", "parametrization"])
        return Mutant("wrong type", base.command(f"+{key}.depth_={value}"), (f"{key}.depth_", "no such option"))
    return Mutant("wrong type", base.command(f"{key}={value}"), (key,))


def nothing(base: Base) -> Mutant:
    key = base.chance.choice(["steps", "seed", "data.batch_size", "data.image_size", "compile", "ema.decay"])
    return Mutant("no value", base.command(f"{key}=null"), (key, "expected", "None"))


def unknown_choice(base: Base) -> Mutant:
    group = base.chance.choice(GROUPS)
    valid = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    wrong = base.typo(base.chance.choice(valid), valid)
    return Mutant("unknown choice", base.command(f"{group}={wrong}"), (f"{group}: unknown", f"'{wrong}'", "Valid:"))


def unknown_group(base: Base) -> Mutant:
    group = base.chance.choice(GROUPS)
    folders = [path.name for path in CONF.iterdir()]
    wrong = base.typo(group, [*folders, *base.plain])
    return Mutant("unknown group", base.command(f"{wrong}=x"), (f"'{wrong}'", "Did you mean"))


def missing_group(base: Base) -> Mutant:
    group = base.chance.choice(["backbone", "path", "objective", "sampler", "method", "optimizer", "trainer", "clock"])
    word = base.chance.choice([f"~{group}", f"{group}=null"])
    return Mutant("missing group", base.command(word), (group,))


def bad_interpolation(base: Base) -> Mutant:
    key, _ = base.literal(int, float)
    value = base.chance.choice(["${nowhere.to_be.found}", "${no_such_resolver:1}", "${" + key + "}", "${oc.env:}"])
    return Mutant("bad interpolation", base.command(f"{key}={value}"), (key if value[2] != "{" else "",))


def torn_interpolation(base: Base) -> Mutant:
    key, _ = base.literal(int, float)
    return Mutant("bad interpolation", base.command(f"{key}=${{seed"), ("",))


def foreign_variable(base: Base) -> Mutant:
    name = base.chance.choice(["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "PATH"])
    word = base.chance.choice([f"name=${{oc.env:{name}}}", f"run_name=${{oc.env:{name},x}}"])
    return Mutant("foreign variable", base.command(word), (f"'{name}'", "environment variables"))


def out_of_range(base: Base) -> Mutant:
    key, value = base.chance.choice(
        [
            ("steps", "0"), ("steps", "-4"), ("seed", "-1"), ("data.batch_size", "0"), ("data.num_workers", "-1"),
            ("data.image_size", "0"), ("ema.decay", "1.5"), ("ema.decay", "-0.1"), ("ema.decay", "nan"),
            ("callbacks.journal.every", "0"), ("callbacks.checkpoint.every", "-5"), ("callbacks.guard.patience", "0"),
            ("trainer.devices", "0"), ("trainer.gradient_clip_val", "-1"), ("data.accumulate", "0"),
            ("callbacks.checkpoint.every", "0"), ("protocol.num_samples", "0"),
        ]
    )  # fmt: skip
    return Mutant("out of range", base.command(f"{key}={value}"), (key, "expected", value))


def wrong_path(base: Base) -> Mutant:
    keys = ["resume", "autoencoder.weights"] if "weights" in base.cfg.autoencoder else ["resume"]
    keys += ["data.root"] if "root" in base.cfg.data else []
    keys += ["init_from"]
    key = base.chance.choice(keys)
    path = f"/no/such/{base.chance.randrange(1000)}.safetensors"
    return Mutant("wrong path", base.command(f"{key}={path}"), (key, path))


def foreign_target(base: Base) -> Mutant:
    key, _ = base.chance.choice([(k, n) for k, n in base.objects if "[" not in k])
    target = base.chance.choice(EVIL)
    return Mutant("foreign target", base.command(f"{key}._target_={target}"), (f"{key}._target_", target))


def misspelt_target(base: Base) -> Mutant:
    key, node = base.chance.choice([(k, n) for k, n in base.objects if "[" not in k])
    module, _, name = node["_target_"].rpartition(".")
    wrong = f"{module}.{name}q{base.chance.randrange(10)}"
    return Mutant("misspelt target", base.command(f"{key}._target_={wrong}"), (f"{key}._target_", wrong.split(".")[-1]))


def incompatible_pair(base: Base) -> Mutant:
    """Two parts that cannot stand together, chosen among the pairs that this recipe can be given."""
    cfg, pairs = base.cfg, []
    names = arguments_of(cfg.backbone._target_, "backbone._target_") or []
    if "token_io" not in names:
        pairs.append((["token_io=channels"], ("token_io", "backbone")))
    if "context_dim" not in names:
        pairs.append((["conditioner=text", "text_encoder=tiny"], ("conditioner", "backbone")))
    elif "num_classes" not in names:
        pairs.append((["conditioner=label"], ("conditioner", "backbone")))
    if "repa" in cfg.aligners and base.plain["aligners"]["repa"]["tap"] == "${align.tap}":
        pairs.append((["align.tap=block.77"], ("aligners.repa.tap", "'block.77'")))
    dim, heads = base.plain["backbone"].get("dim"), base.plain["backbone"].get("heads")
    if type(dim) is int and type(heads) is int and dim % 11:
        pairs.append((["backbone.heads=11"], ("backbone.heads", "11")))
    if type(base.plain["autoencoder"].get("downsampling")) is int and "image_size" in base.plain["data"]:
        pairs.append((["data.image_size=65"], ("data.image_size", "65")))
    if not pairs:
        pairs.append((["sweep=encoder"], ("sweep", "-m")))
    words, parts = base.chance.choice(pairs)
    return Mutant("incompatible pair", base.command(*words), parts)


def malformed(base: Base) -> Mutant:
    word, part = base.chance.choice(
        [("steps", "'steps'"), ("steps=1,2", "several values"), ("optimizer.lr={1", "lr"), ("seed=[1", "seed"),
         ("launcher=joblib", "launcher"), ("--steps=3", "--steps"), ("+steps=3", "steps"), ("~nothing", "nothing")]
    )  # fmt: skip
    return Mutant("malformed word", base.command(word), (part,))


def unknown_name(base: Base) -> Mutant:
    key, value = base.chance.choice(
        [("trainer.precision", "fp17"), ("trainer.accelerator", "gpuu"), ("trainer.strategy", "dpp"),
         ("callbacks.guard.policy", "stopp"), ("data.verify", "hush"), ("data.latent_dtype", "float13"),
         ("task.name", "trian"), ("callbacks.guard.policy", "")]
    )  # fmt: skip
    if key.split(".")[-1] not in OmegaConf.select(base.cfg, key.split(".")[0]) and key.startswith("data."):
        key, value = "callbacks.guard.policy", "stopp"
    return Mutant("unknown name", base.command(f"{key}={value or 'roll'}"), (key, value or "roll", "Valid:"))


def leaving_the_folder(base: Base) -> Mutant:
    value = base.chance.choice(["../../out", "/etc/out", "a/../../b"])
    return Mutant("leaves the folder", base.command(f"run_name={value}"), ("run_name", value))


def _file(base: Base, kind: str, text: str, *parts: str) -> Mutant:
    return Mutant(kind, ("experiment=mutant",), parts, text)


def recipe_typo(base: Base) -> Mutant:
    wrong = base.typo("optimizer", base.plain)
    return _file(base, "recipe: typo at the top", f"{base.text()}\n{wrong}: {{lr: 1}}\n", f"'{wrong}'", "Did you mean")


def recipe_option(base: Base) -> Mutant:
    key, part = base.chance.choice([("clock", "sstepps"), ("path", "sstepps"), ("conditioner", "dropp")])
    return _file(base, "recipe: option", _merged(base, {key: {part: 1}}), f"{key}.{part}", "no such option")


def recipe_type(base: Base) -> Mutant:
    value, part = base.chance.choice(
        [({"steps": "many"}, "steps"), ({"data": {"batch_size": "big"}}, "data.batch_size"),
         ({"compile": "perhaps"}, "compile"), ({"seed": 1.5}, "seed"), ({"callbacks": {"journal": {"every": "often"}}},
         "callbacks.journal.every"), ({"ema": {"decay": [1]}}, "ema.decay"), ({"ema": 3}, "ema")]
    )  # fmt: skip
    return _file(base, "recipe: type", _merged(base, value), part)


def recipe_choice(base: Base) -> Mutant:
    group = base.chance.choice(["backbone", "sampler", "objective", "encoder"])
    return _file(
        base, "recipe: choice", _overriding(base, group, "no_such"), f"{group}: unknown", "'no_such'", "Valid:"
    )


def recipe_group(base: Base) -> Mutant:
    return _file(base, "recipe: group", _overriding(base, "bakcbone", "sit_b_2"), "bakcbone")


def _overriding(base: Base, group: str, choice: str) -> str:
    """The recipe's text with one more choice of its defaults, or another one."""
    held: Any = OmegaConf.to_container(OmegaConf.create(base.text()), resolve=False)
    key = f"override /{group}"
    kept = [item for item in held.get("defaults", []) if not (isinstance(item, dict) and key in item)]
    at = len(kept) - 1 if kept and kept[-1] == "_self_" else len(kept)
    held["defaults"] = [*kept[:at], {key: choice}, *kept[at:]]
    return "# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(held))


def recipe_syntax(base: Base) -> Mutant:
    tail = base.chance.choice(["steps: [1,", "\tsteps: 3", "steps: 3\nsteps: 4", "seed: {a: b", "x: : y", "- a\nb: c"])
    return _file(base, "recipe: syntax", f"{base.text()}\n{tail}\n", "line")


def recipe_tag(base: Base) -> Mutant:
    tag = base.chance.choice(
        ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/module:os"]
    )
    return _file(base, "recipe: YAML tag", f"{base.text()}\nseed: {tag}\n", "python/")


def recipe_hydra(base: Base) -> Mutant:
    value, part = base.chance.choice(
        [({"callbacks": {"a": {"_target_": "os.system"}}}, "hydra.callbacks"),
         ({"job": {"env_set": {"LD_PRELOAD": "x.so"}}}, "hydra.job.env_set"),
         ({"job_logging": {"handlers": {"a": {"()": "os.system"}}}}, "hydra.job_logging"),
         ({"launcher": {"_target_": "os.system"}}, "hydra.launcher"),
         ({"sweeper": {"_target_": "subprocess.run"}}, "hydra.sweeper")]
    )  # fmt: skip
    return _file(base, "recipe: hydra part", _merged(base, {"hydra": value}), part)


def _merged(base: Base, value: dict[str, Any]) -> str:
    """The recipe's text with further values."""
    held = OmegaConf.merge(OmegaConf.create(base.text()), value)
    return "# @package _global_\n" + OmegaConf.to_yaml(held)


KINDS: tuple[Callable[[Base], Mutant], ...] = (
    typo_in_key, typo_at_the_top, unknown_option, number_as_text, switch_as_number, object_as_text, nothing,
    unknown_choice, unknown_group, missing_group, bad_interpolation, torn_interpolation, foreign_variable, out_of_range,
    wrong_path, foreign_target, misspelt_target, incompatible_pair, incompatible_pair, malformed, unknown_name,
    leaving_the_folder, recipe_typo, recipe_option, recipe_type, recipe_choice, recipe_group, recipe_syntax, recipe_tag,
    recipe_hydra,
)  # fmt: skip


def mutants(seed: int, count: int, base_of: Callable[[str], DictConfig], each: int = 3) -> Iterator[Mutant]:
    """``count`` mutants, ``each`` of one recipe after the other, kind after kind."""
    for number in range(count):
        recipe = RECIPES[number // each * max(1, len(RECIPES) * each // count) % len(RECIPES)]
        chance = random.Random(f"{seed} {number}")
        yield KINDS[(number * 7) % len(KINDS)](Base(recipe, base_of(recipe), chance))
