"""Noise by number: the published vectors, one noise in every language, and its distribution."""

import pytest
import torch

from fastvid.kernels._shared import native, philox

# Known answers of Philox 4x32-10 from the Random123 distribution: counter, key, words.
PI = "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0"
KNOWN_ANSWERS = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]


def words(text):
    return [int(word, 16) for word in text.split()]


def signed(key):
    low, high = key
    return (high << 32 | low) - (high >> 31 << 64)


def counters(number):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2**32, (number, 4), generator=generator)


def compiled_words(counter, seed):
    found = torch.empty_like(counter)
    _ops(seed).philox_words(counter, seed, found)
    return found


def _ops(seed):
    return torch.ops.fastvid_cuda if seed.is_cuda else torch.ops.fastvid_cpp


def plain_words(counter, seed):
    return torch.stack(philox.philox(counter.unbind(1), seed), 1)


def compiled_normal(seed, count, stream):
    out = torch.empty(len(seed), count, device=seed.device)
    _ops(seed).normal(seed, stream, out)
    return out


@pytest.fixture
def compiled():
    if not native.loaded():
        pytest.skip(f"no compiled library: {native.failure()}")


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_published_vectors(counter, key, answer):
    counter = torch.tensor([words(counter)])
    seed = torch.tensor([signed(words(key))])
    for draw in (plain_words, compiled_words) if native.loaded() else (plain_words,):
        assert draw(counter, seed).tolist() == [words(answer)]


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_code_has_the_words_and_the_normals(place, compiled):
    if place == "cuda" and not native.cuda_loaded():
        pytest.skip(f"the compiled library has no CUDA kernels: {native.BUILD}")
    counter = counters(1000)
    for seed in SEEDS:
        key = torch.full((1000,), seed)
        found = compiled_words(counter.to(place), key.to(place))
        assert torch.equal(found.cpu(), plain_words(counter, key))
    seed = torch.tensor(SEEDS)
    for stream in (0, 2**32 - 1):
        found = compiled_normal(seed.to(place), 4099, stream)
        wanted = philox.normal(seed, 4099, stream)
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("high", [0, 2**31 - 8, 2**32 - 8, 2**40])
def test_triton_has_the_words_and_the_normals(device, high):
    """`high`: counters past 32 bits; the tensor behind them need not exist."""
    from tests.kernels.philox_kernels import draw

    for seed, stream in zip(SEEDS, (0, 1, 7, 2**31, 2**32 - 1, 3), strict=True):
        bits, normals = draw(seed, high, stream, device)
        index = torch.arange(high, high + len(bits))
        split = index & 2**32 - 1, index >> 32, torch.full_like(index, stream), index * 0
        wanted = torch.stack(philox.philox(split, torch.tensor(seed)), 1)
        assert torch.equal(bits.cpu(), wanted)
        pairs = [philox.box_muller(*pair.unbind(1)) for pair in wanted.split(2, 1)]
        wanted = torch.stack([number for pair in pairs for number in pair], 1)
        torch.testing.assert_close(normals.cpu(), wanted, rtol=0, atol=1e-6)


def extremes():
    """Words at which roots, logarithms and quarter turns change branches."""
    edges = [0, 2**23, 2**24, 2**29, 2**30, 2**31, 3 * 2**30, 0xB504F333, 2**32]
    near = {(edge + step) % 2**32 for edge in edges for step in range(-130, 130)}
    return torch.tensor(sorted(near))


@pytest.mark.usefixtures("interpreter")
def test_box_muller_at_its_seams(device):
    from tests.kernels.philox_kernels import transform

    first, second = torch.meshgrid(extremes()[::60], extremes(), indexing="ij")
    found = transform(first.flatten().to(device), second.flatten().to(device))
    wanted = torch.stack(philox.box_muller(first.flatten(), second.flatten()))
    assert found.isfinite().all()
    torch.testing.assert_close(found.cpu(), wanted, rtol=2e-7, atol=3e-7)


@pytest.mark.parametrize("draw", [philox.normal, compiled_normal])
def test_a_million_draws_are_independent_normals(draw, request):
    if draw is compiled_normal:
        request.getfixturevalue("compiled")
    N = 10**6
    seeds = torch.tensor([0, 1])
    x, beside = draw(seeds, N, 0).double()
    (other_stream,) = draw(seeds[:1], N, 1).double()
    # Five standard deviations of each estimate.
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(x.pow(power).mean() - moment) < 5 * (spread / N) ** 0.5
    lags = [x.roll(lag) for lag in (1, 2, 3, 4, 64)]
    for y in (beside, other_stream, *lags):
        for f in (lambda t: t, lambda t: t.square() - 1, lambda t: t.sign()):
            a, b = f(x), f(y)
            correlation = (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()
            assert abs(correlation) < 5 * N**-0.5
    edges = torch.linspace(-4, 4, 33, dtype=torch.float64)
    share = torch.special.ndtr(edges).diff()
    found = torch.histc(x, 32, -4, 4)
    chi_squared = ((found - N * share).square() / (N * share)).sum()
    assert chi_squared < 31 + 5 * (2 * 31) ** 0.5


def test_a_sample_is_the_same_in_any_company_and_length(cpu_path):
    draw = compiled_normal if cpu_path == "compiled" else philox.normal
    both = draw(torch.tensor([5, 6]), 1000, 2)
    assert torch.equal(draw(torch.tensor([6]), 10, 2)[0], both[1, :10])


def test_one_seed_counts_up_over_the_batch():
    device = torch.device("cpu")
    for seed in (7, torch.tensor(7), torch.tensor([7])):
        assert philox.sample_seeds(seed, 3, device).tolist() == [7, 8, 9]
    own = torch.tensor([3, 1, 2])
    assert philox.sample_seeds(own, 3, device) is own


@pytest.mark.parametrize(
    ("seed", "error", "says"),
    [
        (1.0, TypeError, "seed must be an int or an int64 Tensor, got float"),
        (True, TypeError, "got bool"),
        (2**63, ValueError, "seed must fit in 64 bits"),
        (torch.tensor(1, dtype=torch.int32), TypeError, "seed must be int64, got torch.int32"),
        (torch.tensor([1, 2]), ValueError, r"seed must be \(\), \(1,\) or \(3,\), got \(2,\)"),
        (torch.tensor(1, device="meta"), ValueError, "seed must be on cpu, got meta"),
    ],
)
def test_refuses_a_seed(seed, error, says):
    with pytest.raises(error, match=says):
        philox.sample_seeds(seed, 3, torch.device("cpu"))


@pytest.mark.parametrize("stream", [-1, 2**32])
def test_refuses_a_stream(stream):
    with pytest.raises(ValueError, match=r"stream must be in \[0, 2\*\*32\)"):
        philox.expect_stream(stream)


@pytest.mark.parametrize("stream", [None, 1.0, True, torch.tensor(1)])
def test_refuses_a_stream_that_is_no_int(stream):
    with pytest.raises(TypeError, match="stream must be an int, got"):
        philox.expect_stream(stream)


def test_compiles_to_the_same_noise():
    torch._dynamo.reset()
    seed = torch.tensor([3, 4])
    step = torch.compile(philox.normal, backend="aot_eager", fullgraph=True)
    assert torch.equal(step(seed, 100, 5), philox.normal(seed, 100, 5))
