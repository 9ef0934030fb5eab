"""How close is close enough: no worse than torch is, in the same dtype, or what rounding may do.

Libraries promise neither an order of sums nor equal bits at another shape, offset, batch or number
of threads. Equal bits are asked of copies, of integers and of the same call made twice.
"""

import math

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


def rounding(operations):
    """Relative error of so many float32 operations that follow one another, in any order.

    n u / (1 - n u) with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1);
    a product of n terms has n operations, exp and log count as 4.
    """
    return operations * 2.0**-24 / (1 - operations * 2.0**-24)


def products_within(a, b):
    """[.., n, m]: how far float32 products of a [.., n, D] and b [.., D, m] may be off."""
    return rounding(a.shape[-1]) * (a.double().abs() @ b.double().abs())


def _weight_rounding(q, k, scale):
    """Relative error of float32 weights exp(score - lse) of q and k [B, H, L, D].

    Scores err by `rounding` of D products and a scale, times the largest sum of their absolute
    values. The LSE takes that over, and the sum over all keys comes on top. Both are in the
    exponent, where the LSE may be one more term of the product.
    """
    D, keys = q.shape[-1], k.shape[-2]
    largest = scale * float((q.double().abs() @ k.double().abs().mT).max())
    # the LSE is at most the largest score and the log of the number of keys
    exponent = rounding(D + 4) * (2 * largest + math.log(keys))
    return 2 * exponent + rounding(keys + 8)


def mass_rounding(q, k, scale, block_q=64, block_k=64):
    """Relative error of float32 block masses: that of the weights; columns are summed, then rows."""
    return _weight_rounding(q, k, scale) + rounding(block_q + block_k + 8)


def attention_rounding(q, k, v, scale):
    """How far float32 attention over keys of any choice may be off: weights, and sums over keys."""
    largest = float(v.abs().max())
    return (_weight_rounding(q, k, scale) + rounding(k.shape[-2])) * largest


def assert_same_choice(keep, expected, scores, error):
    """Fail unless two choices of blocks differ only where rounding may decide.

    Args:
        keep, expected: [.., Nk] bool, rows that keep their blocks of highest score.
        scores: [.., Nk] float64. error: [.., Nk], how far a score may be off.
    """
    assert torch.equal(keep.sum(-1), expected.sum(-1)), "other numbers of blocks"
    infinity = float("inf")
    gained = (scores + error).masked_fill(~(keep & ~expected), infinity).amin(-1)
    lost = (scores - error).masked_fill(~(expected & ~keep), -infinity).amax(-1)
    assert (gained >= lost).all(), f"{int((keep != expected).sum())} blocks are not those expected"
