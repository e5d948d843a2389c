"""task=play: its pictures are those of task=sample, on the page too, and the page asks nobody else."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.checkpoint import checkpoints_in
from repalign.errors import UserError
from tasks import play, sample
from tasks.launch import compose
from tasks.player import OWN, Player, Settings, quoted
from tests.chromium import drive, needs_chromium
from tests.smoke.test_recipes_train import train

ROOT = Path(__file__).parents[2]


def words_for(folder: Path, experiment: str) -> list[str]:
    return [f"experiment={experiment}", "debug=tiny", f"paths.runs={folder}", "run_name=run"]


def player_for(folder: Path, experiment: str, *more: str, frames: int = 8) -> Player:
    file = checkpoints_in(train(folder, f"experiment={experiment}"))[-1]
    # Two steps teach a network nothing: weights that are not near zero make it say something.
    content = torch.load(file, weights_only=True)
    noise = torch.Generator().manual_seed(0)
    for name, weight in content["state_dict"].items():
        if "backbone" in name and weight.is_floating_point():
            weight += 0.2 * torch.randn(weight.shape, generator=noise)
    other = folder / "other.ckpt"  # beside the sealed one
    torch.save(content, other)
    words = [*words_for(folder, experiment), *more, f"task.checkpoint={other}"]
    cfg = compose(["task=play", *words])
    return Player(["task=play", "task.port=7999", *words], *sample.restored(cfg), frames)


def sampled(command: str, folder: Path) -> np.ndarray:
    """The pictures of a command that the page shows, by the task itself."""
    words = shlex.split(command)
    assert words[:3] == ["python", "run.py", "task=sample"]
    sample.run(compose([*words[2:], "task.write=[png]", f"task.output={folder}", "task.keep=null"]))
    return np.stack([np.asarray(Image.open(file)) for file in sorted((folder / "png").glob("*.png"))])


@pytest.fixture(scope="module")
def player(tmp_path_factory) -> Player:
    return player_for(
        tmp_path_factory.mktemp("sit"), "repa_sit_s", "sampler=euler", "guidance=none", "sampler.steps=10"
    )


def test_pictures_are_those_of_the_sampling_task(player, tmp_path):
    drawn = player.draw(player.start)
    assert drawn.pictures.shape[0] == player.start.count
    assert np.array_equal(sampled(drawn.command, tmp_path / "own"), drawn.pictures)
    other = Settings(player.class_names[3], 3, 5, "repa_sde", 6, 4.5, (0.1, 0.8))
    changed = player.draw(other)
    assert np.array_equal(sampled(changed.command, tmp_path / "other"), changed.pictures)
    for word in ("sampler=repa_sde", "sampler.steps=6", "guidance=cfg", "guidance.scale=4.5", "task.seed=5"):
        assert word in shlex.split(changed.command)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"scale": 8.0}, {"scale": 8.0, "interval": (0.5, 1.0)}, {"steps": 3}, {"sampler": "heun"}]
)
def test_every_setting_changes_the_pictures(player, change):
    first = player.start
    before = player.draw(Settings(first.wanted, 4, steps=5, scale=8.0 if "interval" in change else 1.0)).pictures
    after = player.draw(Settings(first.wanted, 4, **{"steps": 5, **change})).pictures
    assert not np.array_equal(before, after)


def test_the_strip_ends_in_the_picture(player):
    times: list[float] = []
    drawn = player.draw(Settings(player.start.wanted, 2, steps=20), times.append)
    assert len(times) == 20 and len(drawn.frames) == 8
    assert drawn.times == sorted(drawn.times, reverse=True) and drawn.times[0] == 1
    # Euler's last step goes from its last estimate to that estimate.
    assert np.abs(drawn.frames[-1].astype(int) - drawn.pictures[0]).max() <= 1
    assert np.abs(drawn.frames[0].astype(int) - drawn.pictures[0]).max() > 1
    assert len(player.draw(Settings(player.start.wanted, 1, steps=3)).frames) == 3


def test_only_samplers_that_fit_are_offered(player, tmp_path):
    assert player.samplers[0] == OWN == player.start.sampler
    assert {"euler", "heun", "sit_sde", "dopri5"} <= set(player.samplers)
    assert not {"ddpm", "ddim", "ddt_shared", "ddt_shared_statistical"} & set(player.samplers)
    assert not player.takes_steps("dopri5") and player.steps_of("heun") == 10
    adaptive = player.draw(Settings(player.start.wanted, 1, sampler="dopri5"))
    assert "~sampler.steps" in shlex.split(adaptive.command)  # which the recipe gives its own sampler
    assert np.array_equal(sampled(adaptive.command, tmp_path / "adaptive"), adaptive.pictures)
    chain = player_for(tmp_path, "dit_s")
    assert {"ddpm", "ddim"} <= set(chain.samplers)
    drawn = chain.draw(Settings(chain.start.wanted, 2, sampler="ddim", steps=4))
    assert np.array_equal(sampled(drawn.command, tmp_path / "png"), drawn.pictures)


def test_a_method_that_reads_captions_takes_a_prompt(tmp_path):
    player = player_for(tmp_path, "sd3_embedded")
    assert player.by_caption and player.start.wanted
    drawn = player.draw(Settings('a "red" apple, [ripe]', 2, steps=4, scale=2.0))
    assert np.array_equal(sampled(drawn.command, tmp_path / "png"), drawn.pictures)
    with pytest.raises(UserError, match="prompt: is empty"):
        player.draw(Settings("  ", 1))


def test_texts_survive_the_command_line():
    assert quoted("runs/demo/step_1.ckpt") == "runs/demo/step_1.ckpt"
    for text in ("runs/a=b/step 1.ckpt", 'a "b"', "null", "1", "[x]", "it's", "ä,b:{c}"):
        cfg = compose([f"task.checkpoint={quoted(text)}", "task=sample"])
        assert cfg.task.checkpoint == text
    with pytest.raises(UserError, match="cannot hold"):
        quoted("${seed}")


def test_mistakes_are_told_before_weights_are_read(player, tmp_path, monkeypatch):
    monkeypatch.setattr(play, "restored", lambda cfg: pytest.fail("weights were read"))
    words = ["task=play", *words_for(tmp_path, "repa_sit_s")]
    with socket.socket() as taken:
        taken.bind((play.HOST, 0))
        taken.listen()
        with pytest.raises(UserError, match=r"task.port: \d+ cannot be used .*in use.*; set task.port="):
            play.run(compose([*words, f"task.port={taken.getsockname()[1]}"]))
    with pytest.raises(UserError, match="task.port: found 0"):
        play.run(compose([*words, "task.port=0"]))
    with pytest.raises(UserError, match=r"task.checkpoint: none named and '.*' holds none"):
        play.run(compose([*words, f"task.port={free_port()}"]))
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gradio is not installed; pip install 'repalign\[play\]'"):
        play.run(compose(words))
    with pytest.raises(UserError, match="class: the data have no 'cat'"):
        player.draw(Settings("cat"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((play.HOST, 0))
        return probe.getsockname()[1]


# The command line, with every connection and look-up of the process in its log.
WATCHED = """
import sys
def watch(event, arguments):
    if event == "socket.connect":
        print("asked", arguments[1], flush=True)
    elif event == "socket.getaddrinfo":
        print("asked", arguments[:2], flush=True)
sys.addaudithook(watch)
from tasks.launch import launch
sys.exit(launch(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def address(player):
    """The page, served by the command line itself."""
    pytest.importorskip("gradio", reason="the extra `play` is not installed")
    port = free_port()
    words = [word for word in player.words if word != "task=sample"]
    log = Path(str(player.checkpoint) + ".log")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, "task=play", *words, f"task.port={port}"],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    try:
        end = time.monotonic() + 400
        while "open http" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        yield f"http://{play.HOST}:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
        asked = [line for line in log.read_text().splitlines() if line.startswith("asked")]
        assert asked and all(play.HOST in line for line in asked), asked  # its own page, when it starts
    finally:
        process.kill()
        process.wait()


def asked(url: str, data: object = None) -> str:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        return answer.read().decode()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_draws_what_the_sampling_task_draws(address, player, tmp_path):
    settings = Settings(player.class_names[1], 3, 7, "heun", 4, 3.0, (0.0, 0.9))
    values = [settings.wanted, 3, 7, "heun", 4, 3.0, 0.0, 0.9]
    event = json.loads(asked(f"{address}/gradio_api/call/draw", {"data": values}))["event_id"]
    answer = asked(f"{address}/gradio_api/call/draw/{event}")
    pictures, frames, command = json.loads(answer.split("event: complete\ndata: ")[1])
    found = []
    for entry in pictures:
        file = tmp_path / "picture.png"
        with urllib.request.urlopen(entry["image"]["url"], timeout=60) as got:
            file.write_bytes(got.read())
        found.append(np.asarray(Image.open(file).convert("RGB")))
    assert np.array_equal(sampled(command, tmp_path / "png"), np.stack(found))
    assert len(frames) == 8 and frames[0]["caption"] == "t = 1.00"
    # A mistake is a line for the person, not a broken page.
    event = json.loads(asked(f"{address}/gradio_api/call/draw", {"data": [*values[:-2], 0.9, 0.1]}))["event_id"]
    assert "0 <= low <= high <= 1" in asked(f"{address}/gradio_api/call/draw/{event}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_in_the_page_is_from_elsewhere(address):
    html = asked(address)
    for link in re.findall(r"<(?:link|script|img|iframe)[^>]+(?:href|src)=[\"']([^\"']+)", html):
        assert not link.startswith(("//", "http")) or link.startswith(address), link


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.timeout(600)
@needs_chromium
def test_a_browser_draws_and_asks_nobody_else(address):
    async def steps(page):
        await page.until("document.querySelector('button.primary')")
        await page.value("document.querySelector('button.primary').click()")
        await page.until("document.querySelectorAll('#strip img').length == 8")
        assert await page.value("document.querySelectorAll('#pictures img').length") == 8
        assert "task=sample" in await page.value("document.querySelector('#command textarea').value")
        for width in (1280, 390):
            await page.size(width, 800)
            assert await page.value("document.documentElement.scrollWidth") <= width

    requests = drive(address, steps)
    outside = [
        url for url in requests if not url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))
    ]
    assert len(requests) > 20 and not outside
