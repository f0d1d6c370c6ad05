"""Checkpoints: every form comes back bit for bit, and what does not fit is refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.capture.skeleton import meta_copy
from orepa_compiler.checkpoints.reading import PLAN_KEY
from orepa_compiler.errors import CheckpointError, ExportError
from orepa_compiler.planning import recorded_plans
from tests.compiler_nets import (
    bare_net,
    batch,
    branch_net,
    output,
    same_state,
    stem_net,
    train_a_step,
    untouched,
)

X = batch()


def trained(model: nn.Module) -> nn.Module:
    train_a_step(model, X)
    return model


def linearized() -> nn.Module:
    return trained(orepa.expand(branch_net(), block=orepa.OREPA))


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "plain": (stem_net, lambda: trained(stem_net())),
    "expanded": (stem_net, lambda: trained(orepa.expand(stem_net()))),
    "paper": (stem_net, lambda: trained(orepa.expand(stem_net(), init="paper"))),
    "inserted": (bare_net, lambda: trained(orepa.expand(bare_net(), inputs=X))),
    "collapsed": (stem_net, lambda: orepa.collapse(trained(orepa.expand(stem_net())))),
    "norms kept": (
        stem_net,
        lambda: orepa.collapse(trained(orepa.expand(stem_net())), fold_norm=False),
    ),
    "collapsed only": (branch_net, lambda: orepa.collapse(branch_net())),
    "linearized": (branch_net, linearized),
    "linearized, collapsed": (branch_net, lambda: orepa.collapse(linearized())),
    "in two parts": (
        stem_net,
        lambda: trained(orepa.expand(orepa.expand(stem_net(), where="stem"), where="conv")),
    ),
    "scalar": (
        stem_net,
        lambda: trained(
            orepa.expand(stem_net(), block=replace(orepa.OREPA, scaling_layer="scalar"))
        ),
    ),
}


@pytest.mark.parametrize(("stock", "build"), FORMS.values(), ids=FORMS)
def test_every_form_comes_back_bit_for_bit(
    stock: Callable[[], nn.Module], build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = build()
    with untouched(model):
        assert orepa.save(model, tmp_path / "model.safetensors") == tmp_path / "model.safetensors"
    assert os.listdir(tmp_path) == ["model.safetensors"]
    source = stock()
    with untouched(source):
        loaded = [orepa.load(source, tmp_path / "model.safetensors")]
    loaded.append(orepa.load(stock, str(tmp_path / "model.safetensors")))
    for restored in loaded:
        assert same_state(restored, model)
        assert torch.equal(output(restored, X), output(model, X))
        assert [type(m).__name__ for m in restored.modules()] == [
            type(m).__name__ for m in model.modules()
        ]
        names = [p.done_by for plan in recorded_plans(restored) for p in plan.edits]
        assert names == [p.done_by for plan in recorded_plans(model) for p in plan.edits]
        assert orepa.save(restored, tmp_path / "again.safetensors").stat().st_size > 0


def test_a_loaded_model_goes_on(tmp_path: Path) -> None:
    path = orepa.save(trained(orepa.expand(stem_net())), tmp_path / "model")
    model = trained(orepa.load(stem_net, path))
    path = orepa.save(orepa.collapse(model), tmp_path / "deployed")
    assert torch.equal(orepa.load(stem_net, path)(X), orepa.collapse(model)(X))


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    model = orepa.expand(stem_net())
    tensors = load_file(orepa.save(model, tmp_path / "model"))
    assert tensors.keys() == model.state_dict().keys()


def test_a_block_of_the_users_own(tmp_path: Path) -> None:
    mine = replace(orepa.OREPA, name="mine")
    path = orepa.save(orepa.expand(stem_net(), block=mine), tmp_path / "model")
    assert orepa.load(stem_net, path, block=mine) is not None
    with pytest.raises(CheckpointError, match=r"which is none of .*; give yours with block="):
        orepa.load(stem_net, path)


def test_tensors_that_share_memory_or_are_strided(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)).to(
        memory_format=torch.channels_last  # type: ignore[call-overload]
    )
    net[1].weight = net[0].weight
    net.register_buffer("view", net[0].weight.detach()[:, 1])
    net.register_buffer("empty", torch.zeros(0))
    path = orepa.save(net, tmp_path / "model")
    fresh = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    fresh.register_buffer("view", torch.zeros(3, 3, 3))
    fresh.register_buffer("empty", torch.zeros(0))
    assert same_state(orepa.load(fresh, path), net)


def shallower() -> nn.Module:
    net = stem_net()
    net.head = nn.Sequential(nn.Linear(12, 5))  # type: ignore[assignment]
    return net


def wider() -> nn.Module:
    net = stem_net()
    net.head = nn.Linear(12, 6)
    return net


FITS_NOT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other keys": (
        shallower,
        "2 missing (head.0.weight, head.0.bias); 2 extra (head.bias, head.weight); "
        "0 of the wrong shape",
    ),
    "other shapes": (wider, "0 missing; 0 extra; 2 of the wrong shape (head.bias (5,) for (6,), "),
    "another net": (
        bare_net,
        "its plan does not fit Sequential (stem: the plan does not fit: the model has no such "
        "module); name the model that this checkpoint was trained with",
    ),
}


@pytest.mark.parametrize(("build", "message"), FITS_NOT.values(), ids=FITS_NOT)
def test_a_checkpoint_of_another_model(
    build: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    path, net = orepa.save(orepa.expand(stem_net()), tmp_path / "model"), build()
    with untouched(net), pytest.raises(CheckpointError) as caught:
        orepa.load(net, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_no_other_net_takes_a_form(form: str, tmp_path: Path) -> None:
    stock, build = FORMS[form]
    path = orepa.save(build(), tmp_path / "model")
    others = (stem_net, branch_net, nn.ReLU)
    for other in others:
        if other is not stock:
            with pytest.raises(CheckpointError):
                orepa.load(other, path)


def test_a_file_without_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(stem_net().state_dict(), path)
    with pytest.raises(CheckpointError) as caught:
        orepa.load(stem_net, path)
    assert str(caught.value) == (
        f"{path}: holds no plan, so it was not written by orepa.save; "
        "load it with model.load_state_dict"
    )


@pytest.mark.parametrize("part", [0, 1, 8, 9, 100, 0.5, -1])
def test_a_file_that_was_cut(part: float, tmp_path: Path) -> None:
    path = orepa.save(orepa.expand(stem_net()), tmp_path / "model")
    whole = path.read_bytes()
    path.write_bytes(whole[: part if isinstance(part, int) else int(part * len(whole))])
    with pytest.raises(CheckpointError) as caught:
        orepa.load(stem_net, path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        orepa.load(stem_net, tmp_path / "nowhere")
    assert str(caught.value) == f"{tmp_path / 'nowhere'}: there is no such file"


PLANS = {
    "not JSON": ("{", r"its plan: is not whole JSON"),
    "a list": ("[]", r"its plan: is JSON, but a list and no object"),
    "no plans": ('{"format": 1}', r"its plan: plans is missing"),
    "a bad plan": ('{"format": 1, "plans": ["{"]}', "this is not a plan"),
    "another version": (
        '{"format": 3, "plans": []}',
        "has checkpoint format 3, this version reads 1 and 2",
    ),
}


@pytest.mark.parametrize(("text", "message"), PLANS.values(), ids=PLANS)
def test_a_plan_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_file(stem_net().state_dict(), path, {PLAN_KEY: text})
    with pytest.raises(CheckpointError, match=message):
        orepa.load(stem_net, path)


def test_a_factory_that_gives_no_module(tmp_path: Path) -> None:
    path = orepa.save(stem_net(), tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        orepa.load(lambda: 3, path)  # type: ignore[arg-type, return-value]
    assert str(caught.value) == "the factory gave a int, not a torch.nn.Module"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrapped_model_is_not_saved(prefix: str, tmp_path: Path) -> None:
    wrapped = nn.Module()
    wrapped.add_module(prefix[:-1], stem_net())
    with pytest.raises(CheckpointError) as caught:
        orepa.save(wrapped, tmp_path / "model")
    assert str(caught.value) == (
        f"every key begins with '{prefix}': save the model inside the wrapper, model.{prefix[:-1]}"
    )
    assert os.listdir(tmp_path) == []


def test_a_model_without_values_is_not_saved(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("old")
    with pytest.raises(CheckpointError) as caught:
        orepa.save(meta_copy(stem_net()), tmp_path / "model")
    assert str(caught.value) == "stem.weight is on the meta device: there are no values to save"
    assert (tmp_path / "model").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


class Extra(nn.Conv2d):
    def get_extra_state(self) -> dict[str, int]:
        return {"step": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_a_state_that_is_no_tensor_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        orepa.save(nn.Sequential(Extra(3, 3, 1)), tmp_path / "model")
    assert str(caught.value) == (
        "0._extra_state is a dict, and safetensors holds only tensors; drop it from the state_dict"
    )


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="this is a folder; give the path of the file to write"):
        orepa.save(stem_net(), tmp_path)
    with pytest.raises(ExportError, match=r"cannot write into the folder .*nowhere \(No such file"):
        orepa.save(stem_net(), tmp_path / "nowhere" / "model")


def test_an_error_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = orepa.save(stem_net(), tmp_path / "model")
    old = path.read_bytes()

    def refuse(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ExportError, match=r"cannot move model into place \(Permission denied\)"):
        orepa.save(orepa.expand(stem_net()), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["model"]


KILLED = """
import os, sys
import torch
from torch import nn
import orepa_compiler as orepa
torch.set_num_threads(1)
path, kill_at_rename = sys.argv[1], sys.argv[2] == "rename"
model = nn.Sequential(nn.Conv2d(64, 256, 9))
if kill_at_rename:
    os.replace = lambda source, target: os.kill(os.getpid(), 9)
print("writing", flush=True)
while True:
    with torch.no_grad():
        model[0].bias += 1
    orepa.save(model, path)
"""


def killed_writer(path: Path, when: str, seconds: float) -> int:
    """The exit status of a process that writes checkpoints until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), when], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    time.sleep(seconds)
    if when == "any time":
        process.kill()
    status = process.wait(timeout=60)
    process.stdout.close()
    return status


def test_a_process_killed_at_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = orepa.save(stem_net(), tmp_path / "model")
    old = path.read_bytes()
    assert killed_writer(path, "rename", 0) == -signal.SIGKILL
    assert path.read_bytes() == old


@pytest.mark.parametrize("seconds", [0.02, 0.043, 0.071, 0.113])
def test_a_process_killed_at_any_time_leaves_a_whole_file(seconds: float, tmp_path: Path) -> None:
    factory = lambda: nn.Sequential(nn.Conv2d(64, 256, 9))  # noqa: E731
    path = orepa.save(factory(), tmp_path / "model")
    assert killed_writer(path, "any time", seconds) == -signal.SIGKILL
    assert json.dumps(list(orepa.load(factory, path).state_dict())) == '["0.weight", "0.bias"]'
