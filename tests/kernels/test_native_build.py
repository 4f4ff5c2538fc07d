"""The extension module: what it links to, what it exports, what importing it does."""

import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from adazeta_kernels import _native, backends
from adazeta_kernels.backends import native

MODULE = _native.__file__

needs_binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("ldd")), reason="nm or ldd is missing (binutils)"
)


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_python(code):
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_binutils
def test_exports_nothing_but_the_module_init():
    defined = [line.split()[-1] for line in output("nm", "-D", "--defined-only", MODULE).splitlines()]
    assert defined == ["PyInit__native"]


@needs_binutils
def test_links_to_neither_torch_nor_cuda():
    linked = re.sub(r"\(0x\w+\)", "", output("ldd", MODULE))  # addresses: by chance one has the digits c10
    for word in ("torch", "c10", "cudart", "libcuda", "libpython"):
        assert word not in linked, linked
    wanted = output("nm", "-D", "--undefined-only", MODULE)
    assert not re.search(r"c10|at6Tensor|cuda", wanted)


def test_import_loads_no_driver_and_uses_no_gpu():
    mapped = run_python(
        """
        import adazeta_kernels
        from adazeta_kernels import _native
        adazeta_kernels.backends()
        import torch
        assert not torch.cuda.is_initialized()
        print(open("/proc/self/maps").read())
        """
    )
    assert "_native" in mapped
    assert "libcuda.so" not in mapped


@pytest.mark.parametrize("first", ["torch", "_native"])
def test_threads_work_in_either_import_order(first):
    """torch brings a libgomp of its own, the module links to the system's: whichever comes first serves both."""
    load_native = f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("adazeta_kernels._native", {MODULE!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        """
    load_torch = """
        import torch
        """
    order = [load_torch, load_native] if first == "torch" else [load_native, load_torch]
    printed = run_python(
        "".join(order)
        + """
        import hashlib
        import re
        torch.set_num_threads(2)
        out = torch.empty(300_000)
        for _ in range(3):
            native.fill_normal(out.data_ptr(), out.numel(), 0, 5, 3, 0, 2)
            total = (out.view(300, 1000) @ out.view(1000, 300)).sum()
        assert total.isfinite()
        names = set(re.findall(r"/[^ ]*libgomp[^ ]*$", open("/proc/self/maps").read(), re.M))
        assert len(names) <= 1, names
        print(hashlib.sha256(out.numpy().tobytes()).hexdigest())
        """
    )
    import hashlib

    from adazeta_kernels import fill_normal_

    here = fill_normal_(torch.empty(300_000), 5, offset=3, backend="reference")
    assert printed.strip() == hashlib.sha256(here.numpy().tobytes()).hexdigest()


def test_backends_tell_what_runs():
    report = backends()
    assert report["native"] is None
    assert report["reference"] is None


def test_without_the_module_the_reason_is_told_and_the_reference_runs():
    run_python(
        """
        import sys
        sys.modules["adazeta_kernels._native"] = None
        import torch
        import adazeta_kernels
        reason = adazeta_kernels.backends()["native"]
        assert "does not load" in reason and "pip install -e ." in reason, reason
        adazeta_kernels.perturb_([torch.zeros(3)], [1], [1.0])
        try:
            adazeta_kernels.perturb_([torch.zeros(3)], [1], [1.0], backend="native")
        except RuntimeError as error:
            assert "does not load" in str(error)
        else:
            raise AssertionError("a named backend that is missing must raise")
        """
    )


def test_device_count_tells_the_reason():
    if not _native.cuda_built():
        with pytest.raises(RuntimeError, match="built without CUDA"):
            _native.cuda_device_count()
    elif torch.cuda.is_available():
        assert _native.cuda_device_count() == torch.cuda.device_count()
    else:
        try:
            assert _native.cuda_device_count() == 0
        except RuntimeError as error:
            assert re.search("driver|device", str(error))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dtype": 9}, "dtype code"),
        ({"distribution": -1}, "distribution code"),
        ({"threads": 0}, "at least 1 thread"),
        ({"offset": 2**63}, "indices below 2"),
        ({"numel": -1}, "indices below 2"),
    ],
)
def test_bad_codes_raise_before_anything_is_written(arguments, match):
    out = torch.zeros(4)
    good = {"numel": 4, "dtype": 0, "seed": 1, "offset": 0, "distribution": 0, "threads": 1}
    with pytest.raises(ValueError, match=match):
        _native.fill_normal(out=out.data_ptr(), **(good | arguments))
    assert (out == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: tests/kernels/test_gpu.py uses it")
def test_without_a_gpu_the_cause_is_named():
    reason = native.supports("perturb_", device="cuda", dtype=torch.float32)
    assert re.search("^CUDA: .*(built without CUDA|driver|device)", reason), reason
    if _native.cuda_built():
        out = torch.zeros(4)
        with pytest.raises(RuntimeError, match=r"fill_normal_ on CUDA device 0: .*(driver|device).* \(cudaError \d+\)"):
            _native.cuda_fill_normal(out.data_ptr(), 4, 0, 1, 0, 0, (0, 0))
        assert (out == 0).all()
