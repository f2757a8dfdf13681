"""Frames of a video file, spread evenly over its time, by streaming."""

from __future__ import annotations

import os
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np

from cacovid_kernels.errors import UserError

# Larger frames are halved as they are decoded: 32 frames of 8K video would take 3 GiB.
MAX_PIXELS = 1920 * 1088

# Containers that FFmpeg opens as one-frame or rendered "videos".
PICTURES = ("image2", "_pipe", "tty")

Progress = Callable[[float], None]  # fraction of the file that has been read, 0 to 1


@dataclass(frozen=True)
class Clip:
    """Frames sampled from one video."""

    frames: np.ndarray  # [T, H, W, 3] uint8, RGB, upright
    timestamps: tuple[float, ...]  # seconds from the first frame
    name: str
    duration: float  # seconds
    available: int  # frames the file holds


@dataclass
class _Index:
    """What the packets of a file say before a single frame is decoded."""

    stamps: list[int] = field(default_factory=list)  # presentation stamp of each video packet, in file order
    keys: list[int] = field(default_factory=list)  # numbers of the packets at which decoding can start
    hidden: set[int] = field(default_factory=set)  # packets that are decoded and never shown
    last_second: float = 0.0  # end of the last packet of any stream
    declared_seconds: float | None = None  # what the container's header promises
    has_stamps: bool = True


def read_clip(path: str | Path, num_frames: int, progress: Progress = lambda fraction: None) -> Clip:
    """Read `num_frames` frames at equal distances in time, the first and the last frame included.

    Only the groups of pictures that hold one of these frames are decoded, one picture in memory at a time. A
    video with fewer frames gives all it has.

    Args:
        path: a local video file, any container and codec that PyAV reads.
        num_frames: frames wanted, >= 1.
        progress: is told the fraction of the file that has been read.

    Returns:
        The frames, upright (rotation of 90, 180 and 270 degrees applied), and their times.

    Raises:
        UserError: the path is no readable video, or it is cut short or damaged where a frame is needed.
    """
    path = Path(path)
    _check_file(path)
    index = _read_index(path, lambda fraction: progress(fraction / 2))
    shown = sorted({stamp for i, stamp in enumerate(index.stamps) if i not in index.hidden})
    if not shown:
        raise UserError(f"video: {path} holds no frames. Give a complete video file.")

    wanted = [_nearest(shown, stamp) for stamp in np.linspace(shown[0], shown[-1], num_frames)]
    wanted = sorted(set(wanted))
    spacing = max(1, int(np.median(np.diff(shown)))) if len(shown) > 1 else 1
    pictures: list[np.ndarray] = []
    times: list[float] = []
    with _open(path) as container:
        stream = _video_stream(container, path)
        tick = float(stream.time_base) if index.has_stamps else 1 / float(stream.average_rate or 25)
        frames = _decode(container, stream, index, wanted, lambda fraction: progress(0.5 + fraction / 2))
        for stamp, (found, frame) in _match(frames, wanted):
            if abs(found - stamp) > 2 * spacing or frame.is_corrupt:
                continue
            pictures.append(_upright(frame, pictures[0].shape if pictures else None))
            times.append((found - shown[0]) * tick)
    if len(pictures) < len(wanted):
        raise UserError(
            f"video: {path} is damaged: {len(pictures)} of the {len(wanted)} frames needed could be decoded. "
            "Repair or re-encode the file."
        )
    progress(1.0)
    duration = (shown[-1] - shown[0] + spacing) * tick
    return Clip(np.stack(pictures), tuple(times), path.name, duration, len(shown))


def _check_file(path: Path) -> None:
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
        if stat.S_ISREG(mode):
            with path.open("rb"):
                pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"video: {path} cannot be read: {reason}. Give a video file.") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(f"video: {path} is {kind}. Give a video file.")
    if size == 0:
        raise UserError(f"video: {path} is empty (0 bytes). Give a video file.")


def _open(path: Path) -> Any:
    try:
        # Only local files: a playlist must not make FFmpeg open addresses of its own.
        container = av.open(os.fspath(path.resolve()), options={"protocol_whitelist": "file"})
    except av.FFmpegError as error:
        with path.open("rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"  # an mp4 without its table of contents, which comes last
        fault = "is cut short: its index is missing" if is_mp4 else "is not a video"
        raise UserError(f"video: {path} {fault} ({error.strerror}). Give a complete video file.") from None
    if any(name in container.format.name for name in PICTURES):
        container.close()
        raise UserError(f"video: {path} is not a video ({container.format.long_name}). Give a video file.")
    return container


def _video_stream(container: Any, path: Path) -> Any:
    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover and stream.codec_context is not None:
            stream.thread_type = "AUTO"
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise UserError(f"video: {path} holds no video stream (it holds: {kinds}). Give a video file.")


def _packets(container: Any, progress: Progress, path: Path) -> Iterator[Any]:
    size = max(1, container.size)
    try:
        for packet in container.demux():
            if packet.pos is not None and packet.pos >= 0:
                progress(min(1.0, packet.pos / size))
            yield packet
    except av.FFmpegError as error:
        raise UserError(f"video: {path} cannot be read to its end ({error.strerror}). Repair the file.") from None
    progress(1.0)


def _read_index(path: Path, progress: Progress) -> _Index:
    index = _Index()
    with _open(path) as container:
        stream = _video_stream(container, path)
        start = container.start_time / av.time_base if container.start_time is not None else 0.0
        if container.duration is not None:
            index.declared_seconds = container.duration / av.time_base
        for packet in _packets(container, progress, path):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if packet.size == 0:
                continue
            if stamp is not None:
                end = float((stamp + (packet.duration or 0)) * packet.time_base) - start
                index.last_second = max(index.last_second, end)
            if packet.stream_index == stream.index:
                number = len(index.stamps)
                index.has_stamps &= packet.pts is not None
                index.stamps.append(number if packet.pts is None else packet.pts)
                if packet.is_keyframe:
                    index.keys.append(number)
                if packet.is_discard:
                    index.hidden.add(number)
        declared, found = index.declared_seconds, index.last_second
        if declared is not None and index.has_stamps and declared - found > max(0.5, 0.02 * declared):
            raise UserError(
                f"video: {path} is cut short: it declares {declared:.1f} s and holds {max(0.0, found):.1f} s "
                f"({len(index.stamps)} frames). Give the complete file."
            )
    if not index.has_stamps:  # raw streams: frames are counted and everything is decoded
        index.stamps, index.keys, index.hidden = list(range(len(index.stamps))), [], set()
    return index


def _nearest(values: list[int], wanted: float) -> int:
    right = min(bisect_left(values, wanted), len(values) - 1)
    left = max(0, right - 1)
    return values[left] if wanted - values[left] <= values[right] - wanted else values[right]


def _needed(index: _Index, wanted: list[int]) -> bytearray:
    """Marks the packets that the wanted frames depend on."""
    needed = bytearray(len(index.stamps))
    number_of = {stamp: number for number, stamp in enumerate(index.stamps)}
    for stamp in wanted:
        last = number_of[stamp]
        # A frame shown before the nearest key frame (open group) still refers to the group before that.
        first = next((k for k in reversed(index.keys) if k <= last and index.stamps[k] <= stamp), 0)
        needed[first : last + 1] = b"\1" * (last + 1 - first)
    return needed


def _decode(container: Any, stream: Any, index: _Index, wanted: list[int], progress: Progress) -> Iterator[Any]:
    """Yield (stamp, frame) of every frame in the needed packets, in the order in which they are shown."""
    needed = _needed(index, wanted)
    decoder = stream.codec_context
    number, shown, running = 0, 0, False

    def feed(packet: Any) -> Iterator[Any]:
        nonlocal shown
        try:
            decoded = decoder.decode(packet)
        except av.FFmpegError:
            return  # the frame is missing; the caller sees it in the count
        for frame in decoded:
            stamp = frame.pts if index.has_stamps else shown
            shown += 1
            if stamp is not None:
                yield stamp, frame

    for packet in _packets(container, progress, Path(stream.container.name)):
        if packet.stream_index != stream.index or packet.size == 0:
            continue
        if number < len(needed) and needed[number]:
            yield from feed(packet)
            running = True
        elif running:
            yield from feed(None)  # what the decoder holds back for reordering
            decoder.flush_buffers()
            running = False
        number += 1
    if running:
        yield from feed(None)


def _match(frames: Iterator[Any], wanted: list[int]) -> Iterator[Any]:
    """Pair every wanted stamp with the frame nearest to it: some packets (VP8) are never shown."""
    pending = iter(wanted)
    stamp = next(pending, None)
    previous = None
    for current in frames:
        while stamp is not None and current[0] >= stamp:
            near = previous is not None and stamp - previous[0] < current[0] - stamp
            yield stamp, previous if near else current
            stamp = next(pending, None)
        if stamp is None:
            return
        previous = current
    while stamp is not None and previous is not None:
        yield stamp, previous
        stamp = next(pending, None)


def _upright(frame: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """RGB picture, turned as the file says; later frames take the size of the first one."""
    turns = round(frame.rotation / 90) % 4
    width, height = frame.width, frame.height
    while width * height > MAX_PIXELS:
        width, height = width // 2, height // 2
    if shape is not None:
        height, width = (shape[1], shape[0]) if turns % 2 else (shape[0], shape[1])
    return np.rot90(frame.to_ndarray(format="rgb24", width=max(1, width), height=max(1, height)), turns)
