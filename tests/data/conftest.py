import pytest

from tests.data.cards import numbered


@pytest.fixture
def make_video(tmp_path):
    """A factory of real MP4 files whose frames show their numbers."""
    pytest.importorskip("av")
    from fastvid.data.video import write_mp4

    def make(name="clip.mp4", frames=40, *, height=32, width=64, **options):
        video = numbered(frames, height, width)
        return write_mp4(tmp_path / name, video, 25, **({"key_every": 12} | options))

    return make
