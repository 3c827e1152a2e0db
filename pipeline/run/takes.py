"""Other takes: rows of the ledger that are pending and say themselves what is to be made, whatever the manifest says.

`dailies redo` writes one for a clip that is to be made with another seed, `verify --repair` for one that is damaged.
Nothing of it is believed: the clip's name must be the hash of all that the row asks for, and the model must take it.
An image is read from where the manifest's rows have it, never from where a ledger says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from dailies.actors.messages import FirstFrame, Request
from dailies.model.card import ModelCard
from dailies.model.settings import BY_NAME, FURTHER, MAX_PROMPT_BYTES, SAMPLING
from dailies.model.shapes import VideoShape
from dailies.pipeline.plan import Plan, clip_id_for, hashed
from dailies.pipeline.run.ledger import Ledger, is_one_of, pending_rows, values_of
from dailies.pipeline.run.ledger_row import DAMAGED, row_of
from dailies.pipeline.stages import Outcome

# what a row that waits says and its next row says too
KEPT_BY_TAKES = ("take_of", "replaces", "sample", "samples", "keep", "keep_by", "chosen_because")


class NotMade(ValueError):
    """The row asks for nothing that can be made here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Take:
    """A row of the ledger that waits for its clip, as it says itself."""

    request: Request
    row: Mapping[str, Any]
    own: pa.Table                       # its user columns, one row

    @property
    def key(self) -> tuple[str, int]:
        return self.row["id"], self.row["seed"]

    @property
    def slot(self) -> tuple[str, int]:
        """The manifest's row that it is of: id and seed."""
        take_of = self.row["take_of"]
        return self.row["id"], self.row["seed"] if take_of is None else take_of

    def append(self, ledger: Ledger, value: Any, outcome: Outcome | None) -> None:
        """Its next row: what became of it."""
        said = {name: self.row[name] for name in KEPT_BY_TAKES if self.row.get(name) is not None}
        row = row_of(self.row["id"], value, outcome, seed=self.row["seed"])
        ledger.append([said | row], self.own if self.own.num_columns else None, own=True, counts=False)


def takes_in(ledger: Ledger, plan: Plan) -> Iterator[Take | str]:
    """The rows that wait and are not to be made as the plan has them; a sentence for each that cannot."""
    if not ledger.to_make.num_rows:
        return
    keys = plan.keys()
    keys = keys.filter(is_one_of(keys["id"], set(ledger.to_make["id"].to_pylist())))
    asked = {(name, seed): clip_id for name, seed, clip_id in values_of(keys, "id", "seed", "clip_id")}
    images = {image.sha256: image.uri for image in plan.rows.images}
    for row, own in pending_rows(ledger.store, ledger.to_make):
        if row["error_type"] == DAMAGED and asked.get((row["id"], row["seed"])) == row["clip_id"]:
            continue                                    # the plan has it as well
        try:
            request = request_of_row(row, plan.card, plan.shared, images)
            if request.clip_id != row["clip_id"]:
                raise NotMade("its clip_id is not that of what it asks for")
        except NotMade as error:
            yield f"{row['id']}, seed {row['seed']}: to be made by the ledger, and cannot be: {error}"
            continue
        yield Take(request=request, row=row, own=own)


def request_of_row(row: Mapping[str, Any], card: ModelCard, shared: Mapping[str, Any],
                   images: Mapping[str, str]) -> Request:
    """The request that a row of the ledger was made of.

    shared: what all requests of the run have in common.  images: where they are, by their SHA-256.
    Raises NotMade for what the model does not take, and for an image that is not there.
    """
    if absent := [name for name in ("prompt", "negative_prompt", "seed", "width", "height", "frames")
                  if row.get(name) is None]:
        raise NotMade(f"it does not say {', '.join(absent)}")
    for name in ("prompt", "negative_prompt"):
        if len(row[name].encode(errors="replace")) > MAX_PROMPT_BYTES:
            raise NotMade(f"{name} must be {BY_NAME[name].allowed}")
    size, frames = (row["height"], row["width"]), row["frames"]
    try:
        if size not in card.resolutions.values():
            card.size_for((row["width"], row["height"]))
        if card.frames_for(frames=frames)[0] != frames:
            raise ValueError(f"{card.name} makes no clip of {frames} frames")
        sampling = {setting.name: said for setting in SAMPLING if (said := row.get(setting.name)) is not None}
        for setting in SAMPLING:
            if setting.name in sampling:
                setting.check(sampling[setting.name], card)
            elif setting.own_value(card) is not None and setting.field:
                raise ValueError(f"it does not say {setting.name}")
    except ValueError as error:
        raise NotMade(str(error)) from None
    image, sha256 = None, str(row.get("image_sha256") or "")
    if sha256 or card.takes_image and card.needs_image:
        if sha256 not in images:
            raise NotMade("its image is not among those of this manifest")
        image = FirstFrame(sha256=sha256, uri=images[sha256])
    request = Request(
        clip_id="", prompt=row["prompt"], negative_prompt=row["negative_prompt"],
        seed=row["seed"] if row.get("quality.seed") is None else row["quality.seed"],
        shape=VideoShape(frames=frames, height=size[0], width=size[1]), image=image,
        settings={setting.name: sampling[setting.name] for setting in FURTHER if setting.name in sampling},
        **{setting.field: sampling[setting.name] for setting in SAMPLING if setting.field}, **shared)
    return replace(request, clip_id=clip_id_for(**hashed(request)))

