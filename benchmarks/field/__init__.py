"""The field's re-parameterized blocks, and timm's, each collapsed and compared.

`registry` holds the published blocks that `sums`, `mobile`, `sequences` and `mixtures` define,
`peers` finds timm's models with a method of their own for it, `counting` counts convs, norms and
multiply-accumulates while a model runs, `examining` makes a row, `report` writes the page.
"""

from __future__ import annotations

from orepa_compiler.model_source import declare_torchvision_operators

declare_torchvision_operators()  # before anything imports torchvision
