"""Every key of a run folder and its inverse: what lies where, written once. Nothing here touches a store.

run.json                            which run it is          manifests/<number>-<digest>.json   later manifests
lease.json                          who works on it          ledger/<epoch>-<seq>.parquet       what is done
seal.key                            guards intermediates     retried/<digest>.parquet           what was tried
_SUCCESS.json                       every row has its row    clips/ab/<clip_id>.mp4             what was made
picks/<digest>.parquet              what people decided
latents/ab/<clip_id>.safetensors    steps/ab/<clip_id>.safetensors    embeddings/ab/<digest>.safetensors

Two characters of a name spread a listing over many prefixes. Names are hashes or numbers of ours, never a user's text.
"""

import re

RUN, LEASE, SEAL_KEY, SUCCESS = "run.json", "lease.json", "seal.key", "_SUCCESS.json"
CLIPS, POSTERS, REPORT, PICKS = "clips", "posters", "report", "picks"
LEDGER, RETRIED, MANIFESTS = "ledger", "retried", "manifests"
EMBEDDINGS, LATENTS, SAVED_STEPS = INTERMEDIATES = "embeddings", "latents", "steps"
TOP = frozenset({RUN, LEASE, SEAL_KEY, SUCCESS, CLIPS, POSTERS, REPORT, PICKS, LEDGER, RETRIED, MANIFESTS,
                 *INTERMEDIATES})
EMPTIED = (CLIPS, POSTERS, *INTERMEDIATES)   # folders that a driver leaves behind only where something is in them

INTERMEDIATE_KEY = re.compile(rf"({'|'.join(INTERMEDIATES)})/([0-9a-f]{{2}})/(\2[0-9a-f]{{62}})\.safetensors")
LAST_EPOCH = 999_999                    # of six digits


def clip_key(clip_id: str) -> str:
    return f"{CLIPS}/{clip_id[:2]}/{clip_id}.mp4"


def clip_id_in(key: str) -> str | None:
    """The clip whose file has this key; None for whatever else lies there, such as somebody's copy."""
    clip_id = key.rpartition("/")[2].removesuffix(".mp4")
    return clip_id if key == clip_key(clip_id) else None


def poster_key(clip_id: str) -> str:
    return f"{POSTERS}/{clip_id[:2]}/{clip_id}.webp"


def poster_id_in(key: str) -> str | None:
    """The clip whose poster has this key; None for whatever else lies there."""
    clip_id = key.rpartition("/")[2].removesuffix(".webp")
    return clip_id if key == poster_key(clip_id) else None


def intermediate_key(folder: str, name: str) -> str:
    """folder: one of INTERMEDIATES.  name: a clip_id; of embeddings, which clips share, the digest of their prompts."""
    return f"{folder}/{name[:2]}/{name}.safetensors"


def intermediate_of(key: str) -> str | None:
    """The name in an intermediate's key; None for what is none, and is not ours to remove."""
    found = INTERMEDIATE_KEY.fullmatch(key)
    return found and found.group(3)


def part_key(epoch: int, seq: int) -> str:
    """Of the ledger; in the order of their keys the oldest first."""
    return f"{LEDGER}/{epoch:06d}-{seq:06d}.parquet"


def epoch_of(key: str) -> int | None:
    """Which writer's part it is; None for what is named as no part is."""
    name = key.removeprefix(f"{LEDGER}/").partition("-")[0]
    return int(name) if name.isascii() and name.isdecimal() else None


def retried_key(digest: str) -> str:
    return f"{RETRIED}/{digest}.parquet"


def picks_key(digest: str) -> str:
    return f"{PICKS}/{digest}.parquet"


def manifest_key(number: int, digest: str) -> str:
    """In the order of their keys the first one first."""
    return f"{MANIFESTS}/{number:06d}-{digest}.json"


def manifest_number(key: str) -> int:
    """0 for what is named as no manifest is."""
    name = key.removeprefix(f"{MANIFESTS}/")[:6]
    return int(name) if name.isdecimal() else 0
