"""The paper's experiments as one resumable command, its results as one page."""
