"""One batch on one replica, and the methods that need more passes."""
