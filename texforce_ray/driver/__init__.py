"""The driver: one Ray job that coordinates rollouts, rewards and learners. Read `loop.py` first.

It moves references between actors; the only tensors it holds are the policy and the learner's
state. It is the only writer of the run directory. May import everything but commands and
experiments.
"""
