"""Many runs: what they are, what they cost, how they stand, and how they are started."""
