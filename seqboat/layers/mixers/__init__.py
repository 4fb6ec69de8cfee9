"""One mixer per file, found by its name: `config.model.mixer.name`. Each file has a `Config`, a `MixerConfig`."""
