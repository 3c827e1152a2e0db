"""Which actor samples for which kind of model."""

from dailies.actors.denoiser import Denoiser
from dailies.actors.turbo_denoiser import StudentDenoiser, TurboWanDenoiser
from dailies.actors.wan_denoiser import WanDenoiser
from dailies.model.catalog import LinumCard, StudentCard, TurboCard, WanCard

DENOISERS = {LinumCard: Denoiser, StudentCard: StudentDenoiser, WanCard: WanDenoiser, TurboCard: TurboWanDenoiser}
