"""Every key of the configuration: `python -m texforce_ray.config_help [--markdown]`."""

from __future__ import annotations

import sys

from texforce_ray.config.help import main

if __name__ == "__main__":
    sys.exit(main())
