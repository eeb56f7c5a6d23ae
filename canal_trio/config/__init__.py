"""The configuration: a TOML file, the environment and flags become one `settings.Settings`, or a `ConfigError`."""

from canal_trio.config.load import VARIABLES, Flags, load, strange_variables

__all__ = ["VARIABLES", "Flags", "load", "strange_variables"]
