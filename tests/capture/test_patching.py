"""nn.Module tells who traces, inside of a capture alone, and in its own thread alone."""

import threading

import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.capture import capture
from orepa_compiler.capture.tracing.patching import modules_patched, traced_by
from orepa_compiler.passes import is_leaf


class Told:
    """A tracer that writes down what it is told."""

    def __init__(self):
        self.weights_asked_for = {}
        self.heard = []

    def call_module(self, module, forward, args, kwargs):
        self.heard.append("call")
        return forward(*args, **kwargs)

    def getattr(self, name, value, cache):
        self.heard.append(name)
        return value

    def sets(self, module, name, value):
        self.heard.append(f"sets {name}")


def methods():
    return nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__


def test_the_innermost_tracer_is_told():
    outer, inner, module = Told(), Told(), nn.Identity()
    module.register_buffer("scale", torch.ones(1))
    with traced_by(outer):
        assert module.scale is not None
        with traced_by(inner):
            module(torch.ones(1))
            module.seen = True
        assert module.scale is not None
    module(torch.ones(1))
    assert (outer.heard, inner.heard) == (["scale", "scale"], ["call", "sets seen"])


def test_methods_are_as_before_also_after_an_error():
    before = methods()
    try:
        with traced_by(Told()):
            assert methods() != before
            raise KeyError
    except KeyError:
        pass
    assert methods() == before


def test_methods_are_as_before_when_threads_end_in_any_order():
    before = methods()
    first, second = modules_patched(), modules_patched()
    first.__enter__()
    thread = threading.Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert methods() != before
    second.__exit__(None, None, None)
    assert methods() == before


def test_fx_sets_the_methods_once_for_a_whole_capture(monkeypatch):
    """A method of nn.Module that is set costs a walk over all of its subclasses."""
    times = []
    patch_method = torch.fx._symbolic_trace._PatchedFnSetAttr.patch
    monkeypatch.setattr(
        torch.fx._symbolic_trace._PatchedFnSetAttr,
        "patch",
        lambda self: (times.append(self.fn_name), patch_method(self))[1],
    )

    class Twice(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3)

        def forward(self, x):
            return self.conv(x) + self.conv(x)

    model = nn.Sequential(Twice(2), Twice(3))
    captured = capture(model, training=False, is_leaf=is_leaf)
    assert {"0", "1"} <= set(captured.graphs)
    assert times == []


def test_a_model_runs_beside_a_plan_in_another_thread():
    """Nothing of it becomes a part of the trace, and it is not told of."""
    running, model = nn.Conv2d(2, 2, 1), nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    x, given = torch.ones(1, 2, 4, 4), []
    expected = running(x)
    with modules_patched(), traced_by(Told()):
        thread = threading.Thread(target=lambda: given.append(running(x)))
        thread.start()
        thread.join()
    assert torch.equal(given[0], expected)
    assert orepa.plan(model).edits
