"""Commands, thin: each reads its options and calls the rooms below."""
