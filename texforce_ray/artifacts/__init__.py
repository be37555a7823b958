"""Models and adapters as files and plain data: where they are, whether they are supported.

Checked before anything is loaded, so no torch. May import errors, files, paths and the config.
"""
