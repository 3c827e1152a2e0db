"""The program with one more model: Linum's architecture, tiny, with random weights; a clip takes a few milliseconds.

python tests/tiny.py render prompts.csv --out out/ --model tiny
"""

from dataclasses import replace
from pathlib import Path

from dailies.model.catalog import CATALOG, LINUM_V2_360P

TINY = replace(
    LINUM_V2_360P, name="tiny", description="random weights, for tests", repo_id=None,
    folder=Path(__file__).parent / "goldens/linum_e2e_a/checkpoint",
    resolutions={"24p": (24, 40), "32p": (32, 48)}, resolution="24p", min_side=16, max_pixels=64 * 64,
    num_steps=2, guidance=3.0, memory_gb={},
    dit_fields=dict(width=48, heads=2, layers=2, ffn=64, time_features=64, text_dim=32, text_len=26),
    vae_fields=dict(width=2))

CATALOG[TINY.name] = TINY

if __name__ == "__main__":
    from dailies.jobs.cli import program
    program()
