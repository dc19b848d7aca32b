# /// script
# requires-python = ">=3.12"
# dependencies = ["opencv-python-headless>=4.11,<6", "pillow>=11,<13"]
# ///
"""From recorded videos to the moving and still pictures of the README.

    uv run benchmark/pictures.py gif runs/<run>/videos/best.mp4 images/ppo.gif
    uv run benchmark/pictures.py strip runs/<run>/videos/best-dream.mp4 images/dream.png

gif: one whole episode, half of the frames, 32 colours. strip: about nine frames of a dream, truth, model and error;
several dreams of equal size one below the other.
"""

import sys

import cv2
import numpy as np
from PIL import Image


def frames(path: str) -> tuple[list[np.ndarray], float]:
    clip, images = cv2.VideoCapture(path), []
    while (read := clip.read())[0]:
        images.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    if not images:
        sys.exit(f"{path} holds no frame")
    return images, clip.get(cv2.CAP_PROP_FPS)


def gif(video: str, picture: str) -> None:
    images, fps = frames(video)
    some = np.concatenate(images[:: max(len(images) // 8, 1)])
    palette = Image.fromarray(some).quantize(32)  # one for all frames: it does not flicker
    shown = [Image.fromarray(image).quantize(palette=palette, dither=Image.Dither.NONE) for image in images[::2]]
    shown[0].save(picture, save_all=True, append_images=shown[1:], duration=round(2000 / fps), loop=0, optimize=True)


def strip(*videos_and_picture: str) -> None:
    *videos, picture = videos_and_picture
    strips = []
    for images, _ in map(frames, videos):
        tall = [np.pad(image, ((0, 8), (0, 8), (0, 0)), constant_values=255) for image in images]
        strips.append(np.concatenate(tall[:: round(len(tall) / 9) or 1], 1)[..., ::-1])
    cv2.imwrite(picture, cv2.resize(np.concatenate(strips), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in ("gif", "strip") or (sys.argv[1] == "gif" and len(sys.argv) > 4):
        sys.exit(__doc__)
    {"gif": gif, "strip": strip}[sys.argv[1]](*sys.argv[2:])
