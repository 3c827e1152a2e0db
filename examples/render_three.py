"""Three clips from a program, without the command line and without Ray:  python examples/render_three.py out3/

The run folder is as the command makes one: `dailies status out3/` reads it, and the same program continues it. Each
clip takes some seconds on a CPU.
"""

import sys

import dailies

PROMPTS = ["a red circle moves left on a gray background", "a blue square moves up on a white background",
           "a green triangle moves right on a black background"]


class Announce:
    """A stage of one's own: a list of values in, a list as long out. Here it only says what passes."""

    def __call__(self, latents: list) -> list:
        for latent in latents:
            print(f"sampled: {latent.request.prompt}")
        return latents


def main(out: str) -> int:
    card = dailies.CATALOG["demo"]
    weights = dailies.locate_weights(None, card)
    store = dailies.open_store(out)
    run = dailies.prepare(dailies.Manifest.read(prompts=PROMPTS), store, card, weights=weights,
                          defaults=dailies.Defaults(steps=4, frames=9))
    print(f"{run.plan.num_clips} clips with {card.name} in {run.plan.precision}")

    encode, sample, publish = dailies.text_to_video(
        card, str(weights), store, card.runtime("cpu", run.plan.precision, run.plan.attention))
    announce = dailies.Stage(name="announce", steps=(dailies.Step(actor=Announce),))
    for outcome in run.render([encode, sample, announce, publish]):         # only what is not done yet
        took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in outcome.seconds.items())
        print(outcome.value.uri if isinstance(outcome.value, dailies.Clip) else outcome.value.error, f"({took})")

    ledger = dailies.read_ledger(store, ["id", "status", "path", "prompt"])
    for row in ledger.to_pylist():
        print(row["status"], row["path"], row["prompt"])
    return 0 if {*ledger["status"].to_pylist()} == {"done"} else 3


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "out3/"))
    except dailies.DailiesError as error:               # what a person can put right
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
