"""One batch on one replica, and the methods that go on from it."""
