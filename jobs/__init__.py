"""What should be rendered, and how far it is. Never loads torch."""
