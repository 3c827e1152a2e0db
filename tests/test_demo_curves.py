"""The curves of a training: read from its logs, drawn, and kept."""

import subprocess
import sys

from PIL import Image

from dailies.jobs.demo.curves import PANEL_HEIGHT, PANEL_WIDTH, read_log


def test_curves_are_drawn_from_the_logs_of_a_training(tmp_path):
    (tmp_path / "vae.log").write_text("".join(f"20:00:00 {step} loss {9 / step:g} late_psnr {step / 10:g}\n"
                                              for step in range(25, 525, 25)) + "20:09:00 525 loss 1 late_psnr nan\n")
    # the steps after 50 were lost, and taken again
    (tmp_path / "dit.log").write_text("".join(f"21:00:00 {step} loss {loss} length 1\n"
                                              for step, loss in ((25, 3), (50, 2), (75, 8), (75, 1), (100, 0.5))))
    assert [(step, figures["loss"]) for step, figures in read_log(tmp_path / "dit.log")] == [
        (25, 3), (50, 2), (75, 1), (100, 0.5)]
    picture, log = tmp_path / "curves.png", tmp_path / "training.txt"
    subprocess.run([sys.executable, "-m", "dailies.jobs.demo.curves", tmp_path, picture, "--log", log], check=True)
    assert Image.open(picture).size == (2 * PANEL_WIDTH, 2 * PANEL_HEIGHT)       # of three panels
    assert log.read_text().splitlines() == [*(f"vae {step} loss {9 / step:g} late_psnr {step / 10:g}"
                                              for step in range(100, 525, 100)), "dit 100 loss 0.5 length 1"]
    refused = subprocess.run([sys.executable, "-m", "dailies.jobs.demo.curves", tmp_path / "nowhere", picture],
                             capture_output=True, text=True)
    assert refused.returncode == 1 and "has no log of a training" in refused.stderr
