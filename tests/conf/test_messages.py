"""The obvious mistakes: one line each, quickly, without a traceback."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from repalign.errors import UserError
from tasks.instantiate import check_targets
from tasks.launch import compose

ROOT = Path(__file__).parents[2]
# Five seconds of the reference machine, on which `import torch` takes two; CPU time, because the tests share its cores.
SECONDS = 5.0
IMPORT_SECONDS = 2.0


def cpu_seconds(since: resource.struct_rusage) -> float:
    """CPU time that child processes have used since."""
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return now.ru_utime + now.ru_stime - since.ru_utime - since.ru_stime


def limit_here() -> float:
    """The limit in seconds of this machine as busy as it is now, by what importing torch costs on it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env={"OMP_NUM_THREADS": "1"})
    return SECONDS * max(1.0, cpu_seconds(before) / IMPORT_SECONDS)


def complain(*words: str, **environment: str) -> str:
    """Standard error of a command that must fail with one line; in time at one of two attempts."""
    line, seconds = attempt(*words, **environment)
    if seconds >= SECONDS:  # a slow moment of the machine is no slow message
        seconds = min(seconds, attempt(*words, **environment)[1])
    assert seconds < SECONDS or seconds < limit_here(), f"{seconds:.1f} s: {line}"
    return line


def attempt(*words: str, **environment: str) -> tuple[str, float]:
    """The line, and the CPU time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "run.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1", **environment},
    )
    seconds = cpu_seconds(before)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    return line, seconds


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["stepz=3"], ["unknown key 'stepz'", "Did you mean 'steps'?"]),
        (["optimizer.lrr=1"], ["unknown key 'optimizer.lrr'", "Did you mean 'optimizer.lr'?"]),
        (["experiment=repa_sit_xll"], ["experiment: unknown", "'repa_sit_xll'", "Did you mean 'repa_sit_xl'?"]),
        (["backbone=sit_xl"], ["backbone: unknown", "'sit_xl'", "Did you mean 'sit_xl_"]),
        (["backbonne=sit_xl_2"], ["unknown key 'backbonne'", "Did you mean 'backbone'?"]),
        (["aligner=[repa,repaa]"], ["aligner: unknown", "'repaa'", "Did you mean 'repa'?"]),
        (["steps=many"], ["steps: expected an integer", "found 'many'"]),
        (["optimizer.lr=fast"], ["optimizer.lr: expected a number", "found 'fast'"]),
        (["ema.warmup=1"], ["ema.warmup: expected true or false", "found 1"]),
        (["compile=true"], ["compile: unknown", "'true'", "blocks"]),
        (["--multirun", "experiment=sit_s,sit_q"], ["experiment: unknown", "'sit_q'"]),
        (["trainer=ddp", "trainer.devices=8", "trainer.num_nodes=two"], ["trainer.num_nodes: expected an integer"]),
        (["steps"], ["'steps'", "key=value"]),
        (["+steps=3"], ["steps: exists already", "'+'"]),
        (["aligner=none,repa"], ["several values", "-m"]),
        (["experiment=demo", "callbacks=default"], ["callbacks.sample_grid", "~callbacks.sample_grid"]),
        (["+optimizer.momentun=0.9"], ["optimizer.momentun", "no such option"]),
        (["optimizer._target_=os.system"], ["optimizer._target_", "may not be built"]),
        (["experiment=demo", "align.tap=block.7"], ["aligners.repa.tap", "'block.7'", "Did you mean 'block."]),
        (["latent_norm=file"], ["latent_norm", "latent_norm@autoencoder.norm=..."]),
        (["sweep=encoder"], ["sweep: 'encoder'", "add -m"]),
        (["launcher=joblib"], ["launcher: 'joblib'", "add -m"]),
        (["-m", "sweep=encodr"], ["sweep: unknown", "Did you mean 'encoder'?"]),
        (["-m", "sweep=alignment_depth", "align.tap=block.1,block.9"], ["aligners.repa.tap", "'block.9'"]),
        (["-m", "sweep=aligner_family", "~callbacks.evaluate"], ["~callbacks.evaluate", "recipes", "swept"]),
        (["experiment=sit_s"], ["data.root", "no value", "REPALIGN_IMAGENET"]),
        (["experiment=sit_s", "data.root=/no/such"], ["data.root", "/no/such"]),
        (["experiment=sd3_embedded", "task=prompts"], ["prompt_set: none chosen", "prompt_set=geneval"]),
        (["experiment=sd3_embedded", "task=prompts", "prompt_set=geneval"], ["prompt_set.file", "REPALIGN_GENEVAL"]),
        (
            ["experiment=sd3_embedded", "task=prompts", "prompt_set=geneval", "prompt_set.file=run.py"],
            ["prompt_set.scorer.detector.folder: no weights", "hf download", "REPALIGN_DETECTOR", "task.score=false"],
        ),
        (
            [
                "experiment=sd3_embedded",
                "task=prompts",
                "prompt_set=t2i_compbench",
                "prompt_set.folder=docs",
                "prompt_set.scorer.vqa.folder=tests",
            ],
            ["prompt_set.scorer.vqa.folder: no config.json in 'tests'", "a BLIP for questions", "task.score=false"],
        ),
        (
            ["experiment=sd3_embedded", "task=evaluate", "metric=clip_score"],
            ["metric.network.folder: no weights", "a CLIP", "REPALIGN_CLIP_SCORE"],
        ),
    ],
)
def test_one_line_in_time(words, parts):
    line = complain(*words)
    for part in parts:
        assert part in line, line


def test_targets_inside_lists_and_partials_are_checked():
    cfg = compose(["experiment=repa_sit_s"])
    cfg.aligners.repa.similarities[0][1]["_target_"] = "subprocess.run"
    with pytest.raises(UserError, match=r"aligners.repa.similarities\[0\]\[1\]._target_: 'subprocess.run'"):
        check_targets(cfg)
