"""What runs in other processes: thin shells around plain classes, and the data they exchange.

`roles.py` defines what an actor of each role must have. Heavy imports wait until an actor is
created. May use both torch and Ray, and import everything up to `cluster`.
"""
