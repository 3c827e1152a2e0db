"""The words that the demo models were taught, of either family: what a plan warns of is every other."""

DEMO_WORDS = frozenset("""
    a and at background big black blue bottom box brown circle cross cyan disc down downwards drifts fast front glides
    goes gray green grey high huge image in is it large left leftwards little moves of on over pace photo picture
    plus purple quickly rapidly red right rightwards sign slides slow slowly small speed square still that the tiny to
    top travels triangle turquoise unhurriedly up upwards video violet wall white yellow""".split())
