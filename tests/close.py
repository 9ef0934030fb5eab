"""How close is close enough: no worse than torch is, in the same dtype."""

import torch

# Triton's interpreter truncates to bfloat16, which errs twice as much as rounding
TRUNCATION = 2.0


def assert_as_accurate_as(name, out, same_dtype, exact, factor=2.0):
    """Fail unless `out` errs at most `factor` times as much as torch does.

    Args:
        out: what the kernel returned.
        same_dtype: torch's answer computed in the dtype of `out`.
        exact: the reference computed in float64.
    """
    assert out.shape == exact.shape, f"{name}: shape {list(out.shape)}, not {list(exact.shape)}"
    assert torch.isfinite(out).all(), f"{name}: {int((~torch.isfinite(out)).sum())} non-finite"
    if out.dtype == torch.bfloat16 and out.device.type == "cpu":
        factor *= TRUNCATION
    error = (out.double() - exact).abs().max().item()
    allowed = factor * (same_dtype.double() - exact).abs().max().item() + 1e-6
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def assert_within(name, out, exact, tolerance):
    """Fail unless `out` is within an absolute `tolerance`; infinities must agree."""
    assert out.shape == exact.shape, f"{name}: shape {list(out.shape)}, not {list(exact.shape)}"
    out = out.double()
    assert torch.equal(torch.isinf(out), torch.isinf(exact)), f"{name}: infinities differ"
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isnan(out), torch.isnan(exact)), f"{name}: NaN differ"
    error = (out[finite] - exact[finite]).abs().max().item() if finite.any() else 0.0
    assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.2e}"
