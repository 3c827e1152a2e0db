"""An image as a frame of a video shows it: once through H.264.

A model that learned from frames of compressed videos takes a clean image for a still: nothing in it moves. LTX-2's
releases compress the image that a clip begins with (CRF 33; 18 from 2.4 on), preset veryfast, 4:2:0.
"""

import av
import numpy as np
import torch
from torch import Tensor


def recompressed(pixels: Tensor, crf: int) -> Tensor:
    """The image after H.264 has kept what it keeps at this rate factor, 0 (nothing lost but colour) to 51.

    pixels [3, H, W] in [-1, 1], on the CPU, even sides.  Returns the same, fp32: x / 127.5 - 1 of whole numbers.
    Raises ValueError for odd sides. One thread: the same bytes on every machine with this libx264.
    """
    height, width = pixels.shape[1:]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 halves the colour planes: sides must be even; got {width}x{height}")
    rgb = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.framerate, encoder.thread_count = 1, 1
    encoder.options = {"crf": str(crf), "preset": "veryfast"}
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
    decoder = av.CodecContext.create("h264", "r")
    frames = [shown for packet in (*encoder.encode(frame), *encoder.encode(None)) for shown in decoder.decode(packet)]
    frames += decoder.decode(None)
    seen = frames[0].to_ndarray(format="rgb24").astype(np.float32)
    return torch.from_numpy(seen).permute(2, 0, 1) / 127.5 - 1
