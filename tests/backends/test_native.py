"""The CPU extension's own operators, for every instruction set, and the module that loads it.

A process holds one extension. So `test_masked_*` and the files of OTHERS test whichever one this
process has, and `test_every_instruction_set` runs them again in one process for each of the other
instruction sets: all of them with --whole, else the DRAWN ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.spec import native

OTHERS = ("test_native_linear.py", "test_native_segmented.py", "test_native_four_bit.py")
DRAWN = "test_masked or test_sizes or keeps_the_budget or mixed_batch"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """Philox4x32-10 on Python's integers: slow, and plain to read."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = product1 >> 32 ^ c1 ^ k0, product1 & 0xFFFFFFFF
        c2, c3 = product0 >> 32 ^ c3 ^ k1, product0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def halves(value):
    return value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF


def signed(value):
    return value - 2**64 if value >= 2**63 else value


def keeps(rng, rows, cols, dropout_p):
    """The mask as bool [rows, cols], one element after the other."""
    seed, offset, row0, col0 = rng
    threshold = min(int(dropout_p * 65536 + 0.5), 65535)
    words = {}
    mask = torch.empty(rows, cols, dtype=torch.bool)
    for i in range(rows):
        for j in range(cols):
            group, lane = divmod(col0 + j, 8)
            if (i, group) not in words:
                counter = (halves(row0 + i)[0], halves(group)[0], *halves(offset))
                words[i, group] = philox(counter, halves(seed))
            value = words[i, group][lane // 2] >> 16 * (lane % 2) & 0xFFFF
            mask[i, j] = value >= threshold
    return mask


def bits(x):
    return x.contiguous().view(INTEGER[x.element_size()])


def check(x, rng, dropout_p):
    out = torch.ops.lora_kernels_cpu.masked(x, torch.tensor(rng), dropout_p)
    keep = keeps(rng, *x.shape, dropout_p)
    assert out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous()
    assert torch.equal(bits(out), torch.where(keep, bits(x), 0))
    return keep


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_of_this_file(counter, key, result):
    assert philox(counter, key) == result


@pytest.mark.native
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_masked_known_answers(counter, key, result):
    # An element is kept up to the threshold that is its lane: bisection reads the lane out.
    seed, offset = (signed(low | high << 32) for low, high in (key, counter[2:]))
    rng = torch.tensor([seed, offset, counter[0], 8 * counter[1]])
    ones = torch.ones(1, 8)
    lanes = torch.zeros(8, dtype=torch.int64)
    for step in (1 << bit for bit in reversed(range(16))):
        for lane in range(8):
            p = (lanes[lane].item() + step) / 65536
            kept = torch.ops.lora_kernels_cpu.masked(ones, rng, p)[0, lane] == 1
            lanes[lane] += step * int(kept)
    words = lanes[0::2] + (lanes[1::2] << 16)
    assert tuple(words.tolist()) == result


@pytest.mark.native
def test_masked_instruction_set():
    isa, product = native.load(), torch.ops.lora_kernels_cpu.bfloat16_product()
    extension = "avx512" if isa in ("avx512_bf16", "brgemm") else isa
    assert torch.ops.lora_kernels_cpu.isa() == extension
    assert product == {"avx512_bf16": "dot", "brgemm": "brgemm"}.get(isa, "float")
    # Unforced, the widest; but brgemm only where it is AMX.
    choices = [isa for isa in native.available() if isa != "brgemm" or has_amx()]
    assert isa == (os.environ.get(native.VARIABLE) or choices[-1])
    assert native.why_not() is None


def has_amx():
    return torch.cpu._is_amx_tile_supported()


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999999])
def test_masked_dtypes(dtype, p):
    keep = check(torch.randn(3, 517).to(dtype), (0x123456789ABCDEF, 5, 0, 0), p)
    assert keep.all() == (p == 0.0)
    assert p == 0.0 or abs(keep.float().mean() - (1 - p)) < 0.06


@pytest.mark.native
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("cols", [0, 1, 7, 8, 9, 255, 256, 257, 600])
def test_masked_sizes(rows, cols):
    check(torch.randn(rows, cols), (7, 1, 0, 0), 0.3)


@pytest.mark.native
@pytest.mark.parametrize("row0", [0, 3, 2**32 - 1, 2**40 + 1])
@pytest.mark.parametrize("col0", [0, 1, 13, 8 * 2**32 - 9])
def test_masked_origin(row0, col0):
    check(torch.randn(3, 300), (-1, -(2**62), row0, col0), 0.4)


@pytest.mark.native
def test_masked_part_of_a_whole():
    masked = torch.ops.lora_kernels_cpu.masked
    x = torch.randn(37, 600)
    whole = masked(x, torch.tensor([11, 2, 0, 0]), 0.2)
    part = masked(x[5:21, 123:477], torch.tensor([11, 2, 5, 123]), 0.2)
    assert torch.equal(part, whole[5:21, 123:477])


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[1::2, 3:], id="sliced"),
        pytest.param(lambda x: x[:, ::3], id="every third column"),
        pytest.param(lambda x: x[:1].expand(4, -1), id="expanded rows"),
        pytest.param(lambda x: x[:4, :1].expand(-1, 270), id="expanded columns"),
    ],
)
def test_masked_strides(dtype, view):
    x = torch.randn(8, 300).to(dtype)
    before = x.clone()
    check(view(x), (3, 4, 1, 2), 0.25)
    assert torch.equal(x, before)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_masked_special_values(dtype, value):
    keep = check(torch.full((4, 90), value, dtype=dtype), (1, 2, 3, 4), 0.5)
    assert keep.any() and not keep.all()


@pytest.mark.native
def test_masked_over_threads():
    # Enough rows for several tasks; the threads must not show in the result.
    x, rng = torch.randn(513, 129), torch.tensor([9, 8, 7, 6])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.lora_kernels_cpu.masked(x, rng, 0.5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(results[0] != 0, keeps(rng.tolist(), 513, 129, 0.5))


@pytest.mark.native
@pytest.mark.parametrize(
    ("x", "rng", "p", "error", "says"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(4).long(), 0.1, TypeError, "x must be"),
        (torch.zeros(3), torch.zeros(4).long(), 0.1, ValueError, r"\[M, K\], got \[3\]"),
        (torch.zeros(2, 3, 4), torch.zeros(4).long(), 0.1, ValueError, r"\[M, K\]"),
        (torch.zeros(2, 3), torch.zeros(4), 0.1, TypeError, "rng must be int64"),
        (torch.zeros(2, 3), torch.zeros(3).long(), 0.1, ValueError, "rng must be .*seed"),
        (torch.zeros(2, 3), torch.zeros(4, 1).long(), 0.1, ValueError, "rng must be .*seed"),
        (torch.zeros(2, 3), torch.zeros(8).long()[::2], 0.1, ValueError, "contiguous"),
        (torch.zeros(2, 3), torch.tensor([0, 0, 0, -1]), 0.1, ValueError, "col0"),
        (torch.zeros(2, 3), torch.zeros(4).long(), 1.0, ValueError, "dropout_p"),
        (torch.zeros(2, 3), torch.zeros(4).long(), -0.1, ValueError, "dropout_p"),
        (torch.zeros(2, 3), torch.zeros(4).long(), float("nan"), ValueError, "dropout_p"),
        (torch.zeros(2, 3).to("meta"), torch.zeros(4).long(), 0.1, ValueError, "x on meta"),
        (torch.zeros(2, 3), torch.zeros(4).long().to("meta"), 0.1, ValueError, "rng on meta"),
        (torch.zeros(2, 3).to_sparse(), torch.zeros(4).long(), 0.1, ValueError, "Sparse"),
    ],
)
def test_masked_wrong_calls(x, rng, p, error, says):
    with pytest.raises(error, match=says):
        torch.ops.lora_kernels_cpu.masked(x, rng, p)


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.parametrize("isa", [isa for isa in native.available() if isa != native.load()])
def test_every_instruction_set(isa, request):
    whole = request.config.getoption("--whole")
    files = [__file__, *map(Path(__file__).with_name, OTHERS)]
    every = " or ".join(["test_masked", *(Path(file).stem for file in OTHERS)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        + (["-k", every, "--whole"] if whole else ["-k", DRAWN]),
        # glibc then hands out no memory that is zero: the kernels' own scratch is not torch's.
        env={**os.environ, native.VARIABLE: isa, "MALLOC_PERTURB_": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
    assert "passed" in done.stdout


def load_in_new_process(statement, **environment):
    """What `statement`, run in a process of its own, leaves in `said`."""
    before = "import json, torch\nfrom lora_kernels.spec import native\n"
    code = f"{before}{statement}\nprint(json.dumps(said))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_import_loads_nothing():
    assert not load_in_new_process("said = hasattr(torch.ops.lora_kernels_cpu, 'isa')")


@pytest.mark.slow
@pytest.mark.native
def test_threads_that_load_together():
    said = load_in_new_process(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    said = list(pool.map(lambda _: native.load(), range(32)))"
    )
    assert said == [native.load()] * 32


@pytest.mark.slow
def test_forced_off():
    said = load_in_new_process(
        "said = [native.load(), native.why_not(), hasattr(torch.ops.lora_kernels_cpu, 'isa')]",
        LORA_KERNELS_CPU_ISA="none",
    )
    assert said == [None, "turned off by LORA_KERNELS_CPU_ISA=none", False]


def install(directory, built=(), failed=None, torch_version=torch.__version__):
    info = {"built": list(built), "failed": failed or {}, "compiler": None, "torch": torch_version}
    (directory / "_build_info.json").write_text(json.dumps(info))


def test_unknown_name_raises(tmp_path):
    install(tmp_path)
    with pytest.raises(ValueError, match="LORA_KERNELS_CPU_ISA='sse9'.*baseline.*none"):
        native._load(tmp_path, "sse9")


def test_instruction_set_the_cpu_lacks_raises(tmp_path, monkeypatch):
    install(tmp_path, ["baseline", "avx2", "avx512"])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert native._supported() == ("baseline", "avx2")
    for forced in ("avx512", "avx512_bf16", "brgemm"):
        with pytest.raises(ValueError, match=f"{forced}.*choice of baseline, avx2, none"):
            native._load(tmp_path, forced)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert native._supported() == ("baseline", "avx2", "avx512")
    for forced in ("avx512_bf16", "brgemm"):
        with pytest.raises(ValueError, match=f"{forced}.*choice of baseline, avx2, avx512, none"):
            native._load(tmp_path, forced)


class OfACpu:
    """The operators of an AVX-512 extension, loaded or not, on a CPU with certain products."""

    def __init__(self, products, loaded=False):
        self.products, self.product = products, products[-1]
        if loaded:
            self.load()

    def load(self, path=None):
        self.isa, self.path = (lambda: "avx512"), path

    def bfloat16_product(self):
        return self.product

    def set_bfloat16_product(self, name):
        if name in self.products:
            self.product = name
        return name in self.products


@pytest.fixture
def of_a_cpu(monkeypatch):
    def replace_operators(*products, loaded=False):
        operators = OfACpu(products, loaded)
        monkeypatch.setattr(torch.ops, "lora_kernels_cpu", operators)
        monkeypatch.setattr(torch.ops, "load_library", operators.load)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        return operators

    return replace_operators


@pytest.mark.parametrize(
    ("products", "isa"),
    [
        (["float"], "avx512"),
        (["float", "brgemm", "dot"], "avx512_bf16"),
        (["float", "dot", "brgemm"], "brgemm"),
    ],
)
def test_unforced_the_extension_says_what_it_computes_with(tmp_path, of_a_cpu, products, isa):
    install(tmp_path, ["baseline", "avx2", "avx512"])
    operators = of_a_cpu(*products)
    assert native._load(tmp_path, None) == (isa, None)
    assert operators.path == str(tmp_path / "_C_avx512.so")


@pytest.mark.parametrize(
    ("forced", "product"), [("avx512", "float"), ("avx512_bf16", "dot"), ("brgemm", "brgemm")]
)
def test_forced_product(tmp_path, of_a_cpu, forced, product):
    install(tmp_path, ["baseline", "avx2", "avx512"])
    operators = of_a_cpu("float", "dot", "brgemm")
    assert native._load(tmp_path, forced) == (forced, None)
    assert operators.product == product


def test_forced_product_that_the_extension_refuses(tmp_path, of_a_cpu):
    install(tmp_path, ["avx512"])
    of_a_cpu("float")
    with pytest.raises(ValueError, match="LORA_KERNELS_CPU_ISA='avx512_bf16'.*no AVX512-BF16"):
        native._load(tmp_path, "avx512_bf16")


def test_second_import_does_not_change_the_product(tmp_path, of_a_cpu):
    install(tmp_path, ["baseline", "avx2", "avx512"])
    operators = of_a_cpu("float", "dot", loaded=True)
    assert native._load(tmp_path, None) == ("avx512_bf16", None)
    assert native._load(tmp_path, "avx512_bf16") == ("avx512_bf16", None)
    isa, reason = native._load(tmp_path, "avx512")
    assert isa is None and "avx512_bf16 extension is loaded" in reason
    assert operators.product == "dot"


def test_an_install_with_a_compiler_built_them_all():
    info = native._build_info(native.DIRECTORY)
    if not info.get("compiler"):
        pytest.skip("lora_kernels was installed without a C++ compiler")
    assert info["failed"] == {} and info["torch"] == torch.__version__


def test_reason_never_installed(tmp_path):
    isa, reason = native._load(tmp_path, None)
    assert isa is None and "holds the sources alone" in reason


def test_reason_recorded_by_the_install(tmp_path):
    install(tmp_path, failed=dict.fromkeys(native.ISAS, "no C++ compiler was found"))
    assert native._load(tmp_path, None) == (None, "no C++ compiler was found")
    assert native._load(tmp_path, "baseline") == (None, "no C++ compiler was found")


def test_reason_built_for_another_torch(tmp_path):
    install(tmp_path, ["baseline"], torch_version="2.0.0")
    isa, reason = native._load(tmp_path, None)
    assert isa is None and "built for torch 2.0.0" in reason and torch.__version__ in reason
    assert "pip install --no-build-isolation --force-reinstall --no-deps" in reason


@pytest.mark.slow
@pytest.mark.parametrize("forced", ["", "none"])
def test_one_warning_where_no_extension_answers(tmp_path, forced):
    install(tmp_path, ["baseline"], torch_version="2.0.0")
    said = load_in_new_process(
        "import pathlib, warnings\n"
        f"native.DIRECTORY = pathlib.Path({str(tmp_path)!r})\n"
        "import lora_kernels as lk\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        lk.lora_linear(*[torch.ones(2, 2)] * 4)\n"
        "said = [str(w.message) for w in caught]",
        LORA_KERNELS_CPU_ISA=forced,
    )
    assert len(said) == (forced != "none") and all("built for torch 2.0.0" in s for s in said)


def test_reason_instruction_set_not_built(tmp_path):
    install(tmp_path)
    assert native._load(tmp_path, "baseline") == (None, "baseline was not built")


@pytest.mark.slow
def test_library_that_does_not_load(tmp_path):
    install(tmp_path, ["baseline"])
    (tmp_path / "_C_baseline.so").write_bytes(b"not a library")
    said = load_in_new_process(
        f"import pathlib; said = native._load(pathlib.Path({str(tmp_path)!r}), None)"
    )
    assert said[0] is None and "_C_baseline.so" in said[1]


def test_next_best_is_loaded_where_the_best_is_broken(tmp_path, monkeypatch):
    install(tmp_path, ["baseline", "avx2", "avx512"])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    tried = []

    def load_extension(directory, extension, forced):
        tried.append(extension)
        if extension == "avx512":
            raise OSError("cannot open")
        return extension

    monkeypatch.setattr(native, "_load_extension", load_extension)
    assert native._load(tmp_path, None) == ("avx2", None)
    assert tried == ["avx512", "avx2"]


@pytest.mark.native
def test_second_import_of_the_package_shares_the_library():
    directory, loaded = native.DIRECTORY, native.load()
    assert native._load(directory, loaded) == (loaded, None)
    for other in (isa for isa in native.available() if isa != loaded):
        isa, reason = native._load(directory, other)
        assert isa is None and f"{loaded} extension is loaded" in reason
