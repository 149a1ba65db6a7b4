"""Fast paths. Each is defined by plain torch code elsewhere, is optional, and gives the same results to
rounding.
"""
