"""Loading the compiled part."""

import logging

from fastvid.kernels._shared import native


def test_a_library_that_does_not_load_is_reported_once(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "_csrc.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    native.failure.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "fastvid.kernels"):
            assert not native.loaded()
            assert not native.loaded()
        assert str(broken) in native.failure()
        assert native.BUILD in native.failure()
    finally:
        native.failure.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_cuda_kernels_are_there_only_in_a_library_that_has_them():
    import torch

    assert native.cuda_loaded() == hasattr(torch.ops.fastvid_cuda, "guided_step")
    if torch.version.cuda is None:
        assert not native.cuda_loaded()
