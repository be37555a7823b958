"""Stand-ins for the actors, for tests, benchmarks and trying out a cluster without models.

May import the crew and everything below it; neither observability nor the driver.
"""
