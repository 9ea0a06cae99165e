"""What a run is asked to do: the configuration, its presets and the catalogue of tasks. Never torch."""
