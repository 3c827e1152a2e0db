"""The key that seals what lies in the run folder between two stages: embeddings, latents, the steps of long clips.

It is $DAILIES_SEAL_KEY where the driver has one: then nobody who can write the run folder, and nothing else, can have
a latent of theirs published as a clip of this run. Without it the key is drawn for each run and lies in the run folder:
that guards against damage, and against those who may write there but not read; it is all that a folder can promise that
any machine may continue alone.
"""

import hmac
import os
import re
import secrets

from dailies.model.errors import DailiesError
from dailies.pipeline.run.intermediates import Seal
from dailies.pipeline.run.layout import LATENTS, SEAL_KEY
from dailies.pipeline.store import NotFound, Store, StoreError, TooLarge

VARIABLE = "DAILIES_SEAL_KEY"
LEAST_CHARACTERS = 16


class BadSealKey(DailiesError, ValueError):
    """$DAILIES_SEAL_KEY could be guessed."""


def own_key() -> bytes | None:
    """What $DAILIES_SEAL_KEY makes, for the workers, who never see the variable itself.  Raises BadSealKey."""
    said = os.environ.get(VARIABLE, "")
    if not said:
        return None
    if len(said) < LEAST_CHARACTERS:
        raise BadSealKey(f"{VARIABLE} must have at least {LEAST_CHARACTERS} characters; it has {len(said)}. One is "
                         f"made by: openssl rand -hex 32")
    return hmac.digest(said.encode("utf-8", "surrogateescape"), b"dailies: embeddings, latents, steps", "sha256")


def seal_of(store: Store, *, fresh: bool) -> Seal:
    """The run's seal; for the driver that holds its lease.

    fresh: no driver has worked in this folder before, so what lies there is nobody's.  Raises StoreError, BadSealKey.
    """
    if key := own_key():
        return Seal(key)
    if not fresh:
        try:
            found = store.get(SEAL_KEY, at_most=128).strip()
            if re.fullmatch(rb"[0-9a-f]{64}", found):
                return Seal(found)
        except (NotFound, TooLarge):
            pass
        # another user's run is continued: what is unfinished is made again
        except StoreError as error:
            if not isinstance(error.__cause__, PermissionError):
                raise
    drawn = secrets.token_hex(32).encode()
    store.put(SEAL_KEY, drawn + b"\n", private=True)
    return Seal(drawn)


def drop_key(store: Store) -> None:
    """Where nothing is left that it seals."""
    if next(iter(store.list(f"{LATENTS}/")), None) is None:
        store.delete(SEAL_KEY)
