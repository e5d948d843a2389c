"""The page of task=play, on gradio."""

from __future__ import annotations

import contextlib
import threading

import gradio as gr
from gradio import themes

from repalign.errors import UserError
from tasks.player import OWN, Player, Settings

MAX_PICTURES = 16
# Pixels stay pixels: small pictures are enlarged, not smoothed.
CSS = """
.gradio-container {max-width: 1100px !important; margin: 0 auto !important}
#pictures, #strip {min-height: 0 !important}
#pictures .grid-wrap, #strip .grid-wrap {min-height: 0 !important; max-height: none !important}
#pictures .grid-container, #strip .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
#pictures img, #strip img {image-rendering: pixelated}
#strip .caption-label {font-size: 11px; line-height: 1.2; padding: 1px 4px; border: 0; opacity: .85}
#command textarea {font-family: ui-monospace, monospace; font-size: 12px}
"""


def serve(player: Player, host: str, port: int, browser: bool) -> None:
    """Show the page until the process is interrupted."""
    blocks = page(player)
    blocks.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        ssr_mode=False,
        footer_links=["api"],
        quiet=True,
        prevent_thread_lock=True,
        theme=themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    print(f"open http://{host}:{port} (stop: Ctrl-C)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    blocks.close(verbose=False)


def gallery(name: str) -> gr.Gallery:
    """Pictures side by side, sent without loss."""
    return gr.Gallery(
        show_label=False,
        format="png",
        columns=4,
        height="auto",
        object_fit="contain",
        buttons=["download"],
        elem_id=name,
    )


def page(player: Player) -> gr.Blocks:
    """The page: settings on the left, pictures, strip and command on the right (below, on a narrow screen)."""
    start = player.start

    def draw(
        wanted: str,
        count: float,
        seed: float,
        sampler: str,
        steps: float,
        scale: float,
        low: float,
        high: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (gradio finds it by the default)
    ) -> tuple:
        own = None if not steps else int(steps)
        settings = Settings(wanted, int(count), int(seed), sampler, own, float(scale), (float(low), float(high)))
        try:
            drawn = player.draw(settings, lambda t: progress(1 - t, desc=f"t = {t:.2f}"))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        frames = [(frame, f"t = {t:.2f}") for frame, t in zip(drawn.frames, drawn.times, strict=True)]
        return list(drawn.pictures), frames, drawn.command

    def own_steps(sampler: str) -> dict:
        return gr.update(value=player.steps_of(sampler), visible=player.takes_steps(sampler))

    with gr.Blocks(title=f"repalign: {player.cfg.name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"## {player.cfg.name}\n{player.checkpoint.name}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                if player.by_caption:
                    wanted = gr.Textbox(start.wanted, label="Prompt", lines=2)
                else:
                    wanted = gr.Dropdown(player.class_names, value=start.wanted, label="Class")
                count = gr.Slider(1, MAX_PICTURES, start.count, step=1, label="Pictures", buttons=[])
                sampler = gr.Dropdown(player.samplers, value=OWN, label="Sampler")
                with gr.Row():
                    seed = gr.Number(start.seed, label="Seed", precision=0, minimum=0, min_width=100)
                    steps = gr.Number(
                        start.steps,
                        label="Steps",
                        precision=0,
                        minimum=1,
                        min_width=100,
                        visible=player.takes_steps(OWN),
                    )
                scale = gr.Slider(
                    0,
                    10,
                    start.scale,
                    step=0.05,
                    label="Guidance scale",
                    info="1: no guidance; below: where it acts",
                    buttons=[],
                )
                with gr.Row():
                    low = gr.Slider(0, 1, start.interval[0], step=0.01, label="t ≥", min_width=120, buttons=[])
                    high = gr.Slider(0, 1, start.interval[1], step=0.01, label="t ≤", min_width=120, buttons=[])
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=3, min_width=300):
                gr.Markdown("**Pictures**")
                pictures = gallery("pictures")
                gr.Markdown("**Denoising of the first picture**: the estimate of x_0 at t (1: noise, 0: data)")
                strip = gallery("strip")
                command = gr.Textbox(
                    label="The same pictures by task=sample", lines=4, max_lines=8, buttons=["copy"], elem_id="command"
                )
        sampler.change(own_steps, sampler, steps, api_visibility="private")
        inputs = [wanted, count, seed, sampler, steps, scale, low, high]
        button.click(draw, inputs, [pictures, strip, command], api_name="draw", concurrency_limit=1)
    return blocks
