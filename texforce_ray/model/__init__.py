"""The frozen pipeline behind a few methods, the trained adapter on it, adapters as files.

torch, diffusers, transformers and PEFT; no Ray. Model families are rows in `artifacts.families`.
May import `diffusion`, in the same layer, and everything below.
"""
