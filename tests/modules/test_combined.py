"""The sampler of combined weights, as the file beside them states it."""

from diffusers import DPMSolverMultistepScheduler

from genlight.diffusion.consistency import ConsistencyTraining
from genlight.diffusion.noise_schedules import EDMSchedule
from genlight.io import atomic_write_json, read_json
from genlight.modules.combined import COEFFICIENTS, other_sampler, sampler_of
from genlight.modules.consistency import ConsistencyModule


def test_another_number_of_steps_is_told(tiny, tmp_path):
    def module(steps):
        return ConsistencyModule(tiny.unet(), EDMSchedule(), ConsistencyTraining(), num_inference_steps=steps)

    assert other_sampler(tmp_path, module(1)) is None
    atomic_write_json(tmp_path / COEFFICIENTS, {"sampler": sampler_of(module(1))})
    assert other_sampler(tmp_path, module(1)) is None
    assert "num_inference_steps = 1 of the sampler, here it is 2" in other_sampler(tmp_path, module(2))
    assert "class = CMStochasticIterativeScheduler" in other_sampler(tmp_path, tiny.module("edm"))
    assert sampler_of(module(1))["config"]["sigma_max"] == 80.0 and sampler_of(object()) is None


def test_another_option_of_the_sampler_is_told(tiny, tmp_path):
    module = ConsistencyModule(tiny.unet(), EDMSchedule(), ConsistencyTraining(), num_inference_steps=1)
    stated = sampler_of(module)
    stated["config"]["an_option_of_another_version"] = 1
    atomic_write_json(tmp_path / COEFFICIENTS, {"sampler": stated})
    assert other_sampler(tmp_path, module) is None
    stated["config"]["sigma_max"] = 5.0
    atomic_write_json(tmp_path / COEFFICIENTS, {"sampler": stated})
    assert "for sigma_max = 5.0 of the CMStochasticIterativeScheduler, here it is 80.0" in other_sampler(
        tmp_path, module
    )


def test_a_config_with_infinity_is_written_and_read_back(tiny, tmp_path):
    """Strict JSON has no number for it: lambda_min_clipped is -inf."""
    module = tiny.module("epsilon")
    module.build_scheduler = DPMSolverMultistepScheduler
    stated = sampler_of(module)
    assert stated["config"]["lambda_min_clipped"] == "-Infinity"
    atomic_write_json(tmp_path / COEFFICIENTS, {"sampler": stated})
    assert read_json(tmp_path / COEFFICIENTS)["sampler"] == stated
    assert other_sampler(tmp_path, module) is None
    module.num_inference_steps += 1
    assert "num_inference_steps" in other_sampler(tmp_path, module)


def test_a_file_of_that_name_that_says_nothing_is_passed_over(tiny, tmp_path):
    atomic_write_json(tmp_path / COEFFICIENTS, [1.0])
    assert other_sampler(tmp_path, tiny.module("edm")) is None
