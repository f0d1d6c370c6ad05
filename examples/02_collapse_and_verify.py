"""Collapse the trained net to plain convs, and prove that it computes the same."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from digits import accuracy, digits, digits_net, output_folder, remember
from rich import print

import orepa_compiler as orepa


def main(folder: Path) -> None:
    if not (folder / "orepa.safetensors").exists():
        import_module("01_expand_and_train").main(folder)
    expanded = orepa.load(digits_net, folder / "orepa.safetensors").eval()

    deploy = orepa.collapse(expanded)
    report = orepa.verify(expanded, deploy, digits()[2])
    print(report)
    assert report

    # The architecture that went into expand, norms kept: it loads into the stock net.
    stock = digits_net().eval()
    stock.load_state_dict(orepa.collapse(expanded, fold_norm=False).state_dict(), strict=True)
    assert orepa.verify(expanded, stock, digits()[2])

    orepa.save(deploy, folder / "deploy.safetensors")
    facts = remember(folder, collapse_error=report.max_error)
    remember(folder, accuracy={**facts["accuracy"], "deploy": accuracy(deploy)})


if __name__ == "__main__":
    main(output_folder())
