"""The Triton kernels of the sparse operators, without a GPU: what they compute, and that they compile for one."""

import pytest
import torch
from tests.kernels.compiler import Compiled
from tests.kernels.interpreter import needs_triton, run_interpreted

pytestmark = needs_triton

CAPABILITIES = [80, 90]
SHARED_MEMORY = 99 * 1024
"""What a program may have on a GPU of capability 8.6 or 8.9; those of data centres have more."""


@pytest.mark.slow
def test_kernels_equal_the_reference():
    run_interpreted("interpreted_fused.py")


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A function that replaces a kernel by its compiler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def replace(module, name: str, capability: int) -> Compiled:
        stand_in = Compiled(getattr(module, name), capability)
        monkeypatch.setattr(module, name, stand_in)
        return stand_in

    return replace


def entries():
    feature, token = torch.tensor([0, 3, 1]), torch.tensor([0, 0, 1])
    return feature, token, torch.tensor([0, 2, 3])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_compile(compiled, capability, bits):
    from circuitmill.kernels import fused

    feature, token, offsets = entries()
    kernel = compiled(fused, "_weighted_sums", capability)
    other = compiled(fused, "_partial_dots", capability)
    values = torch.ones(3, dtype=torch.float64 if bits == torch.float64 else torch.float32)
    weight, rows = torch.ones(4, 1024, dtype=bits), torch.ones(2, 1024, dtype=values.dtype)
    fused.decode(values, feature, offsets, weight)
    fused.segments(values, rows, token, torch.tensor([0, 1, 2, 2, 3]), bits)
    fused.dots(rows, weight, feature, token)
    results = kernel.results + other.results
    assert len(results) == 3
    for result in results:
        assert result.metadata.shared <= SHARED_MEMORY
        # rows are read in pieces of 16 bytes
        assert "ld.global.v4.b32" in result.asm["ptx"] or "ld.global.v2.b64" in result.asm["ptx"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("bits", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_comparisons_compile(compiled, capability, bits, precision):
    from circuitmill.kernels import encode

    compare, listing = (compiled(encode, name, capability) for name in ("_compare", "_list"))
    sums = torch.zeros(64, dtype=torch.float64 if bits == torch.float64 else torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        bits_, _ = encode._compared(torch.ones(64, 48, dtype=bits), torch.ones(64, 48, dtype=bits), sums, sums, sums)
    finally:
        torch.set_float32_matmul_precision(before)
    encode._listed(bits_, torch.zeros(65, dtype=torch.int64), 0)
    assert listing.results
    (result,) = compare.results
    assert result.metadata.shared <= SHARED_MEMORY
    # matrix units, in all types that they have been taught
    if bits != torch.float64:
        assert ("wgmma" if capability == 90 else "mma.sync") in result.asm["ptx"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_adam_compiles(compiled, capability, bits):
    from circuitmill.kernels import adam

    kernel = compiled(adam, "_update", capability)
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "factor": 1.0}
    weight = torch.ones(4, 512, dtype=bits)
    moments = torch.zeros(4, 512, dtype=torch.float64 if bits == torch.float64 else torch.float32)
    adam.adam_(weight, weight, moments, moments, **options, step=1, seed=2**40, block=64)
    adam.adam_(weight, weight, moments.to(bits), moments.to(bits), **options, step=1, seed=0)
    assert len(kernel.results) == 2
