"""Frames of video files: which ones, upright, and every file that must be refused."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")
av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from clips import encode  # noqa: E402

from cacovid_kernels import video as video_module  # noqa: E402
from cacovid_kernels.errors import UserError  # noqa: E402
from cacovid_kernels.video import read_clip  # noqa: E402


def brightness(clip):
    return clip.frames[:, -4, -4].mean(-1)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("video") / "grey.mp4")


def test_sampled_frames_are_even_in_time(video):
    clip = read_clip(video, 5)
    assert clip.frames.shape == (5, 48, 64, 3)
    assert clip.timestamps == pytest.approx((0, 0.5, 0.95, 1.45, 1.95))
    assert brightness(clip) == pytest.approx([0, 40, 76, 116, 156], abs=5)
    assert (clip.available, clip.duration) == (40, pytest.approx(2.0))


def test_variable_frame_rate_is_sampled_by_time(tmp_path):
    stamps = [20 * i for i in range(30)] + [600 + 200 * i for i in range(10)]
    clip = read_clip(encode(tmp_path / "vfr.mkv", stamps=stamps), 4)
    assert clip.timestamps == pytest.approx((0, 0.8, 1.6, 2.4))


def test_fewer_frames_than_wanted_gives_all(tmp_path):
    assert len(read_clip(encode(tmp_path / "few.mp4", frames=7), 32).frames) == 7


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("odd.mkv", {"codec": "ffv1", "pix_fmt": "gray", "size": (33, 47)}),
        ("ten_bit.mkv", {"codec": "ffv1", "pix_fmt": "yuv422p10le", "size": (33, 47)}),
        ("reordered.avi", {"codec": "mpeg4", "bf": "2"}),
        ("open_groups.mp4", {"x264-params": "open-gop=1:keyint=6:bframes=3"}),
        ("raw.h264", {}),
        ("stream.ts", {}),
    ],
)
def test_other_formats_give_the_right_frames(tmp_path, name, kwargs):
    clip = read_clip(encode(tmp_path / name, **kwargs), 5)
    assert brightness(clip) == pytest.approx([0, 40, 76, 116, 156], abs=5)


def test_decoding_skips_what_no_frame_needs(tmp_path, monkeypatch):
    path = encode(tmp_path / "groups.mp4", **{"x264-params": "keyint=5:scenecut=0:bframes=0"})
    shown, match = [], video_module._match

    def watched(frames, wanted):
        return match((shown.append(frame) or frame for frame in frames), wanted)

    monkeypatch.setattr(video_module, "_match", watched)
    clip = read_clip(path, 3)
    assert brightness(clip) == pytest.approx([0, 80, 156], abs=6)
    assert len(shown) <= 12  # of 40


@pytest.mark.parametrize("rotation, corner", [(90, (0, -1)), (-90, (-1, 0)), (180, (-1, -1))])
def test_rotation_is_applied(tmp_path, rotation, corner):
    path = encode(tmp_path / "turned.mp4", rotation=rotation, frames=3)
    clip = read_clip(path, 3)
    assert clip.frames.shape[1:3] == ((48, 64) if rotation == 180 else (64, 48))
    white = [(y, x) for y in (0, -1) for x in (0, -1) if clip.frames[0, y, x].mean() > 200]
    assert len(white) == 1
    with av.open(str(path)) as container:
        angle = next(container.decode(video=0)).rotation
    turned = np.rot90(np.array([[1, 0], [0, 0]]), round(angle / 90))
    assert turned[white[0]] == 1


def _cut(source, target, share):
    target.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    return target


def _sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for i in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _noise(path):
    encode(path, movflags="faststart")
    data = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(len(data) // 2, len(data), 300):
        data[place] ^= 255
    path.write_bytes(data)
    return path


def _text(path):
    path.write_text("not a video\n" * 50)
    return path


def _empty(path):
    path.write_bytes(b"")
    return path


def _picture(path):
    Image.new("RGB", (32, 32)).save(path)
    return path


REFUSED = {
    "missing": (lambda d: d / "none.mp4", "No such file"),
    "folder": (lambda d: d, "is a folder"),
    "empty": (lambda d: _empty(d / "empty.mp4"), "is empty"),
    "text": (lambda d: _text(d / "text.mp4"), "is not a video"),
    "picture": (lambda d: _picture(d / "still.png"), "is not a video"),
    "sound": (lambda d: _sound(d / "sound.m4a"), "no video stream"),
    "cut, index last": (
        lambda d: _cut(encode(d / "a.mp4"), d / "cut.mp4", 0.5),
        "cut short: its index is missing",
    ),
    "cut, index first": (
        lambda d: _cut(encode(d / "a.mp4", movflags="faststart"), d / "cut.mp4", 0.6),
        "is cut short: it declares 2.0 s",
    ),
    "damaged": (lambda d: _noise(d / "noise.mp4"), "is damaged"),
    "device": (lambda d: "/dev/null", "not a regular file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_no_videos_are_refused_in_one_line(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        read_clip(make(tmp_path), 8)
    assert "\n" not in str(caught.value)
