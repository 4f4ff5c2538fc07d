"""The Triton backend on a machine without a GPU, and what does not need one: the choice of configurations."""

import contextlib
import importlib
import json
import logging

import pytest
import torch

import adazeta_kernels as kernels
from adazeta_kernels import TTAdapterLayout

triton = pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from adazeta_kernels.backends import triton as backend  # noqa: E402
from adazeta_kernels.backends.triton import elementwise, launch, token_launch, tuning  # noqa: E402
from adazeta_kernels.backends.triton.launch import Configuration, Limits  # noqa: E402

CANDIDATES = [Configuration((("BLOCK", block),), num_warps=4) for block in (1024, 2048, 4096)]
GPU = torch.device("cuda", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: only without one has Triton no driver")
def test_without_a_driver_the_call_names_the_cause():
    reason = kernels.backends()["triton"]
    assert f"triton {triton.__version__} has no driver" in reason and "sees no GPU" in reason
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run fill_normal_ .* no driver to run on"):
        kernels.fill_normal_(torch.zeros(3), 1, backend="triton")
    assert kernels.explain("fill_normal_", torch.zeros(3), 1, backend="triton").backend is None


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Runs `choose` as on a GPU, with times given instead of measured; counts measurements."""
    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path))
    monkeypatch.delenv("ADAZETA_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB/HBM3")
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    times = {1024: 3.0, 2048: 1.0, 4096: 2.0}
    measured = []

    def fastest(candidates, device, run):
        measured.append(run)
        return min(candidates, key=lambda configuration: times[configuration["BLOCK"]])

    monkeypatch.setattr(tuning, "_fastest", fastest)
    for function in (tuning._path, tuning._chosen):
        function.cache_clear()
        monkeypatch.setattr(tuning, function.__name__, function)

    def choose(shapes=(64,), candidates=CANDIDATES):
        return tuning.choose("perturb_", shapes, candidates, GPU, lambda: "a run")

    yield choose, measured, tmp_path
    tuning._path.cache_clear()
    tuning._chosen.cache_clear()


def test_a_configuration_is_measured_once_and_kept(tuned):
    choose, measured, folder = tuned
    assert [choose()["BLOCK"] for _ in range(3)] == [2048] * 3 and measured == ["a run"]
    choose((128,))
    assert len(measured) == 2
    (file,) = folder.iterdir()
    assert file.name == f"triton-{triton.__version__}-NVIDIA-H100-80GB-HBM3.json"
    assert json.loads(file.read_text())["perturb_ 64"] == {"sizes": [["BLOCK", 2048]], "num_warps": 4, "num_stages": 1}
    tuning._chosen.cache_clear()  # as in another process
    assert choose()["BLOCK"] == 2048 and len(measured) == 2
    # A choice that a new version no longer offers is measured anew.
    assert choose(candidates=[CANDIDATES[0], CANDIDATES[2]])["BLOCK"] == 4096 and len(measured) == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"perturb_ 64": {"num_warps": 4}}', '{"perturb_ 64": 7}'])
def test_an_unusable_file_is_said_and_measured_anew(tuned, caplog, text):
    choose, measured, _ = tuned
    choose()
    path = tuning._path(torch.cuda.get_device_name(GPU))
    path.write_text(text)
    tuning._chosen.cache_clear()
    with caplog.at_level(logging.WARNING, logger="adazeta_kernels"):
        assert choose()["BLOCK"] == 2048
    assert len(measured) == 2 and "are unusable, measuring anew" in caplog.text
    assert json.loads(path.read_text())["perturb_ 64"]["sizes"] == [["BLOCK", 2048]]


def test_a_folder_that_cannot_be_written_is_no_error(tuned, caplog, monkeypatch):
    choose, _, folder = tuned
    (folder / "file").write_text("")
    monkeypatch.setenv("ADAZETA_CACHE", str(folder / "file"))
    with caplog.at_level(logging.WARNING, logger="adazeta_kernels"):
        assert choose()["BLOCK"] == 2048
    assert "cannot be kept" in caplog.text


def test_no_measurement_while_capturing_or_when_switched_off(tuned, monkeypatch):
    choose, measured, _ = tuned
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert choose() is CANDIDATES[0]
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    monkeypatch.setenv("ADAZETA_AUTOTUNE", "0")
    assert choose() is CANDIDATES[0] and not measured
    monkeypatch.delenv("ADAZETA_AUTOTUNE")
    assert choose()["BLOCK"] == 2048  # what was not measured is not remembered either


def test_configurations_fit_the_device():
    def need(configuration):
        return Limits(shared_bytes=32 * configuration["BLOCK"], registers=configuration["BLOCK"] // 16)

    assert launch.configurations(CANDIDATES, need, Limits(64 << 10, 255)) == CANDIDATES[:2]
    assert launch.configurations(CANDIDATES, need, Limits(227 << 10, 255)) == CANDIDATES[:2]
    assert launch.configurations(CANDIDATES, need, Limits(227 << 10, 512), most=1) == CANDIDATES[:1]
    with pytest.raises(ValueError, match="no configuration fits"):
        launch.configurations(CANDIDATES, need, Limits(1024, 255))


def test_shapes_of_one_class_are_rounded_up():
    assert launch.shape_class(1, 3, 4, 1025, 0) == (1, 4, 4, 2048, 0)


class DriverOfNoDevice:
    """As much of a driver as compiling needs."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch):
    """Launches compile and run nothing; `(kernel name, signature, constants, aligned names, options)` of each."""
    launches = []

    class Compiling:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def compile(*args, **kwargs):
                made = self.kernel.warmup(*args, grid=grid, **kwargs)
                constants = {self.kernel.arg_names[k]: value for (k,), value in made.src.constants.items()}
                aligned = {self.kernel.arg_names[k] for (k,), attributes in made.src.attrs.items() if attributes}
                options = made.metadata.num_warps, made.metadata.num_stages, made.metadata.enable_fp_fusion
                launches.append((self.kernel.__name__, made.src.signature, constants, aligned, options))

            return compile

    original = launch.launch
    monkeypatch.setattr(launch, "launch", lambda kernel, *rest, **kwargs: original(Compiling(kernel), *rest, **kwargs))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(triton.runtime.driver, "_active", DriverOfNoDevice())
    return launches


def listed(modules):
    """What the specimens are, as `compiled` tells launches."""
    found = []
    for module in modules:
        for specimen in importlib.import_module(f"adazeta_kernels.backends.triton.{module}").specimens():
            names = specimen.kernel.arg_names
            signature = {name: specimen.signature.get(name, "constexpr") for name in names}
            options = specimen.num_warps, specimen.num_stages, specimen.fp_fusion
            aligned = set(specimen.aligned)
            found.append((specimen.kernel.__name__, signature, specimen.constexprs, aligned, options))
    return found


@pytest.mark.slow
def test_a_launch_compiles_what_the_specimens_list(compiled):
    """Whatever the lengths, addresses, offsets and numbers of seeds: a kernel is compiled once per configuration."""
    configuration = elementwise._fitting(0, launch.SMALLEST)[0]
    for numel, seed, offset in ((100, 2**64 - 1, 2**63 - 100), (1, 1, 1), (16, 16, 16)):
        theta, seeds, scales = torch.zeros(numel + 1)[1:], torch.full((numel,), seed % 2**31), torch.ones(numel)
        backend.fill_normal_(theta, seed, offset, "rademacher", configuration=configuration)
        backend.perturb_([theta] * numel, seeds, scales, 0, 1.0, "rademacher", configuration=configuration)
        backend.perturb_rows(theta, seeds, scales, offset, "rademacher", configuration=configuration)
    launch._through_launches(torch.tensor([seed % 2**31, -1]), torch.device("cpu"))
    assert len(compiled) == 10
    known = listed(["fill_normal", "perturb", "perturb_rows", "launch"])
    assert all(found in known for found in compiled)
    assert len({str(found) for found in compiled}) == 4


@pytest.mark.slow
def test_a_launch_of_a_tt_op_compiles_what_the_specimens_list(compiled):
    """Whatever the numbers of probes and tokens, the ranks of a class, the bottleneck and the distances of rows."""
    tokens = Configuration((("TOKENS", 16), ("WIDTH", 32)), num_warps=4, num_stages=3)
    contraction = Configuration((("ROWS", 32), ("COLUMNS", 32)))
    seeds, scales = torch.arange(3), torch.ones(3)
    for width, bottleneck, rank, count in ((64, 48, 32, 1), (48, 23, 17, 16)):
        layout = TTAdapterLayout.auto(width, bottleneck, rank, shapes={"width": (width,), "bottleneck": (bottleneck,)})
        assert layout.down.bond == layout.up.bond == rank
        theta, factors = torch.zeros(count * layout.numel), torch.zeros(3, layout.factor_numel)
        backend.tt_factors(theta, layout, seeds, scales, count, "gaussian", configuration=contraction, shares=count)
        x = torch.zeros(3, count, width, dtype=torch.float16)
        for shares in (1, token_launch._SHARES):
            backend.tt_adapter(x, factors, layout, "gelu", 0.5, configuration=tokens, shares=shares)
        left, right, bias = torch.zeros(3, width, rank), torch.zeros(3, rank, 32), torch.zeros(3, 32)
        backend.tt_linear(x, left, right, bias, configuration=tokens, shares=1)
        backend.low_rank_linear(x, x[..., :32], left, right, 0.5, configuration=tokens, shares=1)
    assert len(compiled) == 14
    assert len({str(found) for found in compiled}) == 7
    known = listed(["tt_factors", "tt_adapter"])
    alone = [found for found in compiled if found[0] != "low_rank_kernel"]
    assert len(alone) == 10 and all(found in known for found in alone)
    (shared, *_) = listed(["low_rank_linear"])
    for name, _, _, aligned, _ in compiled:  # its specimens have a base and a bias, of which each op has one at most
        assert name != "low_rank_kernel" or aligned <= shared[3]
