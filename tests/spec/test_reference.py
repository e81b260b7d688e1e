"""The mathematics: against autograd, against gradcheck, and the dropout bits against Philox written
out in Python."""

import pytest
import torch

from lora_kernels.spec import reference
from lora_kernels.testing.linear import Case, naive

# Known answers of Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_in_python(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    counter, key = (tuple(torch.tensor(word) for word in words) for words in (counter, key))
    assert tuple(word.item() for word in reference.philox4x32(counter, key)) == words


@pytest.mark.parametrize(
    "rng", [(0, 0, 0, 0), (-5, 2**40 + 3, 7, 13), (2**63 - 1, -1, 2**32 - 2, 8)]
)
def test_dropout_mask_bits(rng):
    seed, offset, row0, col0 = rng
    rows, cols, p = 5, 21, 0.3
    mask = reference.dropout_mask(torch.tensor(rng), rows, cols, p)
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for i in range(rows):
        for j in range(cols):
            row, col = row0 + i, col0 + j
            counter = (row % 2**32, col // 8 % 2**32, offset % 2**32, (offset >> 32) % 2**32)
            lane = philox_in_python(counter, key)[col % 8 // 2] >> 16 * (col % 2) & 0xFFFF
            assert mask[i, j].item() == (lane >= int(p * 65536 + 0.5))


def test_dropout_mask_of_a_shard_is_its_part_of_the_whole():
    whole = reference.dropout_mask(torch.tensor([11, 4, 0, 0]), 40, 64, 0.5)
    shard = reference.dropout_mask(torch.tensor([11, 4, 9, 19]), 20, 30, 0.5)
    assert torch.equal(shard, whole[9:29, 19:49])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_mask_rate_and_independence(p):
    rows, cols = 512, 1024
    first = reference.dropout_mask(torch.tensor([1, 0, 0, 0]), rows, cols, p).double()
    other = reference.dropout_mask(torch.tensor([1, 1, 0, 0]), rows, cols, p).double()
    # Six standard deviations of a binomial mean.
    tolerance = 6 * (p * (1 - p) / (rows * cols)) ** 0.5 + 1e-5
    assert abs(first.mean().item() - (1 - p)) <= tolerance
    assert (first.mean(0) - (1 - p)).abs().max() <= 6 * (p * (1 - p) / rows) ** 0.5 + 1e-5
    assert abs((first * other).mean().item() - (1 - p) ** 2) <= 2 * tolerance


@pytest.mark.parametrize(
    ("p", "threshold"), [(0.0, 0), (1e-7, 0), (0.5, 32768), (0.1, 6554), (0.9999999, 65535)]
)
def test_dropout_threshold(p, threshold):
    assert reference.dropout_threshold(p) == threshold


def test_masked_drops_to_zero_even_nan():
    rng = torch.tensor([3, 0, 0, 0])
    mask = reference.dropout_mask(rng, 16, 24, 0.5)
    dropped = reference.masked(torch.full((16, 24), float("nan")), rng, 0.5)
    assert torch.equal(dropped.isnan(), mask)
    assert (dropped[~mask] == 0).all()


CASES = [
    Case(5, 4, 7, 3, dtype=torch.float64),
    Case(5, 4, 7, 3, dtype=torch.float64, bias=False, dropout_p=0.4),
    Case(4, 6, 6, 2, dtype=torch.float64, fan_in_fan_out=True, dropout_p=0.25),
    Case(5, 4, 7, 3, dtype=torch.float64, out_scale=True, dropout_p=0.25),
    Case(1, 1, 1, 1, dtype=torch.float64),
    Case(0, 3, 2, 1, dtype=torch.float64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_handwritten_backward_is_autograds(case):
    inputs = case.draw()
    exact = naive(inputs, torch.float64)
    y, s = reference.lora_linear_fwd(**inputs.arguments("lora_linear_fwd"))
    dx, d = reference.lora_linear_dx(**inputs.arguments("lora_linear_dx"))
    da, db, dbias = reference.lora_linear_dab(**inputs.arguments("lora_linear_dab"))
    results = {"y": y, "s": s, "d": d, "dx": dx, "da": da, "db": db, "dbias": dbias}
    for name, expected in exact.items():
        torch.testing.assert_close(results[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_reference_passes_gradcheck(case):
    inputs = case.draw()
    arguments = inputs.arguments("lora_linear_fwd")
    leaves = [arguments.pop(name).requires_grad_() for name in ("x", "lora_a", "lora_b")]

    def forward(x, lora_a, lora_b):
        return reference.lora_linear_fwd(x=x, lora_a=lora_a, lora_b=lora_b, **arguments)[0]

    assert torch.autograd.gradcheck(forward, leaves)
