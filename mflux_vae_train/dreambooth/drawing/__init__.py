"""``mflux-dreambooth draw``: images of the adapters of a run, or of an adapter file."""
