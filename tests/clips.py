"""Small video files with known pixels."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np


def encode(path, frames=40, size=(64, 48), codec="libx264", pix_fmt="yuv420p", stamps=None, rotation=None, **options):
    """A video whose frame i is grey of brightness 4 i, with a white block in the upper left corner."""
    with av.open(str(path), "w", options={k: v for k, v in options.items() if k == "movflags"}) as container:
        encoder = {k: v for k, v in options.items() if k != "movflags"}
        stream = container.add_stream(codec, rate=20, options=encoder)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), 4 * i, np.uint8)
            picture[: size[1] // 3, : size[0] // 3] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
