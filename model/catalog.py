"""The models by name. A further one is added to CATALOG by whoever brings it: a card, and the family that it names.

Importing this costs nothing heavy: cards are data, and torch comes in when a part is loaded (family.py).
"""

from dailies.model.card import ModelCard
from dailies.model.linum.card import DEMO, DEMO_SPARSE, DEMO_TURBO, LINUM_V2_360P, LINUM_V2_720P
from dailies.model.ltx2.card import (
    DEMO_AV,
    LTX2_19B,
    LTX2_19B_DISTILLED,
    LTX2_19B_DISTILLED_TWO_STAGE,
    LTX2_19B_TWO_STAGE,
    LTX23,
    LTX23_DISTILLED,
    LTX23_DISTILLED_TWO_STAGE,
    LTX23_TWO_STAGE,
)
from dailies.model.wan.card import (
    TURBO_WAN21_T2V_1_3B,
    TURBO_WAN21_T2V_14B_480P,
    TURBO_WAN21_T2V_14B_720P,
    TURBO_WAN22_I2V_A14B,
    WAN21_I2V_14B,
    WAN21_T2V_1_3B,
    WAN21_T2V_14B,
    WAN22_I2V_A14B,
    WAN22_T2V_A14B,
)

CATALOG: dict[str, ModelCard] = {card.name: card for card in (
    DEMO, DEMO_TURBO, DEMO_SPARSE, LINUM_V2_360P, LINUM_V2_720P, WAN21_T2V_1_3B, WAN21_T2V_14B, WAN21_I2V_14B,
    WAN22_T2V_A14B, WAN22_I2V_A14B, TURBO_WAN21_T2V_1_3B, TURBO_WAN21_T2V_14B_480P, TURBO_WAN21_T2V_14B_720P,
    TURBO_WAN22_I2V_A14B, LTX2_19B, LTX2_19B_DISTILLED, LTX2_19B_TWO_STAGE, LTX2_19B_DISTILLED_TWO_STAGE, LTX23,
    LTX23_DISTILLED, LTX23_TWO_STAGE, LTX23_DISTILLED_TWO_STAGE, DEMO_AV)}
