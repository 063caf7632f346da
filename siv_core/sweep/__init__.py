"""Many runs of one recipe: trials read, run a few at a time, averaged and drawn."""
