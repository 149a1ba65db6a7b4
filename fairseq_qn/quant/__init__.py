"""The mathematics: pure functions on tensors. Needs torch only."""
