"""Published implementations, bound as candidates. Their matchers and loss classes run unmodified."""
