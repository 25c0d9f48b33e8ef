"""Gaussian diffusion in pure functions: schedules, process, losses, samplers, tasks."""
