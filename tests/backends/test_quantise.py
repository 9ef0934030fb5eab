import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.backends import reference
from sparse_attn.backends.triton.quantise import PAD, TILE, key_order, quantise, rotation
from tests.backends import inputs

VALUES = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])


def run(q, k, v, dtype=torch.int8, **options):
    return quantise(q, k, v, scale=0.1, values=dtype, **options)


def values(x):
    """[B, H, tokens, D] values as they are stored."""
    return inputs.stored_values(x.v, x.v_tile_scale, x.v_scale.shape[-1])


def restored(x, stored):
    scale, mean = (y[:, :, None].double() for y in (x.v_scale, x.v_mean))
    return stored * scale + mean


def allowed(x, v, tile_scale):
    """Half a step: 1/16 of e4m3, whose interpreter drops what lies below 2^-6; of int8 its scale.

    Those may round up to 15/128 of a step off the half, so that their errors cancel.
    """
    if tile_scale is None:
        error = (v.double() - x.v_mean[:, :, None]).abs() / 16 + x.v_scale[:, :, None] * 2**-6
    else:
        steps = tile_scale.repeat_interleave(TILE, 2)[:, :, : v.shape[2]]
        steps = steps.repeat_interleave(64, -1)
        error = x.v_scale[:, :, None] * steps * (0.501 + 15 / 128)
    return error + 1e-5


@pytest.mark.parametrize("D", [64, 128])
def test_the_rotation_is_orthogonal(D, device):
    matrix = rotation(D, torch.float32, device)
    assert torch.equal(matrix @ matrix.T, D * torch.eye(D, device=device))


@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_scores_come_back_less_the_keys_mean(layout, device):
    B, H, Lq, Lk, D = 2, 2, 150, 200, 128
    q, k, v = inputs.make(B, H, Lq, Lk, D, torch.bfloat16, device, layout)
    k = k + 3
    x = run(q, k, v)
    scores = x.q[:, :, :Lq].double() @ x.k[:, :, :Lk].double().mT
    scores *= x.q_scale[:, :, :Lq, None]
    scores *= x.k_scale.repeat_interleave(TILE, 2)[:, :, None, :Lk]
    exact = 0.1 * q.double() @ k.double().mT
    got = scores * 0.6931471805599453 + x.q_shift[:, :, :Lq, None]
    error = (got - exact).norm() / (exact - exact.mean(-1, keepdim=True)).norm()
    # a step is 1/127 of the largest
    assert error < 0.015, error


def test_an_outlying_channel_costs_no_precision(device):
    q, k, v = inputs.make(1, 1, 128, 128, 128, torch.bfloat16, device)
    q[..., 5] *= 30
    x = run(q, k, v)
    scores = x.q[:, :, :128].double() @ x.k[:, :, :128].double().mT
    scores *= x.q_scale[..., None] * x.k_scale.repeat_interleave(TILE, 2)[:, :, None]
    centred = k.double() - k.double().mean(2, keepdim=True)
    exact = 0.1 * q.double() @ centred.mT / 0.6931471805599453
    assert (scores - exact).norm() / exact.norm() < 0.015


@VALUES
def test_padding_is_zero(dtype, device):
    B, H, Lq, Lk, D = 1, 2, 100, 70, 64
    q, k, v = inputs.make(B, H, Lq, Lk, D, torch.float16, device)
    x = run(q, k + 5, v + 5, dtype)
    assert x.q.shape == (B, H, PAD, D) and x.k.shape == (B, H, 2 * TILE, D)
    assert (x.q[:, :, Lq:] == 0).all() and (x.k[:, :, Lk:] == 0).all()
    assert (values(x)[:, :, Lk:] == 0).all()
    assert (x.q_scale[:, :, Lq:] == 0).all()


@VALUES
@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_values_come_back(offset, dtype, device):
    B, H, L, D = 2, 1, 130, 64
    q, k, v = inputs.make(B, H, L, L, D, torch.bfloat16, device)
    v = v + offset
    x = run(q, k, v, dtype)
    error = (restored(x, values(x))[:, :, :L] - v.double()).abs()
    assert (error <= allowed(x, v, x.v_tile_scale)).all()


@pytest.mark.parametrize("D", [64, 128])
def test_errors_of_a_channel_cancel_within_a_tile(D, device):
    q, k, v = inputs.make(1, 2, 640, 640, D, torch.bfloat16, device)
    x = run(q, k, v)
    error = (restored(x, values(x)) - v.double()) / x.v_scale[:, :, None].double()
    steps = error.unflatten(2, (-1, TILE)) / x.v_tile_scale.repeat_interleave(64, -1)[:, :, :, None]
    # 64 errors of rounding to the nearest add up to sqrt(64 / 12) = 2.3 steps; half of that
    assert steps.sum(3).square().mean().sqrt() < 1.15
    assert steps.square().mean().sqrt() < 0.31


def test_only_a_mean_that_matters_is_taken_from_the_values(device):
    q, k, v = inputs.make(1, 1, 4096, 4096, 64, torch.bfloat16, device)
    v[..., 3] += 2
    v[..., 5] += 0.2
    mean = run(q, k, v).v_mean[0, 0]
    assert mean[3] > 1.9 and mean[5] > 0.1 and (mean == 0).any()
    # what is left is a number of as few bits as the values were
    step = 2.0 ** v[0, 0].abs().amax(0).log2().floor() / 128
    assert torch.equal(mean / step, (mean / step).round())
    assert ((mean - v[0, 0].float().mean(0)).abs() <= step * 0.51).all()


def test_key_order_is_how_values_lie(device):
    order = key_order()
    assert torch.equal(order.sort().values, torch.arange(TILE))
    # what a lane holds as scores is what it must hold as weights
    for t in range(4):
        assert order[4 * t : 4 * t + 4].tolist() == [2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]
    q, k, v = inputs.make(1, 1, 64, 64, 64, torch.bfloat16, device)
    v[:] = torch.arange(64, device=device)[:, None] - 31.5
    x = run(q, k, v)
    assert torch.equal(x.v[0, 0, 5].argsort().argsort(), order.to(device))


def test_a_long_sequence_is_sampled_and_still_exact(device):
    q, k, v = inputs.make(1, 1, 64, 64 * 130, 64, torch.bfloat16, device)
    k[:, :, ::2] += 4
    x = run(q, k, v)
    scores = x.q[:, :, :64].double() @ x.k.double().mT
    scores *= x.q_scale[:, :, :64, None]
    scores *= x.k_scale.repeat_interleave(TILE, 2)[:, :, None]
    got = scores * 0.6931471805599453 + x.q_shift[:, :, :64, None]
    exact = 0.1 * q.double() @ k.double().mT
    assert (got - exact).norm() / exact.norm() < 0.015


@VALUES
def test_equal_keys_and_values_give_no_nan(dtype, device):
    q = torch.ones(1, 1, 64, 64, device=device, dtype=torch.bfloat16)
    x = run(q, q, q, dtype)
    for y in (x.q_scale, x.q_shift, x.k_scale, x.v_scale, x.v_mean):
        assert torch.isfinite(y).all()
    assert torch.allclose(restored(x, values(x)), q.double())


@VALUES
def test_what_a_bias_hides_is_zero_and_not_counted(dtype, device):
    B, H, L, D = 2, 1, 200, 64
    q, k, v = inputs.make(B, H, L, L, D, torch.bfloat16, device)
    bias = torch.zeros(B, L, device=device)
    bias[1, 20:150] = float("-inf")
    k[1, :, 20:150] = v[1, :, 20:150] = float("nan")
    x = run(q, k + 3, v + 9, dtype, key_bias=bias)
    assert (x.k[1, :, 20:150] == 0).all() and (values(x)[1, :, 20:150] == 0).all()
    seen = torch.cat([v[1:, :, :20], v[1:, :, 150:]], 2).add(9).double()
    # a mean is a whole number of steps of the values, 2^-7 of their largest power of 2
    step = 2.0 ** seen.amax((0, 2)).log2().floor() / 128
    assert ((x.v_mean[1] - seen.mean((0, 2))).abs() <= step * 0.501).all()
    assert torch.isfinite(x.k_scale).all() and torch.isfinite(x.q_shift).all()


@VALUES
def test_pooled_keys_and_values_are_quantised_as_those_of_tokens(dtype, device):
    q, k, v = inputs.make(1, 2, 200, 64 * 65 + 9, 64, torch.bfloat16, device)
    order = inputs.random_orders(1, 2, k.shape[2], device)
    pooled = reference.permute(None, k + 3, v + 9, order).pooled
    pooled.log_sizes[0, 5] = float("-inf")
    pooled.k_mean[0, :, 5] = pooled.v_mean[0, :, 5] = float("nan")
    x = run(q, k + 3, v + 9, dtype, pooled=pooled)
    plain = run(q, k + 3, v + 9, dtype)
    assert torch.equal(x.k, plain.k) and torch.equal(x.v_scale, plain.v_scale)
    shown = torch.arange(66, device=device) != 5
    scores = x.q[:, :, :200].double() @ x.pooled_k[:, :, :66].double().mT
    scores *= x.q_scale[:, :, :200, None]
    scores *= x.pooled_k_scale.repeat_interleave(TILE, 2)[:, :, None, :66]
    got = scores * 0.6931471805599453 + x.q_shift[:, :, :200, None]
    exact = 0.1 * q.double() @ pooled.k_mean.double().mT
    assert (got - exact)[..., shown].norm() / exact[..., shown].norm() < 0.015
    stored = inputs.stored_values(x.pooled_v, x.pooled_v_tile_scale, 64)[:, :, :66]
    error = (restored(x, stored) - pooled.v_mean.double()).abs()
    within = error <= allowed(x, pooled.v_mean, x.pooled_v_tile_scale)
    assert within[:, :, shown].all()
    assert (x.pooled_k[:, :, 5] == 0).all() and torch.isfinite(x.pooled_k_scale).all()
