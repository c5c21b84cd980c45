from pathlib import Path

import mflux_vae_train

TINY = Path(mflux_vae_train.__file__).parent / "pipelines" / "tiny" / "weights"
