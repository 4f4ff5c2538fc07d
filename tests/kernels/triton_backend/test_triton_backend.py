"""The Triton backend on a machine without a GPU, and what does not need one: the choice of configurations."""

import json
import logging

import pytest
import torch

import adazeta_kernels as kernels

triton = pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from adazeta_kernels.backends.triton import launch, tuning  # noqa: E402
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
