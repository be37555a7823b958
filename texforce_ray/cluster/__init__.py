"""Ray itself: joining a cluster, what a run needs from it, whether that fits, autoscaling.

The lowest folder that may import Ray. May import everything below it, but no
torch; knows nothing of the actors.
"""
