"""The table and the figure of docs/int8.md, from the records."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.int8.methods import DECAY, FORMS, METHODS, PRETRAINED, PRETRAINED_SIZE, Setting
from orepa_compiler.files.atomic import staged

BEGIN, END = "<!-- int8: begin -->\n", "<!-- int8: end -->\n"

# Two-sided 95 % of Student's t, by the number of pairs.
_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

# Beside what else the net that is trained in its own form stands, at equal epochs.
BESIDE = ("float, trained on", "QAT after collapse")
OURS = "QAT in training form"

Records = list[dict[str, Any]]


def write_page(records: Records, page: Path) -> None:
    """The part of the page between its marks, and the figure beside it."""
    whole = page.read_text() if page.exists() else BEGIN + END
    before, rest = whole.split(BEGIN)
    text = "\n".join(lines(records)) + "\n" if records else ""
    with staged(page) as draft:
        draft.write_text(before + BEGIN + text + END + rest.split(END)[1])
    if records:
        draw(records, page.parent / "pictures" / "int8.svg")


def lines(records: Records) -> list[str]:
    """The table in markdown, and what was run."""
    nets = [name for name in FORMS if of_net(records, name)]
    heads = [f"{name} (n = {len(of_net(records, name))})" for name in nets]
    made = [f"| accuracy of the file, minus float | {' | '.join(heads)} |"]
    made.append("|---|" + "---:|" * len(nets))
    floats = [f"{statistics.mean(accuracies(records, name, 'float')):.2f} %" for name in nets]
    made.append(f"| float, collapsed | {' | '.join(floats)} |")
    for method in list(METHODS)[1:]:
        cells = [interval(differences(records, name, method)) for name in nets]
        made.append(f"| {method} | {' | '.join(cells)} |")
    for base in BESIDE:
        cells = [interval(differences(records, name, OURS, base)) for name in nets]
        made.append(f"| *{OURS}, minus {base}* | {' | '.join(cells)} |")
    for what in ("bytes", "processor_time"):
        ratios = [ratio(records, name, what) for name in nets]
        cells = ["not measured" if value is None else f"{value:.2f}" for value in ratios]
        name = what.replace("_", " ")
        made.append(f"| {name} of the QAT file / float | {' | '.join(cells)} |")
    made += ["", *map(_said, nets_run(records))]
    made += [
        "Mean differences in points, with their 95 % interval over n paired seeds. Each file runs "
        f"in onnxruntime as it is written. Weight decay {DECAY:g}. Processor time is that of batch "
        "32 on one thread, in turn with the float file, with onnxruntime's own int8 kernels.",
    ]
    return made


def nets_run(records: Records) -> list[Setting]:
    """What was run of each kind of net: of the small ones once, and of the pretrained one."""
    settings = [Setting(**record["run"]) for record in records]
    small = [setting for setting in settings if setting.net != PRETRAINED]
    large = [setting for setting in settings if setting.net == PRETRAINED]
    return [*small[:1], *large[:1]]


def _said(setting: Setting) -> str:
    is_large = setting.net == PRETRAINED
    who = f"{PRETRAINED}, from ImageNet weights" if is_large else "The small nets"
    size = PRETRAINED_SIZE if is_large else 14
    return (
        f"{who}: trained on {setting.train:,} images of {size} x {size}, {setting.epochs} epochs "
        f"at rate {setting.rate:g}, all but float and PTQ for {setting.tuned} epochs more; tested "
        f"on {setting.test:,} images."
    )


def of_net(records: Records, net: str) -> Records:
    return [record for record in records if record["run"]["net"] == net]


def accuracies(records: Records, net: str, method: str) -> list[float]:
    return [record["found"][method]["accuracy"] for record in of_net(records, net)]


def differences(records: Records, net: str, method: str, base: str = "float") -> list[float]:
    pairs = zip(accuracies(records, net, method), accuracies(records, net, base), strict=True)
    return [one - base for one, base in pairs]


def interval(values: list[float]) -> str:
    """Mean and 95 % interval; the mean alone of one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = _T.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.2f} ± {half:.2f}"


def ratio(records: Records, net: str, what: str) -> float | None:
    """Of the file that was trained for int8, to the float one; None where it was not measured."""
    found = [record["found"] for record in of_net(records, net)]
    ours = [one[OURS] for one in found]
    if what == "bytes":
        pairs = zip(ours, found, strict=True)
        return statistics.median(one["bytes"] / base["float"]["bytes"] for one, base in pairs)
    times = [one[what] for one in ours if what in one]
    return statistics.median(times) if times else None


def draw(records: Records, path: Path) -> None:
    """A dot for each seed: accuracy minus float, by method and net."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    nets = [name for name in FORMS if of_net(records, name)]
    figure, axes = pyplot.subplots(1, len(nets), figsize=(3 * len(nets), 3), sharey=True)
    methods = list(METHODS)[1:]
    for axis, net in zip([axes] if len(nets) == 1 else axes, nets, strict=True):
        for number, method in enumerate(reversed(methods)):
            values = differences(records, net, method)
            axis.plot(values, [number] * len(values), "o", color="C0", alpha=0.5, markersize=4)
            axis.plot(statistics.mean(values), number, "k|", markersize=14)
        axis.axvline(0, color="0.7", linewidth=1)
        axis.set_xscale("symlog", linthresh=1)  # a tenth of a point is seen beside a dead net
        axis.set_xlim(-100, 10)
        axis.set_xticks([-50, -5, -1, 0, 1, 5], ["-50", "-5", "-1", "0", "1", "5"], fontsize=7)
        axis.minorticks_off()
        axis.set_title(net, fontsize=9)
        axis.set_xlabel("points, minus float", fontsize=8)
        axis.set_yticks(range(len(methods)), list(reversed(methods)), fontsize=8)
    figure.tight_layout()
    matplotlib.rcParams["svg.hashsalt"] = "int8"  # the same file from the same records
    with staged(path) as draft:
        figure.savefig(draft, format="svg", metadata={"Date": None})
    pyplot.close(figure)
