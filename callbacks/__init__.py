"""Lightning callbacks of genlight."""
