"""Fast paths, all optional. Plain torch code elsewhere defines each; results agree to rounding."""
