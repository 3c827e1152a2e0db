"""What a row of a manifest can say: every column of ours, written once.

The manifest's checks, the defaults of a command line and of TOML, the plan, a request, the ledger, a clip's name and
what its file says of itself are loops over SETTINGS. To add a setting: an entry here, its value in the cards that take
it (ModelCard.settings), and the model's code, which reads request.settings[name].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dailies.model.card import ModelCard

Scalar = str | int | float | bool

MAX_PROMPT_BYTES = 8192
MAX_ID_BYTES = 256
MAX_SAMPLES = 10_000

# an id with a match is refused: characters that would break a log line, and what could climb out of a folder
UNSAFE_ID = r"[\p{Cc}\p{Zl}\p{Zp}\\]|^$|^/|^\p{Zs}|\p{Zs}$|(^|/)\.\.?(/|$)"

# text in which nothing is to be seen: blanks, marks of format and direction, fillers; to an encoder it is nothing
NOTHING_SEEN = (r"^[\s\p{Z}\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{M}\x{115F}\x{1160}\x{2065}\x{2800}\x{3164}\x{FFA0}"
                r"\x{FFF0}-\x{FFF8}\x{FFFC}\x{1D159}\x{E0000}-\x{E0FFF}]*$")

@dataclass(frozen=True, kw_only=True)
class Setting:
    """A column of a manifest, and what becomes of its values."""

    name: str                           # of the column, here and in the ledger
    type: type[Scalar]
    allowed: str                        # in words, for who gave something else
    low: float = 0                      # numbers: both ends allowed
    high: float = 0
    max_bytes: int = 0                  # text, in UTF-8
    refuse: str | None = None           # text: a pattern (RE2) that must not occur
    must: str | None = None             # text: a pattern (RE2) that must occur
    choices: tuple[str, ...] = ()       # text: nothing else, where there are any
    other_words: str = ""               # for it, in other programs

    by_name: bool = False               # the plan knows it; others decide how a clip is sampled, and share a batch
    field: str = ""                     # of Request; of those without one, and not known by name, `settings` has it
    of_card: str = ""                   # field of ModelCard: what a row gets that does not say; else its `settings`
    least_of_card: str = ""             # field of ModelCard: the smallest value that the model takes
    most_of_card: str = ""              # field of ModelCard: the largest
    neutral: Scalar | None = None       # what clips had before there was this setting: with it they keep their names
    same_as: str = ""                   # a setting of which this is another name, with models that have both
    absent: Scalar | None = None        # what is said of a model without the setting, and so may be asked of it
    lacking: str = "has no such setting"    # of such a model, to who asks for more
    phrase: str = ""                    # "{} steps": how a clip's settings are told

    flag: str = ""                      # of the command line, and key of TOML, where it is not the name
    metavar: str = ""
    help: str = ""

    @property
    def option(self) -> str:
        """As a command line has it, with underscores; "" for what only a row can say."""
        return self.flag or ("" if self.by_name else self.name)

    def told(self, value: Scalar) -> str:
        shown = f"{value:g}" if self.type is float else str(value)
        return (self.phrase or f"{self.name} {{}}").format(shown)

    def own_value(self, card: "ModelCard") -> Scalar | None:
        """What a row gets from this model that does not say; None where the model has no such setting."""
        return getattr(card, self.of_card) if self.of_card else card.settings.get(self.name)

    def check(self, value: Scalar, card: "ModelCard") -> None:
        """Raises ValueError, saying what is allowed, for a value that this model does not take."""
        if self.own_value(card) is None:
            if self.absent is not None and value == self.absent:
                return
            also = "" if self.absent is None else f" or {str(self.absent).lower()}"
            raise ValueError(f"{self.name} must be nothing{also}: {card.name} {self.lacking}; got {value}")
        if self.least_of_card and value < (least := getattr(card, self.least_of_card)):
            raise ValueError(f"{self.name} must be at least {least:g} for {card.name}; got {value:g}")
        if self.most_of_card and value > (most := getattr(card, self.most_of_card)):
            raise ValueError(f"{self.name} must be at most {most:g} for {card.name}; got {value:g}")


SETTINGS: tuple[Setting, ...] = (
    Setting(name="id", type=str, by_name=True, max_bytes=MAX_ID_BYTES, refuse=UNSAFE_ID,
            allowed=f"a name of 1 to {MAX_ID_BYTES} bytes without control characters, outer blanks, backslashes, "
                    "a slash in front, or '.' or '..' between slashes"),
    Setting(name="prompt", type=str, by_name=True, field="prompt", max_bytes=MAX_PROMPT_BYTES, refuse=NOTHING_SEEN,
            allowed=f"text of 1 to {MAX_PROMPT_BYTES} bytes in UTF-8, not blank",
            other_words="text caption prompts captions prompt_en video_prompt text_prompt positive_prompt "
                        "video_caption"),
    Setting(name="negative_prompt", type=str, by_name=True, field="negative_prompt", of_card="negative_prompt",
            max_bytes=MAX_PROMPT_BYTES, allowed=f"text of at most {MAX_PROMPT_BYTES} bytes in UTF-8",
            other_words="negative neg neg_prompt n_prompt uncond_prompt negative_text negative_caption "
                        "sample_neg_prompt"),
    Setting(name="seed", type=int, by_name=True, field="seed", low=0, high=2**63 - 1,
            allowed="a whole number from 0 to 2**63 - 1",
            other_words="base_seed random_seed rng_seed noise_seed manual_seed sample_seed"),
    Setting(name="samples", type=int, by_name=True, low=1, high=MAX_SAMPLES,
            allowed=f"a whole number from 1 to {MAX_SAMPLES}",
            other_words="num_samples n_samples num_videos num_videos_per_prompt num_images_per_prompt "
                        "samples_per_prompt"),
    Setting(name="keep", type=int, by_name=True, low=1, high=MAX_SAMPLES,
            allowed=f"a whole number from 1 to {MAX_SAMPLES}"),
    Setting(name="keep_by", type=str, by_name=True, max_bytes=128, must=r"^-?quality(\.[a-z0-9_]+)+$",
            allowed="a column of the ledger such as quality.motion, or -quality.flicker where less is better"),
    Setting(name="resolution", type=str, by_name=True, of_card="resolution", max_bytes=32, refuse=r"\x00",
            allowed="a name such as 360p, or WIDTHxHEIGHT", flag="resolution", metavar="NAME|WIDTHxHEIGHT",
            other_words="size video_size image_size sample_size frame_size"),
    Setting(name="duration_s", type=float, by_name=True, of_card="duration_s", low=1e-3, high=86_400,
            allowed="a number of seconds above 0", flag="duration", metavar="SECONDS",
            other_words="duration seconds secs duration_sec duration_seconds video_duration length_s length_seconds"),
    Setting(name="frames", type=int, by_name=True, low=1, high=2**31 - 1, allowed="a whole number from 1",
            other_words="num_frames frame_num n_frames nb_frames frame_count video_length total_frames "
                        "number_of_frames video_frames"),
    Setting(name="steps", type=int, field="num_steps", of_card="num_steps", least_of_card="min_steps",
            most_of_card="max_steps", low=1, high=1000,
            allowed="a whole number from 1 to 1000", phrase="{} steps", metavar="N",
            other_words="num_inference_steps inference_steps num_steps n_steps sample_steps sampling_steps "
                        "num_sampling_steps denoising_steps ddim_steps"),
    Setting(name="guidance", type=float, field="guidance", of_card="guidance", most_of_card="max_guidance",
            low=0, high=1000, allowed="a number from 0 to 1000", metavar="X",
            other_words="guidance_scale cfg cfg_scale guide_scale sample_guide_scale classifier_free_guidance "
                        "true_cfg_scale unconditional_guidance_scale video_cfg_guidance_scale"),
    Setting(name="video_guidance", type=float, low=0, high=1000, neutral=1.0, same_as="guidance", metavar="X",
            most_of_card="max_guidance", allowed="a number from 0 to 1000",
            help="of models with sound: the same as --guidance, which is of their pictures",
            other_words="video_guidance_scale video_cfg video_cfg_scale"),
    Setting(name="audio_guidance", type=float, low=0, high=1000, neutral=1.0, metavar="X", most_of_card="max_guidance",
            allowed="a number from 0 to 1000", help="of models with sound: how closely it follows the prompt",
            other_words="audio_guidance_scale audio_cfg audio_cfg_scale audio_cfg_guidance_scale"),
    Setting(name="modality_guidance", type=float, low=0, high=1000, neutral=1.0, metavar="X",
            allowed="a number from 0 to 1000",
            help="of models with sound: how closely pictures and sound follow each other; 1: no further",
            other_words="modality_scale video_modality_guidance_scale a2v_guidance_scale"),
    Setting(name="stg", type=float, low=0, high=1000, neutral=0.0, metavar="X", allowed="a number from 0 to 1000",
            help="of LTX-2: guidance away from what a block without attention makes; 0: none",
            other_words="stg_scale video_stg_guidance_scale spatio_temporal_guidance"),
    Setting(name="audio", type=bool, neutral=True, absent=False, lacking="makes no sound", allowed="true or false",
            help="of models with sound: whether it is made; a model of both makes other pictures without it",
            phrase="audio {}", other_words="with_audio generate_audio enable_audio sound with_sound has_audio"),
    Setting(name="image", type=str, by_name=True, max_bytes=1024, refuse=r"\x00",
            allowed="text of at most 1024 bytes",
            other_words="image_path first_frame first_frame_path input_image init_image start_image start_frame img "
                        "img_path reference_image ref_image conditioning_image"),
    Setting(name="on_reject", type=str, by_name=True, max_bytes=32, choices=("fail", "reseed"),
            allowed="fail or reseed"),
    Setting(name="priority", type=int, by_name=True, low=-2**31, high=2**31 - 1,
            allowed="a whole number from -2**31 to 2**31 - 1", other_words="prio"),
)
LENGTHS = ("duration_s", "frames")      # one says what the other does

SIZE = ("width", "height", "frames")     # of a clip, as the ledger names it

BY_NAME = {setting.name: setting for setting in SETTINGS}
SAMPLING = tuple(setting for setting in SETTINGS if not setting.by_name)     # how a clip is sampled
FURTHER = tuple(setting for setting in SAMPLING if not setting.field)        # of some models: Request.settings has them
ROW_OPTIONS = tuple(setting for setting in SETTINGS if setting.option)
# what a run can say for rows that do not; the negative prompt, which is long, at the end
DEFAULTED = (*(BY_NAME[name] for name in ("resolution", *LENGTHS)), *SAMPLING, BY_NAME["negative_prompt"])


ALIKE_SETTINGS = tuple((setting, BY_NAME[setting.same_as]) for setting in SAMPLING if setting.same_as)


def sampling_of(values: Mapping[str, Scalar | None]) -> list[str]:
    """How a clip is sampled, in words, without what is at its neutral value.  values: by the settings' names."""
    said = ((setting, values.get(setting.name)) for setting in SAMPLING)
    return [setting.told(value) for setting, value in said if value is not None and value != setting.neutral]
