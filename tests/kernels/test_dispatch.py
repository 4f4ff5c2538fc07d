"""Which backend runs a call: by name, by environment, automatically; and what is said when it cannot."""

import logging

import pytest
import torch

import adazeta_kernels as kernels
from adazeta_kernels import TTAdapterLayout, dispatch
from adazeta_kernels.backends import reference


class Absent:
    """A backend that cannot run."""

    @staticmethod
    def unavailable():
        return "the extension was not built"


class Counting:
    """A backend that runs fill_normal_ alone, and counts."""

    calls = 0

    @staticmethod
    def unavailable():
        return None

    @staticmethod
    def supports(op, *, device, dtype, **sizes):
        return None if op == "fill_normal_" and dtype == torch.float32 else f"no {op} for {dtype}"

    @classmethod
    def fill_normal_(cls, *args):
        cls.calls += 1
        reference.fill_normal_(*args)


@pytest.fixture
def native(monkeypatch):
    """Put another module in the place of the native backend."""

    def install(backend):
        original = dispatch.importlib.import_module
        monkeypatch.setattr(
            dispatch.importlib, "import_module", lambda name: backend if name.endswith(".native") else original(name)
        )
        dispatch.clear()
        return backend

    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    yield install
    monkeypatch.undo()
    dispatch.clear()


def test_backends_tells_what_can_run_and_why_not_the_rest(native):
    native(Absent)
    assert kernels.backends() == {
        "native": "the extension was not built",
        "triton": "this version of adazeta_kernels has no triton kernels",
        "reference": None,
    }


def test_backends_stays_callable_and_a_package():
    import adazeta_kernels.backends.reference as module

    assert module is kernels.backends.reference
    assert kernels.backends()["reference"] is None


def test_auto_falls_back_and_says_why_once(native, caplog):
    native(Absent)
    with caplog.at_level(logging.INFO, logger="adazeta_kernels"):
        for _ in range(3):
            kernels.fill_normal_(torch.empty(4), 1)
            kernels.fill_normal_(torch.empty(4).half(), 1)
            kernels.perturb_([torch.zeros(4)], [1], [1.0])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "native cannot run: the extension was not built" in caplog.text


def test_auto_takes_the_first_that_can(native, caplog):
    backend = native(Counting)
    before = backend.calls
    with caplog.at_level(logging.INFO, logger="adazeta_kernels"):
        kernels.fill_normal_(torch.empty(4), 1)
        kernels.fill_normal_(torch.empty(4), 1, backend="auto")
        kernels.fill_normal_(torch.empty(4), 1, backend="reference")
        kernels.fill_normal_(torch.empty(4).half(), 1)
    assert backend.calls - before == 2
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "cannot run fill_normal_: no fill_normal_ for torch.float16" in caplog.text


def test_a_named_backend_that_cannot_run_raises_with_the_reason(native):
    native(Absent)
    out = torch.zeros(4)
    with pytest.raises(RuntimeError, match="backend 'native' cannot run fill_normal_ .*: the extension was not built"):
        kernels.fill_normal_(out, 1, backend="native")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run perturb_ .* has no triton kernels"):
        kernels.perturb_([out], [1], [1.0], backend="triton")
    assert torch.equal(out, torch.zeros(4))
    native(Counting)
    layout = TTAdapterLayout.auto(24, 8, 2)
    with pytest.raises(RuntimeError, match="cannot run tt_factors .*: no tt_factors for torch.float32"):
        kernels.tt_factors(torch.zeros(layout.numel), layout, [1], [1.0], backend="native")


def test_environment_names_a_backend_and_the_call_wins(native, monkeypatch):
    native(Absent)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "native")
    with pytest.raises(RuntimeError, match="the extension was not built"):
        kernels.fill_normal_(torch.empty(4), 1)
    kernels.fill_normal_(torch.empty(4), 1, backend="reference")
    kernels.fill_normal_(torch.empty(4), 1, backend="auto")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    kernels.fill_normal_(torch.empty(4), 1)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "")
    kernels.fill_normal_(torch.empty(4), 1)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="unknown ADAZETA_BACKEND 'fast'; known are auto, native, triton, reference"):
        kernels.fill_normal_(torch.empty(4), 1)


def test_tt_factors_takes_directions_from_the_fastest_backend(native, monkeypatch):
    calls = []

    class Rows(Counting):
        @staticmethod
        def supports(op, *, device, dtype, **sizes):
            return None if op == "perturb_rows" else "no"

        @staticmethod
        def perturb_rows(*args):
            calls.append(args)
            return reference.perturb_rows(*args)

    native(Rows)
    layout = TTAdapterLayout.auto(24, 8, 2)
    theta = torch.randn(layout.numel)
    kernels.tt_factors(theta, layout, [1], [1.0], backend="reference")
    assert not calls
    kernels.tt_factors(theta, layout, [1], [1.0])
    kernels.tt_factors(theta.double(), layout, [1], [1.0])
    assert len(calls) == 1


def test_a_named_backend_without_backward_says_so():
    layout = TTAdapterLayout.auto(24, 8, 2)
    theta = torch.zeros(layout.numel, requires_grad=True)
    with pytest.raises(RuntimeError, match="'native' cannot run tt_factors on inputs that require grad"):
        kernels.tt_factors(theta, layout, [1], [1.0], backend="native")
