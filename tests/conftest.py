"""What holds for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test judges how fast this machine is just now: neither of an example (200 ms by default), nor of making them.
settings.register_profile("canal-trio", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("canal-trio")
