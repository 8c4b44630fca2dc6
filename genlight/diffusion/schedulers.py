"""The diffusers scheduler that belongs to a noise schedule and a prediction type, and back.

A diffusers scheduler repeats the noise schedule in its own words; if the two disagree, sampling goes wrong silently.
So schedulers are only built here, from the schedule. In a diffusers pipeline folder the scheduler's config is the one
record of what the network was trained on; `read_scheduler` turns it back. The scheduler of searched solver schedules
states its noise schedule and prediction type itself, and is only held against those that it is to sample.

The network is called the same way under all of them: network(scheduler.scale_model_input(x, t), t) for each t of
`scheduler.timesteps`, which are values of `NoiseSchedule.model_timestep`. Flow matching has no `scale_model_input`.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction

# our own class; a folder that has it carries a copy of its code, which is never run here
SEARCHED = "SolverScheduleScheduler"

_ALL_VP = ("epsilon", "v_prediction", "sample")
_NO_SAMPLE = ("epsilon", "v_prediction")
_ALL_FLOW = ("flow", "epsilon", "sample")
_EDM = ("edm", "v_prediction")

# family -> scheduler class -> prediction types that the class handles for that family. Left out, in diffusers 0.42:
# DEIS and SASolver on flow matching, which never remove the noise of their last step (its sigma is repeated), and
# KDPM2Ancestral, which asks the network for the timestep nan under the cosine schedule.
_SUPPORTED: dict[str, dict[str, tuple[str, ...]]] = {
    "vp": {
        "DDIMScheduler": _ALL_VP,
        "DDIMParallelScheduler": _ALL_VP,
        "DDPMScheduler": _ALL_VP,
        "DDPMParallelScheduler": _ALL_VP,
        "DEISMultistepScheduler": _ALL_VP,
        "DPMSolverMultistepScheduler": _ALL_VP,
        "DPMSolverSinglestepScheduler": _ALL_VP,
        "EulerAncestralDiscreteScheduler": _NO_SAMPLE,
        "EulerDiscreteScheduler": _NO_SAMPLE,
        "HeunDiscreteScheduler": _NO_SAMPLE,
        "KDPM2DiscreteScheduler": _NO_SAMPLE,
        "LCMScheduler": _ALL_VP,
        "LMSDiscreteScheduler": _NO_SAMPLE,
        "PNDMScheduler": _NO_SAMPLE,
        "SASolverScheduler": _ALL_VP,
        "TCDScheduler": _ALL_VP,
        "UniPCMultistepScheduler": _ALL_VP,
    },
    "edm": {
        "EDMDPMSolverMultistepScheduler": _EDM,
        "EDMEulerScheduler": _EDM,
        "EulerDiscreteScheduler": ("v_prediction",),
    },
    "flow": {
        "DPMSolverMultistepScheduler": _ALL_FLOW,
        "DPMSolverSinglestepScheduler": _ALL_FLOW,
        "FlowMatchEulerDiscreteScheduler": ("flow",),
        "FlowMatchHeunDiscreteScheduler": ("flow",),
        "UniPCMultistepScheduler": _ALL_FLOW,
    },
}
# the classes that know rescale_betas_zero_snr
_ZERO_TERMINAL_SNR = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
_FAMILY_NAMES = {"vp": "variance-preserving", "edm": "EDM", "flow": "flow-matching"}
# options that would change the noise schedule or the meaning of the network's output behind the schedule's back
_RESERVED = ("trained_betas", "prediction_type", "use_flow_sigmas", "flow_shift", "shift", "timestep_type")
# options by which times are shifted by the size of the image; pipelines read the numbers from the scheduler's config
_DYNAMIC = "use_dynamic_shifting"
_SHIFTING = (
    _DYNAMIC,
    "time_shift_type",
    "shift_terminal",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)


def build_scheduler(scheduler: str | type, schedule: NoiseSchedule, prediction_type: str, /, **options: Any) -> Any:
    """A diffusers scheduler that samples what `schedule` and `prediction_type` train.

    Args:
        scheduler: a class of diffusers, its name ("DDIMScheduler") or dotted path.
        options: further constructor arguments, such as `timestep_spacing`. Defaults are those of diffusers, except that
            a schedule of zero terminal SNR gets timestep_spacing "trailing": any other may skip its noisiest step.
            "SolverScheduleScheduler" takes its whole config, without the keys that begin with "_".

    Raises:
        ValueError: the three do not belong together (`check_scheduler`), an option that the class does not have, or one
            that contradicts the schedule.
    """
    name = _name(scheduler)
    if name == SEARCHED:
        return _build_searched(schedule, prediction_type, options)
    check_scheduler(scheduler, schedule, prediction_type)
    import diffusers

    cls = getattr(diffusers, name)
    config = _config(name, schedule, prediction_type)
    known = _check_known(cls, options)
    for key, value in options.items():
        if (key in config or key in _RESERVED) and config.get(key) != value:
            raise ValueError(
                f"scheduler.{key} = {value!r} contradicts noise_schedule = {schedule!r} with "
                f"prediction_type = {prediction_type!r}, which decide it; leave it out"
            )
    if getattr(schedule, "rescale_zero_terminal_snr", False) and "timestep_spacing" in known:
        options.setdefault("timestep_spacing", "trailing")
    return cls(**{**options, **config})


def build_like(own: Any, scheduler: str | type, /, **options: Any) -> Any:
    """As `build_scheduler`, for the schedule and prediction type of a scheduler `own`, and its dynamic shifting.

    Raises:
        ValueError: as there and in `read_scheduler`, and for a class without dynamic shifting where `own` has it.
    """
    schedule, prediction_type = read_scheduler(own)
    shifting = {key: own.config[key] for key in _SHIFTING if key in own.config} if own.config.get(_DYNAMIC) else {}
    name = _name(scheduler)
    if not shifting or name == SEARCHED:  # searched times are those that are sampled
        return build_scheduler(scheduler, schedule, prediction_type, **options)
    check_scheduler(scheduler, schedule, prediction_type)
    known = _arguments(name)
    if _DYNAMIC not in known:
        shifted = [other for other in _SUPPORTED[schedule.family] if _DYNAMIC in _arguments(other)]
        raise ValueError(
            f"scheduler = {name!r} cannot shift times by the size of the image, as {type(own).__name__} does here; "
            f"use {_choice(shifted)}"
        )
    given = {key: value for key, value in shifting.items() if key in known}
    made = build_scheduler(scheduler, schedule, prediction_type, **{**given, **options})
    made.register_to_config(**{key: value for key, value in shifting.items() if key not in known})
    return made


def check_scheduler(scheduler: str | type, schedule: NoiseSchedule, prediction_type: str) -> None:
    """Raise ValueError, in one sentence that names what would be right, if the three do not belong together."""
    name, family = _name(scheduler), schedule.family
    kind = _FAMILY_NAMES[family]
    supported = _SUPPORTED[family]
    if not any(name in classes for classes in _SUPPORTED.values()):
        raise ValueError(f"scheduler = {name!r} is not known here; for {kind} schedules use {_choice(supported)}")
    if name not in supported:
        others = [_FAMILY_NAMES[other] for other, classes in _SUPPORTED.items() if name in classes]
        raise ValueError(
            f"scheduler = {name!r} samples {' and '.join(others)} schedules, not {kind} ones such as {schedule!r}; "
            f"use {_choice(supported)}"
        )
    if prediction_type not in supported[name]:
        others = [other for other, types in supported.items() if prediction_type in types]
        hint = f", or for {prediction_type!r} scheduler {_choice(others)}" if others else ""
        raise ValueError(
            f"scheduler = {name!r} on a {kind} schedule cannot take prediction_type = {prediction_type!r}; "
            f"use {_choice(supported[name])}{hint}"
        )
    if isinstance(schedule, EDMSchedule) and prediction_type == "v_prediction" and schedule.sigma_data != 1:
        raise ValueError(
            f"prediction_type = 'v_prediction' on an EDM schedule needs noise_schedule.sigma_data = 1, "
            f"not {schedule.sigma_data:g}; use prediction_type edm"
        )
    if isinstance(schedule, VPSchedule) and schedule.rescale_zero_terminal_snr:
        if prediction_type == "epsilon":
            raise ValueError(
                "prediction_type = 'epsilon' says nothing of the image where the signal is zero, as at the end of a "
                "schedule with rescale_zero_terminal_snr; use v_prediction or sample"
            )
        if name not in _ZERO_TERMINAL_SNR:
            raise ValueError(
                f"scheduler = {name!r} cannot sample a schedule with rescale_zero_terminal_snr; "
                f"use {_choice(_ZERO_TERMINAL_SNR)}"
            )


def read_scheduler(scheduler: Any) -> tuple[NoiseSchedule, str]:
    """The noise schedule and prediction type that a diffusers scheduler, or its config, stands for.

    Args:
        scheduler: a scheduler instance, or its config as a mapping with "_class_name".

    Raises ValueError for a class or an option that no schedule here describes.
    """
    config: Mapping[str, Any] = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    name = str(config.get("_class_name", type(scheduler).__name__))
    if name == SEARCHED:
        return _noise_schedule_of(_searched(config).config)
    families = [family for family, classes in _SUPPORTED.items() if name in classes]
    if not families:
        known = sorted({SEARCHED, *(name for classes in _SUPPORTED.values() for name in classes)})
        raise ValueError(f"scheduler = {name!r} is not known here; known are {_choice(known)}")
    if config.get("trained_betas") is not None:
        raise ValueError(f"scheduler.trained_betas: a {name} with its own table of betas is not supported")
    if config.get("invert_sigmas"):
        raise ValueError(f"scheduler.invert_sigmas: a {name} whose times rise from noise to images is not supported")

    prediction_type = str(config.get("prediction_type", "epsilon"))
    if "vp" not in families and "edm" in families:
        schedule: NoiseSchedule = EDMSchedule(config["sigma_min"], config["sigma_max"], config["sigma_data"])
        prediction_type = "edm" if prediction_type == "epsilon" else prediction_type
    elif config.get("timestep_type") == "continuous":
        schedule = EDMSchedule(config["sigma_min"], config["sigma_max"], sigma_data=1.0)
    elif config.get("use_flow_sigmas"):
        schedule = FlowSchedule(config["num_train_timesteps"], config["flow_shift"])
        prediction_type = "flow" if prediction_type == "flow_prediction" else prediction_type
    elif "vp" not in families:
        schedule, prediction_type = FlowSchedule(config["num_train_timesteps"], config["shift"]), "flow"
    else:
        keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
        zero_snr = bool(config.get("rescale_betas_zero_snr", False))
        schedule = VPSchedule(**{key: config[key] for key in keys}, rescale_zero_terminal_snr=zero_snr)
    check_scheduler(name, schedule, prediction_type)
    return schedule, prediction_type


def _config(name: str, schedule: NoiseSchedule, prediction_type: str) -> dict[str, Any]:
    """Schedule and prediction type in the words of the class `name`."""
    config = {**schedule.scheduler_config(), "prediction_type": prediction_type}
    if schedule.family == "vp" and name not in _ZERO_TERMINAL_SNR:
        del config["rescale_betas_zero_snr"]
    elif schedule.family == "edm" and name == "EulerDiscreteScheduler":
        # its continuous timesteps with v_prediction are EDM preconditioning of sigma_data 1; karras is EDM's grid
        del config["sigma_data"]
        config.update(timestep_type="continuous", use_karras_sigmas=True)
    elif schedule.family == "edm":
        config["prediction_type"] = {"edm": "epsilon"}.get(prediction_type, prediction_type)
    elif schedule.family == "flow" and name.startswith("FlowMatch"):
        del config["prediction_type"]
    elif schedule.family == "flow":
        config.update(use_flow_sigmas=True, flow_shift=config.pop("shift"))
        config["prediction_type"] = {"flow": "flow_prediction"}.get(prediction_type, prediction_type)
    return config


def _build_searched(schedule: NoiseSchedule, prediction_type: str, config: Mapping[str, Any]) -> Any:
    scheduler = _searched(config)
    found, found_type = _noise_schedule_of(scheduler.config)
    if (found.fingerprint(), found_type) != (schedule.fingerprint(), prediction_type):
        raise ValueError(
            f"scheduler = {SEARCHED!r} holds schedules searched for noise_schedule = {found!r} with prediction_type = "
            f"{found_type!r}, not for {schedule!r} with {prediction_type!r}"
        )
    return scheduler


def _searched(config: Mapping[str, Any]) -> Any:
    """The scheduler of solver schedules that a config describes; ValueError if the config is not whole."""
    from genlight.diffusion.solver_schedule import SolverScheduleScheduler

    options = {key: value for key, value in config.items() if not key.startswith("_")}
    _check_known(SolverScheduleScheduler, options)
    try:
        return SolverScheduleScheduler(**options)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"scheduler: this config of a {SEARCHED} is damaged ({error!r})") from error


def _noise_schedule_of(config: Any) -> tuple[NoiseSchedule, str]:
    """Noise schedule and prediction type of a checked config of solver schedules."""
    from genlight.diffusion.solver_schedule import definition

    families: dict[str, type[NoiseSchedule]] = {"vp": VPSchedule, "edm": EDMSchedule, "flow": FlowSchedule}
    schedule = families[config.family](**definition(config))
    prediction_type = {"flow_prediction": "flow"}.get(config.prediction_type, config.prediction_type)
    return schedule, Prediction(prediction_type, schedule).prediction_type


def _check_known(cls: Any, options: Mapping[str, Any]) -> list[str]:
    """The arguments that a scheduler class has; ValueError for an option that is none of them."""
    known = [parameter for parameter in inspect.signature(cls.__init__).parameters if parameter != "self"]
    for key in options:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; it has {', '.join(known)}"
            raise ValueError(f"scheduler.{key}: {cls.__name__} has no such option{hint}")
    return known


def _arguments(name: str) -> list[str]:
    import diffusers

    return _check_known(getattr(diffusers, name), {})


def _name(scheduler: str | type) -> str:
    return scheduler.rsplit(".", 1)[-1] if isinstance(scheduler, str) else scheduler.__name__


def _choice(names: Any) -> str:
    names = sorted(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
