"""What all tests share: the profiles of hypothesis. Strategies are in strategies.py, importable because this
file is here.

A run of the tests draws the same examples each time. `--hypothesis-profile=long` draws others, and more of
them, each time; with `--hypothesis-seed=N` the same ones again.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "qn", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "long", settings.get_profile("qn"), max_examples=200, derandomize=False, print_blob=True
)
settings.load_profile("qn")
