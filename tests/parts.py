"""Parts of models, loaded on a CPU unless it is said otherwise: how is what ModelCard.runtime takes."""

from dailies.model import refitted
from dailies.model.family import family_of


def text_encoder_of(card, weights, *how, **also):
    return family_of(card).load_encoder(card, weights, card.runtime(*how, **also))


def image_encoder_of(card, weights, *how, **also):
    return family_of(card).load_image_encoder(card, weights, card.runtime(*how, **also))


def vae_of(card, weights, *how, **also):
    return family_of(card).load_vae(card, weights, card.runtime(*how, **also))


def dit_of(card, weights, *how, expert=0, **also):
    which = {"expert": expert} if expert else {}
    return family_of(card).load_dit(card, weights, card.runtime(*how, **also), **which)


def dit_from(card, path, *how, **also):
    family = family_of(card)
    return refitted.dit_from(card, lambda: new_dit(card), family.tables, path, card.runtime(*how, **also))


def new_dit(card):
    return family_of(card).new_dit(card)
