"""dailies: render tonight, look tomorrow. Large text-to-video batches, from a manifest of prompts to clips in a store."""

from pathlib import Path

HOME = Path(__file__).resolve().parent.parent           # the checkout, or the site-packages, that dailies is imported from
if (HOME / "kernels" / "__init__.py").is_file() and not (HOME / "dailies" / "kernels").is_dir():
    __path__.append(str(HOME))                          # a checkout: dailies.kernels is the folder kernels beside this one
