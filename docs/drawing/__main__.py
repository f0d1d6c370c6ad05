"""Writes every picture."""

from pathlib import Path

from docs.drawing.pictures import PICTURES

FOLDER = Path(__file__).parents[1] / "pictures"

for name, picture in PICTURES.items():
    (FOLDER / f"{name}.svg").write_text(picture())
    print(f"docs/pictures/{name}.svg")
