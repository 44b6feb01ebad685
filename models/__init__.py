"""The networks of Wan2.1 in plain torch, and what is needed to run them: usable in a notebook."""
