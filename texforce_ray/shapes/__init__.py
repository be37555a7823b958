"""The embedded world: scenes and their captions, the detector, pre-training, the weights.

Scenes, captions and detector need no torch: rewards and prompts use them. May import artifacts,
the config and the modules below them.
"""
