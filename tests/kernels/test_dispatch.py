"""Which backend runs a call: by name, by environment, automatically; and what is said when it cannot."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adazeta_kernels as kernels
from adazeta_kernels import TTAdapterLayout, dispatch
from adazeta_kernels.backends import native_cuda, reference


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


class Driverless:
    """Triton on a machine without a GPU."""

    @staticmethod
    def unavailable():
        return "no driver to run on"


@pytest.fixture
def native(monkeypatch):
    """Put another module in the place of the native backend, and one in that of Triton."""

    def install(backend, triton=Driverless):
        original = dispatch.importlib.import_module
        modules = {"adazeta_kernels.backends.native": backend, "adazeta_kernels.backends.triton": triton}
        monkeypatch.setattr(
            dispatch.importlib, "import_module", lambda name: modules[name] if name in modules else original(name)
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
        "triton": "no driver to run on",
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
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run perturb_ .*: no driver to run on"):
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
            return None if op == "perturb_rows" and dtype == torch.float32 else "no"

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


def test_order_on_a_gpu_and_reasons_logged_once(native, caplog):
    """What `auto` chooses for tensors on a GPU, told by stand-ins: no GPU is touched."""

    class EveryOp(Counting):
        @staticmethod
        def supports(op, *, device, dtype, **sizes):
            return None if device == "cuda" else "needs a GPU"

    gpu = torch.device("cuda", 0)
    native(Counting, triton=EveryOp)
    assert dispatch.select("fill_normal_", None, gpu, torch.float32) == Counting.fill_normal_
    with caplog.at_level(logging.INFO, logger="adazeta_kernels"):
        for _ in range(2):
            assert dispatch.select("fill_normal_", None, gpu, torch.float16) == EveryOp.fill_normal_
    assert [record.getMessage() for record in caplog.records] == [
        "backend native cannot run fill_normal_: no fill_normal_ for torch.float16; trying the next one"
    ]
    native(Absent)
    assert dispatch.select("fill_normal_", None, gpu, torch.float32) is reference.fill_normal_
    assert dispatch.select("fill_normal_", None, torch.device("cpu"), torch.float32) is reference.fill_normal_


def test_the_order_depends_on_the_class_of_shapes(native, monkeypatch):
    """The first line whose bounds all hold decides, and explain names it."""

    class EveryOp(Counting):
        @staticmethod
        def supports(op, *, device, dtype, **sizes):
            return None

        tt_linear = "Triton's"

    native(Absent, triton=EveryOp)
    orders = (
        dispatch.Order("few tokens, low rank", {"tokens": 64, "rank": 16}, ("reference",), "measured so"),
        dispatch.Order("few tokens", {"tokens": 64}, ("native", "reference"), "measured otherwise"),
        dispatch.Order("many tokens"),
    )
    monkeypatch.setitem(dispatch.GPU_ORDER, "tt_linear", orders)
    gpu = torch.device("cuda")
    for tokens, rank, order, backend in (
        (1, 1, orders[0], "reference"),
        (64, 16, orders[0], "reference"),
        (64, 17, orders[1], "reference"),
        (65, 16, orders[2], "triton"),
        (10**9, 64, orders[2], "triton"),
    ):
        sizes = {"tokens": dispatch.rounded(tokens), "rank": rank}
        found = dispatch._explanation("tt_linear", "auto", gpu, torch.float32, sizes)
        assert (found.order, found.backend) == (order, backend), (tokens, rank)
        run = dispatch.select("tt_linear", None, gpu, torch.float32, **sizes)
        assert run == (reference.tt_linear if backend == "reference" else EveryOp.tt_linear)
    found = dispatch._explanation("tt_linear", "auto", gpu, torch.float32, {"tokens": 64, "rank": 17})
    assert str(found) == (
        "tt_linear for torch.float32 on cuda runs on reference\n"
        "  not on native: the extension was not built\n"
        "  few tokens: native, reference (measured otherwise)"
    )
    # Neither the CPU nor a name asks the table.
    assert (
        dispatch._explanation("tt_linear", "auto", torch.device("cpu"), torch.float32, {}).order is dispatch.CPU_ORDER
    )
    assert dispatch._explanation("tt_linear", "triton", gpu, torch.float32, {}).backend == "triton"


def test_each_gpu_is_asked_for_its_compute_capability(native, monkeypatch, caplog):
    """The second GPU is older than what the kernels are built for."""
    module = SimpleNamespace(cuda_device_count=lambda: 2, cuda_lowest_capability=lambda: 80)
    monkeypatch.setattr(native_cuda, "_native", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (7, 5)][index])
    native(kernels.backends.native)
    new, old = torch.device("cuda", 0), torch.device("cuda", 1)
    with caplog.at_level(logging.INFO, logger="adazeta_kernels"):
        assert dispatch.select("fill_normal_", None, new, torch.float32) is kernels.backends.native.fill_normal_
        assert not caplog.records
        assert dispatch.select("fill_normal_", None, old, torch.float32) is reference.fill_normal_
    reason = "CUDA: the device has compute capability 7.5, the kernels are built for 8.0 and above"
    assert f"backend native cannot run fill_normal_: {reason}" in caplog.text
    assert dispatch.select("fill_normal_", "native", new, torch.float32) is kernels.backends.native.fill_normal_
    with pytest.raises(RuntimeError, match=f"backend 'native' cannot run fill_normal_ .*: {reason}"):
        dispatch.select("fill_normal_", "native", old, torch.float32)


def test_sizes_are_rounded_to_powers_of_two():
    assert [dispatch.rounded(n) for n in (0, 1, 2, 3, 64, 65, 2**40 + 1)] == [0, 1, 2, 4, 64, 128, 2**41]


@pytest.fixture
def calls():
    """Op -> arguments of one call."""
    layout = TTAdapterLayout.auto(24, 8, 2)
    factors, x = torch.zeros(1, layout.factor_numel), torch.zeros(1, 3, 24)
    left, right = torch.zeros(1, 24, 2), torch.zeros(1, 2, 8)
    return {
        "fill_normal_": (torch.zeros(5), 1),
        "perturb_": ([torch.zeros(5)], [1], [1.0]),
        "tt_factors": (torch.zeros(layout.numel), layout, [1], [1.0]),
        "tt_adapter": (x, factors, layout),
        "tt_linear": (x, left, right),
        "low_rank_linear": (x, torch.zeros(1, 3, 8), left, right),
    }


def test_the_table_has_every_op_and_bounds_of_sizes_that_ops_tell(monkeypatch, calls):
    assert set(reference.__all__) - {"supports", "unavailable"} == set(dispatch.GPU_ORDER)
    told, select = {"perturb_rows": {}}, dispatch.select

    def recording(op, *args, **sizes):
        told.setdefault(op, sizes)
        return select(op, *args, **sizes)

    monkeypatch.setattr(dispatch, "select", recording)
    for op, args in calls.items():
        getattr(kernels, op)(*args)
    assert told["tt_linear"] == {"rank": 2, "tokens": 4}
    for op, orders in dispatch.GPU_ORDER.items():
        assert not orders[-1].most, f"{op}: some shapes have no order"
        for order in orders:
            assert set(order.names) <= set(dispatch.NAMES) and set(order.most) <= set(told[op]), order
            assert order.names == dispatch.NAMES or order.reason != dispatch.UNMEASURED, order


def test_explain_tells_what_would_run_and_why(native, monkeypatch):
    native(Absent)
    out = torch.zeros(3)
    found = kernels.explain("fill_normal_", out, 1)
    why_not = {"native": "the extension was not built"}
    assert found == dispatch.Explanation(
        "fill_normal_", "torch.float32 on cpu", "reference", why_not, dispatch.CPU_ORDER
    )
    assert str(found) == (
        "fill_normal_ for torch.float32 on cpu runs on reference\n  not on native: the extension was not built\n"
        "  any shape: native, reference (Triton's interpreter is for tests, and runs by name only)"
    )
    assert kernels.explain(kernels.perturb_, [out], [1], [1.0], backend="native").backend is None
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    assert kernels.explain(kernels.perturb_, [out], [1], [1.0]).passed_over == {"triton": "no driver to run on"}
    assert not out.any(), "explaining ran the op"


def test_explain_of_every_op_and_of_gradients(native, calls):
    native(Counting)
    assert kernels.explain("fill_normal_", *calls.pop("fill_normal_")).backend == "native"
    for op, args in calls.items():
        found = kernels.explain(op, *args)
        assert found.backend == "reference" and f"no {op} for" in found.passed_over["native"]
    theta, *rest = calls["tt_factors"]
    theta = theta.requires_grad_()
    found = kernels.explain("tt_factors", theta, *rest)
    assert found.backend == "reference" and "require grad" in found.passed_over["native"]
    assert found.order.reason == "derivatives are wanted" and set(found.passed_over) == {"native", "triton"}
    assert kernels.explain("tt_factors", theta, *rest, backend="triton").backend is None


def test_explain_checks_as_the_op_does(native):
    native(Counting)
    with pytest.raises(ValueError, match="unknown op None; known are fill_normal_"):
        kernels.explain(None)
    with pytest.raises(ValueError, match="unknown op 'perturb'; known are fill_normal_, perturb_, tt_factors"):
        kernels.explain("perturb", [torch.zeros(3)], [1], [1.0])
    with pytest.raises(TypeError, match="has dtype float64"):
        kernels.explain("fill_normal_", torch.zeros(3).double(), 1)
    kernels.fill_normal_(torch.empty(3), 1)  # and afterwards ops run again
    assert Counting.calls


def test_without_the_package_triton_its_backend_says_so():
    code = """
import sys

sys.modules["triton"] = None  # as where it is not installed

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adazeta_kernels as kernels

assert kernels.backends()["triton"].startswith("triton does not load ("), kernels.backends()
try:
    kernels.fill_normal_(torch.empty(3), 1, backend="triton")
except RuntimeError as error:
    assert "backend 'triton' cannot run fill_normal_" in str(error) and "does not load" in str(error)
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_whatever_listens_to_ops_sees_them():
    """Calls pass torch's dispatcher by only where nothing on it would act on them."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        pass

    names, theta = [], torch.zeros(5)
    with Seen():
        kernels.perturb_([theta], [1], [0.5])
    assert "adazeta::perturb_" in names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kernels.fill_normal_(theta, 3)
    assert "adazeta::fill_normal_" in {event.key for event in profile.key_averages()}
    assert dispatch.plain([theta]) and dispatch.plain(theta, torch.ones(2), None)
    assert not dispatch.plain([theta.as_subclass(Own)])
    assert not dispatch.plain([theta.to("meta")])
    assert not dispatch.plain(torch.ones(1), torch._neg_view(theta))
    assert kernels.fill_normal_(theta.to("meta"), 3).is_meta


def test_a_write_is_counted():
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        kernels.perturb_([weight], [1], [0.5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        assert kernels.fill_normal_(torch.empty(3), 1).any()
