"""The engine of ComfyUI-DMD: plain torch, knows nothing of ComfyUI.

A model is `denoiser(x, sigma, cond) -> x0` (denoiser.py) on a noise schedule (schedule.py). Teacher, student, critic
and sliders are LoRA sets on one frozen network (adapters.py). An objective (objectives/) names who learns and from
what; `train` (train.py) is a generator that drives any of them; samplers.py turns noise into images.
"""
