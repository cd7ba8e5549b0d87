"""Who is admitted, and what runs when."""
