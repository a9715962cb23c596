"""Every variant of the compiled kernels that this machine runs against plain torch, and what happens without them."""

import ctypes
import inspect
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bonn_qat.engine import library, operators
from bonn_qat.engine.library import Convolution, Gradients, Library, Task

SHARED = ctypes.CDLL(str(library._FILE)) if library._FILE.exists() else None
VARIANTS = [library.bind(SHARED, name) for name in library.variants(SHARED)] if SHARED else []
ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-41, 3e38)
ULP = 2.0**-24  # the largest relative error of rounding to float32
Pair = tuple[int, int]
quick = settings(database=None, deadline=None, max_examples=40)
each_variant = pytest.mark.parametrize("kernels", VARIANTS, ids=lambda kernels: kernels.variant)


def address(x: Tensor) -> int:
    return x.data_ptr()


class Maps:
    """Maps (pixels, channels) as a norm, a sign and a nonlinearity meet them, and a number for each channel."""

    def __init__(self, channels: int, pixels: int, half: bool, threads: int, odd: bool, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.dtype = torch.bfloat16 if half else torch.float32
        self.threads, self.shape = threads, (pixels, channels)
        self.a, self.b, self.c = (torch.randn(self.shape, generator=draw).to(self.dtype) for _ in range(3))
        if odd:
            for x in (self.a, self.b, self.c):
                places = torch.rand(self.shape, generator=draw) < 0.1
                x[places] = torch.tensor(ODD).to(self.dtype)[torch.arange(int(places.sum())) % len(ODD)]
        self.alpha, self.beta, self.threshold, self.mean, self.factor = torch.randn(5, channels, generator=draw)
        self.threshold[::3] = self.normed()[0, ::3]  # met exactly
        self.out = torch.full(self.shape, 7, dtype=self.dtype)
        self.totals = torch.full((library.SUMS, channels), 7.0)
        self.sums = torch.full((threads, library.SUMS, channels), 7.0, dtype=torch.float64)
        self.words = torch.full((pixels, -(-channels // 32)), -1, dtype=torch.int32)

    def run(self, kernel: Callable[[Task, int], None], **numbers: float | None) -> None:
        names = ("a", "b", "c", "out", "alpha", "beta", "threshold", "mean", "factor", "totals", "sums", "words")
        pointers = {name: address(getattr(self, name)) for name in names}
        pixels, channels = self.shape
        half = self.dtype == torch.bfloat16
        kernel(Task(**(pointers | {"half": half, "pixels": pixels, "channels": channels} | numbers)), self.threads)

    def normed(self) -> Tensor:
        """alpha a + beta, rounded once."""
        return (self.alpha.double() * self.a.double() + self.beta.double()).float()

    def is_sum(self, terms: Tensor, row: int, steps: int = 0) -> bool:
        """Whether totals are those of float32 terms, which have up to ``steps`` roundings, over blocks of pixels."""
        bound = (65 + steps) * ULP * terms.abs().sum(0)
        return bool(((self.totals[row] - terms.sum(0)).abs() <= bound).all())


def maps(odd: st.SearchStrategy[bool]) -> st.SearchStrategy[Maps]:
    pixels = st.one_of(st.integers(1, 5), st.integers(60, 70), st.integers(120, 300))
    return st.builds(Maps, st.integers(1, 70), pixels, st.booleans(), st.integers(1, 3), odd, st.integers(0, 2**32))


def equal(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(7), y.nan_to_num(7))


# -------------------------------------------------------------------------------------------------- passes


@each_variant
@given(maps(st.just(False)))
@quick
def test_moments_are_the_mean_and_the_variance(kernels: Library, m: Maps) -> None:
    m.a = (m.a + 30).to(m.dtype)  # squares of numbers themselves would lose six bits
    m.run(kernels.moments)
    exact = m.a.double()
    mean, deviation = exact.mean(0), exact.std(0, correction=0)
    # Distances are from the mean of the first pixels, which is a few deviations away.
    far = (exact[:64].mean(0) - mean).abs() + deviation
    assert ((m.totals[0] - mean).abs() <= ULP * (mean.abs() + 70 * far)).all()
    assert ((m.totals[1] - deviation.square()).abs() <= 140 * ULP * (far.square() + ULP * 900)).all()


@each_variant
@given(maps(st.booleans()))
@quick
def test_signs_are_bits_and_spread_is_their_inverse(kernels: Library, m: Maps) -> None:
    m.run(kernels.signs)
    m.run(kernels.spread)
    assert torch.equal(m.out, torch.where(m.normed() >= m.threshold, 1.0, -1.0).to(m.dtype))
    bits = m.words[:, :, None] >> torch.arange(32, dtype=torch.int32) & 1
    pixels, channels = m.shape
    assert torch.equal(bits.view(pixels, -1)[:, :channels] == 1, m.out == 1)
    assert not bits.view(pixels, -1)[:, channels:].any()


def estimators(clip: float | None, m: Maps) -> tuple[dict[str, float], Tensor]:
    """Arguments of an estimator and the gradients that it gives: a parabola without ``clip``, which 0 makes a tie."""
    u, c = m.normed() - m.threshold, m.c.float()
    if clip is None:
        return {"parabola": True}, (2 - 2 * u.abs()).clamp(min=0) * c
    clip = clip or u[0].abs().nan_to_num(1).max().item()
    return {"clip": clip}, torch.where(u.abs() >= clip, 0.0, c)


@each_variant
@given(maps(st.just(False)), st.one_of(st.none(), st.just(0), st.floats(0.125, 2, width=32)))
@quick
def test_gradient_sums_are_those_of_the_estimated_gradient_and_its_product_with_the_distance(
    kernels: Library, m: Maps, clip: float | None
) -> None:
    arguments, gradient = estimators(clip, m)
    m.run(kernels.gradient, **arguments)
    assert m.is_sum(gradient.double(), 0)
    assert m.is_sum(gradient.double() * (m.a.float() - m.mean).double(), 1, steps=3)


@each_variant
@given(maps(st.booleans()), st.one_of(st.none(), st.just(0), st.floats(0.125, 2, width=32)))
@quick
def test_gradient_is_that_of_the_norm(kernels: Library, m: Maps, clip: float | None) -> None:
    arguments, gradient = estimators(clip, m)
    m.totals = torch.randn(m.totals.shape) * m.shape[0]
    m.run(kernels.gradient, sums=None, **arguments)
    gradient, distance = gradient.double(), (m.a.float() - m.mean).double()
    k1, k2 = m.totals[:2] / m.shape[0]
    k2 = k2 * m.factor.square()
    exact = (gradient - k1 - distance * k2) * m.alpha
    parts = gradient.abs() + k1.abs() + (distance * k2).abs()
    bound = 8 * ULP * parts * m.alpha.abs() + (2.0**-8 if m.dtype == torch.bfloat16 else ULP) * exact.abs() + 1e-37
    fits = (parts < 1e38) & (exact.abs() < 1e38)
    assert ((m.out.double() - exact).abs() <= bound)[fits].all()
    odd = exact.isnan() | exact.isinf()
    assert equal(m.out[odd].double(), exact[odd])


@each_variant
@given(maps(st.booleans()), st.booleans())
@quick
def test_affine_adds_a_map_to_the_norm(kernels: Library, m: Maps, addend: bool) -> None:
    m.run(kernels.affine, **({} if addend else {"c": None}))
    y = m.normed() + m.c.float() if addend else m.normed()
    assert equal(m.out, y.to(m.dtype))


def shifted(m: Maps, shifts: bool) -> tuple[dict[str, None], Tensor, Tensor]:
    """Arguments of a PReLU, its input without the threshold, and what is added to it."""
    if shifts:
        return {}, m.a.float() - m.threshold, m.beta
    return {"threshold": None, "beta": None}, m.a.float(), torch.tensor(0.0)


@each_variant
@given(maps(st.booleans()), st.booleans())
@quick
def test_prelu_is_rounded_as_torchs_operations_in_float32(kernels: Library, m: Maps, shifts: bool) -> None:
    arguments, x, after = shifted(m, shifts)
    m.run(kernels.prelu, **arguments)
    assert equal(m.out, (torch.where(x > 0, x, x * m.alpha) + after).to(m.dtype))


@each_variant
@given(maps(st.booleans()), st.booleans())
@quick
def test_prelu_gradient_is_that_of_the_input_and_of_the_vectors(kernels: Library, m: Maps, shifts: bool) -> None:
    arguments, x, _ = shifted(m, shifts)
    m.run(kernels.prelu_gradient, **arguments)
    c = m.c.float()
    passed = torch.where(x > 0, c, c * m.alpha)
    assert equal(m.out, passed.to(m.dtype))
    for row, terms in enumerate((torch.where(x > 0, 0.0, c * x), passed, c)):
        normal = terms.double().abs().sum(0) < 1e38
        totals, m.totals = m.totals, m.totals[:, normal]
        assert m.is_sum(terms[:, normal].double(), row, steps=1)
        m.totals = totals


# --------------------------------------------------------------------------------------------- convolution


def words_of(signs: Tensor) -> Tensor:
    """(..., channels) of -1 and +1 to words."""
    bits = F.pad((signs > 0).long(), (0, -signs.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


def kernel_words(w: Tensor) -> Tensor:
    """(outputs, channels, rows, columns) of -1 and +1 to (blocks of 16 outputs, rows, columns, words, 16)."""
    words = F.pad(words_of(w.movedim(1, -1)), (0,) * 7 + (-len(w) % 16,))
    return words.unflatten(0, (-1, 16)).movedim(1, -1).contiguous()


@pytest.mark.skipif(not VARIANTS, reason="no kernels")
@given(st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3)), st.booleans())
@quick
def test_the_words_of_kernels_are_those_of_their_signs(shape: tuple[int, ...], half: bool) -> None:
    value = torch.randn(shape).to(torch.bfloat16 if half else torch.float32)
    value[torch.rand(shape) < 0.1] = -0.0
    value[torch.rand(shape) < 0.1] = math.nan
    expected = kernel_words(torch.where(value >= 0, 1.0, -1.0))
    for layout in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(operators.kernel_words(value.contiguous(memory_format=layout)), expected)


@st.composite
def convolutions(draw: st.DrawFn, widest: int = 17, largest: int = 4) -> tuple[Tensor, Tensor, Pair, Pair, Pair]:
    pair = lambda least, most: draw(st.tuples(*[st.integers(least, most)] * 2))  # noqa: E731
    kernel, stride, dilation, padding = pair(1, largest), pair(1, 3), pair(1, 3), pair(0, 5)
    # torch refuses an image that is smaller than the kernel even with its padding.
    least = [(k - 1) * d + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = map(max, (draw(st.integers(1, 17)), draw(st.integers(1, widest))), least)
    batch, channels, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    return signs(batch, channels, *size), signs(outputs, channels, *kernel), stride, dilation, padding


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape) * 2.0 - 1


def check_convolution(
    kernels: Library, half: bool, threads: int, x: Tensor, w: Tensor, stride: Pair, dilation: Pair, padding: Pair
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    (batch, channels, *size), (outputs, _, *kernel) = x.shape, w.shape
    scale = torch.randn(outputs)
    sums = F.conv2d(x.double(), w.double(), None, stride, padding, dilation)
    expected = (sums.float() * scale.view(-1, 1, 1)).to(dtype)

    x_words, w_words = words_of(x.movedim(1, -1)), kernel_words(w)
    out = torch.full_like(expected, 7, memory_format=torch.channels_last)
    task = Convolution(
        x=address(x_words), w=address(w_words), scale=address(scale), out=address(out), batch=batch, height=size[0],
        width=size[1], words=x_words.shape[-1], channels=channels, out_height=out.shape[2], out_width=out.shape[3],
        outputs=outputs, rows=kernel[0], columns=kernel[1], stride=stride, padding=padding, dilation=dilation,
        half=half,
    )  # fmt: skip
    kernels.convolve(task, threads)
    assert torch.equal(out, expected)


@each_variant
@given(convolutions(), st.booleans(), st.integers(1, 2))
@settings(quick, max_examples=100)
def test_a_convolution_is_exact_but_for_one_rounding(
    kernels: Library, drawn: tuple[Tensor, Tensor, Pair, Pair, Pair], half: bool, threads: int
) -> None:
    check_convolution(kernels, half, threads, *drawn)


@each_variant
@pytest.mark.parametrize("channels", [992, 1000, 2100])
def test_no_count_of_bits_overflows(kernels: Library, channels: int) -> None:
    x, w = torch.ones(1, channels, 3, 9), -torch.ones(17, channels, 3, 2)
    check_convolution(kernels, False, 1, x, w, (1, 1), (1, 1), (0, 0))


def check_gradients(
    kernels: Library, x: Tensor, w: Tensor, stride: Pair, dilation: Pair, padding: Pair, dtype: torch.dtype,
    half: bool, scaled: bool, threads: int, odd: int,
) -> None:  # fmt: skip
    (batch, channels, *image), (outputs, _, *kernel) = x.shape, w.shape
    scale = 2.0 ** torch.randint(-3, 3, (outputs,))
    x.requires_grad_(), w.requires_grad_()
    y = F.conv2d(x.double(), w.double() * scale.view(-1, 1, 1, 1), None, stride, padding, dilation)
    # Numbers whose sums are exact, and some that are not finite.
    grad = torch.randint(-9, 10, y.shape).to(dtype)
    grad.view(-1)[torch.randint(grad.numel(), (odd // 8,))] = math.nan
    y.backward(grad.double())
    assert x.grad is not None
    assert w.grad is not None

    grad = grad.contiguous(memory_format=torch.channels_last)
    x_words = words_of(x.detach().movedim(1, -1))
    w_words = kernel_words(w.detach())
    out = torch.full_like(x, 7, dtype=torch.bfloat16 if half else torch.float32, memory_format=torch.channels_last)
    sums = torch.full((-(-outputs // 8) * 8, *kernel, -(-channels // 16) * 16), 7.0)
    # The signs are those of 2a + 1 - 1, and the estimator passes what is below 2.
    a = torch.randint(0, 2, x.shape).to(out.dtype).contiguous(memory_format=torch.channels_last)
    moments, (one, two, mean) = torch.zeros(threads, library.SUMS, channels).double(), torch.tensor([[1.0], [2], [3]])
    totals = torch.full((library.SUMS, channels), 7.0)
    one, two, mean = (vector.repeat(channels) for vector in (one, two, mean))
    signs = Task(a=address(a), alpha=address(two), beta=address(one), threshold=address(one), mean=address(mean),
                 sums=address(moments), totals=address(totals), channels=channels, clip=2)  # fmt: skip
    task = Gradients(
        grad=address(grad), x=address(x_words), w=address(w_words), scale=address(scale), out=address(out),
        signs=ctypes.pointer(signs), scaled=scaled,
        sums=address(sums), batch=batch, height=image[0], width=image[1], words=x_words.shape[-1], channels=channels,
        out_height=y.shape[2], out_width=y.shape[3], outputs=outputs, rows=kernel[0], columns=kernel[1], stride=stride,
        padding=padding, dilation=dilation, half=dtype == torch.bfloat16, out_half=half,
    )  # fmt: skip
    assert kernels.tables is not None
    task.scratch_size = kernels.tables.scratch_size(task)
    scratch = torch.full((threads * task.scratch_size + 64,), 255, dtype=torch.uint8)  # as floats, NaN
    task.scratch = address(scratch)
    kernels.tables.input_gradient(task, threads)
    kernels.tables.weight_gradient(task, threads)
    assert (scratch[-64:] == 255).all()
    passed = torch.where(a == 0, x.grad, 0.0)
    assert torch.equal(out.nan_to_num(99), (passed * (2 if scaled else 1)).to(out.dtype).nan_to_num(99))
    for found, terms in zip(totals, (passed.double(), passed.double() * -3), strict=False):
        assert equal((found - terms.sum((0, 2, 3))).abs() <= 1e-6 * terms.abs().sum((0, 2, 3)), ~found.isnan())
    found = sums[:outputs, ..., :channels].movedim(-1, 1) * scale.view(-1, 1, 1, 1)
    found[w.grad.isnan() & (sum(padding) > 0)] = math.nan  # torch multiplies with the padding too
    assert torch.equal(found.nan_to_num(99), w.grad.nan_to_num(99))


with_tables = pytest.mark.parametrize(
    "kernels", [kernels for kernels in VARIANTS if kernels.tables], ids=lambda k: k.variant
)


@with_tables
@given(convolutions(widest=150, largest=7), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(),
       st.booleans(), st.integers(1, 2), st.integers(0, 9))  # fmt: skip
@settings(quick, max_examples=100)
def test_gradients_by_tables_are_those_of_torch(
    kernels: Library, drawn: tuple[Tensor, Tensor, Pair, Pair, Pair], dtype: torch.dtype, half: bool, scaled: bool,
    threads: int, odd: int,
) -> None:  # fmt: skip
    check_gradients(kernels, *drawn, dtype, half, scaled, threads, odd)


@with_tables
def test_a_kernel_with_tables_may_reach_far(kernels: Library) -> None:
    x, w, dilation = signs(4, 5, 2, 8), signs(9, 5, 1, 2), (1, operators._REACH)
    check_gradients(kernels, x, w, (1, 1), dilation, (0, 998), torch.float32, False, False, 1, 0)
    assert operators.has_tables(torch.float32, (1, 2), dilation)
    assert not operators.has_tables(torch.float32, (1, 2), (1, operators._REACH + 1))


@with_tables
def test_gradients_by_fewer_threads_than_asked_for(kernels: Library) -> None:
    assert SHARED is not None
    SHARED[f"use_threads_{kernels.variant}"](None, None, None)  # as in a forked process
    try:
        x, w, one = signs(2, 5, 4, 9), signs(9, 5, 3, 3), (1, 1)
        check_gradients(kernels, x, w, one, one, one, torch.float32, False, False, threads=2, odd=0)
    finally:
        library.bind(SHARED, kernels.variant)


# ------------------------------------------------------------------------------------------------- loading


@pytest.mark.skipif(
    platform.machine().lower() not in {"x86_64", "amd64", "aarch64", "arm64"}, reason="no kernels for this machine"
)
def test_the_package_is_built_with_its_kernels() -> None:
    assert library._FILE.exists(), "compile the kernels: pip install -e ."
    assert VARIANTS
    assert library.load() is not None
    assert library.load().variant == VARIANTS[0].variant


@each_variant
def test_the_structures_are_those_of_the_kernels(kernels: Library) -> None:
    assert SHARED is not None
    assert SHARED[f"task_size_{kernels.variant}"]() == ctypes.sizeof(Task)
    assert SHARED[f"convolution_size_{kernels.variant}"]() == ctypes.sizeof(Convolution)
    if kernels.tables:
        assert SHARED[f"gradients_size_{kernels.variant}"]() == ctypes.sizeof(Gradients)


@pytest.mark.skipif(sys.platform == "win32", reason="torch's OpenMP library is not found there")
@each_variant
def test_the_work_is_shared_by_torchs_threads(kernels: Library) -> None:
    m = Maps(16, 256, False, 2, False, 0)
    m.run(kernels.moments)
    assert m.sums[0].any()
    assert m.sums[1].any()


@pytest.fixture
def fresh() -> Callable[[], Library | None]:
    """``load`` as in a new process."""
    return inspect.unwrap(library.load)


def test_a_variable_turns_the_kernels_off(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BONN_QAT_NO_ENGINE", "1")
    assert fresh() is None


def test_a_package_without_kernels_is_one_without_a_warning(fresh, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_FILE", tmp_path / "kernels.so")
    assert fresh() is None


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(100)])
def test_a_damaged_library_is_not_used(fresh, monkeypatch, tmp_path: Path, content: bytes) -> None:
    monkeypatch.setattr(library, "_FILE", tmp_path / "kernels.so")
    library._FILE.write_bytes(content)
    with pytest.warns(UserWarning, match=r"kernels\.so cannot be loaded \(.*install bonn-qat again"):
        assert fresh() is None


def test_a_library_without_the_functions_is_not_used(fresh, monkeypatch) -> None:
    monkeypatch.setattr(library, "_FILE", Path(torch._C.__file__))
    with pytest.warns(UserWarning, match=r"cannot be loaded \(.*sources"):
        assert fresh() is None


@pytest.mark.skipif(not VARIANTS, reason="no kernels")
def test_a_library_that_is_older_than_its_sources_is_not_used(fresh, monkeypatch) -> None:
    monkeypatch.setattr(library, "sources", lambda: 0)
    with pytest.warns(UserWarning, match=r"compiled from other sources.*pip install -e \."):
        assert fresh() is None


FORK = """
import os, torch
from torch.utils.data import DataLoader
from bonn_qat.engine import library, operators

class Sums:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        a, sums = torch.arange(16 * 256.0), torch.empty(2, library.SUMS, 16, dtype=torch.float64)
        totals = torch.empty(library.SUMS, 16)
        task = library.Task(a=a.data_ptr(), totals=totals.data_ptr(), sums=sums.data_ptr(), pixels=256, channels=16)
        library.load().moments(task, 2)
        return totals

expected = Sums()[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(Sums()[0], expected) else 1)
assert os.waitpid(child, 0)[1] == 0
for batch in DataLoader(Sums(), batch_size=2, num_workers=2, multiprocessing_context="fork"):
    assert torch.equal(batch, expected.expand(2, *expected.shape))
"""


@pytest.mark.skipif(not VARIANTS or sys.platform == "win32", reason="no kernels, or no forks")
def test_a_forked_process_and_the_workers_of_a_loader_do_not_wait_for_threads(tmp_path: Path, run_scripts) -> None:
    script = tmp_path / "fork.py"
    script.write_text(FORK)
    (done,) = run_scripts([str(script)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


KEPT = """
import ctypes, torch, bonn_qat.layers
class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
mallinfo2()
maps = [torch.empty(31 * 2**18) for _ in range(8)]  # 31 MiB each
del maps
print(mallinfo2().fordblks // 2**20)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="for glibc 2.33 or newer"
)
@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", "MALLOC_ARENA_MAX": "2"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}, False),
    ],
)
def test_freed_maps_are_kept_unless_the_environment_sets_a_threshold(own: dict[str, str], kept: bool) -> None:
    others = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    found = subprocess.run([sys.executable, "-c", KEPT], env=others | own, capture_output=True, text=True, check=True)
    assert (int(found.stdout) >= 8 * 31) == kept  # MiB that the allocator has for the next maps
