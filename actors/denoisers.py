"""Which actor samples for which kind of model."""

from actors.denoiser import Denoiser
from actors.turbo_denoiser import StudentDenoiser, TurboWanDenoiser
from actors.wan_denoiser import WanDenoiser
from model.catalog import LinumCard, StudentCard, TurboCard, WanCard

DENOISERS = {LinumCard: Denoiser, StudentCard: StudentDenoiser, WanCard: WanDenoiser, TurboCard: TurboWanDenoiser}
