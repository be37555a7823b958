"""Runs the actors for the driver: starts them, gives them work, retries, stops them.

May import actors and everything below; nothing of the driver. Loads torch only in
the tasks that measure batch sizes (`sizing.py`).
"""
