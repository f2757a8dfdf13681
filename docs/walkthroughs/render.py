"""Runs examples/walkthroughs/*.py and writes them beside this file as notebooks with what they print and draw."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image
from traitlets.config import Config

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "examples" / "walkthroughs"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SHADES = 32  # of every colour channel: a third of the size less, and nothing to see


def render(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script, run from its first cell to its last."""
    notebook = jupytext.read(script)
    config = Config({"ConnectionFileMixin": {"transport": "ipc"}})  # a file that is ours, no port
    options = {"kernel_name": "python3", "timeout": 600, "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, config=config, **options)
    client.execute(env=os.environ | {"PYTHONWARNINGS": "ignore:IProgress not found"})  # tqdm misses widgets
    notebook.metadata = nbformat.from_dict(METADATA)  # jupytext and the kernel add versions
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{script.name}, cell {number} warns: {output['text']}")
            shown = output.get("data", {})
            if "image/png" in shown:
                shown.pop("image/jpeg", None)  # Pillow shows both
                shown["image/png"] = _smaller(shown["image/png"])
    return notebook


def _smaller(png: str) -> str:
    """A picture as base64, in fewer shades."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    shades = [round(round(value / 255 * (SHADES - 1)) * 255 / (SHADES - 1)) for value in range(256)]
    picture.point(shades * 3).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for script in sorted(SCRIPTS.glob("*.py")):
        nbformat.write(render(script), HERE / f"{script.stem}.ipynb")
