"""Every file of a run: metrics, samples, checkpoints, images, the report, the model card.

No torch, no Ray. Files are written whole or not at all (`texforce_ray.files`).
May import artifacts, the config and the modules below them.
"""
