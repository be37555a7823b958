"""Denoising: the process as a Markov decision process, the policy at one step, the sampler.

No Ray; of diffusers, only its random noise. In the same layer as `model`, which it drives; may also
import everything below.
"""
