"""The configuration: a TOML file, the environment and flags become one `settings.Settings`, or a `ConfigError`."""

from canal_trio.config.load import VARIABLES, Flags, load, load_keys, load_ledger, read_file, strange_variables

__all__ = ["VARIABLES", "Flags", "load", "load_keys", "load_ledger", "read_file", "strange_variables"]
