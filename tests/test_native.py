"""The compiled module: what it says of itself, and its allocator setting."""

import platform

import pytest

from fastcifar import native

pytestmark = pytest.mark.skipif(native.module() is None, reason=f"no compiled module: {native.why_not()}")


def test_build_info_names_compiler_and_parts():
    info = native.build_info()
    assert info["compiler"] and isinstance(info["cuda"], bool) and isinstance(info["openmp"], bool)
    assert native.has_cuda() == info["cuda"]


def test_the_allocator_keeps_memory_with_glibc():
    assert native.tune_allocator() == (platform.libc_ver()[0] == "glibc")


def test_kept_memory_is_not_mapped_anew():
    """A freed large tensor's pages come back without page faults."""
    resource = pytest.importorskip("resource")
    import torch

    if not native.tune_allocator():
        pytest.skip("this C library has no such setting")

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.empty(32 * 2**20, dtype=torch.uint8).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 10 * 32 * 2**20 / 4096 / 10
