"""Training runs of a folder: their losses and pictures, live, and the newest checkpoint of each."""

from pathlib import Path

import gradio as gr


def training(runs: Path) -> None:
    gr.Markdown(str(runs))
