"""Other programs' protocols, spoken on their own routes with their own error bodies."""
