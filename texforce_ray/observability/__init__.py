"""What a run shows while it runs: live status, Prometheus, progress, alarms, profiles.

Reads the crew and the records; decides nothing. May import both and everything below, but not the
driver.
"""
