"""From raw downloads to what `vixml prepare` reads. Each command is run as `python -m data_prep.images`."""
