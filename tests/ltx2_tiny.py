"""The program with tiny LTX-2.3 models of random weights, in the published single-file layout; a clip takes a moment.

python tests/ltx2_tiny.py write ltx-tiny FOLDER                writes a model's weights; the models are in CARDS
python tests/ltx2_tiny.py render prompts.csv --out out/ --model ltx-tiny --weights FOLDER
python tests/ltx2_tiny.py --four render ...                    in four processes at once, which leave FOLDER/at-work/PID
"""

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import tiny_program
import torch
from gemma_tiny import gemma_folder, tokenizer_json
from golden import Golden

from dailies.jobs.demo.codecs_av import AUDIO, VIDEO, VOCODER
from dailies.jobs.demo.release_av import DEMO_AV, SMALL_CONNECTORS, SMALL_GEMMA, SMALL_TRANSFORMER, write_release
from dailies.jobs.gpu.models import fill_weights
from dailies.model.catalog import CATALOG, LTX23, LTX23_DISTILLED, LTX23_TWO_STAGE
from dailies.model.ltx2.audio_vae import AudioVAE
from dailies.model.ltx2.connectors import TextConnectors
from dailies.model.ltx2.gemma import Gemma3
from dailies.model.ltx2.load import LtxFamily
from dailies.model.ltx2.transformer import LtxTransformer
from dailies.model.ltx2.video_vae import VideoVAE
from dailies.model.ltx2.vocoder import make_vocoder

TINY = dict(channels=8, context_widths=(20, 12), text_rows=128, dit_width=20, min_side=32, duration_s=1.0,
            memory_gb={}, sources={}, description="random weights, for tests")
ONE_STAGE = TINY | dict(resolutions={"32p": (32, 64)}, resolution="32p", max_pixels=64 * 128)

LTX_TINY = replace(LTX23, name="ltx-tiny", num_steps=3, stg_blocks=(1,), **ONE_STAGE)
LTX_TINY_DISTILLED = replace(LTX23_DISTILLED, name="ltx-tiny-distilled", **ONE_STAGE)
LTX_TINY_TWO_STAGE = replace(LTX23_TWO_STAGE, name="ltx-tiny-two-stage", num_steps=3, stg_blocks=(1,), **TINY,
                             resolutions={"64p": (64, 128)}, resolution="64p", max_pixels=64 * 128)
CARDS = (LTX_TINY, LTX_TINY_DISTILLED, LTX_TINY_TWO_STAGE)


def write_weights(folder: Path, card=LTX_TINY) -> None:
    """The file of a release, which has all but Gemma, and Gemma's folder; of goldens, whose weights are random."""
    folder.mkdir(parents=True, exist_ok=True)
    golden, two = Golden("ltx2_i2v_a"), Golden("ltx2_two_stage_a")
    shutil.copy(golden.folder / "weights.safetensors", folder / card.files[0])
    gemma_folder(golden, folder / card.text_folder)
    for part, name in ((card.upsampler, "weights_upsampler"), (card.lora, "weights_distilled_lora")):
        if part:
            shutil.copy(two.folder / f"{name}.safetensors", folder / part)


# LTX-2.3's architecture, with heads of a size that the kernels of attention take
LTX_SMALL = replace(DEMO_AV, name="ltx-small", precisions=("fp32", "bf16", "int8"), min_side=32, num_steps=2,
                    resolutions={"32p": (32, 64)}, resolution="32p", words=frozenset())


def write_small(folder: Path) -> None:
    """A release of LTX_SMALL, of random weights."""
    with torch.device("meta"):
        parts = dict(dit=LtxTransformer(SMALL_TRANSFORMER), video=VideoVAE(VIDEO), audio=AudioVAE(AUDIO, ["decoder"]),
                     vocoder=make_vocoder(VOCODER), gemma=Gemma3(SMALL_GEMMA),
                     connectors=TextConnectors(SMALL_CONNECTORS))
    for part in parts.values():
        fill_weights(part, "cpu")
        for name, values in part.named_buffers():
            if name.endswith("std-of-means"):
                values.fill_(1.0)
    (folder / "text").mkdir(parents=True)
    (folder / "text/tokenizer.json").write_text(json.dumps(tokenizer_json()))
    write_release(folder, **parts, tokenizer=folder / "text")


class Meeting(LtxFamily):
    """The family, whose samplers begin when four processes have a clip: or the first would have made them all."""

    def load_sampler(self, card, weights, on):
        sampler = super().load_sampler(card, weights, on)
        sample, folder = sampler.sample, weights / "at-work"

        def met(batch, draw, steps):
            folder.mkdir(exist_ok=True)
            (folder / str(os.getpid())).touch()
            until = time.monotonic() + 200
            while len(list(folder.iterdir())) < 4:
                if time.monotonic() > until:
                    raise TimeoutError(f"of 4 processes these have a clip: {list(folder.iterdir())}")
                time.sleep(0.05)
            return sample(batch, draw, steps)
        sampler.sample = met
        return sampler


MEETING = Meeting()


class SixCores:
    """Ray on this machine, which is told that there are six: four samplers, the encoder, and who publishes."""

    def connect(self, address, **options):
        from dailies.pipeline.scheduler import cluster
        return cluster.connect(address, **options | {"cpus": 6})

    def run(self, stages, requests, **options):
        from dailies.pipeline.scheduler import cluster
        return cluster.run(stages, requests, **options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--four"]:
        from dailies.jobs.cli import main
        CATALOG.update({card.name: replace(card, family="ltx2_tiny:MEETING") for card in CARDS})
        sys.exit(main([*sys.argv[2:], "--samplers", "4"], engine=SixCores()))
    tiny_program.run(CARDS, write_weights)
