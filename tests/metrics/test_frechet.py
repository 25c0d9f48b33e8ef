"""The Frechet distance in closed form and beside scipy; FVD's protocol, file check and traps."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvid.metrics import FVD, frechet, frechet_distance

D = 6


class TinyI3D(nn.Module):
    """Same call as the published file; a handful of features of a random projection."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(D, 3, 3, 5, 5, generator=generator))

    def forward(
        self,
        video: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ):
        if rescale:
            video = video / 127.5 - 1
        if resize:
            video = F.interpolate(video, [video.shape[2], 224, 224], mode="trilinear")
        out = F.conv3d(video, self.weight, stride=[2, 32, 32]).relu().mean([2, 3, 4])
        return out.squeeze(0) if return_features else out.softmax(1)  # drops a batch of one


def few_features(video):
    """A cheap detector: D projections of each frame's mean colour; drops a batch of one."""
    projection = torch.randn(30, D, generator=torch.Generator().manual_seed(0))
    return (video.mean(dim=(3, 4)).flatten(1) @ projection / 255).squeeze(0)


@pytest.fixture
def clips(rand):
    return rand(10, 3, 10, 16, 20).sigmoid(), rand(10, 3, 10, 16, 20).mul(2).sigmoid()


def covariance(rand, n=D):
    root = rand(n, 2 * n, dtype=torch.float64)
    return root @ root.T / n


class TestFrechetDistance:
    def test_isotropic_gaussians_in_closed_form(self):
        mean, eye = torch.zeros(5), torch.eye(5)
        # |m|^2 + D (s1 - s2)^2
        value = frechet_distance(mean, 4 * eye, mean + 2, 9 * eye)
        assert value == pytest.approx(20 + 5 * (2 - 3) ** 2, rel=1e-12)

    def test_rotated_gaussians_that_commute_in_closed_form(self, rand):
        basis = torch.linalg.qr(rand(D, D, dtype=torch.float64)).Q
        first, second = torch.arange(1.0, D + 1).double(), torch.arange(D, 0.0, -1).double() ** 2
        covs = [basis * values @ basis.T for values in (first, second)]
        expected = (first.sqrt() - second.sqrt()).square().sum().item()
        mean = torch.zeros(D)
        assert frechet_distance(mean, covs[0], mean, covs[1]) == pytest.approx(expected, rel=1e-12)

    def test_equals_scipy_sqrtm(self, rand):
        linalg = pytest.importorskip("scipy.linalg")
        means = rand(2, 40, dtype=torch.float64)
        a, b = covariance(rand, 40), covariance(rand, 40)
        root = linalg.sqrtm((a @ b).numpy()).real.trace()
        expected = (means[0] - means[1]).square().sum() + a.trace() + b.trace() - 2 * root
        value = frechet_distance(means[0], a, means[1], b)
        assert value == pytest.approx(expected.item(), rel=1e-10)

    def test_is_zero_for_equal_and_exact_for_singular_covariances(self):
        line = torch.zeros(D, D)
        line[0, 0] = 4.0
        other = torch.zeros(D, D)
        other[1, 1] = 9.0  # orthogonal supports share nothing: 4 + 9
        mean = torch.zeros(D)
        assert frechet_distance(mean, line, mean, line) == pytest.approx(0, abs=1e-14)
        assert frechet_distance(mean, line, mean, other) == pytest.approx(13, rel=1e-14)

    def test_refuses_other_shapes_and_values(self):
        mean, eye = torch.zeros(3), torch.eye(3)
        with pytest.raises(ValueError, match=r"cov2 must be \(3, 3\), got \(2, 2\)"):
            frechet_distance(mean, eye, mean, torch.eye(2))
        with pytest.raises(ValueError, match="mean2 must be finite"):
            frechet_distance(mean, eye, mean * torch.nan, eye)


class TestSets:
    def test_equals_the_distance_of_all_features_at_once(self, clips):
        real, fake = clips
        fvd = FVD(few_features)
        fvd.update(real=real, fake=fake)
        result = fvd.compute()
        a, b = fvd.features(real), fvd.features(fake)
        expected = frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
        assert result == {"fvd": expected, "variant": "styleganv", "n": 10}
        assert expected > 0

    @pytest.mark.parametrize("batch", [1, 4, 10])
    def test_batches_and_a_short_last_one_do_not_matter(self, clips, batch):
        real, fake = clips
        fvd, whole = FVD(few_features), FVD(few_features)
        whole.update(real=real, fake=fake)
        for part in real.split(batch):
            fvd.update(real=part)
        for part in fake.split(3):
            fvd.update(fake=part)
        result = fvd.compute()
        assert result["n"] == 10
        assert result["fvd"] == pytest.approx(whole.compute()["fvd"], rel=1e-5)

    def test_computing_twice_gives_the_same(self, clips):
        fvd = FVD(few_features)
        fvd.update(real=clips[0], fake=clips[1])
        assert fvd.compute() == fvd.compute()

    def test_warns_when_clips_are_fewer_than_features(self, clips):
        fvd = FVD(few_features)
        fvd.update(real=clips[0][:D], fake=clips[1][:D])
        with pytest.warns(UserWarning, match=f"N={D} clips with {D} features.*singular"):
            fvd.compute()
        fvd.update(real=clips[0][D:], fake=clips[1][D:])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fvd.compute()

    def test_refuses_unequal_counts(self, clips):
        fvd = FVD(few_features)
        fvd.update(real=clips[0], fake=clips[1][:8])
        with pytest.raises(ValueError, match=r"same N.*got \(10, 6\) and \(8, 6\)"):
            fvd.compute()

    def test_refuses_an_empty_side(self, clips):
        fvd = FVD(few_features)
        fvd.update(real=clips[0])
        with pytest.raises(ValueError, match="both sides"):
            fvd.compute()

    def test_refuses_short_clips_and_wrong_range(self, clips):
        fvd = FVD(few_features)
        with pytest.raises(ValueError, match="at least 10 frames, got 9"):
            fvd.update(real=clips[0][:, :, :9])
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            fvd.update(fake=2 * clips[1] - 1)

    def test_few_samples_of_one_law_look_far_apart(self, rand):
        """Why N stands in the result: equal sets score high at 16 clips, near zero at 256."""
        fvd = FVD(few_features)
        with pytest.warns(UserWarning, match="singular"):
            few = fvd.score(*rand(2, 16, 100, dtype=torch.float64) * 0.13)
        many = fvd.score(*rand(2, 256, 100, dtype=torch.float64) * 0.13)
        assert few["fvd"] > 5 * many["fvd"] > 0


class TestVariants:
    @pytest.fixture
    def seen(self, clips):
        """What the detector gets, by variant, from clips of 16 x 20."""
        inputs = {}

        def detector(video):
            inputs["video"] = video
            return torch.zeros(len(video), D)

        def run(variant, video=clips[0]):
            FVD(detector, variant=variant).features(video)
            return inputs["video"]

        return run

    def test_styleganv_hands_over_8_bit_levels_at_their_own_size(self, seen, clips):
        assert torch.equal(seen("styleganv"), (clips[0] * 255).round())

    def test_videogpt_keeps_the_aspect_and_crops_the_centre(self, seen):
        ramp = torch.linspace(0, 1, 320).expand(1, 3, 10, 160, 320)
        out = seen("videogpt", ramp)
        assert out.shape == (1, 3, 10, 224, 224)
        torch.testing.assert_close(out.mean(), torch.tensor(0.0), rtol=0, atol=2e-3)
        assert out.amax() < 0.51  # the outer quarters of a 2:1 frame are gone
        assert out.amin() > -0.51

    def test_tf_squeezes_the_whole_frame(self, seen):
        ramp = torch.linspace(0, 1, 320).expand(1, 3, 10, 160, 320)
        out = seen("tf", ramp)
        assert out.shape == (1, 3, 10, 224, 224)
        assert out[..., 0].amax() == -1
        assert out[..., -1].amin() > 0.98

    def test_tf_has_no_half_pixel_centres(self, seen):
        """Twice the size by TF1's rule: even outputs are the inputs, odd ones their midpoints."""
        levels = torch.arange(112.0).mul(2).div(255).expand(1, 3, 10, 112, 112)
        row = (seen("tf", levels)[0, 0, 0, 0] + 1) * 127.5
        expected = torch.arange(224.0).clamp_max(222)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)
        column = (seen("tf", levels.mT)[0, 0, 0, :, 0] + 1) * 127.5
        torch.testing.assert_close(column, expected, rtol=0, atol=1e-4)

    def test_refuses_another_name(self):
        with pytest.raises(ValueError, match="one of styleganv, videogpt, tf, got 'fvd'"):
            FVD(few_features, variant="fvd")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
class TestDetectorFile:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "i3d_torchscript.pt"
        torch.jit.script(TinyI3D()).save(path)
        return path

    def test_blob_hash_is_gits(self):
        assert frechet.git_blob_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"

    @pytest.mark.parametrize("variant", ["styleganv", "videogpt", "tf"])
    def test_the_known_file_is_loaded_and_called_by_variant(
        self, file, clips, variant, monkeypatch
    ):
        monkeypatch.setattr(frechet, "I3D_BLOB", frechet.git_blob_hash(file.read_bytes()))
        fvd = FVD(file, variant=variant)
        whole = variant == "styleganv"
        prepared = frechet.PREPARE[variant]((clips[0][:1] * 255).round())
        expected = TinyI3D()(prepared, rescale=whole, resize=whole, return_features=True)
        features = fvd.features(clips[0][:1])
        assert features.shape == (1, D)
        torch.testing.assert_close(features[0], expected.detach().double(), rtol=1e-5, atol=1e-6)

    def test_another_file_is_refused_before_it_is_loaded(self, file, monkeypatch):
        monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("loaded unchecked"))
        with pytest.raises(ValueError, match=r"is not i3d_torchscript\.pt.*it was not loaded"):
            FVD(file)

    def test_the_state_dict_file_is_named(self, file, monkeypatch):
        monkeypatch.setattr(frechet, "I3D_STATE_BLOB", frechet.git_blob_hash(file.read_bytes()))
        with pytest.raises(ValueError, match="weights without their network"):
            FVD(file)

    def test_a_missing_file_says_what_belongs_there(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no file at .*93daef59.*nothing is downloaded"
        ):
            FVD(tmp_path / "i3d_torchscript.pt")
