import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.backends.triton.permute import arrange
from tests.backends import kernel_reference as reference

# B, H, L, D, layout
CASES = [
    (1, 1, 1, 64, "BHLD"),  # one token
    (2, 3, 300, 64, "BLHD"),  # ragged; batch; the host's strides
    (1, 2, 128, 128, "packed"),  # nothing ragged
    (1, 1, 64 * 65 + 7, 64, "BHLD"),  # more means than one block of them
]


def made(case, device):
    """x, and an order for every head."""
    B, H, L, D, layout = case
    x = reference.make(B, H, L, L, D, torch.bfloat16, device, layout)[0]
    return x, reference.random_orders(B, H, L, device)


def moved(x, order):
    return x.gather(2, order.long()[..., None].expand_as(x))


def block_means(x):
    """Float64 means of every 64 tokens of [B, H, L, D]."""
    return torch.stack([part.mean(2) for part in x.double().split(64, 2)], 2)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-L{}-D{}-{}".format(*c))
def test_gives_every_token_its_place(case, device):
    x, order = made(case, device)
    out = arrange(x, order)
    assert out.is_contiguous() and torch.equal(out, moved(x, order))


def test_heads_may_share_an_order(device):
    x, order = made(CASES[1], device)
    for shared in (order[:1, :1], order[:, :1], order[:1]):
        whole = shared.expand(x.shape[:3])
        assert torch.equal(arrange(x, whole), moved(x, whole))


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-L{}-D{}-{}".format(*c))
def test_appends_the_mean_of_every_block(case, device):
    x, order = made(case, device)
    B, H, L, D, _ = case
    out = arrange(x, order, means=True)
    N = -(-L // 64)
    assert out.shape == (B, H, N * 64 + -(-N // 64) * 64, D)
    assert torch.equal(out[:, :, :L], moved(x, order))
    expected = block_means(moved(x, order))
    means = out[:, :, N * 64 : N * 64 + N].double()
    # bfloat16 has 8 bits, and Triton's interpreter truncates to them
    assert (means - expected).abs().max() <= expected.abs().max() * 2**-7
    assert not out[:, :, L : N * 64].any() and not out[:, :, N * 64 + N :].any()


def test_a_second_call_gives_the_same_bits(device):
    x, order = made(CASES[1], device)
    assert torch.equal(arrange(x, order, means=True), arrange(x, order, means=True))


def test_refuses_an_order_of_another_length(device):
    x, order = made(CASES[1], device)
    with pytest.raises(ValueError, match=r"`order` must be \[2, 3, 300\] int32, got \[2, 3, 299\]"):
        arrange(x, order[..., :-1])
    with pytest.raises(ValueError, match=r"got \[300\]"):
        arrange(x, order[0, 0])
    with pytest.raises(ValueError, match="int64"):
        arrange(x, order.long())
