"""vLLM's published lists of shapes through our ``lora_shrink`` and ``lora_expand``."""

import pytest
import torch
from vllm_stand_ins import served

import lora_kernels as lk
from lora_kernels.integrations import vllm as plugin
from lora_kernels.testing.linear import assert_within_budget

NAN = float("nan")

# vLLM's tests/lora/test_punica_ops.py. Its prompts of 128 tokens are of two here (of 128 in a few
# shapes): the lists are of shapes, and rows add nothing that these do not show.
ADAPTERS, BATCHES, ALL_RANKS = [1, 8, 32, 128], [1, 4, 16, 32], [1, 4, 8, 16, 32, 64, 128, 256]
HIDDEN = [
    *(128, 256, 512, 896, 1024, 1152, 1216, 1280, 1536, 1664, 2048, 2240, 2304, 2368, 2432, 2560),
    *(2752, 3072, 3328, 3456, 3584, 3712, 4096, 4480, 4608, 4736, 4864, 5120, 5504, 5632, 5888),
    *(6144, 6400, 6848, 6912, 7168, 7424, 8192, 8960, 9216, 9472, 10240, 11008, 11264, 13824),
    *(14336, 14784, 14848, 15360, 18944, 22016, 22528, 24576, 27392, 27648, 29568, 29696, 32000),
    *(32256, 32512, 32768, 33024, 36864, 43264, 49152, 49408, 60544, 60672, 64000, 64256, 102400),
    *(102656, 128000, 128256),
]
SHARDED = sorted({size // devices for size in HIDDEN for devices in (1, 2, 8, 16, 64)})


@pytest.fixture(scope="module")
def pool():
    """Random values that every shape's weights are windows into, by dtype."""
    values = torch.randn(128 * 256 * 2049, generator=torch.Generator().manual_seed(0)).bfloat16()
    return {torch.bfloat16: values, torch.float16: values[: 2**24].half()}


def window(pool, number, *shape):
    size = torch.Size(shape).numel()
    start = number * 12345 % (len(pool) - size + 1)
    return pool[start : start + size].view(shape)


def run_shape(pool, op, dtype, batches, adapters, rank, hidden, slices, length=2):
    """``check_lora_shrink_kernel`` and ``check_lora_expand_kernel`` of vLLM's list, with rows that
    have no adapter and the last adapter among the others."""
    pool = pool[dtype]
    generator = torch.Generator().manual_seed(batches * rank + hidden)
    slots = torch.randint(-1, adapters, (batches,), generator=generator)
    slots[-1] = adapters - 1
    slots = slots.repeat_interleave(length).to(torch.int32)
    rows = len(slots)
    # Of the metadata only the mapping is read.
    meta = (slots, *[torch.empty(0)] * 4, torch.tensor([False]), torch.tensor([adapters + 1]))
    with lk.record_plans() as answers:
        if op == "shrink":
            x = torch.randn(rows, hidden, generator=generator).to(dtype)
            weights = [window(pool, j, adapters, rank, hidden) for j in range(slices)]
            y = torch.full((slices, rows, rank), NAN)
            plugin.lora_shrink(x, weights, y, *meta, 0.5)
        else:
            x = torch.randn(slices, rows, rank, generator=generator).to(dtype)
            weights = [window(pool, j, adapters, hidden, rank) for j in range(slices)]
            y = torch.randn(rows, hidden * slices, generator=generator).to(dtype)
            before = y.clone()
            plugin.lora_expand(x, weights, y, *meta, offset_start=0, add_inputs=True)
    served(answers, "segmented_shrink" if op == "shrink" else "segmented_expand_")

    def naive(dtype):
        result = torch.zeros(y.shape, dtype=dtype) if op == "shrink" else before.to(dtype)
        for j, weight in enumerate(weights):
            for slot in set(slots.tolist()) - {-1}:
                of_slot = slots == slot
                w = weight[slot].to(dtype).t()
                if op == "shrink":
                    result[j, of_slot] = 0.5 * (x[of_slot].to(dtype) @ w)
                else:
                    columns = slice(j * hidden, (j + 1) * hidden)
                    result[of_slot, columns] += x[j, of_slot].to(dtype) @ w
        return result

    name = f"{op} {batches} prompts, {adapters} adapters, r {rank}, {hidden}, {slices} slices"
    assert_within_budget(name, y, naive(dtype), naive(torch.float64))
    if op == "expand":
        assert torch.equal(y[slots < 0], before[slots < 0])


@pytest.mark.parametrize("op", ["shrink", "expand"])
@pytest.mark.parametrize("rank", ALL_RANKS)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_vllms_list_of_batches(adapters, rank, op, pool):
    for number, batches in enumerate(BATCHES):
        # Two dtypes by turns, and every number of slices.
        dtype = (torch.bfloat16, torch.float16)[(number + rank) % 2 * (adapters * rank < 2**12)]
        for slices in (1, 2, 3):
            run_shape(pool, op, dtype, batches, adapters, rank, 2049, slices)


@pytest.mark.parametrize("op", ["shrink", "expand"])
@pytest.mark.parametrize("part", range(8))
def test_vllms_list_of_hidden_sizes(part, op, pool):
    assert len(SHARDED) > 220
    for number, hidden in enumerate(SHARDED[part::8]):
        run_shape(pool, op, torch.bfloat16, 4, 4, 32, hidden, 1 + (number + part) % 3)


@pytest.mark.parametrize("op", ["shrink", "expand"])
@pytest.mark.parametrize(("rank", "hidden", "slices"), [(16, 2049, 3), (64, 1216, 2)])
def test_vllms_prompts_of_128_tokens(rank, hidden, slices, op, pool):
    for dtype in (torch.bfloat16, torch.float16):
        run_shape(pool, op, dtype, 4, 8, rank, hidden, slices, length=128)


def test_no_lora_flag_writes_nothing():
    y, idle = torch.full((1, 2, 4), NAN), torch.tensor([True])
    meta = (torch.tensor([0, 0]), *[torch.empty(0)] * 4, idle, torch.tensor([2]))
    plugin.lora_shrink(torch.ones(2, 8), [torch.ones(1, 4, 8)], y, *meta, 1.0)
    assert y.isnan().all()
