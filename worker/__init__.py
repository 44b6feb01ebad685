"""One process per device: from a claimed job to a video in the bucket."""
