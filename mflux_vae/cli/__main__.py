"""``python -m mflux_vae.cli``."""

import sys

from mflux_vae.cli import main

sys.exit(main())
