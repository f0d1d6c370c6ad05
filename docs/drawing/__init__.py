"""The pictures of the documentation, drawn from graphs that the passes made: one for each pass.

`python -m docs.drawing` writes them to docs/pictures.
"""
