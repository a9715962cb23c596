"""Files: atomic writes, bounded JSON and TOML, tensors with a header, locks."""
