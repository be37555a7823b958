"""Objectives and their maths: each objective is a `Learner`, advantages and PPO are pure functions.

No Ray. May import diffusion, model and everything below them.
"""
