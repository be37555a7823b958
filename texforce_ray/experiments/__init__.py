"""The paper's experiments as one resumable command, its results as one page.

The top layer: may import everything but commands, which it runs as processes of their own.
"""
