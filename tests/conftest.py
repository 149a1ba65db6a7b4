"""What all tests share: one profile of hypothesis. Strategies are in strategies.py, importable because this file is here."""

from hypothesis import HealthCheck, settings

settings.register_profile("qn", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qn")
